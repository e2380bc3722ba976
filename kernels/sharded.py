"""TAL loss kernels for class-sharded logits: three passes over the columns that a rank holds.

They are the three reads of a long row, with the collectives of ``tal_fast/loss/tensor_parallel.py`` between them. One
program takes one row, in chunks. Results are float64, as the ranks combine them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tal_fast.kernels.distance import sqrt_rn
from tal_fast.kernels.launch import Launch, planner
from tal_fast.kernels.rows import (
    LN2,
    LOG2E,
    add3,
    add_exponentials,
    exponentials,
    load_chunk,
    other_logits,
    store_chunk,
)

CHUNK = 2048  # logits at a time, 16 a thread
NUM_WARPS = 4


@triton.jit
def scan_kernel(
    logits_ptr, out_ptr, classes, logits_stride_b, logits_stride_c,
    FLOAT64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Largest logit, its index, norm, sum, and 1 where all logits and the norm are finite, of each row.

    NaN does not count as the largest.

    Pointers:
        logits: (rows, classes), strides logits_stride_b and logits_stride_c.
        out: (rows, 5) float64 out.
    """
    dtype: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * logits_stride_b
    c = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), dtype)
    index = tl.zeros((BLOCK,), tl.int64)
    squares = tl.zeros((BLOCK,), dtype)
    z_sum = tl.zeros((BLOCK,), dtype)
    for start in range(0, classes, BLOCK):
        at = start + c.to(tl.int64)
        inside = at < classes
        z = tl.load(base + at * logits_stride_c, mask=inside, other=0.0).to(dtype)
        better = inside & (z > largest)
        largest = tl.where(better, z, largest)
        index = tl.where(better, at, index)
        squares += z * z
        z_sum += z
    z_max = tl.max(largest, axis=0)
    # First class over the lanes that hold the largest logit; `classes` stands in for the others.
    argmax = tl.min(tl.where(largest == z_max, index, classes), axis=0)
    out = out_ptr + row * 5
    tl.store(out, z_max.to(tl.float64))
    tl.store(out + 1, argmax.to(tl.float64))
    norm = sqrt_rn(tl.sum(squares, axis=0))
    tl.store(out + 2, norm.to(tl.float64))
    tl.store(out + 3, tl.sum(z_sum, axis=0).to(tl.float64))
    # Finite; false for any NaN or infinity, too.
    tl.store(out + 4, tl.where(norm < float("inf"), 1.0, 0.0).to(tl.float64))


