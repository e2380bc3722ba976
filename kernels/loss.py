"""Logits to the TAL loss and its gradient (paper, equations 2 to 6).

The fewest bytes: each logit read once and each gradient element written once. While a row fits on chip
(``loss_config``), ``loss_kernel`` holds it in registers as float32, ``packed_row_loss_kernel`` as half-precision pairs,
and both do just that; wider rows go through ``long_row_loss_kernel``, which reads a row three times in blocks (norm and
maximum; both sums; gradient), the second and third time mostly from the L2 cache. Programs walk over rows; each leaves
one partial sum, and the one that finishes last adds them in order, so that the loss needs no second launch and does not
depend on timing.

Variant ``released`` needs the mean weight of the batch before the loss of any row: ``batch_sums_kernel`` reads the
logits once more for it. A batch is described by six numbers (``reference.batch_summary``), so that they may as well
come from all ranks of a distributed run.

The label's own exponential is left out of the sums: the gradient of a confident row is -(sum of the others) / sum,
which p - 1 would round away.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from tal_fast.kernels.launch import Launch, Target, cdiv, constants_on, target_of
from tal_fast.kernels.typicalness import is_last, sqrt_exact

NORM_EPS = tl.constexpr(1e-7)
RANGE_EPS = tl.constexpr(1e-8)

LONG_BLOCK = 512  # 4 logits a thread: the largest that spills nowhere; 2,048 spills 8 to 16 bytes, 4,096 up to 56
SUMS_BLOCK = 1024


@dataclass(frozen=True)
class LossConfig:
    """How a row of ``classes`` logits is laid out."""

    path: Literal["one block", "packed", "blocks"]
    block: int  # logits held at a time; on path "packed", of a chunk
    num_warps: int
    recompute: bool = False  # on path "one block": exponentials again for the gradient, instead of in registers
    max_registers: int | None = None  # a thread may have


@cache
def loss_config(classes: int, dtype: torch.dtype, target: Target, contiguous: bool) -> LossConfig:
    """One block for rows of up to 8,192 logits (half precision: 16,384 where that does not spill), packed pairs for
    half-precision rows of up to 32,768 there, blocks beyond and for float64, which is for checks.

    On the first path a logit costs three registers (x and both exponentials); addresses, masks and scalars some 30 a
    thread whatever the block, which favours few threads with many logits. The figures are from the compile check, for
    the largest body (``released``, smoothing). Rows of 16,384 need their exponentials computed twice instead of
    kept: without spills on sm_80 and sm_90, with 4 to 40 bytes on sm_100 and gfx942, which therefore take blocks; so
    do packed rows there (16 to 32 bytes). A packed logit costs half a register. Four exponentials a logit still keep
    pace with the copy bandwidth, at 16 a clock and multiprocessor. Not yet tuned on a GPU.

    ``contiguous``: whether a row's logits lie side by side, which packed rows need.
    """
    block = triton.next_power_of_2(classes)
    if dtype.itemsize == 2 and target.holds_wide_rows and contiguous and 16384 < classes <= 32768:
        # 16 warps of 64 registers, two programs a multiprocessor, spill at 32,768 logits; 32 warps do not.
        if classes <= 22528:
            return LossConfig("packed", 2048, 16, max_registers=64)
        return LossConfig("packed", 4096, 32)
    widest = 16384 if dtype.itemsize == 2 and target.holds_wide_rows else 8192
    if block > widest or dtype == torch.float64:
        block = min(block, LONG_BLOCK)
        return LossConfig("blocks", block, warps_of(block, target))
    return LossConfig("one block", block, warps_of(block, target), block > 8192)


def warps_of(block: int, target: Target) -> int:
    """4 logits a thread up to blocks of 1,024, 16 up to 8,192, 32 beyond."""
    logits = 4 if block <= 1024 else 16 if block <= 8192 else 32
    return max(1, block // (logits * target.warp_size))


@triton.jit
def _batch_terms(batch_ptr, dtype: tl.constexpr, RELEASED: tl.constexpr, WARMUP: tl.constexpr):
    """From the batch's six numbers: smallest distance, range, divisor, mean weight (``released``), inactive.

    Differences are taken in float64 and divisions in ``dtype``: a float64 division is a subroutine with a stack."""
    low = tl.load(batch_ptr)
    high = tl.load(batch_ptr + 1)
    n_valid = tl.load(batch_ptr + 2)
    nothing = low > high  # no row has a distance: inf and -inf stand there
    low = tl.where(nothing, 0.0, low)
    high = tl.where(nothing, 0.0, high)
    d_min = low.to(dtype)
    spread = high.to(dtype) - d_min + RANGE_EPS
    count = tl.where(n_valid > 0, n_valid, 1.0).to(dtype)
    w_bar = tl.full((), 1.0, dtype)
    inactive = n_valid < 0  # false, as a tensor
    if RELEASED and not WARMUP:
        n_one = tl.load(batch_ptr + 4)
        inactive = tl.load(batch_ptr + 3) == n_valid
        # Typicalness is affine in the distance: its sum follows from the distances'.
        n_weighted = n_valid - n_one
        above = (tl.load(batch_ptr + 5) - n_weighted * low).to(dtype)
        mean = (n_valid.to(dtype) - above / spread) / count
        w_bar = tl.where(inactive | (n_weighted <= 0), 1.0, mean)
    return d_min, spread, count, w_bar, inactive


@triton.jit
def _row_terms(
    d, right, valid, d_min, spread, inactive, constants_ptr, HAS_T_WRONG: tl.constexpr, WARMUP: tl.constexpr
):
    """Typicalness, weight and temperature of one row; all in d's type."""
    dtype = d.dtype
    t_min = tl.load(constants_ptr).to(dtype)
    t_range = tl.load(constants_ptr + 1).to(dtype)
    if WARMUP:
        tau = tl.full((), 1.0, dtype)
    else:
        measured = valid & (tl.abs(d) < float("inf")) & (inactive == 0)
        tau = tl.where(measured, 1.0 - (d - d_min) / spread, 1.0).to(dtype)
    temperature = t_min + (1.0 - tau) * t_range
    if HAS_T_WRONG:
        temperature = tl.where(right | (valid == 0), temperature, tl.load(constants_ptr + 2).to(dtype))
    weight = tl.where(valid, tl.where(right, tau, 1.0), 0.0).to(dtype)
    return tau, weight, temperature


