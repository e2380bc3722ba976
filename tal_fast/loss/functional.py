"""Functional form of the loss, for callers who keep their own queue, and the step that ``TALLoss`` shares with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tal_fast.loss import dispatch, tensor_parallel
from tal_fast.loss.autograd import attach_gradient, refuse_transforms, wants_gradient
from tal_fast.loss.backends import Backend, KernelBackend, LossInputs
from tal_fast.loss.options import LossOptions, check_class_weight, check_inputs
from tal_fast.loss.reference import TALStats, feature_statistics, nearest_distance, weights_for
from tal_fast.loss.ring import RingBuffer

__all__ = ["TALStats", "feature_statistics", "nearest_distance", "tal_loss"]


def tal_loss(
    logits: Tensor,
    features: Tensor,
    labels: Tensor,
    queue_mean: Tensor,
    queue_std: Tensor,
    *,
    variant: str = "paper",
    t_min: float = 10.0,
    t_max: float = 100.0,
    t_wrong: float | None = 20.0,
    confidence_threshold: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    warmup: bool = False,
    class_group: dist.ProcessGroup | None = None,
    inplace: bool = False,
    backend: str = "auto",
    reduction: str = "mean",
    class_weight: Tensor | None = None,
) -> tuple[Tensor, TALStats]:
    """TAL loss of a batch, given the queue as tensors.

    The queue is only read. To update it, append ``feature_statistics(features)`` of the rows with ``stats.accepted``.

    Args:
        logits: (B, C) floating point; the only input with a gradient.
        features: (B, D) floating point, D >= 2: the input of the last Linear layer.
        labels: (B,) int64 in [0, C), or ``ignore_index``.
        queue_mean, queue_std: (N,) float32 or float64 statistics of past samples, N >= 0, in any order.
        warmup: Whether the typicalness of every sample is 1.

    The other arguments are those of ``TALLoss``.

    Returns:
        loss: Scalar, or (B,) for reduction "none", in float32 (float64 for float64 logits).
        stats: ``TALStats`` with (B,) fields.

    Raises:
        ValueError: If an option is out of its range, shapes do not fit, devices differ, or a label is out of range.
        TypeError: If a dtype is not as above.

    Examples:
        >>> import torch
        >>> from tal_fast.functional import tal_loss
        >>> logits, features = torch.randn(32, 10), torch.rand(32, 64)
        >>> labels = torch.randint(10, (32,))
        >>> queue_mean, queue_std = torch.rand(1000), torch.rand(1000)
        >>> loss, stats = tal_loss(logits, features, labels, queue_mean, queue_std)
        >>> loss.shape, stats.typicalness.shape
        (torch.Size([]), torch.Size([32]))
    """
    options = LossOptions(
        variant, t_min, t_max, t_wrong, confidence_threshold, ignore_index, label_smoothing, inplace, reduction
    )
    if class_weight is not None:
        class_weight = check_class_weight(class_weight)
    check_inputs(logits, features, labels, ignore_index, class_group is not None, class_weight)
    result = step_in_parts(
        logits, features, labels, RingBuffer.of_entries(queue_mean, queue_std, logits.device), options,
        backend=dispatch.for_device(dispatch.check_name(backend), logits.device),
        warmup=warmup, class_weight=class_weight, class_group=class_group, combine=None, direct=False,
    )  # fmt: skip
    return result.loss, result.stats


class StepResult(NamedTuple):
    """Results of a step: the loss, its gradient if it was computed directly, and (B,) statistics."""

    loss: Tensor
    gradient: Tensor | None
    stats: TALStats
    mean: Tensor
    std: Tensor


def step_in_parts(
    logits: Tensor,
    features: Tensor,
    labels: Tensor,
    ring: RingBuffer,
    options: LossOptions,
    *,
    backend: Backend,
    warmup: bool,
    class_weight: Tensor | None,
    class_group: dist.ProcessGroup | None,
    combine: Callable[..., Tensor] | None,
    direct: bool,
) -> StepResult:
    """TAL step from a backend's parts, without the checks before it and the push after it.

    The ring is only read. Arguments that are not listed are as in ``TALLoss``.

    Args:
        combine: Function from the batch's summary to that of all ranks, if they act as one; else None.
        direct: Whether to compute the gradient and return it, instead of a differentiable loss.
    """
    if direct or class_group is not None or isinstance(backend, KernelBackend):
        refuse_transforms(logits)
    class_weight = weights_for(logits, class_weight)
    with torch.no_grad():
        mean, std, distance, summary, tickets = backend.statistics_distance(
            features, labels, ring, options.ignore_index, class_weight if class_group is None else None
        )
        inputs = LossInputs(logits, labels, distance, summary, tickets, options, warmup, class_weight)
        if class_group is None:
            # Plain PyTorch has no summary yet, and needs one for other ranks only.
            if (summary is not None and inputs.needs_sums) or (summary is None and combine is not None):
                inputs.summary = backend.complete_summary(inputs)
            if combine is not None:
                inputs.summary = combine(inputs.summary)
    gradient: Tensor | None = None
    if class_group is not None:
        need_grad = direct or wants_gradient(logits)
        loss, gradient, stats = tensor_parallel.loss_and_gradient(
            logits, labels, distance, options, warmup, class_group,
            class_weight=class_weight, backend=backend.name, combine=combine, need_grad=need_grad,
        )  # fmt: skip
        if need_grad and not direct:
            loss = attach_gradient(logits, loss, gradient, labels, options.ignore_index)
    elif direct:
        loss, gradient, stats = backend.loss_and_gradient(inputs)
    else:
        loss, stats = backend.loss(inputs)
    return StepResult(loss, gradient, stats, mean, std)
