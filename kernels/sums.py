"""Sums over a batch that variant ``released`` needs before the loss of any row: a read of the logits of its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tal_fast.kernels import layout
from tal_fast.kernels.distance import SUMS_TICKET, is_last_program
from tal_fast.kernels.launch import Launch, Target, cdiv, device_target, planner
from tal_fast.kernels.layout import THRESHOLD
from tal_fast.kernels.rows import NORM_EPS, fetch_rows, ordered_sum, scan_rows


@triton.jit
def batch_sums_kernel(
    logits_ptr, labels_ptr, distance_ptr, summary_ptr, constants_ptr, tickets_ptr, partials_ptr, rows,
    stride_b, stride_c, labels_stride, ignore_index,
    FLOAT64: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
    V: tl.constexpr, EDGES: tl.constexpr, HELD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Number of accepted rows, number of rows of weight 1, and sum of the other valid rows' distances.

    Pointers and constants are those of ``loss_kernel``, and:
        summary: (7,) float64 summary; its values 3 to 5 are written.
        partials: (3, programs) float64 scratch.
    """
    dtype: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    if not EDGES:
        stride_b = stride_b // V * V
    if V == 1:  # the logits of a row may lie apart; otherwise stride_c is 1
        stride_c = tl.cast(stride_c, tl.int64)
    threshold = tl.load(constants_ptr + THRESHOLD).to(dtype)
    n_accepted = tl.zeros((ROWS,), tl.float64)
    n_one = tl.zeros((ROWS,), tl.float64)
    sum_distance = tl.zeros((ROWS,), tl.float64)
    step = tl.num_programs(0) * ROWS
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    next_label = tl.load(labels_ptr + row * labels_stride, mask=row < rows, other=ignore_index)
    ahead = fetch_rows(
        logits_ptr, distance_ptr, row, next_label, rows, stride_b, stride_c, ignore_index,
        CLASSES, CHUNKS, WIDTH, V, EDGES, HELD,
    )  # fmt: skip
    row += step
    next_label = tl.load(labels_ptr + row * labels_stride, mask=row < rows, other=ignore_index)
    for turn in range(tl.program_id(0) * ROWS, rows, step):  # noqa: B007
        valid, in_range, column, base, head, length, z_label, d, z_edge, held = ahead
        ahead = fetch_rows(
            logits_ptr, distance_ptr, row, next_label, rows, stride_b, stride_c, ignore_index,
            CLASSES, CHUNKS, WIDTH, V, EDGES, HELD,
        )  # fmt: skip
        row += step
        next_label = tl.load(labels_ptr + row * labels_stride, mask=row < rows, other=ignore_index)
        z_label = z_label.to(dtype)
        largest, norm, correct, _, _ = scan_rows(
            held, z_edge, base, z_label, column, in_range, valid, head, length, stride_c, constants_ptr,
            dtype, CLASSES, ROWS, CHUNKS, WIDTH, V, EDGES, HELD, UNROLL, False, False,
        )  # fmt: skip
        cosine = tl.maximum(largest, z_label) * (1.0 / (norm + NORM_EPS))
        accepted = correct & (norm < float("inf")) & (cosine > threshold)
        d = d.to(tl.float64)
        weighted = correct & (tl.abs(d) < float("inf"))
        n_accepted += accepted.to(tl.float64)
        n_one += (valid & (weighted == 0)).to(tl.float64)
        sum_distance += tl.where(weighted, d, 0.0)
    programs = tl.num_programs(0)
    pid = tl.program_id(0)
    tl.store(partials_ptr + pid, tl.sum(n_accepted, axis=0))
    tl.store(partials_ptr + programs + pid, tl.sum(n_one, axis=0))
    tl.store(partials_ptr + 2 * programs + pid, tl.sum(sum_distance, axis=0))
    if is_last_program(tickets_ptr + SUMS_TICKET, programs):
        for k in range(3):
            tl.store(summary_ptr + 3 + k, ordered_sum(partials_ptr + k * programs, programs))


@planner
def plan_batch_sums(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, aligned: bool, labels_stride: int,
    ignore_index: int, target: Target,
) -> Launch:  # fmt: skip
    """Launch of ``batch_sums_kernel``; arguments as for ``plan_loss``."""
    rows, classes = shape
    v, edges = layout.vector_of(classes, dtype.itemsize, stride, aligned)
    config = layout.loss_config(classes, dtype, v, edges, target.architecture)
    programs = layout.num_programs_for(cdiv(rows, config.rows), max(1, 16 // config.num_warps), target)
    numbers = rows, *stride, labels_stride, ignore_index
    constants = {"FLOAT64": dtype == torch.float64, **layout.constants_of(classes, v, edges, config)}
    return Launch(batch_sums_kernel, (programs,), numbers, constants, config.num_warps)


def batch_sums(
    logits: Tensor, labels: Tensor, distance: Tensor, summary: Tensor, tickets: Tensor, confidence_threshold: float,
    ignore_index: int,
) -> None:  # fmt: skip
    """Fill in the values 3 to 5 of ``summary`` (7,), which variant ``released`` needs before the loss.

    Arguments as for ``loss_forward``; ``tal_fast.loss.reference.batch_summary`` defines the values.
    """
    launch = plan_batch_sums(
        logits.shape, logits.stride(), logits.dtype, logits.data_ptr() % 16 == 0, labels.stride(0), ignore_index,
        device_target(logits.device),
    )  # fmt: skip
    constants = layout.loss_constants(logits.device, 0.0, 0.0, None, confidence_threshold, 0.0)
    partials = summary.new_empty(3 * launch.grid[0])
    launch.run(logits, labels, distance, summary, constants, tickets, partials)