@triton.jit
def _log_sum(others, at_label):
    """log(others + at_label), accurate also where at_label is 1 and others tiny (tl has no log1p)."""
    series = others * (1.0 - others * (0.5 - others / 3.0))  # to x^4 / 4, 2.5e-13 at 1e-3
    return tl.where((at_label == 1.0) & (others < 1e-3), series, tl.log(others + at_label))


@triton.jit
def _losses(
    others, weighted, at_label, x_label, target_x, scale, factor, weight, norm, smoothing, ACROSS: tl.constexpr
):
    """One of the two cross-entropies of a row: weighted loss, gradient factor of the exponentials, of the label, of z.

    others, weighted: sums over the other classes of e = exp(scale x) and of x e, with x = z - max z.
    factor: what the upstream side multiplies this cross-entropy's gradient by.
    ACROSS: the direction loss, whose gradient also has a part along z.
    """
    total = others + at_label
    loss = weight * (_log_sum(others, at_label) - scale * target_x)
    per_exponential = factor / total
    at_label_gradient = factor * (smoothing - others / total)
    along = tl.zeros_like(others)
    if ACROSS:
        # <z, p - e>: the shift by the maximum cancels, because p - e sums to 0
        k = (weighted + x_label * at_label) / total - target_x
        along = tl.where(norm > 0, factor * k / (norm * (norm + NORM_EPS)), 0.0)
    return loss, per_exponential, at_label_gradient, along


