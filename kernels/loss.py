"""TAL loss and its gradient from logits (paper, equations 2 to 6).

While a row fits on chip (see ``loss_config``), each logit is read once and each gradient element written once:
``loss_kernel`` holds the row in registers as float32, ``packed_row_loss_kernel`` as pairs of half-precision values.
Wider rows take ``long_row_loss_kernel``, which reads a row three times in blocks (norm and maximum; exponential sums;
gradient), the second and third time mostly from the L2 cache. Each program stores one partial sum of the loss, and the
last program to finish adds them in order, so the loss needs no second launch and does not depend on timing.

Variant ``released`` needs the mean weight of the batch before the loss of any row; ``batch_sums_kernel`` reads the
logits once more for it. A batch is summarised by six numbers (``tal_fast.loss.reference.batch_summary``), which may
also cover all ranks of a distributed run.

The label's exponential is left out of the sums, because the gradient of a confident row at the label is
-(sum of the other exponentials) / (sum of all), which softmax - 1 would round to zero.

A row whose squares overflow (float32: logits beyond 1e19) counts as not finite, so that its loss is NaN; the
definition, which scales such rows, has a loss for it.

The three loss kernels are written out, signatures included: one launcher serves them, hence equal arguments, and they
differ in where a row is held. What does not depend on that is in functions of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from tal_fast.kernels.distance import is_last_program, sqrt_rn
from tal_fast.kernels.launch import Launch, Target, cdiv, device_constants, device_target

NORM_EPS = tl.constexpr(1e-7)  # added to a row's norm; reference.NORM_EPS
RANGE_EPS = tl.constexpr(1e-8)  # added to the batch's distance range; reference.RANGE_EPS

# Indices into the tensor of ``loss_constants``.
T_MIN, T_RANGE, T_WRONG, THRESHOLD, SMOOTHING, OPAQUE_ONE, OPAQUE_ZERO = (tl.constexpr(i) for i in range(7))

# Logits per iteration of a long row, 4 a thread: the largest block that spills nowhere (2,048: 8 to 16 bytes, 4,096: up
# to 56).
LONG_BLOCK = 512
SUMS_BLOCK = 1024  # logits per iteration of batch_sums_kernel
SCALE_BLOCK = 4096  # values per program of scale_kernel


@dataclass(frozen=True)
class LossConfig:
    """How a row of logits is held on chip."""

    path: Literal["one block", "packed", "blocks"]
    block: int  # logits held at a time; per chunk on path "packed"
    num_warps: int
    recompute: bool = False  # on path "one block": compute the exponentials twice instead of keeping them in registers
    max_registers: int | None = None  # per thread


@cache
def loss_config(classes: int, dtype: torch.dtype, target: Target, contiguous: bool) -> LossConfig:
    """Layout of rows of ``classes`` logits. Not yet tuned on a GPU.

    - One block: rows of up to 8,192 logits, or 16,384 in half precision where that does not spill.
    - Packed pairs: half-precision rows of up to 32,768 logits, where those do not spill.
    - Blocks: wider rows, and float64, which serves checks only.

    The limits come from the compile check, for the largest kernel (``released`` with label smoothing). In one block a
    logit takes three registers (its value and two exponentials), and addresses, masks and scalars some 30 a thread
    whatever the block, which favours few threads with many logits. Rows of 16,384 must compute their exponentials
    twice: that does not spill on sm_80 and sm_90, but spills 4 to 40 bytes on sm_100 and gfx942, which therefore take
    blocks; packed rows spill 16 to 32 bytes there. A packed logit takes half a register. Four exponentials a logit
    still keep pace with memory, at 16 per clock and multiprocessor.

    ``contiguous`` says whether the logits of a row are adjacent in memory, which packed rows require.
    """
    block = triton.next_power_of_2(classes)
    if dtype.itemsize == 2 and target.holds_wide_rows and contiguous and 16384 < classes <= 32768:
        # 16 warps of 64 registers (two programs per multiprocessor) spill at 32,768 logits; 32 warps do not.
        if classes <= 22528:
            return LossConfig("packed", 2048, 16, max_registers=64)
        return LossConfig("packed", 4096, 32)
    widest = 16384 if dtype.itemsize == 2 and target.holds_wide_rows else 8192
    if block > widest or dtype == torch.float64:
        block = min(block, LONG_BLOCK)
        return LossConfig("blocks", block, num_warps_for(block, target))
    return LossConfig("one block", block, num_warps_for(block, target), block > 8192)


def num_warps_for(block: int, target: Target) -> int:
    """Number of warps for a block: 4 logits a thread up to 1,024 logits, 16 up to 8,192, 32 beyond."""
    logits = 4 if block <= 1024 else 16 if block <= 8192 else 32
    return max(1, block // (logits * target.warp_size))


@triton.jit
def _batch_terms(summary_ptr, dtype: tl.constexpr, RELEASED: tl.constexpr, WARMUP: tl.constexpr):
    """Smallest distance, distance range, loss divisor, mean weight (``released``) and whether typicalness is inactive.

    ``summary_ptr`` is the (6,) float64 summary. Differences are taken in float64 and divisions in ``dtype``, because a
    float64 division is a subroutine that needs a stack.
    """
    low = tl.load(summary_ptr)
    high = tl.load(summary_ptr + 1)
    n_valid = tl.load(summary_ptr + 2)
    no_distance = low > high  # inf and -inf: no row has a distance
    low = tl.where(no_distance, 0.0, low)
    high = tl.where(no_distance, 0.0, high)
    d_min = low.to(dtype)
    spread = high.to(dtype) - d_min + RANGE_EPS
    count = tl.where(n_valid > 0, n_valid, 1.0).to(dtype)
    w_bar = tl.full((), 1.0, dtype)
    inactive = n_valid < 0  # always false, as a tensor
    if RELEASED and not WARMUP:
        n_one = tl.load(summary_ptr + 4)
        inactive = tl.load(summary_ptr + 3) == n_valid
        # Typicalness is affine in the distance, so its sum follows from the sum of the distances.
        n_weighted = n_valid - n_one
        above = (tl.load(summary_ptr + 5) - n_weighted * low).to(dtype)
        mean = (n_valid.to(dtype) - above / spread) / count
        w_bar = tl.where(inactive | (n_weighted <= 0), 1.0, mean)
    return d_min, spread, count, w_bar, inactive


@triton.jit
def _sample_terms(
    d, correct, valid, d_min, spread, inactive, constants_ptr, HAS_T_WRONG: tl.constexpr, WARMUP: tl.constexpr
):
    """Typicalness, weight and temperature of one row, in the dtype of its distance ``d``."""
    dtype = d.dtype
    t_min = tl.load(constants_ptr + T_MIN).to(dtype)
    t_range = tl.load(constants_ptr + T_RANGE).to(dtype)
    if WARMUP:
        tau = tl.full((), 1.0, dtype)
    else:
        measured = valid & (tl.abs(d) < float("inf")) & (inactive == 0)
        tau = tl.where(measured, 1.0 - (d - d_min) / spread, 1.0).to(dtype)
    temperature = t_min + (1.0 - tau) * t_range
    if HAS_T_WRONG:
        temperature = tl.where(correct | (valid == 0), temperature, tl.load(constants_ptr + T_WRONG).to(dtype))
    weight = tl.where(valid, tl.where(correct, tau, 1.0), 0.0).to(dtype)
    return tau, weight, temperature


@triton.jit
def _log_sum_exp(others, at_label):
    """log(others + at_label), also accurate where at_label is 1 and others is tiny (``tl`` has no log1p)."""
    series = others * (1.0 - others * (0.5 - others / 3.0))  # error x^4 / 4: 2.5e-13 at 1e-3
    return tl.where((at_label == 1.0) & (others < 1e-3), series, tl.log(others + at_label))


@triton.jit
def _cross_entropy(
    others, weighted, at_label, x_label, target_x, scale, factor, weight, norm, smoothing, DIRECTION: tl.constexpr
):
    """One of the two cross-entropies of a row.

    Args:
        others: sum over the classes other than the label of e = exp(scale x), with x = z - max z.
        weighted: sum over the same classes of x e.
        at_label: exp(scale x) at the label.
        x_label: x at the label.
        target_x: mean of x under the (smoothed) target distribution.
        factor: upstream gradient of this cross-entropy times ``scale``.
        weight: weight of this cross-entropy in the loss.
        DIRECTION: whether this is the direction loss, whose gradient also has a component along z.

    Returns:
        Weighted loss, and the gradient's coefficients: of the exponentials, at the label, and of z.
    """
    total = others + at_label
    loss = weight * (_log_sum_exp(others, at_label) - scale * target_x)
    per_exponential = factor / total
    at_label_gradient = factor * (smoothing - others / total)
    z_coef = tl.zeros_like(others)
    if DIRECTION:
        # <z, p - target>; the shift by the maximum cancels because p - target sums to 0.
        k = (weighted + x_label * at_label) / total - target_x
        z_coef = tl.where(norm > 0, factor * k / (norm * (norm + NORM_EPS)), 0.0)
    return loss, per_exponential, at_label_gradient, z_coef


@triton.jit
def _ordered_sum(parts_ptr, count):
    """Sum, in a fixed order, of ``count`` float64 values stored by all programs of this launch."""
    total = tl.zeros((256,), tl.float64)
    for start in range(0, count, 256):
        i = start + tl.arange(0, 256)
        # .cg reads from the L2 cache, where the other programs' stores are.
        total += tl.load(parts_ptr + i, mask=i < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


@triton.jit
def _write_mean_loss(total, partials_ptr, ticket_ptr, loss_ptr, count):
    """Store this program's partial sum; the last program adds all of them in order and writes the mean loss."""
    programs = tl.num_programs(0)
    tl.store(partials_ptr + tl.program_id(0), total)
    if is_last_program(ticket_ptr, programs):
        tl.store(loss_ptr, _ordered_sum(partials_ptr, programs).to(loss_ptr.dtype.element_ty) / count)


