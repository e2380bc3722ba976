"""Launchers as torch operators, which torch.compile keeps in its graph.

Eager mode calls the launchers directly: the dispatcher would take longer than the kernels. No launcher has keyword-only
arguments, because Inductor passes those of an operator by position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tal_fast.kernels import distance, loss, queue_push, sums

statistics_distance = torch.library.custom_op(
    "tal_fast_triton::statistics_distance", distance.statistics_distance, mutates_args=()
)
nearest = torch.library.custom_op("tal_fast_triton::nearest", distance.nearest, mutates_args=())
batch_sums = torch.library.custom_op(
    "tal_fast_triton::batch_sums", sums.batch_sums, mutates_args={"summary", "tickets"}
)
push = torch.library.custom_op(
    "tal_fast_triton::push", queue_push.push, mutates_args={"queue_mean", "queue_std", "cursor"}
)
# The schema is written out because it leaves out `inplace`: an operator must not return one of its inputs.
loss_forward = torch.library.custom_op(
    "tal_fast_triton::loss_forward",
    loss.loss_forward,
    mutates_args={"tickets"},
    schema=(
        "(Tensor logits, Tensor labels, Tensor distance, Tensor summary, Tensor(a!) tickets, Tensor? class_weight, "
        "str variant, float t_min, float t_max, float? t_wrong, float confidence_threshold, float label_smoothing, "
        "int ignore_index, str reduction, bool warmup, bool need_grad) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)


@statistics_distance.register_fake
def _(features: Tensor, labels: Tensor, queue_mean: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mean, std, distances = (queue_mean.new_empty(features.shape[:1]) for _ in range(3))
    summary, tickets = (queue_mean.new_empty(n, dtype=t) for n, t in ((7, torch.float64), (3, torch.int32)))
    return mean, std, distances, summary, tickets


@nearest.register_fake
def _(queue_mean: Tensor, queue_std: Tensor, cursor: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return torch.empty_like(mean, memory_format=torch.contiguous_format)


@batch_sums.register_fake
@push.register_fake
def _(*_: Any) -> None:
    return None


@loss_forward.register_fake
def _(logits: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reduction, _, need_grad = options[-3:]
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    stored = wide if logits.dtype == torch.float16 else logits.dtype
    rows = logits.shape[0]
    grad = logits.new_empty(logits.shape if need_grad else (0,), dtype=stored)
    stats = logits.new_empty((3, rows), dtype=wide)
    loss = logits.new_empty((rows,) if reduction == "none" else (), dtype=wide)
    return loss, grad, stats, logits.new_empty((2, rows), dtype=torch.bool)