@triton.jit
def _sum_in_order(parts_ptr, count):
    """The sum of ``count`` float64 values that other programs of this launch have stored."""
    total = tl.zeros((256,), tl.float64)
    for start in range(0, count, 256):
        i = start + tl.arange(0, 256)
        # .cg: from the L2 cache, where the other programs' stores are
        total += tl.load(parts_ptr + i, mask=i < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


@triton.jit
def _finish(total, partials_ptr, ticket_ptr, loss_ptr, count):
    """Leave this program's sum; the last program adds all sums in order and writes the mean."""
    programs = tl.num_programs(0)
    tl.store(partials_ptr + tl.program_id(0), total)
    if is_last(ticket_ptr, programs):
        tl.store(loss_ptr, _sum_in_order(partials_ptr, programs).to(loss_ptr.dtype.element_ty) / count)


@triton.jit
def _row_scale(
    d, z_max, norm, finite, right, valid, d_min, spread, w_bar, inactive, constants_ptr,
    RELEASED: tl.constexpr, HAS_T_WRONG: tl.constexpr, WARMUP: tl.constexpr,
):  # fmt: skip
    """What a row's sums need of its first look: accepted, typicalness, weight, temperature, share of the direction
    loss, and the factor of its exponents."""
    dtype = d.dtype
    accepted = right & finite & (z_max / (norm + NORM_EPS) > tl.load(constants_ptr + 3).to(dtype))
    tau, w, temperature = _row_terms(d, right, valid, d_min, spread, inactive, constants_ptr, HAS_T_WRONG, WARMUP)
    share = w_bar if RELEASED else w
    return accepted, tau, w, temperature, share, temperature / (norm + NORM_EPS)


@triton.jit
def _row_gradient(
    p_sum, p_weighted, q_sum, x_label, mean_x, scale, share, norm, finite, valid, count, constants_ptr, classes,
    SMOOTH: tl.constexpr,
):  # fmt: skip
    """From a row's sums its loss, and the terms of its gradient: g_p exp(scale x) + g_q exp(x) - along z - away, and
    g_label in place of the first two at the label."""
    dtype = scale.dtype
    smoothing = tl.load(constants_ptr + 4).to(dtype)
    target_x = x_label
    if SMOOTH:
        target_x = (1.0 - smoothing) * x_label + smoothing * mean_x
    inverse_count = 1.0 / count
    f_dir = share * scale * inverse_count
    f_ce = (1.0 - share) * inverse_count
    one = tl.full((), 1.0, dtype)
    l_dir, g_p, g_p_label, along = _losses(
        p_sum, p_weighted, tl.exp(scale * x_label), x_label, target_x, scale, f_dir, share, norm, smoothing, True
    )
    l_ce, g_q, g_q_label, _ = _losses(
        q_sum, q_sum, tl.exp(x_label), x_label, target_x, one, f_ce, 1.0 - share, norm, smoothing, False
    )
    # Not finite: so is plain cross-entropy, or a logit is -inf and the direction is undefined.
    row_loss = tl.where(valid, tl.where(finite, l_dir + l_ce, float("nan")), 0.0)
    return row_loss.to(tl.float64), g_p, g_q, g_p_label + g_q_label, along, (f_dir + f_ce) * smoothing / classes


@triton.jit
def _store_row(row, rows, tau, w, temperature, right, accepted, stats_ptr, flags_ptr):
    tl.store(stats_ptr + row, tau)
    tl.store(stats_ptr + rows + row, w)
    tl.store(stats_ptr + 2 * rows + row, temperature)
    tl.store(flags_ptr + row, right)
    tl.store(flags_ptr + rows + row, accepted)


@triton.jit
def loss_kernel(
    logits_ptr,  # (B, C)
    labels_ptr,  # (B,) int64
    distance_ptr,  # (B,)
    batch_ptr,  # (6,) float64
    constants_ptr,  # (9,) float64: loss_constants
    ticket_ptr,  # (1,) int32, 0 before and after
    partials_ptr,  # (programs,) float64
    loss_ptr,  # () out
    grad_ptr,  # (B, C), rows contiguous, out; may be logits_ptr
    stats_ptr,  # (3, B) out: typicalness, weight, temperature
    flags_ptr,  # (2, B) bool out: right, accepted
    rows,
    classes,
    logits_stride_b,
    logits_stride_c,
    labels_stride,
    grad_stride_b,
    ignore_index,
    RELEASED: tl.constexpr,
    HAS_T_WRONG: tl.constexpr,
    SMOOTH: tl.constexpr,
    WARMUP: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype = stats_ptr.dtype.element_ty  # float32, or float64 for float64 logits
    d_min, spread, count, w_bar, inactive = _batch_terms(batch_ptr, dtype, RELEASED, WARMUP)
    c = tl.arange(0, BLOCK)
    inside = c < classes
    total = tl.zeros((), tl.float64)
    row = tl.program_id(0).to(tl.int64)
    while row < rows:
        label = tl.load(labels_ptr + row * labels_stride)
        valid = label != ignore_index
        in_range = (label >= 0) & (label < classes)
        # 1. The row, once.
        base = logits_ptr + row * logits_stride_b
        z = tl.load(base + c.to(tl.int64) * logits_stride_c, mask=inside, other=0.0).to(dtype)
        z_label = tl.load(base + label * logits_stride_c, mask=valid & in_range, other=0.0).to(dtype)
        # 2. Largest logit, norm, and whether any class comes before the label: larger, or as large and earlier. That
        #    is the arg-max without its indices, which would take as many registers as the logits.
        z_max = tl.max(tl.where(inside, z, float("-inf")), axis=0)
        norm = sqrt_exact(tl.sum(z * z, axis=0))
        finite = tl.sum((inside & ~(tl.abs(z) < float("inf"))).to(tl.int32), axis=0) == 0
        first = inside & (~(z <= z_label) | ((z == z_label) & (c < label)))
        right = valid & in_range & (tl.sum(first.to(tl.int32), axis=0) == 0)
        # 3. Typicalness, weight, temperature.
        d = tl.load(distance_ptr + row).to(dtype)
        accepted, tau, w, temperature, share, scale = _row_scale(
            d, z_max, norm, finite, right, valid, d_min, spread, w_bar, inactive, constants_ptr,
            RELEASED, HAS_T_WRONG, WARMUP,
        )  # fmt: skip
        # 4. Both cross-entropies, from one set of registers.
        x = tl.where(inside, z - z_max, 0.0)
        other = inside & (c != label)
        p = tl.where(other, tl.exp(scale * x), 0.0)
        q = tl.where(other, tl.exp(x), 0.0)
        mean_x = tl.sum(x, axis=0) / classes if SMOOTH else z_max
        row_loss, g_p, g_q, g_label, along, away = _row_gradient(
            tl.sum(p, axis=0), tl.sum(x * p, axis=0), tl.sum(q, axis=0), z_label - z_max, mean_x, scale, share, norm,
            finite, valid, count, constants_ptr, classes, SMOOTH,
        )  # fmt: skip
        total += row_loss
        # 5. Results, once.
        if NEED_GRAD:
            if RECOMPUTE:
                # A 1 that the compiler cannot know to be 1: it would keep the exponentials it has seen, and spill.
                unit = tl.load(constants_ptr + 5).to(dtype)
                g = tl.exp(scale * unit * x) * g_p + tl.exp(unit * x) * g_q
            else:
                g = p * g_p + q * g_q
            g = tl.where(c == label, g_label, g) - (x + z_max) * along - away
            g = tl.where(valid, tl.where(finite, g, float("nan")), 0.0)
            tl.store(grad_ptr + row * grad_stride_b + c, g.to(grad_ptr.dtype.element_ty), mask=inside)
        _store_row(row, rows, tau, w, temperature, right, accepted, stats_ptr, flags_ptr)
        row += tl.num_programs(0)
    _finish(total, partials_ptr, ticket_ptr, loss_ptr, count)


@triton.jit
def _unpacked(words, half: tl.constexpr, unknown, dtype: tl.constexpr):
    """One half of a packed pair, as float32. ``unknown`` is 0, which the compiler cannot know: else it would keep the
    float32 values of the first use in registers for the later ones, twice as many as the packed ones."""
    bits = (words ^ unknown) >> (16 * half)
    return bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def packed_row_loss_kernel(
    logits_ptr,  # arguments as those of loss_kernel
    labels_ptr,
    distance_ptr,
    batch_ptr,
    constants_ptr,
    ticket_ptr,
    partials_ptr,
    loss_ptr,
    grad_ptr,
    stats_ptr,
    flags_ptr,
    rows,
    classes,
    logits_stride_b,
    logits_stride_c,
    labels_stride,
    grad_stride_b,
    ignore_index,
    RELEASED: tl.constexpr,
    HAS_T_WRONG: tl.constexpr,
    SMOOTH: tl.constexpr,
    WARMUP: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    CHUNKS: tl.constexpr,
    HALF: tl.constexpr,
):
    """A row of half-precision logits held in registers as pairs, in chunks of 2 HALF. logits_stride_c is 1."""
    dtype = stats_ptr.dtype.element_ty
    stored = logits_ptr.dtype.element_ty
    d_min, spread, count, w_bar, inactive = _batch_terms(batch_ptr, dtype, RELEASED, WARMUP)
    c = tl.arange(0, HALF)
    total = tl.zeros((), tl.float64)
    row = tl.program_id(0).to(tl.int64)
    while row < rows:
        label = tl.load(labels_ptr + row * labels_stride)
        valid = label != ignore_index
        in_range = (label >= 0) & (label < classes)
        # 1. The row, once. All chunks but the last are full; `at` counts from 0 and is an int32.
        base = logits_ptr + row * logits_stride_b
        held = ()
        for i in tl.static_range(CHUNKS):
            at = 2 * i * HALF + c
            if i + 1 < CHUNKS:
                low = tl.load(base + at)
                high = tl.load(base + at + HALF)
            else:
                low = tl.load(base + at, mask=at < classes, other=0.0)
                high = tl.load(base + at + HALF, mask=at + HALF < classes, other=0.0)
            low_bits = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            held = held + (  # type: ignore[assignment]  # noqa: RUF005 (Triton has no unpacking)
                low_bits | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16),
            )
        z_label = tl.load(base + label, mask=valid & in_range, other=0.0).to(dtype)
        column = tl.where(in_range, label, -1).to(tl.int32)
        # 2. Largest logit, norm, right or not. Zeros from memory: see _unpacked; the masks' too would be kept.
        unknown = tl.load(constants_ptr + 6).to(tl.int32)
        largest = tl.full((HALF,), float("-inf"), dtype)
        squares = tl.zeros((HALF,), dtype)
        plain = tl.zeros((HALF,), dtype)
        infinite = tl.zeros((HALF,), tl.int32)
        before = tl.zeros((HALF,), tl.int32)
        for i in tl.static_range(CHUNKS):
            for half in tl.static_range(2):
                z = _unpacked(held[i], half, unknown, stored)
                at = (2 * i + half) * HALF + c
                inside = (at < classes + unknown) if i + 1 == CHUNKS else tl.full((HALF,), True, tl.int1)
                largest = tl.maximum(largest, tl.where(inside, z, float("-inf")))
                squares += z * z
                plain += z
                infinite |= (inside & ~(tl.abs(z) < float("inf"))).to(tl.int32)
                before |= (inside & (~(z <= z_label) | ((z == z_label) & (at < column + unknown)))).to(tl.int32)
        z_max = tl.max(largest, axis=0)
        norm = sqrt_exact(tl.sum(squares, axis=0))
        finite = tl.sum(infinite, axis=0) == 0
        right = valid & in_range & (tl.sum(before, axis=0) == 0)
        d = tl.load(distance_ptr + row).to(dtype)
        accepted, tau, w, temperature, share, scale = _row_scale(
            d, z_max, norm, finite, right, valid, d_min, spread, w_bar, inactive, constants_ptr,
            RELEASED, HAS_T_WRONG, WARMUP,
        )  # fmt: skip
        # 3. The sums of both cross-entropies.
        unknown = tl.load(constants_ptr + 7).to(tl.int32)
        p_sum = tl.zeros((HALF,), dtype)
        p_weighted = tl.zeros((HALF,), dtype)
        q_sum = tl.zeros((HALF,), dtype)
        for i in tl.static_range(CHUNKS):
            for half in tl.static_range(2):
                z = _unpacked(held[i], half, unknown, stored)
                at = (2 * i + half) * HALF + c
                inside = (at < classes + unknown) if i + 1 == CHUNKS else tl.full((HALF,), True, tl.int1)
                other = inside & (at != column + unknown)
                x = tl.where(inside, z - z_max, 0.0)
                p = tl.where(other, tl.exp(scale * x), 0.0)
                p_sum += p
                p_weighted += x * p
                q_sum += tl.where(other, tl.exp(x), 0.0)
        row_loss, g_p, g_q, g_label, along, away = _row_gradient(
            tl.sum(p_sum, axis=0), tl.sum(p_weighted, axis=0), tl.sum(q_sum, axis=0), z_label - z_max,
            tl.sum(plain, axis=0) / classes - z_max, scale, share, norm, finite, valid, count, constants_ptr, classes,
            SMOOTH,
        )  # fmt: skip
        total += row_loss
        # 4. The gradient, once.
        if NEED_GRAD:
            unknown = tl.load(constants_ptr + 8).to(tl.int32)
            out = grad_ptr + row * grad_stride_b
            for i in tl.static_range(CHUNKS):
                for half in tl.static_range(2):
                    z = _unpacked(held[i], half, unknown, stored)
                    at = (2 * i + half) * HALF + c
                    inside = (at < classes + unknown) if i + 1 == CHUNKS else tl.full((HALF,), True, tl.int1)
                    x = tl.where(inside, z - z_max, 0.0)
                    g = tl.exp(scale * x) * g_p + tl.exp(x) * g_q
                    g = tl.where(at == column + unknown, g_label, g) - z * along - away
                    g = tl.where(valid, tl.where(finite, g, float("nan")), 0.0)
                    tl.store(out + at, g.to(grad_ptr.dtype.element_ty), mask=inside)
        _store_row(row, rows, tau, w, temperature, right, accepted, stats_ptr, flags_ptr)
        row += tl.num_programs(0)
    _finish(total, partials_ptr, ticket_ptr, loss_ptr, count)


@triton.jit
def _scan_long_row(base, classes, stride, label, z_label, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Largest logit, norm, whether all are finite, whether the label comes first, and the sum: one pass over blocks."""
    c = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), dtype)
    squares = tl.zeros((BLOCK,), dtype)
    plain = tl.zeros((BLOCK,), dtype)
    infinite = tl.zeros((BLOCK,), tl.int32)
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, classes, BLOCK):
        at = start + c
        inside = at < classes
        z = tl.load(base + at.to(tl.int64) * stride, mask=inside, other=0.0).to(dtype)
        largest = tl.maximum(largest, tl.where(inside, z, float("-inf")))
        squares += z * z
        plain += z
        infinite |= (inside & ~(tl.abs(z) < float("inf"))).to(tl.int32)
        before |= (inside & (~(z <= z_label) | ((z == z_label) & (at < label)))).to(tl.int32)
    return (
        tl.max(largest, axis=0),
        sqrt_exact(tl.sum(squares, axis=0)),
        tl.sum(infinite, axis=0) == 0,
        tl.sum(before, axis=0) == 0,
        tl.sum(plain, axis=0),
    )


@triton.jit
def _sum_long_row(base, classes, stride, label, z_max, scale, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over the other classes of exp(scale x), x exp(scale x) and exp(x), with x = z - z_max: one pass."""
    c = tl.arange(0, BLOCK)
    p_sum = tl.zeros((BLOCK,), dtype)
    p_weighted = tl.zeros((BLOCK,), dtype)
    q_sum = tl.zeros((BLOCK,), dtype)
    for start in range(0, classes, BLOCK):
        at = start + c.to(tl.int64)
        inside = at < classes
        z = tl.load(base + at * stride, mask=inside, other=0.0).to(dtype)
        other = inside & (at != label)
        x = tl.where(inside, z - z_max, 0.0)
        p = tl.where(other, tl.exp(scale * x), 0.0)
        p_sum += p
        p_weighted += x * p
        q_sum += tl.where(other, tl.exp(x), 0.0)
    return tl.sum(p_sum, axis=0), tl.sum(p_weighted, axis=0), tl.sum(q_sum, axis=0)


@triton.jit
def _store_long_gradient(
    base, out, classes, stride, label, valid, finite, z_max, scale, g_p, g_q, g_label, along, away,
    dtype: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of one row, one pass; see _row_gradient for its terms."""
    c = tl.arange(0, BLOCK)
    for start in range(0, classes, BLOCK):
        at = start + c.to(tl.int64)
        inside = at < classes
        z = tl.load(base + at * stride, mask=inside, other=0.0).to(dtype)
        x = tl.where(inside, z - z_max, 0.0)
        g = tl.exp(scale * x) * g_p + tl.exp(x) * g_q
        g = tl.where(at == label, g_label, g) - z * along - away
        g = tl.where(valid, tl.where(finite, g, float("nan")), 0.0)
        tl.store(out + at, g.to(out.dtype.element_ty), mask=inside)


@triton.jit
def long_row_loss_kernel(
    logits_ptr,  # arguments as those of loss_kernel
    labels_ptr,
    distance_ptr,
    batch_ptr,
    constants_ptr,
    ticket_ptr,
    partials_ptr,
    loss_ptr,
    grad_ptr,
    stats_ptr,
    flags_ptr,
    rows,
    classes,
    logits_stride_b,
    logits_stride_c,
    labels_stride,
    grad_stride_b,
    ignore_index,
    RELEASED: tl.constexpr,
    HAS_T_WRONG: tl.constexpr,
    SMOOTH: tl.constexpr,
    WARMUP: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype = stats_ptr.dtype.element_ty
    d_min, spread, count, w_bar, inactive = _batch_terms(batch_ptr, dtype, RELEASED, WARMUP)
    total = tl.zeros((), tl.float64)
    row = tl.program_id(0).to(tl.int64)
    if row < rows:  # a program a row; the one program of no rows has none
        label = tl.load(labels_ptr + row * labels_stride)
        valid = label != ignore_index
        in_range = (label >= 0) & (label < classes)
        base = logits_ptr + row * logits_stride_b
        z_label = tl.load(base + label * logits_stride_c, mask=valid & in_range, other=0.0).to(dtype)
        # First read: largest logit, norm, right or not.
        z_max, norm, finite, first, plain = _scan_long_row(base, classes, logits_stride_c, label, z_label, dtype, BLOCK)
        right = valid & in_range & first
        d = tl.load(distance_ptr + row).to(dtype)
        accepted, tau, w, temperature, share, scale = _row_scale(
            d, z_max, norm, finite, right, valid, d_min, spread, w_bar, inactive, constants_ptr,
            RELEASED, HAS_T_WRONG, WARMUP,
        )  # fmt: skip
        # Second read: the sums of both cross-entropies.
        p_sum, p_weighted, q_sum = _sum_long_row(base, classes, logits_stride_c, label, z_max, scale, dtype, BLOCK)
        row_loss, g_p, g_q, g_label, along, away = _row_gradient(
            p_sum, p_weighted, q_sum, z_label - z_max, plain / classes - z_max, scale, share, norm, finite, valid,
            count, constants_ptr, classes, SMOOTH,
        )  # fmt: skip
        total += row_loss
        # Third read: the gradient.
        if NEED_GRAD:
            _store_long_gradient(
                base, grad_ptr + row * grad_stride_b, classes, logits_stride_c, label, valid, finite, z_max, scale,
                g_p, g_q, g_label, along, away, dtype, BLOCK,
            )  # fmt: skip
        _store_row(row, rows, tau, w, temperature, right, accepted, stats_ptr, flags_ptr)
    _finish(total, partials_ptr, ticket_ptr, loss_ptr, count)


@triton.jit
def batch_sums_kernel(
    logits_ptr,  # (B, C)
    labels_ptr,  # (B,) int64
    distance_ptr,  # (B,)
    batch_ptr,  # (6,) float64; the last three are written
    constants_ptr,  # (9,) float64: loss_constants
    ticket_ptr,  # (1,) int32, 0 before and after
    partials_ptr,  # (3, programs) float64
    rows,
    classes,
    logits_stride_b,
    logits_stride_c,
    labels_stride,
    ignore_index,
    FLOAT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    threshold = tl.load(constants_ptr + 3).to(dtype)
    n_accepted = tl.zeros((), tl.float64)
    n_one = tl.zeros((), tl.float64)
    sum_distance = tl.zeros((), tl.float64)
    row = tl.program_id(0).to(tl.int64)
    while row < rows:
        label = tl.load(labels_ptr + row * labels_stride)
        valid = label != ignore_index
        in_range = (label >= 0) & (label < classes)
        base = logits_ptr + row * logits_stride_b
        z_label = tl.load(base + label * logits_stride_c, mask=valid & in_range, other=0.0).to(dtype)
        z_max, norm, finite, first, _ = _scan_long_row(base, classes, logits_stride_c, label, z_label, dtype, BLOCK)
        right = valid & in_range & first
        accepted = right & finite & (z_max / (norm + NORM_EPS) > threshold)
        d = tl.load(distance_ptr + row).to(tl.float64)
        weighted = right & (tl.abs(d) < float("inf"))
        n_accepted += tl.where(accepted, 1.0, 0.0)
        n_one += tl.where(valid & (weighted == 0), 1.0, 0.0)
        sum_distance += tl.where(weighted, d, 0.0)
        row += tl.num_programs(0)
    programs = tl.num_programs(0)
    pid = tl.program_id(0)
    tl.store(partials_ptr + pid, n_accepted)
    tl.store(partials_ptr + programs + pid, n_one)
    tl.store(partials_ptr + 2 * programs + pid, sum_distance)
    if is_last(ticket_ptr, programs):
        for k in range(3):
            tl.store(batch_ptr + 3 + k, _sum_in_order(partials_ptr + k * programs, programs))


def programs_of(rows: int, num_warps: int, target: Target) -> int:
    """As many programs as run at once at 64 registers a thread (32 warps of 32 a multiprocessor), or one a row; at
    least one, which writes the loss of no rows. (Not yet tuned on a GPU.)"""
    at_once = max(1, 1024 // (num_warps * target.warp_size))
    return max(1, min(rows, at_once * target.multiprocessors))


def loss_constants(
    device: torch.device, t_min: float, t_max: float, t_wrong: float | None, threshold: float, smoothing: float
) -> Tensor:
    """(9,) float64: the numbers a user chooses, then a 1 and three 0s that the compiler must not know."""
    wrong = 0.0 if t_wrong is None else t_wrong
    return constants_on(device, t_min, t_max - t_min, wrong, threshold, smoothing, 1.0, 0.0, 0.0, 0.0)


def plan_loss(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    batch: Tensor,
    ticket: Tensor,
    constants: Tensor,
    *,
    variant: str,
    has_t_wrong: bool,
    smooth: bool,
    ignore_index: int,
    warmup: bool,
    need_grad: bool,
    target: Target,
    inplace: bool = False,
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The launch and what it fills: loss, gradient, (typicalness, weight, temperature), (right, accepted)."""
    rows, classes = logits.shape
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # float16 would lose small gradients before a gradient scaler multiplies them: kept in float32.
    stored = wide if logits.dtype == torch.float16 else logits.dtype
    loss = logits.new_empty((), dtype=wide)
    grad = logits if inplace else logits.new_empty((rows, classes) if need_grad else (0,), dtype=stored)
    stats = logits.new_empty((3, rows), dtype=wide)
    flags = logits.new_empty((2, rows), dtype=torch.bool)
    config = loss_config(classes, logits.dtype, target, logits.stride(1) == 1)
    programs = max(1, rows) if config.path == "blocks" else programs_of(rows, config.num_warps, target)
    arguments: dict[str, Any] = {
        "logits_ptr": logits,
        "labels_ptr": labels,
        "distance_ptr": distance,
        "batch_ptr": batch,
        "constants_ptr": constants,
        "ticket_ptr": ticket,
        "partials_ptr": batch.new_empty(programs),
        "loss_ptr": loss,
        "grad_ptr": grad,
        "stats_ptr": stats,
        "flags_ptr": flags,
        "rows": rows,
        "classes": classes,
        "logits_stride_b": logits.stride(0),
        "logits_stride_c": logits.stride(1),
        "labels_stride": labels.stride(0),
        "grad_stride_b": grad.stride(0),
        "ignore_index": ignore_index,
    }
    constexprs: dict[str, Any] = {
        "RELEASED": variant == "released",
        "HAS_T_WRONG": has_t_wrong,
        "SMOOTH": smooth,
        "WARMUP": warmup,
        "NEED_GRAD": need_grad,
    }
    if config.path == "one block":
        kernel = loss_kernel
        constexprs |= {"RECOMPUTE": config.recompute, "BLOCK": config.block}
    elif config.path == "packed":
        kernel = packed_row_loss_kernel
        constexprs |= {"CHUNKS": cdiv(classes, config.block), "HALF": config.block // 2}
    else:
        kernel = long_row_loss_kernel
        constexprs["BLOCK"] = config.block
    launch = Launch(kernel, (programs,), arguments, constexprs, config.num_warps, config.max_registers)
    return launch, (loss, grad, stats, flags)


def loss_forward(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    batch: Tensor,
    ticket: Tensor,
    *,
    variant: str,
    t_min: float,
    t_max: float,
    t_wrong: float | None,
    confidence_threshold: float,
    label_smoothing: float,
    ignore_index: int,
    warmup: bool,
    need_grad: bool,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean loss, its gradient, and the per-sample statistics.

    Args:
        logits: (B, C) floating point, any strides.
        labels: (B,) int64 in [0, C) or ``ignore_index``. Not checked: that would wait for the device. A label out of
            range reads nothing outside the logits and gives a meaningless loss.
        distance: (B,) floating point.
        batch: (6,) float64, ``reference.batch_summary``; the last three are read in variant ``released`` only.
        ticket: (1,) int32, zero; zero again afterwards.
        need_grad: whether to compute the gradient.
        inplace: write the gradient over the logits, which must be contiguous and not float16.

    Returns:
        loss (); gradient (B, C) in the logits' dtype (float32 for float16) or empty; typicalness, weight and
        temperature (3, B); right and accepted (2, B) bool. Floats are float32, float64 for float64 logits.
    """
    constants = loss_constants(logits.device, t_min, t_max, t_wrong, confidence_threshold, label_smoothing)
    launch, outputs = plan_loss(
        logits,
        labels,
        distance,
        batch,
        ticket,
        constants,
        variant=variant,
        has_t_wrong=t_wrong is not None,
        smooth=label_smoothing != 0,
        ignore_index=ignore_index,
        warmup=warmup,
        need_grad=need_grad,
        target=target_of(logits.device),
        inplace=inplace,
    )
    launch.run()
    return outputs


def plan_batch_sums(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    batch: Tensor,
    ticket: Tensor,
    constants: Tensor,
    ignore_index: int,
    target: Target,
) -> Launch:
    """The launch."""
    rows, classes = logits.shape
    block = min(SUMS_BLOCK, triton.next_power_of_2(classes))
    num_warps = warps_of(block, target)
    programs = programs_of(rows, num_warps, target)
    arguments = {
        "logits_ptr": logits,
        "labels_ptr": labels,
        "distance_ptr": distance,
        "batch_ptr": batch,
        "constants_ptr": constants,
        "ticket_ptr": ticket,
        "partials_ptr": batch.new_empty(3 * programs),
        "rows": rows,
        "classes": classes,
        "logits_stride_b": logits.stride(0),
        "logits_stride_c": logits.stride(1),
        "labels_stride": labels.stride(0),
        "ignore_index": ignore_index,
    }
    constexprs = {"FLOAT64": logits.dtype == torch.float64, "BLOCK": block}
    return Launch(batch_sums_kernel, (programs,), arguments, constexprs, num_warps)


def batch_sums(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    batch: Tensor,
    ticket: Tensor,
    *,
    confidence_threshold: float,
    ignore_index: int,
) -> None:
    """Complete ``batch`` (6,) with the sums that variant ``released`` needs: see ``reference.batch_summary``."""
    constants = loss_constants(logits.device, 0.0, 0.0, None, confidence_threshold, 0.0)
    plan_batch_sums(logits, labels, distance, batch, ticket, constants, ignore_index, target_of(logits.device)).run()


SCALE_BLOCK = 4096


@triton.jit
def scale_kernel(
    values_ptr,  # (size,) in and out
    factor_ptr,  # () floating point
    size,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if factor != 1:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        dtype = values_ptr.dtype.element_ty
        wide = tl.float64 if dtype == tl.float64 else tl.float32
        values = tl.load(values_ptr + at, mask=inside, other=0.0).to(wide)
        tl.store(values_ptr + at, (values * factor.to(wide)).to(dtype), mask=inside)


def plan_scale(values: Tensor, factor: Tensor) -> Launch:
    """The launch."""
    arguments = {"values_ptr": values, "factor_ptr": factor, "size": values.numel()}
    return Launch(scale_kernel, (cdiv(values.numel(), SCALE_BLOCK),), arguments, {"BLOCK": SCALE_BLOCK}, 8)


def scale(values: Tensor, factor: Tensor) -> None:
    """Multiply contiguous ``values`` by the scalar tensor ``factor``, in place; a factor of 1, which the device alone
    knows, moves no memory."""
    if values.numel():
        plan_scale(values, factor).run()