@triton.jit
def _row_weights(
    d, z_max, norm, finite, correct, valid, d_min, spread, w_bar, inactive, constants_ptr,
    RELEASED: tl.constexpr, HAS_T_WRONG: tl.constexpr, WARMUP: tl.constexpr,
):  # fmt: skip
    """Accepted flag, typicalness, weight, temperature, weight of the direction loss, and scale of its exponents.

    ``d``, ``z_max``, ``norm``, ``finite``, ``correct`` and ``valid`` describe the row; the rest the batch.
    """
    dtype = d.dtype
    accepted = correct & finite & (z_max / (norm + NORM_EPS) > tl.load(constants_ptr + THRESHOLD).to(dtype))
    tau, w, temperature = _sample_terms(d, correct, valid, d_min, spread, inactive, constants_ptr, HAS_T_WRONG, WARMUP)
    dir_weight = w_bar if RELEASED else w
    return accepted, tau, w, temperature, dir_weight, temperature / (norm + NORM_EPS)


@triton.jit
def _row_loss_and_coefficients(
    p_sum, p_weighted, q_sum, x_label, mean_x, scale, dir_weight, norm, finite, valid, count, constants_ptr, classes,
    SMOOTH: tl.constexpr,
):  # fmt: skip
    """Loss of a row and the coefficients of its gradient, from its exponential sums.

    The gradient is g_p exp(scale x) + g_q exp(x) - z_coef z - smooth_term, with g_label instead of the first two terms
    at the label. ``smooth_term`` comes from label smoothing.

    Returns:
        Loss (float64), g_p, g_q, g_label, z_coef, smooth_term.
    """
    dtype = scale.dtype
    smoothing = tl.load(constants_ptr + SMOOTHING).to(dtype)
    target_x = x_label
    if SMOOTH:
        target_x = (1.0 - smoothing) * x_label + smoothing * mean_x
    inverse_count = 1.0 / count
    f_dir = dir_weight * scale * inverse_count
    f_ce = (1.0 - dir_weight) * inverse_count
    one = tl.full((), 1.0, dtype)
    l_dir, g_p, g_p_label, z_coef = _cross_entropy(
        p_sum, p_weighted, tl.exp(scale * x_label), x_label, target_x, scale, f_dir, dir_weight, norm, smoothing, True
    )
    l_ce, g_q, g_q_label, _ = _cross_entropy(
        q_sum, q_sum, tl.exp(x_label), x_label, target_x, one, f_ce, 1.0 - dir_weight, norm, smoothing, False
    )
    # Logits that are not finite give NaN: cross-entropy is not finite either, or, with a logit of -inf, the direction
    # is undefined.
    row_loss = tl.where(valid, tl.where(finite, l_dir + l_ce, float("nan")), 0.0)
    return row_loss.to(tl.float64), g_p, g_q, g_p_label + g_q_label, z_coef, (f_dir + f_ce) * smoothing / classes


