"""TAL loss kernels for class-sharded logits: three passes over the columns that a rank holds.

They are the three reads of a long row, with the collectives of ``tal_fast/loss/tensor_parallel.py`` between them. One
program takes one row, in blocks of ``LONG_BLOCK`` logits. Results are float64, as the ranks combine them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tal_fast.kernels.distance import sqrt_rn
from tal_fast.kernels.launch import Launch, Target, device_target
from tal_fast.kernels.loss import LONG_BLOCK, exp_sums_long_row, num_warps_for, store_long_row_gradient


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
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * logits_stride_b
    label = tl.load(label_column_ptr + row)
    z_max = tl.load(z_max_ptr + row).to(dtype)
    scale = tl.load(scale_ptr + row).to(dtype)
    p_sum, p_weighted, q_sum = exp_sums_long_row(base, classes, logits_stride_c, label, z_max, scale, dtype, BLOCK)
    is_local = label >= 0
    z_label = tl.load(base + label * logits_stride_c, mask=is_local, other=0.0).to(dtype)
    out = out_ptr + row * 4
    tl.store(out, p_sum.to(tl.float64))
    tl.store(out + 1, p_weighted.to(tl.float64))
    tl.store(out + 2, q_sum.to(tl.float64))
    tl.store(out + 3, tl.where(is_local, z_label - z_max, 0.0).to(tl.float64))


@triton.jit
def gradient_kernel(
    logits_ptr, label_column_ptr, valid_ptr, terms_ptr, grad_ptr, classes, logits_stride_b, logits_stride_c,
    FLOAT64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of each row by these columns; ``loss._row_loss_and_coefficients`` has its formula.

    Pointers:
        logits, label_column: as for ``exp_sums_kernel``.
        valid: (rows,) bool; the gradient of the other rows is 0.
        terms: (rows, 7) float64: z_max, scale, g_p, g_q, g_label, z_coef, smooth_term. A row whose smooth_term is NaN
            has a gradient of NaN.
        grad: (rows, classes) out, contiguous.
    """
    dtype: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    terms = terms_ptr + row * 7
    smooth_term = tl.load(terms + 6).to(dtype)
    store_long_row_gradient(
        logits_ptr + row * logits_stride_b, grad_ptr + row * classes, classes, logits_stride_c,
        tl.load(label_column_ptr + row), tl.load(valid_ptr + row) != 0, smooth_term == smooth_term,
        tl.load(terms).to(dtype), tl.load(terms + 1).to(dtype), tl.load(terms + 2).to(dtype),
        tl.load(terms + 3).to(dtype), tl.load(terms + 4).to(dtype), tl.load(terms + 5).to(dtype), smooth_term,
        dtype, BLOCK,
    )  # fmt: skip


def _plan(kernel: object, logits: Tensor, tensors: tuple[Tensor, ...], target: Target) -> Launch:
    """Launch with one program per row, for the logits and the kernel's other tensors."""
    rows, classes = logits.shape
    block = min(LONG_BLOCK, triton.next_power_of_2(max(1, classes)))
    constants = {"FLOAT64": logits.dtype == torch.float64, "BLOCK": block}
    arguments = (logits, *tensors, classes, *logits.stride())
    return Launch(kernel, (rows,), arguments, constants, num_warps_for(block, target))


def plan_scan(logits: Tensor, target: Target) -> tuple[Launch, Tensor]:
    """Launch of ``scan_kernel``, and its output."""
    out = logits.new_empty((len(logits), 5), dtype=torch.float64)
    return _plan(scan_kernel, logits, (out,), target), out


def plan_exp_sums(
    logits: Tensor, label_column: Tensor, z_max: Tensor, scale: Tensor, target: Target
) -> tuple[Launch, Tensor]:
    """Launch of ``exp_sums_kernel``, and its output."""
    out = logits.new_empty((len(logits), 4), dtype=torch.float64)
    return _plan(exp_sums_kernel, logits, (label_column, z_max, scale, out), target), out


def plan_gradient(
    logits: Tensor, label_column: Tensor, valid: Tensor, terms: Tensor, target: Target
) -> tuple[Launch, Tensor]:
    """Launch of ``gradient_kernel``, and its output."""
    stored = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    grad = torch.empty(logits.shape, dtype=stored, device=logits.device)
    return _plan(gradient_kernel, logits, (label_column, valid, terms, grad), target), grad


def scan(logits: Tensor) -> Tensor:
    """(B, 5) output of ``scan_kernel`` for (B, C) logits, C >= 0."""
    return _run(*plan_scan(logits, device_target(logits.device)))


def exp_sums(logits: Tensor, label_column: Tensor, z_max: Tensor, scale: Tensor) -> Tensor:
    """(B, 4) output of ``exp_sums_kernel`` for (B, C) logits, C >= 0."""
    vectors = label_column.contiguous(), z_max.contiguous(), scale.contiguous()
    return _run(*plan_exp_sums(logits, *vectors, device_target(logits.device)))


def gradient(logits: Tensor, label_column: Tensor, valid: Tensor, terms: Tensor) -> Tensor:
    """(B, C) gradient from ``gradient_kernel``, in the logits' dtype, or float32 for float16; C >= 0."""
    vectors = label_column.contiguous(), valid.contiguous(), terms.contiguous()
    return _run(*plan_gradient(logits, *vectors, device_target(logits.device)))


def _run(launch: Launch, out: Tensor) -> Tensor:
    if launch.grid[0]:
        launch.run()
    return out
