"""TAL without a module, for those who keep their own queue.

``feature_statistics`` and ``nearest_distance`` are the reference's; ``tal_loss`` is the loss on the fastest backend of
the logits' device.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tal_fast.loss import backends
from tal_fast.loss import tensor_parallel as sharded
from tal_fast.loss.backends import LossOptions
from tal_fast.loss.module import check_inputs, labels_are_checked
from tal_fast.loss.queue import FeatureQueue
from tal_fast.loss.reference import TALStats, feature_statistics, nearest_distance

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
    confidence_threshold: float = 0.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    warmup: bool = False,
    class_group: dist.ProcessGroup | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, TALStats]:
    """The mean TAL loss of a batch against a queue given as tensors; the queue is only read.

    Args:
        logits: (B, C) floating point.
        features: (B, D) floating point, D >= 2.
        labels: (B,) int64 in [0, C), or ``ignore_index``.
        queue_mean, queue_std: (N,) float32 or float64, in any order, N >= 0.
        variant, t_min, t_max, t_wrong, confidence_threshold, ignore_index, label_smoothing, warmup, class_group,
            inplace, backend: as in ``TALLoss``.

    Returns:
        The loss, a scalar in float32 (float64 for float64 logits), and ``TALStats``. The samples to push are those
        with ``stats.accepted``; their statistics are ``feature_statistics(features)``.

    Raises:
        ValueError, TypeError: as ``TALLoss``; also a queue whose tensors differ in shape or are not (N,).
    """
    options = LossOptions(variant, t_min, t_max, t_wrong, confidence_threshold, ignore_index, label_smoothing, inplace)
    check_inputs(logits, features, labels, ignore_index, in_columns=class_group is not None)
    if queue_mean.dim() != 1 or queue_mean.shape != queue_std.shape:
        raise ValueError(
            f"queue_mean and queue_std must both be (N,), not {tuple(queue_mean.shape)} and {tuple(queue_std.shape)}"
        )
    size = queue_mean.numel()
    queue = FeatureQueue(1, dtype=queue_mean.dtype, device=logits.device)
    if size:
        queue.mean_ring, queue.std_ring = queue_mean.detach().contiguous(), queue_std.detach().contiguous()
        queue.cursor[1] = size
    chosen = backends.for_loss(backends.check_name(backend), logits.device)
    with torch.no_grad():
        _, _, distance, batch = chosen.statistics_distance(features, labels, queue, ignore_index)
        if variant == "released" and batch is not None and class_group is None:
            batch = chosen.summary(logits, labels, distance, batch, queue, options)
    if class_group is not None:
        need_grad = backends.wants_gradient(logits)
        loss, gradient, stats = sharded.loss_and_gradient(
            logits, labels, distance, options, warmup, class_group,
            rows_group=None, backend=chosen.name, check_labels=labels_are_checked(labels), need_grad=need_grad,
        )  # fmt: skip
        return backends.attach_gradient(logits, loss, gradient, need_grad), stats
    return chosen.loss(logits, labels, distance, batch, queue, options, warmup)