@triton.jit
def _store_row_stats(row, rows, tau, w, temperature, correct, accepted, stats_ptr, flags_ptr):
    """Write the statistics of one row; ``stats_ptr`` is (3, rows) and ``flags_ptr`` (2, rows)."""
    tl.store(stats_ptr + row, tau)
    tl.store(stats_ptr + rows + row, w)
    tl.store(stats_ptr + 2 * rows + row, temperature)
    tl.store(flags_ptr + row, correct)
    tl.store(flags_ptr + rows + row, accepted)


@triton.jit
def loss_kernel(
    logits_ptr, labels_ptr, distance_ptr, summary_ptr, constants_ptr, ticket_ptr, partials_ptr, loss_ptr, grad_ptr,
    stats_ptr, flags_ptr, rows, classes, logits_stride_b, logits_stride_c, labels_stride, grad_stride_b, ignore_index,
    RELEASED: tl.constexpr, HAS_T_WRONG: tl.constexpr, SMOOTH: tl.constexpr, WARMUP: tl.constexpr,
    NEED_GRAD: tl.constexpr, RECOMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss, gradient and statistics of rows of up to BLOCK logits, held in registers.

    Pointers:
        logits: (rows, classes), strides logits_stride_b and logits_stride_c.
        labels, distance, summary, ticket: as for ``plan_loss``; the labels' stride is labels_stride.
        constants: (9,) float64 from ``loss_constants``.
        partials: (programs,) float64 scratch.
        loss: () out.
        grad: (rows, classes) out, stride grad_stride_b between rows; may be the logits.
        stats: (3, rows) out: typicalness, weight, temperature; its dtype is the compute dtype.
        flags: (2, rows) bool out: correct, accepted.
    """
    dtype = stats_ptr.dtype.element_ty
    d_min, spread, count, w_bar, inactive = _batch_terms(summary_ptr, dtype, RELEASED, WARMUP)
    c = tl.arange(0, BLOCK)
    inside = c < classes
    total = tl.zeros((), tl.float64)
    row = tl.program_id(0).to(tl.int64)
    while row < rows:
        label = tl.load(labels_ptr + row * labels_stride)
        valid = label != ignore_index
        in_range = (label >= 0) & (label < classes)
        # 1. Load the row.
        base = logits_ptr + row * logits_stride_b
        z = tl.load(base + c.to(tl.int64) * logits_stride_c, mask=inside, other=0.0).to(dtype)
        z_label = tl.load(base + label * logits_stride_c, mask=valid & in_range, other=0.0).to(dtype)
        # 2. Largest logit, norm, and whether the label is the arg-max: no class is larger, or as large and earlier. An
        #    arg-max with indices would take as many registers again as the logits.
        z_max = tl.max(tl.where(inside, z, float("-inf")), axis=0)
        norm = sqrt_rn(tl.sum(z * z, axis=0))
        finite = norm < float("inf")  # false for any NaN or infinity, too
        ahead = inside & (~(z <= z_label) | ((z == z_label) & (c < label)))
        correct = valid & in_range & (tl.sum(ahead.to(tl.int32), axis=0) == 0)
        # 3. Typicalness, weight, temperature.
        d = tl.load(distance_ptr + row).to(dtype)
        accepted, tau, w, temperature, dir_weight, scale = _row_weights(
            d, z_max, norm, finite, correct, valid, d_min, spread, w_bar, inactive, constants_ptr,
            RELEASED, HAS_T_WRONG, WARMUP,
        )  # fmt: skip
        # 4. Both cross-entropies, from the same registers.
        x = tl.where(inside, z - z_max, 0.0)
        other = inside & (c != label)
        p = tl.where(other, tl.exp(scale * x), 0.0)
        q = tl.where(other, tl.exp(x), 0.0)
        mean_x = tl.sum(x, axis=0) / classes if SMOOTH else z_max
        row_loss, g_p, g_q, g_label, z_coef, smooth_term = _row_loss_and_coefficients(
            tl.sum(p, axis=0), tl.sum(x * p, axis=0), tl.sum(q, axis=0), z_label - z_max, mean_x, scale, dir_weight,
            norm, finite, valid, count, constants_ptr, classes, SMOOTH,
        )  # fmt: skip
        total += row_loss
        # 5. Store the gradient and the statistics.
        if NEED_GRAD:
            if RECOMPUTE:
                # An opaque 1 makes the compiler compute the exponentials again; keeping them would spill.
                opaque_one = tl.load(constants_ptr + OPAQUE_ONE).to(dtype)
                g = tl.exp(scale * opaque_one * x) * g_p + tl.exp(opaque_one * x) * g_q
            else:
                g = p * g_p + q * g_q
            g = tl.where(c == label, g_label, g) - (x + z_max) * z_coef - smooth_term
            g = tl.where(valid, tl.where(finite, g, float("nan")), 0.0)
            tl.store(grad_ptr + row * grad_stride_b + c, g.to(grad_ptr.dtype.element_ty), mask=inside)
        _store_row_stats(row, rows, tau, w, temperature, correct, accepted, stats_ptr, flags_ptr)
        row += tl.num_programs(0)
    _write_mean_loss(total, partials_ptr, ticket_ptr, loss_ptr, count)


@triton.jit
def _unpack_half(words, half: tl.constexpr, opaque_zero, dtype: tl.constexpr):
    """One half of packed half-precision pairs, as float32.

    ``opaque_zero`` is zero, loaded from memory so that the compiler unpacks again at every use; it would otherwise keep
    the float32 values in registers, twice as many as the packed words take.
    """
    bits = (words ^ opaque_zero) >> (16 * half)
    return bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def packed_row_loss_kernel(
    logits_ptr, labels_ptr, distance_ptr, summary_ptr, constants_ptr, ticket_ptr, partials_ptr, loss_ptr, grad_ptr,
    stats_ptr, flags_ptr, rows, classes, logits_stride_b, logits_stride_c, labels_stride, grad_stride_b, ignore_index,
    RELEASED: tl.constexpr, HAS_T_WRONG: tl.constexpr, SMOOTH: tl.constexpr, WARMUP: tl.constexpr,
    NEED_GRAD: tl.constexpr, CHUNKS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Loss, gradient and statistics of half-precision rows, held in registers as packed pairs.

    A row is CHUNKS chunks of 2 HALF logits. Pointers as for ``loss_kernel``; logits_stride_c is 1.
    """
    dtype = stats_ptr.dtype.element_ty
    stored = logits_ptr.dtype.element_ty
    d_min, spread, count, w_bar, inactive = _batch_terms(summary_ptr, dtype, RELEASED, WARMUP)
    c = tl.arange(0, HALF)
    total = tl.zeros((), tl.float64)
    row = tl.program_id(0).to(tl.int64)
    while row < rows:
        label = tl.load(labels_ptr + row * labels_stride)
        valid = label != ignore_index
        in_range = (label >= 0) & (label < classes)
        # 1. Load the row. All chunks but the last are full.
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
        # 2. Largest logit, norm, and whether the label is the arg-max. The opaque zero also keeps the compiler from
        #    holding the masks in registers.
        opaque_zero = tl.load(constants_ptr + OPAQUE_ZERO).to(tl.int32)
        largest = tl.full((HALF,), float("-inf"), dtype)
        squares = tl.zeros((HALF,), dtype)
        z_sum = tl.zeros((HALF,), dtype)
        ahead = tl.zeros((HALF,), tl.int32)
        for i in tl.static_range(CHUNKS):
            for half in tl.static_range(2):
                z = _unpack_half(held[i], half, opaque_zero, stored)
                at = (2 * i + half) * HALF + c
                inside = (at < classes + opaque_zero) if i + 1 == CHUNKS else tl.full((HALF,), True, tl.int1)
                largest = tl.maximum(largest, tl.where(inside, z, float("-inf")))
                squares += z * z
                z_sum += z
                ahead |= (inside & (~(z <= z_label) | ((z == z_label) & (at < column + opaque_zero)))).to(tl.int32)
        z_max = tl.max(largest, axis=0)
        norm = sqrt_rn(tl.sum(squares, axis=0))
        finite = norm < float("inf")  # false for any NaN or infinity, too
        correct = valid & in_range & (tl.sum(ahead, axis=0) == 0)
        d = tl.load(distance_ptr + row).to(dtype)
        accepted, tau, w, temperature, dir_weight, scale = _row_weights(
            d, z_max, norm, finite, correct, valid, d_min, spread, w_bar, inactive, constants_ptr,
            RELEASED, HAS_T_WRONG, WARMUP,
        )  # fmt: skip
        # 3. Exponential sums of both cross-entropies.
        opaque_zero = tl.load(constants_ptr + OPAQUE_ZERO + 1).to(tl.int32)
        p_sum = tl.zeros((HALF,), dtype)
        p_weighted = tl.zeros((HALF,), dtype)
        q_sum = tl.zeros((HALF,), dtype)
        for i in tl.static_range(CHUNKS):
            for half in tl.static_range(2):
                z = _unpack_half(held[i], half, opaque_zero, stored)
                at = (2 * i + half) * HALF + c
                inside = (at < classes + opaque_zero) if i + 1 == CHUNKS else tl.full((HALF,), True, tl.int1)
                other = inside & (at != column + opaque_zero)
                x = tl.where(inside, z - z_max, 0.0)
                p = tl.where(other, tl.exp(scale * x), 0.0)
                p_sum += p
                p_weighted += x * p
                q_sum += tl.where(other, tl.exp(x), 0.0)
        row_loss, g_p, g_q, g_label, z_coef, smooth_term = _row_loss_and_coefficients(
            tl.sum(p_sum, axis=0), tl.sum(p_weighted, axis=0), tl.sum(q_sum, axis=0), z_label - z_max,
            tl.sum(z_sum, axis=0) / classes - z_max, scale, dir_weight, norm, finite, valid, count, constants_ptr,
            classes, SMOOTH,
        )  # fmt: skip
        total += row_loss
        # 4. Store the gradient and the statistics.
        if NEED_GRAD:
            opaque_zero = tl.load(constants_ptr + OPAQUE_ZERO + 2).to(tl.int32)
            out = grad_ptr + row * grad_stride_b
            for i in tl.static_range(CHUNKS):
                for half in tl.static_range(2):
                    z = _unpack_half(held[i], half, opaque_zero, stored)
                    at = (2 * i + half) * HALF + c
                    inside = (at < classes + opaque_zero) if i + 1 == CHUNKS else tl.full((HALF,), True, tl.int1)
                    x = tl.where(inside, z - z_max, 0.0)
                    g = tl.exp(scale * x) * g_p + tl.exp(x) * g_q
                    g = tl.where(at == column + opaque_zero, g_label, g) - z * z_coef - smooth_term
                    g = tl.where(valid, tl.where(finite, g, float("nan")), 0.0)
                    tl.store(out + at, g.to(grad_ptr.dtype.element_ty), mask=inside)
        _store_row_stats(row, rows, tau, w, temperature, correct, accepted, stats_ptr, flags_ptr)
        row += tl.num_programs(0)
    _write_mean_loss(total, partials_ptr, ticket_ptr, loss_ptr, count)


@triton.jit
def scan_long_row(base, classes, stride, label, z_label, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Largest logit, norm, whether all are finite, whether the label is the arg-max, and the sum, in one pass."""
    c = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), dtype)
    squares = tl.zeros((BLOCK,), dtype)
    z_sum = tl.zeros((BLOCK,), dtype)
    ahead = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, classes, BLOCK):
        at = start + c
        inside = at < classes
        z = tl.load(base + at.to(tl.int64) * stride, mask=inside, other=0.0).to(dtype)
        largest = tl.maximum(largest, tl.where(inside, z, float("-inf")))
        squares += z * z
        z_sum += z
        ahead |= (inside & (~(z <= z_label) | ((z == z_label) & (at < label)))).to(tl.int32)
    norm = sqrt_rn(tl.sum(squares, axis=0))
    return (
        tl.max(largest, axis=0),
        norm,
        norm < float("inf"),  # false for any NaN or infinity, too
        tl.sum(ahead, axis=0) == 0,
        tl.sum(z_sum, axis=0),
    )


@triton.jit
def exp_sums_long_row(base, classes, stride, label, z_max, scale, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over the classes other than the label of exp(scale x), x exp(scale x) and exp(x), with x = z - z_max."""
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
def store_long_row_gradient(
    base, out, classes, stride, label, valid, finite, z_max, scale, g_p, g_q, g_label, z_coef, smooth_term,
    dtype: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one row in one pass; see ``_row_loss_and_coefficients`` for its terms."""
    c = tl.arange(0, BLOCK)
    for start in range(0, classes, BLOCK):
        at = start + c.to(tl.int64)
        inside = at < classes
        z = tl.load(base + at * stride, mask=inside, other=0.0).to(dtype)
        x = tl.where(inside, z - z_max, 0.0)
        g = tl.exp(scale * x) * g_p + tl.exp(x) * g_q
        g = tl.where(at == label, g_label, g) - z * z_coef - smooth_term
        g = tl.where(valid, tl.where(finite, g, float("nan")), 0.0)
        tl.store(out + at, g.to(out.dtype.element_ty), mask=inside)


@triton.jit
def long_row_loss_kernel(
    logits_ptr, labels_ptr, distance_ptr, summary_ptr, constants_ptr, ticket_ptr, partials_ptr, loss_ptr, grad_ptr,
    stats_ptr, flags_ptr, rows, classes, logits_stride_b, logits_stride_c, labels_stride, grad_stride_b, ignore_index,
    RELEASED: tl.constexpr, HAS_T_WRONG: tl.constexpr, SMOOTH: tl.constexpr, WARMUP: tl.constexpr,
    NEED_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss, gradient and statistics of rows read in blocks, one program per row. Pointers as for ``loss_kernel``."""
    dtype = stats_ptr.dtype.element_ty
    d_min, spread, count, w_bar, inactive = _batch_terms(summary_ptr, dtype, RELEASED, WARMUP)
    total = tl.zeros((), tl.float64)
    row = tl.program_id(0).to(tl.int64)
    if row < rows:  # false in the one program of an empty batch
        label = tl.load(labels_ptr + row * labels_stride)
        valid = label != ignore_index
        in_range = (label >= 0) & (label < classes)
        base = logits_ptr + row * logits_stride_b
        z_label = tl.load(base + label * logits_stride_c, mask=valid & in_range, other=0.0).to(dtype)
        # 1. First read: largest logit, norm, and whether the label is the arg-max.
        z_max, norm, finite, is_argmax, z_sum = scan_long_row(
            base, classes, logits_stride_c, label, z_label, dtype, BLOCK
        )
        correct = valid & in_range & is_argmax
        d = tl.load(distance_ptr + row).to(dtype)
        accepted, tau, w, temperature, dir_weight, scale = _row_weights(
            d, z_max, norm, finite, correct, valid, d_min, spread, w_bar, inactive, constants_ptr,
            RELEASED, HAS_T_WRONG, WARMUP,
        )  # fmt: skip
        # 2. Second read: exponential sums of both cross-entropies.
        p_sum, p_weighted, q_sum = exp_sums_long_row(base, classes, logits_stride_c, label, z_max, scale, dtype, BLOCK)
        row_loss, g_p, g_q, g_label, z_coef, smooth_term = _row_loss_and_coefficients(
            p_sum, p_weighted, q_sum, z_label - z_max, z_sum / classes - z_max, scale, dir_weight, norm, finite, valid,
            count, constants_ptr, classes, SMOOTH,
        )  # fmt: skip
        total += row_loss
        # 3. Third read: the gradient.
        if NEED_GRAD:
            store_long_row_gradient(
                base, grad_ptr + row * grad_stride_b, classes, logits_stride_c, label, valid, finite, z_max, scale,
                g_p, g_q, g_label, z_coef, smooth_term, dtype, BLOCK,
            )  # fmt: skip
        _store_row_stats(row, rows, tau, w, temperature, correct, accepted, stats_ptr, flags_ptr)
    _write_mean_loss(total, partials_ptr, ticket_ptr, loss_ptr, count)


@triton.jit
def batch_sums_kernel(
    logits_ptr, labels_ptr, distance_ptr, summary_ptr, constants_ptr, ticket_ptr, partials_ptr, rows, classes,
    logits_stride_b, logits_stride_c, labels_stride, ignore_index,
    FLOAT64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Number of accepted rows, number of rows of weight 1, and sum of the other valid rows' distances.

    Pointers:
        logits, labels, distance, constants, ticket: as for ``loss_kernel``.
        summary: (6,) float64 summary; its last three values are written.
        partials: (3, programs) float64 scratch.
    """
    dtype: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    threshold = tl.load(constants_ptr + THRESHOLD).to(dtype)
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
        z_max, norm, finite, is_argmax, _ = scan_long_row(base, classes, logits_stride_c, label, z_label, dtype, BLOCK)
        correct = valid & in_range & is_argmax
        accepted = correct & finite & (z_max / (norm + NORM_EPS) > threshold)
        d = tl.load(distance_ptr + row).to(tl.float64)
        weighted = correct & (tl.abs(d) < float("inf"))
        n_accepted += tl.where(accepted, 1.0, 0.0)
        n_one += tl.where(valid & (weighted == 0), 1.0, 0.0)
        sum_distance += tl.where(weighted, d, 0.0)
        row += tl.num_programs(0)
    programs = tl.num_programs(0)
    pid = tl.program_id(0)
    tl.store(partials_ptr + pid, n_accepted)
    tl.store(partials_ptr + programs + pid, n_one)
    tl.store(partials_ptr + 2 * programs + pid, sum_distance)
    if is_last_program(ticket_ptr, programs):
        for k in range(3):
            tl.store(summary_ptr + 3 + k, _ordered_sum(partials_ptr + k * programs, programs))


def num_programs_for(rows: int, num_warps: int, target: Target) -> int:
    """Number of programs: one per row, or at most what runs at once at 64 registers a thread (1,024 threads per
    multiprocessor). An empty batch needs one, to write its loss. Not yet tuned on a GPU.
    """
    at_once = max(1, 1024 // (num_warps * target.warp_size))
    return max(1, min(rows, at_once * target.multiprocessors))


def loss_constants(
    device: torch.device, t_min: float, t_max: float, t_wrong: float | None, threshold: float, smoothing: float
) -> Tensor:
    """User-chosen numbers as a (9,) float64 tensor, followed by opaque constants that prevent constant folding.

    The opaque constants are a 1 and three zeros. Loaded from memory, they keep the compiler from reusing registers
    across the steps of a kernel where computing a value again is cheaper than holding it.
    """
    wrong = 0.0 if t_wrong is None else t_wrong
    return device_constants(device, t_min, t_max - t_min, wrong, threshold, smoothing, 1.0, 0.0, 0.0, 0.0)


def plan_loss(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    summary: Tensor,
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
    inplace: bool = False,
    *,
    target: Target,
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Launch of the loss kernel for this width, and its outputs.

    The options that are not listed are those of ``tal_fast.TALLoss``.

    Args:
        logits: (B, C) floating point, any strides.
        labels: (B,) int64 in [0, C) or ``ignore_index``. They are not checked, which would wait for the device: a label
            out of range reads nothing outside the logits and gives a meaningless loss.
        distance: (B,) floating point, distance to the queue.
        summary: (6,) float64, ``tal_fast.loss.reference.batch_summary``; the last three are read for ``released`` only.
        ticket: (1,) int32, zero before and after.
        warmup: whether typicalness is 1 for every sample.
        need_grad: whether to compute the gradient.
        inplace: write the gradient over the logits, which must be contiguous and not float16.
        target: the device.

    Returns:
        The launch, and ``(loss, gradient, stats, flags)``: a scalar; (B, C) in the logits' dtype (float32 for float16),
        empty without ``need_grad``; (3, B) typicalness, weight and temperature; (2, B) bool, correct and accepted.
        Floats are float32, or float64 for float64 logits.
    """
    rows, classes = logits.shape
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # float32 for float16 logits: float16 would lose small gradients before a gradient scaler multiplies them.
    stored = wide if logits.dtype == torch.float16 else logits.dtype
    loss = logits.new_empty((), dtype=wide)
    grad = logits if inplace else logits.new_empty((rows, classes) if need_grad else (0,), dtype=stored)
    stats = logits.new_empty((3, rows), dtype=wide)
    flags = logits.new_empty((2, rows), dtype=torch.bool)
    config = loss_config(classes, logits.dtype, target, logits.stride(1) == 1)
    programs = max(1, rows) if config.path == "blocks" else num_programs_for(rows, config.num_warps, target)
    constants = loss_constants(logits.device, t_min, t_max, t_wrong, confidence_threshold, label_smoothing)
    arguments = (
        logits, labels, distance, summary, constants, ticket, summary.new_empty(programs), loss, grad,
        stats, flags, rows, classes, *logits.stride(), labels.stride(0), grad.stride(0), ignore_index,
    )  # fmt: skip
    constexprs: dict[str, Any] = {
        "RELEASED": variant == "released",
        "HAS_T_WRONG": t_wrong is not None,
        "SMOOTH": label_smoothing != 0,
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


def loss_forward(logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean loss, its gradient, and the per-sample statistics; arguments and results as for ``plan_loss``."""
    launch, outputs = plan_loss(logits, *args, target=device_target(logits.device), **kwargs)
    launch.run()
    return outputs


def plan_batch_sums(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    summary: Tensor,
    ticket: Tensor,
    confidence_threshold: float,
    ignore_index: int,
    target: Target,
) -> Launch:
    """Launch of ``batch_sums_kernel``."""
    rows, classes = logits.shape
    block = min(SUMS_BLOCK, triton.next_power_of_2(classes))
    num_warps = num_warps_for(block, target)
    programs = num_programs_for(rows, num_warps, target)
    constants = loss_constants(logits.device, 0.0, 0.0, None, confidence_threshold, 0.0)
    arguments = (
        logits, labels, distance, summary, constants, ticket, summary.new_empty(3 * programs), rows, classes,
        *logits.stride(), labels.stride(0), ignore_index,
    )  # fmt: skip
    constexprs = {"FLOAT64": logits.dtype == torch.float64, "BLOCK": block}
    return Launch(batch_sums_kernel, (programs,), arguments, constexprs, num_warps)


def batch_sums(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    summary: Tensor,
    ticket: Tensor,
    confidence_threshold: float,
    ignore_index: int,
) -> None:
    """Fill in the last three values of ``summary`` (6,), which variant ``released`` needs before the loss.

    Arguments as for ``plan_loss``; ``tal_fast.loss.reference.batch_summary`` defines the values.
    """
    target = device_target(logits.device)
    plan_batch_sums(logits, labels, distance, summary, ticket, confidence_threshold, ignore_index, target).run()


@triton.jit
def scale_kernel(
    values_ptr, factor_ptr, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply values in place by a scalar; a factor of 1 moves no memory."""
    factor = tl.load(factor_ptr)
    if factor != 1:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        dtype = values_ptr.dtype.element_ty
        wide = tl.float64 if dtype == tl.float64 else tl.float32
        values = tl.load(values_ptr + at, mask=inside, other=0.0).to(wide)
        tl.store(values_ptr + at, (values * factor.to(wide)).to(dtype), mask=inside)


def plan_scale(values: Tensor, factor: Tensor) -> Launch:
    """Launch of ``scale_kernel``."""
    arguments = (values, factor, values.numel())
    return Launch(scale_kernel, (cdiv(values.numel(), SCALE_BLOCK),), arguments, {"BLOCK": SCALE_BLOCK}, 8)


def scale(values: Tensor, factor: Tensor) -> None:
    """Multiply contiguous ``values`` in place by the scalar tensor ``factor``, without reading it back to the host."""
    if values.numel():
        plan_scale(values, factor).run()
