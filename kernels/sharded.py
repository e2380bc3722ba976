"""The three passes over some columns of each row that a class-sharded loss takes (``tal_fast/sharded.py``).

They are the three reads of a long row, with the collectives between them: a program a row, blocks of ``LONG_BLOCK``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tal_fast.kernels.launch import Launch, Target, target_of
from tal_fast.kernels.loss import LONG_BLOCK, _store_long_gradient, _sum_long_row, warps_of
from tal_fast.kernels.typicalness import sqrt_exact


@triton.jit
def scan_kernel(
    logits_ptr,  # (B, C)
    out_ptr,  # (B, 5) float64 out
    classes,
    logits_stride_b,
    logits_stride_c,
    FLOAT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * logits_stride_b
    c = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), dtype)
    index = tl.zeros((BLOCK,), tl.int64)
    squares = tl.zeros((BLOCK,), dtype)
    plain = tl.zeros((BLOCK,), dtype)
    infinite = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, classes, BLOCK):
        at = start + c.to(tl.int64)
        inside = at < classes
        z = tl.load(base + at * logits_stride_c, mask=inside, other=0.0).to(dtype)
        better = inside & (z > largest)
        largest = tl.where(better, z, largest)
        index = tl.where(better, at, index)
        squares += z * z
        plain += z
        infinite |= (inside & ~(tl.abs(z) < float("inf"))).to(tl.int32)
    z_max = tl.max(largest, axis=0)
    # The first class among the lanes' own; beyond every class where a lane's largest is smaller.
    first = tl.min(tl.where(largest == z_max, index, classes), axis=0)
    out = out_ptr + row * 5
    tl.store(out, z_max.to(tl.float64))
    tl.store(out + 1, first.to(tl.float64))
    tl.store(out + 2, sqrt_exact(tl.sum(squares, axis=0)).to(tl.float64))
    tl.store(out + 3, tl.sum(plain, axis=0).to(tl.float64))
    tl.store(out + 4, tl.where(tl.sum(infinite, axis=0) == 0, 1.0, 0.0).to(tl.float64))


@triton.jit
def exp_sums_kernel(
    logits_ptr,  # (B, C)
    own_label_ptr,  # (B,) int64, -1 where the label is not among these columns
    z_max_ptr,  # (B,) float64
    scale_ptr,  # (B,) float64
    out_ptr,  # (B, 4) float64 out
    classes,
    logits_stride_b,
    logits_stride_c,
    FLOAT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * logits_stride_b
    label = tl.load(own_label_ptr + row)
    z_max = tl.load(z_max_ptr + row).to(dtype)
    scale = tl.load(scale_ptr + row).to(dtype)
    p_sum, p_weighted, q_sum = _sum_long_row(base, classes, logits_stride_c, label, z_max, scale, dtype, BLOCK)
    here = label >= 0
    z_label = tl.load(base + label * logits_stride_c, mask=here, other=0.0).to(dtype)
    out = out_ptr + row * 4
    tl.store(out, p_sum.to(tl.float64))
    tl.store(out + 1, p_weighted.to(tl.float64))
    tl.store(out + 2, q_sum.to(tl.float64))
    tl.store(out + 3, tl.where(here, z_label - z_max, 0.0).to(tl.float64))


@triton.jit
def gradient_kernel(
    logits_ptr,  # (B, C)
    own_label_ptr,  # (B,) int64
    valid_ptr,  # (B,) bool
    terms_ptr,  # (B, 7) float64: largest logit, scale, g_p, g_q, g_label, along, away
    grad_ptr,  # (B, C) contiguous, out
    classes,
    logits_stride_b,
    logits_stride_c,
    FLOAT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    terms = terms_ptr + row * 7
    away = tl.load(terms + 6).to(dtype)
    _store_long_gradient(
        logits_ptr + row * logits_stride_b, grad_ptr + row * classes, classes, logits_stride_c,
        tl.load(own_label_ptr + row), tl.load(valid_ptr + row) != 0, away == away, tl.load(terms).to(dtype),
        tl.load(terms + 1).to(dtype), tl.load(terms + 2).to(dtype), tl.load(terms + 3).to(dtype),
        tl.load(terms + 4).to(dtype), tl.load(terms + 5).to(dtype), away, dtype, BLOCK,
    )  # fmt: skip


def _launch(kernel: object, logits: Tensor, tensors: dict[str, Tensor], target: Target) -> Launch:
    rows, classes = logits.shape
    block = min(LONG_BLOCK, triton.next_power_of_2(max(1, classes)))
    arguments = {
        "logits_ptr": logits,
        **tensors,
        "classes": classes,
        "logits_stride_b": logits.stride(0),
        "logits_stride_c": logits.stride(1),
    }
    constants = {"FLOAT64": logits.dtype == torch.float64, "BLOCK": block}
    return Launch(kernel, (rows,), arguments, constants, warps_of(block, target))


def plan_scan(logits: Tensor, target: Target) -> tuple[Launch, Tensor]:
    """The launch and what it fills."""
    out = logits.new_empty((len(logits), 5), dtype=torch.float64)
    return _launch(scan_kernel, logits, {"out_ptr": out}, target), out


def plan_exp_sums(
    logits: Tensor, own_label: Tensor, z_max: Tensor, scale: Tensor, target: Target
) -> tuple[Launch, Tensor]:
    """The launch and what it fills."""
    out = logits.new_empty((len(logits), 4), dtype=torch.float64)
    tensors = {"own_label_ptr": own_label, "z_max_ptr": z_max, "scale_ptr": scale, "out_ptr": out}
    return _launch(exp_sums_kernel, logits, tensors, target), out


def plan_gradient(
    logits: Tensor, own_label: Tensor, valid: Tensor, terms: Tensor, target: Target
) -> tuple[Launch, Tensor]:
    """The launch and what it fills."""
    stored = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    grad = torch.empty(logits.shape, dtype=stored, device=logits.device)
    tensors = {"own_label_ptr": own_label, "valid_ptr": valid, "terms_ptr": terms, "grad_ptr": grad}
    return _launch(gradient_kernel, logits, tensors, target), grad


def scan(logits: Tensor) -> Tensor:
    """See ``tal_fast.loss.tensor_parallel._scan``. A NaN does not count as the largest; its row is marked as not finite."""
    return _run(*plan_scan(logits, target_of(logits.device)))


def exp_sums(logits: Tensor, own_label: Tensor, z_max: Tensor, scale: Tensor) -> Tensor:
    """See ``tal_fast.loss.tensor_parallel._exp_sums``."""
    vectors = own_label.contiguous(), z_max.contiguous(), scale.contiguous()
    return _run(*plan_exp_sums(logits, *vectors, target_of(logits.device)))


def gradient(logits: Tensor, own_label: Tensor, valid: Tensor, terms: Tensor) -> Tensor:
    """See ``tal_fast.loss.tensor_parallel._gradient``."""
    vectors = own_label.contiguous(), valid.contiguous(), terms.contiguous()
    return _run(*plan_gradient(logits, *vectors, target_of(logits.device)))


def _run(launch: Launch, out: Tensor) -> Tensor:
    if launch.grid[0]:
        launch.run()
    return out
