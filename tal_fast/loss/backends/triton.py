"""Backend of the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from tal_fast.loss.autograd import mark_overwritten, may_overwrite
from tal_fast.loss.backends.base import BatchStatistics, KernelBackend, LossInputs
from tal_fast.loss.reference import TALStats
from tal_fast.loss.ring import RingBuffer

# The kernels are imported where they are called: an installation without them still has the other backends.


class TritonBackend(KernelBackend):
    """Backend of fused kernels on GPUs; CPU tensors, for tests, need Triton's interpreter (TRITON_INTERPRET=1)."""

    name = "triton"

    def statistics_distance(
        self, features: Tensor, labels: Tensor, ring: RingBuffer, ignore_index: int, class_weight: Tensor | None = None
    ) -> BatchStatistics:
        from tal_fast import kernels

        ring.check()
        return BatchStatistics(
            *kernels.statistics_distance(
                features.detach(), labels, ring.mean, ring.std, ring.cursor, class_weight, ignore_index=ignore_index
            )
        )

    def complete_summary(self, inputs: LossInputs) -> Tensor:
        from tal_fast import kernels

        assert inputs.summary is not None
        kernels.batch_sums(
            inputs.logits.detach(), inputs.labels, inputs.distance, inputs.summary, inputs.tickets,
            confidence_threshold=inputs.options.confidence_threshold, ignore_index=inputs.options.ignore_index,
        )  # fmt: skip
        return inputs.summary

    def forward(self, inputs: LossInputs, need_grad: bool) -> tuple[Tensor, Tensor, TALStats]:
        from tal_fast import kernels

        o = inputs.options
        inplace = need_grad and may_overwrite(inputs.logits, o)
        loss, grad, stats, flags = kernels.loss_forward(
            inputs.logits.detach(), inputs.labels, inputs.distance, inputs.summary, inputs.tickets, inputs.class_weight,
            variant=o.variant, t_min=o.t_min, t_max=o.t_max, t_wrong=o.t_wrong,
            confidence_threshold=o.confidence_threshold, label_smoothing=o.label_smoothing,
            ignore_index=o.ignore_index, reduction=o.reduction, warmup=inputs.warmup, need_grad=need_grad,
            inplace=inplace,
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
