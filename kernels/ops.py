"""The launchers as torch operators, which torch.compile keeps in its graph; in eager mode they are called directly,
because the dispatcher would cost more time than the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from tal_fast.kernels import loss, ring, typicalness


@torch.library.custom_op("tal_fast_triton::statistics_distance", mutates_args={"ticket"})
def statistics_distance(
    features: Tensor,
    labels: Tensor,
    queue_mean: Tensor,
    queue_std: Tensor,
    cursor: Tensor,
    ticket: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return typicalness.statistics_distance(features, labels, queue_mean, queue_std, cursor, ticket, ignore_index)


@statistics_distance.register_fake
def _(
    features: Tensor,
    labels: Tensor,
    queue_mean: Tensor,
    queue_std: Tensor,
    cursor: Tensor,
    ticket: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, std, distance = (queue_mean.new_empty(features.shape[:1]) for _ in range(3))
    return mean, std, distance, queue_mean.new_empty((6,), dtype=torch.float64)


@torch.library.custom_op("tal_fast_triton::batch_sums", mutates_args={"batch", "ticket"})
def batch_sums(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    batch: Tensor,
    ticket: Tensor,
    confidence_threshold: float,
    ignore_index: int,
) -> None:
    loss.batch_sums(
        logits,
        labels,
        distance,
        batch,
        ticket,
        confidence_threshold=confidence_threshold,
        ignore_index=ignore_index,
    )


@batch_sums.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    batch: Tensor,
    ticket: Tensor,
    confidence_threshold: float,
    ignore_index: int,
) -> None:
    return None


@torch.library.custom_op("tal_fast_triton::loss_forward", mutates_args={"ticket"})
def loss_forward(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    batch: Tensor,
    ticket: Tensor,
    variant: str,
    t_min: float,
    t_max: float,
    t_wrong: float | None,
    confidence_threshold: float,
    label_smoothing: float,
    ignore_index: int,
    warmup: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return loss.loss_forward(
        logits,
        labels,
        distance,
        batch,
        ticket,
        variant=variant,
        t_min=t_min,
        t_max=t_max,
        t_wrong=t_wrong,
        confidence_threshold=confidence_threshold,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        warmup=warmup,
        need_grad=need_grad,
    )


@loss_forward.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    batch: Tensor,
    ticket: Tensor,
    variant: str,
    t_min: float,
    t_max: float,
    t_wrong: float | None,
    confidence_threshold: float,
    label_smoothing: float,
    ignore_index: int,
    warmup: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    stored = wide if logits.dtype == torch.float16 else logits.dtype
    rows = logits.shape[0]
    grad = logits.new_empty(logits.shape if need_grad else (0,), dtype=stored)
    stats = logits.new_empty((3, rows), dtype=wide)
    return logits.new_empty((), dtype=wide), grad, stats, logits.new_empty((2, rows), dtype=torch.bool)


@torch.library.custom_op("tal_fast_triton::push", mutates_args={"queue_mean", "queue_std", "cursor"})
def push_(
    queue_mean: Tensor, queue_std: Tensor, cursor: Tensor, mean: Tensor, std: Tensor, accepted: Tensor | None
) -> None:
    ring.push(queue_mean, queue_std, cursor, mean, std, accepted)


@push_.register_fake
def _(
    queue_mean: Tensor, queue_std: Tensor, cursor: Tensor, mean: Tensor, std: Tensor, accepted: Tensor | None
) -> None:
    return None


@torch.library.custom_op("tal_fast_triton::nearest", mutates_args=())
def nearest(queue_mean: Tensor, queue_std: Tensor, cursor: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return typicalness.nearest(queue_mean, queue_std, cursor, mean, std)


@nearest.register_fake
def _(queue_mean: Tensor, queue_std: Tensor, cursor: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return torch.empty_like(mean, memory_format=torch.contiguous_format)
