"""Backend of the C++ extension, for CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tal_fast.loss.autograd import mark_overwritten, may_overwrite, refuse_transforms
from tal_fast.loss.backends.base import BatchStatistics, KernelBackend, LossInputs
from tal_fast.loss.options import LossOptions
from tal_fast.loss.reference import TALStats
from tal_fast.loss.ring import RingBuffer


class CppBackend(KernelBackend):
    """Backend with the step in parts, for ``torch.compile``, which traces them, and for distributed runs."""

    name = "native"

    def push(self, ring: RingBuffer, mean: Tensor, std: Tensor, accepted: Tensor | None) -> None:
        torch.ops.tal_fast.push_(ring.mean, ring.std, ring.cursor, mean, std, accepted, ring.index)

    def nearest(self, ring: RingBuffer, mean: Tensor, std: Tensor) -> Tensor:
        return torch.ops.tal_fast.nearest(ring.mean, ring.std, ring.cursor, mean, std, ring.index)

    def statistics_distance(
        self, features: Tensor, labels: Tensor, ring: RingBuffer, ignore_index: int, class_weight: Tensor | None = None
    ) -> BatchStatistics:
        results = torch.ops.tal_fast.statistics_distance(
            features.detach(), labels, ring.mean, ring.std, ring.cursor, ignore_index, ring.index, class_weight
        )
        return BatchStatistics(*results)

    def complete_summary(self, inputs: LossInputs) -> Tensor:
        options = inputs.options
        return torch.ops.tal_fast.batch_sums(
            inputs.logits.detach(), inputs.labels, inputs.distance, inputs.summary,
            options.confidence_threshold, options.ignore_index,
        )  # fmt: skip

    def forward(self, inputs: LossInputs, need_grad: bool) -> tuple[Tensor, Tensor, TALStats]:
        logits = inputs.logits.detach()
        options = _loss_arguments(inputs.options, inputs.warmup, inputs.class_weight)
        arguments = (logits, inputs.labels, inputs.distance, inputs.summary, *options)
        if need_grad and may_overwrite(inputs.logits, inputs.options):
            loss, *stats = torch.ops.tal_fast.loss_inplace_(*arguments)
            grad = mark_overwritten(logits)
        else:
            loss, grad, *stats = torch.ops.tal_fast.loss_forward(*arguments, need_grad)
        return loss, grad, TALStats(inputs.distance, *stats)


def step(
    logits: Tensor, features: Tensor, labels: Tensor, ring: RingBuffer, options: LossOptions, warmup: bool,
    class_weight: Tensor | None, push: bool, direct: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Whole step on the CPU in one call, which checks its arguments.

    Returns the differentiable loss, or with ``direct`` the loss without a graph and its gradient; then ``TALStats``.
    """
    operator = torch.ops.tal_fast.step_with_gradient.default if direct else torch.ops.tal_fast.step.default
    queue = ring.mean, ring.std, ring.cursor, ring.index
    try:
        results = operator(logits, features, labels, *queue, *_loss_arguments(options, warmup, class_weight), push)
    except RuntimeError:
        refuse_transforms(logits)  # in plainer words than PyTorch's
        raise
    return (*results[:-6], TALStats(*results[-6:]))


_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # at::Reduction


def _loss_arguments(options: LossOptions, warmup: bool, class_weight: Tensor | None) -> tuple[Any, ...]:
    """Options in the order of the extension's operators."""
    o = options
    return (
        o.variant == "released", o.t_min, o.t_max, o.t_wrong, o.confidence_threshold, o.label_smoothing,
        o.ignore_index, warmup, _REDUCTIONS[o.reduction], class_weight,
    )  # fmt: skip