@triton.jit
def exp_sums_kernel(
    logits_ptr, label_column_ptr, z_max_ptr, scale_ptr, out_ptr, classes, logits_stride_b, logits_stride_c,
    FLOAT64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Exponential sums of each row without its label, and x = z - z_max at the label.

    Pointers:
        logits: (rows, classes), strides logits_stride_b and logits_stride_c.
        label_column: (rows,) int64, index of the label among these columns, or -1 if another rank holds it.
        z_max, scale: (rows,) float64, largest logit of the whole row and factor of the exponents.
        out: (rows, 4) float64 out: sums of exp(scale x), x exp(scale x) and exp(x); x at the label, or 0.
    """
    dtype: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    base = logits_ptr + row * logits_stride_b
    label = tl.load(label_column_ptr + row)
    z_max = tl.load(z_max_ptr + row).to(dtype)
    rate = tl.load(scale_ptr + row).to(dtype)
    ratio = 1.0 / rate
    length = tl.zeros((1,), tl.int32) + classes
    p_sum = tl.zeros((1, BLOCK), dtype)
    yp_sum = tl.zeros((1, BLOCK), dtype)
    q_sum = tl.zeros((1, BLOCK), dtype)
    for begin in range(0, classes, BLOCK):
        z = load_chunk(base, begin, length, length >= 0, tl.cast(logits_stride_c, tl.int64), BLOCK, 1).to(dtype)
        others = other_logits(z, begin, length, label.to(tl.int32), dtype, BLOCK, 1)
        y = (others - z_max[:, None]) * (rate * LOG2E)[:, None]
        _, _, p_sum, yp_sum, q_sum = add_exponentials(y, ratio, p_sum, yp_sum, q_sum, dtype)
    p_sum, yp_sum, q_sum = tl.reduce((p_sum, yp_sum, q_sum), 1, add3)
    is_local = label >= 0
    z_label = tl.load(base + label * logits_stride_c, mask=is_local, other=0.0).to(dtype)
    out = out_ptr + row * 4
    tl.store(out, p_sum.to(tl.float64))
    tl.store(out + 1, (yp_sum * ratio * LN2).to(tl.float64))
    tl.store(out + 2, q_sum.to(tl.float64))
    tl.store(out + 3, tl.where(is_local, z_label - z_max, 0.0).to(tl.float64))


@triton.jit
def gradient_kernel(
    logits_ptr, label_column_ptr, valid_ptr, terms_ptr, grad_ptr, classes, logits_stride_b, logits_stride_c,
    FLOAT64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of each row by these columns; ``loss.loss_kernel`` has its formula.

    Pointers:
        logits, label_column: as for ``exp_sums_kernel``.
        valid: (rows,) bool; the gradient of the other rows is 0.
        terms: (rows, 7) float64: z_max, scale, g_p, g_q, g_label, z_coef, smooth_term. A row whose smooth_term is NaN
            has a gradient of NaN.
        grad: (rows, classes) out, contiguous.
    """
    dtype: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    terms = terms_ptr + row * 7
    base = logits_ptr + row * logits_stride_b
    out = grad_ptr + row * classes
    label = tl.load(label_column_ptr + row)
    valid = tl.load(valid_ptr + row) != 0
    z_max = tl.where(valid, tl.load(terms), 0.0).to(dtype)
    rate = tl.where(valid, tl.load(terms + 1), 1.0).to(dtype)
    g_p = tl.where(valid, tl.load(terms + 2), 0.0).to(dtype)
    g_q = tl.where(valid, tl.load(terms + 3), 0.0).to(dtype)
    g_label = tl.load(terms + 4).to(dtype)
    z_coef = tl.where(valid, tl.load(terms + 5), 0.0).to(dtype)
    away = tl.where(valid, tl.load(terms + 6), 0.0).to(dtype)
    ratio = 1.0 / rate
    length = tl.zeros((1,), tl.int32) + classes
    for begin in range(0, classes, BLOCK):
        z = load_chunk(base, begin, length, valid, tl.cast(logits_stride_c, tl.int64), BLOCK, 1).to(dtype)
        y = (z - z_max[:, None]) * (rate * LOG2E)[:, None]
        p, q = exponentials(y, ratio[:, None], dtype)
        store_chunk(
            z, p, q, out, begin, length, length, length >= 0, g_p, g_q, z_coef, -away, away, grad_ptr, dtype, BLOCK, 1,
            False,
        )  # fmt: skip
    tl.debug_barrier()  # the label's gradient is the last to be stored at its address
    z_label = tl.load(base + label * logits_stride_c, mask=valid & (label >= 0), other=0.0).to(dtype)
    g_label -= z_label * z_coef + away
    tl.store(out + label, g_label.to(grad_ptr.dtype.element_ty), mask=valid & (label >= 0))


@planner
def plan_rows(kernel: Any, rows: int, classes: int, stride: tuple[int, ...], is_float64: bool) -> Launch:
    """Launch with one program per row."""
    block = min(CHUNK, triton.next_power_of_2(max(1, classes)))
    constants = {"FLOAT64": is_float64, "BLOCK": block}
    return Launch(kernel, (rows,), (classes, *stride), constants, NUM_WARPS)


def scan(logits: Tensor) -> Tensor:
    """(B, 5) output of ``scan_kernel`` for (B, C) logits, C >= 0."""
    return _run(scan_kernel, logits, (), logits.new_empty((len(logits), 5), dtype=torch.float64))


def exp_sums(logits: Tensor, label_column: Tensor, z_max: Tensor, scale: Tensor) -> Tensor:
    """(B, 4) output of ``exp_sums_kernel`` for (B, C) logits, C >= 0."""
    out = logits.new_empty((len(logits), 4), dtype=torch.float64)
    return _run(exp_sums_kernel, logits, (label_column, z_max, scale), out)


def gradient(logits: Tensor, label_column: Tensor, valid: Tensor, terms: Tensor) -> Tensor:
    """(B, C) gradient from ``gradient_kernel``, in the logits' dtype, or float32 for float16; C >= 0."""
    stored = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    out = torch.empty(logits.shape, dtype=stored, device=logits.device)
    return _run(gradient_kernel, logits, (label_column, valid, terms), out)


def _run(kernel: Any, logits: Tensor, others: tuple[Tensor, ...], out: Tensor) -> Tensor:
    rows, classes = logits.shape
    if rows:
        launch = plan_rows(kernel, rows, classes, logits.stride(), logits.dtype == torch.float64)
        launch.run(logits, *[t.contiguous() for t in others], out)
    return out
