"""Backend of the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from tal_fast.loss.autograd import mark_overwritten, may_overwrite
from tal_fast.loss.backends.base import KernelBackend, LossInputs
from tal_fast.loss.reference import TALStats
from tal_fast.loss.ring import RingBuffer

# The kernels are imported where they are called: an installation without them still has the other backends.


class TritonBackend(KernelBackend):
    """Fused kernels on GPUs; on CPU tensors, for tests, in Triton's interpreter (TRITON_INTERPRET=1)."""

    name = "triton"

    def statistics_distance(
        self, features: Tensor, labels: Tensor, ring: RingBuffer, ignore_index: int, class_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        from tal_fast import kernels

        if class_weight is not None:
            raise NotImplementedError("class_weight is not in the Triton kernels yet; use backend='reference'")
        ring.check()
        *statistics, summary = kernels.statistics_distance(
            features.detach(), labels, ring.mean, ring.std, ring.cursor, ring.ticket, ignore_index=ignore_index
        )
        mean, std, distance = statistics
        return mean, std, distance, torch.cat([summary, summary[2:3]])

    def complete_summary(self, inputs: LossInputs) -> Tensor:
        from tal_fast import kernels

        assert inputs.summary is not None
        kernels.batch_sums(
            inputs.logits.detach(), inputs.labels, inputs.distance, inputs.summary[:6], inputs.ring.ticket,
            confidence_threshold=inputs.options.confidence_threshold, ignore_index=inputs.options.ignore_index,
        )  # fmt: skip
        return inputs.summary

    def forward(self, inputs: LossInputs, need_grad: bool) -> tuple[Tensor, Tensor, TALStats]:
        from tal_fast import kernels

        options = inputs.options
        if options.reduction != "mean":
            raise NotImplementedError(
                f"reduction={options.reduction!r} is not in the Triton kernels yet; use backend='reference'"
            )
        assert inputs.summary is not None
        inplace = need_grad and may_overwrite(inputs.logits, options)
        loss, grad, stats, flags = kernels.loss_forward(
            inputs.logits.detach(), inputs.labels, inputs.distance, inputs.summary[:6], inputs.ring.ticket,
            variant=options.variant, t_min=options.t_min, t_max=options.t_max, t_wrong=options.t_wrong,
            confidence_threshold=options.confidence_threshold, label_smoothing=options.label_smoothing,
            ignore_index=options.ignore_index, warmup=inputs.warmup, need_grad=need_grad, inplace=inplace,
        )  # fmt: skip
        if inplace:
            mark_overwritten(grad)
        return loss, grad, TALStats(inputs.distance, *stats.unbind(), *flags.unbind())

    def push(self, ring: RingBuffer, mean: Tensor, std: Tensor, accepted: Tensor | None) -> None:
        from tal_fast import kernels

        ring.check()
        kernels.push(ring.mean, ring.std, ring.cursor, mean, std, accepted)

    def nearest(self, ring: RingBuffer, mean: Tensor, std: Tensor) -> Tensor:
        from tal_fast import kernels

        ring.check()
        return kernels.nearest(ring.mean, ring.std, ring.cursor, mean, std)
