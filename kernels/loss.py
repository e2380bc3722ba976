"""Logits to the TAL loss and its gradient (paper, equations 2 to 6).

The fewest bytes: each logit read once and each gradient element written once. While a row fits on chip
(``loss_config``), ``loss_kernel`` holds it in registers and does just that; wider rows go through
``long_row_loss_kernel``, which reads a row three times in blocks (norm and maximum; both sums; gradient), the second
and third time mostly from the L2 cache. Programs walk over rows; each leaves one partial sum, and the one that
finishes last adds them in order, so that the loss needs no second launch and does not depend on timing.

Variant ``released`` needs the mean weight of the batch before the loss of any row: ``batch_sums_kernel`` reads the
logits once more for it. A batch is described by six numbers (``reference.batch_summary``), so that they may as well
come from all ranks of a distributed run.

The label's own exponential is left out of the sums: the gradient of a confident row is -(sum of the others) / sum, which
p - 1 would round away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tal_fast.kernels.launch import Launch, Target, constants_on, target_of
from tal_fast.kernels.typicalness import is_last, sqrt_exact

NORM_EPS = tl.constexpr(1e-7)
RANGE_EPS = tl.constexpr(1e-8)

WIDEST_ROW = 16384
LONG_BLOCK = 4096


@dataclass(frozen=True)
class LossConfig:
    """How a row of ``classes`` logits is laid out."""

    block: int  # logits held at a time
    num_warps: int
    in_one_block: bool


def loss_config(classes: int, dtype: torch.dtype, target: Target) -> LossConfig:
    """One block for rows up to ``WIDEST_ROW``, blocks of ``LONG_BLOCK`` beyond; about 16 logits a thread.

    A row costs three registers a logit (z and both exponentials), so that 16 logits a thread stay far below the 64
    registers that 32 warps leave each; ``kernels/compile_check.py`` shows no spill on any target. float64 takes twice
    the registers and half the block. Not yet tuned on a GPU.
    """
    widest = WIDEST_ROW // 2 if dtype == torch.float64 else WIDEST_ROW
    block = triton.next_power_of_2(classes)
    in_one_block = block <= widest
    if not in_one_block:
        block = LONG_BLOCK
    most = 1024 // target.warp_size  # threads a program can have
    return LossConfig(block, max(1, min(most, block // (16 * target.warp_size))), in_one_block)


@triton.jit
def _batch_terms(batch_ptr, RELEASED: tl.constexpr, WARMUP: tl.constexpr):
    """From the batch's six numbers: smallest distance, range, divisor, mean weight (``released``), inactive."""
    d_min = tl.load(batch_ptr)
    d_max = tl.load(batch_ptr + 1)
    n_valid = tl.load(batch_ptr + 2)
    nothing = d_min > d_max  # no row has a distance: inf and -inf stand there
    d_min = tl.where(nothing, 0.0, d_min)
    d_max = tl.where(nothing, 0.0, d_max)
    spread = d_max - d_min + RANGE_EPS
    w_bar = tl.full((), 1.0, tl.float64)
    inactive = n_valid < 0  # false, as a tensor
    if RELEASED and not WARMUP:
        n_accepted = tl.load(batch_ptr + 3)
        n_one = tl.load(batch_ptr + 4)
        sum_distance = tl.load(batch_ptr + 5)
        inactive = n_accepted == n_valid
        # Typicalness is affine in the distance: its sum follows from the distances'.
        n_weighted = n_valid - n_one
        mean = (n_one + n_weighted - (sum_distance - n_weighted * d_min) / spread) / n_valid
        w_bar = tl.where(inactive | (n_weighted <= 0), 1.0, mean)
    return d_min, d_max, tl.where(n_valid > 0, n_valid, 1.0), w_bar, inactive


@triton.jit
def _row_terms(
    d, right, valid, d_min, d_max, inactive, constants_ptr, HAS_T_WRONG: tl.constexpr, WARMUP: tl.constexpr
):
    """Typicalness, weight and temperature of one row; all in d's type."""
    dtype = d.dtype
    t_min = tl.load(constants_ptr).to(dtype)
    t_range = tl.load(constants_ptr + 1).to(dtype)
    if WARMUP:
        tau = tl.full((), 1.0, dtype)
    else:
        measured = valid & (tl.abs(d) < float("inf")) & (inactive == 0)
        low = d_min.to(dtype)
        spread = d_max.to(dtype) - low + RANGE_EPS
        tau = tl.where(measured, 1.0 - (d - low) / spread, 1.0).to(dtype)
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
def _finish(total, partials_ptr, ticket_ptr, loss_ptr, count, PROGRAMS: tl.constexpr):
    """Leave this program's sum; the last program adds all sums in order and writes the mean."""
    programs = tl.num_programs(0)
    tl.store(partials_ptr + tl.program_id(0), total)
    if is_last(ticket_ptr, programs):
        i = tl.arange(0, PROGRAMS)
        parts = tl.load(partials_ptr + i, mask=i < programs, other=0.0, cache_modifier=".cg")
        tl.store(loss_ptr, (tl.sum(parts, axis=0) / count).to(loss_ptr.dtype.element_ty))


@triton.jit
def loss_kernel(
    logits_ptr,  # (B, C)
    labels_ptr,  # (B,) int64
    distance_ptr,  # (B,)
    batch_ptr,  # (6,) float64
    constants_ptr,  # (5,) float64: t_min, t_max - t_min, t_wrong, confidence threshold, label smoothing
    ticket_ptr,  # (1,) int32, 0 before and after
    partials_ptr,  # (programs,) float64
    loss_ptr,  # () out
    grad_ptr,  # (B, C) contiguous, out
    typicalness_ptr,  # (B,) out, as the next two
    weight_ptr,
    temperature_ptr,
    right_ptr,  # (B,) bool out, as the next
    accepted_ptr,
    rows,
    classes,
    logits_stride_b,
    logits_stride_c,
    labels_stride,
    ignore_index,
    RELEASED: tl.constexpr,
    HAS_T_WRONG: tl.constexpr,
    SMOOTH: tl.constexpr,
    WARMUP: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,  # a power of two, at least as many as there are
):
    dtype = typicalness_ptr.dtype.element_ty  # float32, or float64 for float64 logits
    d_min, d_max, count, w_bar, inactive = _batch_terms(batch_ptr, RELEASED, WARMUP)
    threshold = tl.load(constants_ptr + 3).to(dtype)
    smoothing = tl.load(constants_ptr + 4).to(dtype)
    inverse_count = (1.0 / count).to(dtype)
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
        # 2. Largest logit, its first place (a NaN counts as the largest, as in torch), norm.
        key = tl.where(inside, tl.where(z == z, z, float("inf")), float("-inf"))
        z_max = tl.max(key, axis=0)
        prediction = tl.argmax(key, axis=0, tie_break_left=True)
        finite = tl.max(tl.where(inside & (tl.abs(z) < float("inf")), 0, tl.where(inside, 1, 0)), axis=0) == 0
        norm = sqrt_exact(tl.sum(z * z, axis=0))
        right = valid & (prediction == label)
        accepted = right & finite & (z_max / (norm + NORM_EPS) > threshold)
        # 3. Typicalness, weight, temperature.
        d = tl.load(distance_ptr + row).to(dtype)
        tau, w, temperature = _row_terms(d, right, valid, d_min, d_max, inactive, constants_ptr, HAS_T_WRONG, WARMUP)
        share = w_bar.to(dtype) if RELEASED else w
        # 4. Both cross-entropies, from one set of registers.
        x = tl.where(inside, z - z_max, 0.0)
        x_label = z_label - z_max
        other = inside & (c != label)
        scale = temperature / (norm + NORM_EPS)
        p = tl.where(other, tl.exp(scale * x), 0.0)
        q = tl.where(other, tl.exp(x), 0.0)
        target_x = x_label
        if SMOOTH:
            target_x = (1.0 - smoothing) * x_label + smoothing * (tl.sum(x, axis=0) / classes)
        f_dir = share * scale * inverse_count
        f_ce = (1.0 - share) * inverse_count
        one = tl.full((), 1.0, dtype)
        l_dir, g_p, g_p_label, along = _losses(
            tl.sum(p, axis=0), tl.sum(x * p, axis=0), tl.exp(scale * x_label), x_label, target_x, scale, f_dir, share,
            norm, smoothing, True,
        )  # fmt: skip
        l_ce, g_q, g_q_label, _ = _losses(
            tl.sum(q, axis=0), tl.sum(q, axis=0), tl.exp(x_label), x_label, target_x, one, f_ce, 1.0 - share,
            norm, smoothing, False,
        )  # fmt: skip
        # Not finite: so is plain cross-entropy, or a logit is -inf and the direction is undefined.
        row_loss = tl.where(finite, l_dir + l_ce, float("nan"))
        row_loss = tl.where(valid, row_loss, 0.0)
        total += row_loss.to(tl.float64)
        # 5. Results, once.
        if NEED_GRAD:
            away = (f_dir + f_ce) * smoothing / classes
            g = tl.where(c == label, g_p_label + g_q_label, p * g_p + q * g_q) - z * along - away
            g = tl.where(valid, tl.where(finite, g, float("nan")), 0.0)
            tl.store(grad_ptr + row * classes + c, g.to(grad_ptr.dtype.element_ty), mask=inside)
        tl.store(typicalness_ptr + row, tau)
        tl.store(weight_ptr + row, w)
        tl.store(temperature_ptr + row, temperature)
        tl.store(right_ptr + row, right)
        tl.store(accepted_ptr + row, accepted)
        row += tl.num_programs(0)
    _finish(total, partials_ptr, ticket_ptr, loss_ptr, count, PROGRAMS)


@triton.jit
def _scan_long_row(base, classes, stride, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Largest logit, its first place, norm, whether all are finite, and the sum, in one pass over blocks."""
    c = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), dtype)
    place = tl.zeros((BLOCK,), tl.int64)
    squares = tl.zeros((BLOCK,), dtype)
    infinite = tl.zeros((BLOCK,), tl.int32)
    plain = tl.zeros((BLOCK,), dtype)
    for start in range(0, classes, BLOCK):
        at = start + c.to(tl.int64)
        inside = at < classes
        z = tl.load(base + at * stride, mask=inside, other=0.0).to(dtype)
        key = tl.where(inside, tl.where(z == z, z, float("inf")), float("-inf"))
        place = tl.where(key > largest, at, place)
        largest = tl.maximum(largest, key)
        squares += z * z
        plain += z
        infinite = tl.where(inside & (tl.abs(z) < float("inf")), infinite, tl.where(inside, 1, infinite))
    z_max = tl.max(largest, axis=0)
    first = tl.min(tl.where(largest == z_max, place, classes), axis=0)
    return z_max, first, sqrt_exact(tl.sum(squares, axis=0)), tl.max(infinite, axis=0) == 0, tl.sum(plain, axis=0)


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
    typicalness_ptr,
    weight_ptr,
    temperature_ptr,
    right_ptr,
    accepted_ptr,
    rows,
    classes,
    logits_stride_b,
    logits_stride_c,
    labels_stride,
    ignore_index,
    RELEASED: tl.constexpr,
    HAS_T_WRONG: tl.constexpr,
    SMOOTH: tl.constexpr,
    WARMUP: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    dtype = typicalness_ptr.dtype.element_ty
    d_min, d_max, count, w_bar, inactive = _batch_terms(batch_ptr, RELEASED, WARMUP)
    threshold = tl.load(constants_ptr + 3).to(dtype)
    smoothing = tl.load(constants_ptr + 4).to(dtype)
    inverse_count = (1.0 / count).to(dtype)
    c = tl.arange(0, BLOCK)
    total = tl.zeros((), tl.float64)
    row = tl.program_id(0).to(tl.int64)
    while row < rows:
        label = tl.load(labels_ptr + row * labels_stride)
        valid = label != ignore_index
        in_range = (label >= 0) & (label < classes)
        base = logits_ptr + row * logits_stride_b
        z_label = tl.load(base + label * logits_stride_c, mask=valid & in_range, other=0.0).to(dtype)
        # First read: largest logit, norm.
        z_max, prediction, norm, finite, plain = _scan_long_row(base, classes, logits_stride_c, dtype, BLOCK)
        right = valid & (prediction == label)
        accepted = right & finite & (z_max / (norm + NORM_EPS) > threshold)
        d = tl.load(distance_ptr + row).to(dtype)
        tau, w, temperature = _row_terms(d, right, valid, d_min, d_max, inactive, constants_ptr, HAS_T_WRONG, WARMUP)
        share = w_bar.to(dtype) if RELEASED else w
        scale = temperature / (norm + NORM_EPS)
        x_label = z_label - z_max
        # Second read: the sums of both cross-entropies.
        p_sum = tl.zeros((BLOCK,), dtype)
        p_weighted = tl.zeros((BLOCK,), dtype)
        q_sum = tl.zeros((BLOCK,), dtype)
        for start in range(0, classes, BLOCK):
            at = start + c.to(tl.int64)
            inside = at < classes
            z = tl.load(base + at * logits_stride_c, mask=inside, other=0.0).to(dtype)
            other = inside & (at != label)
            x = tl.where(inside, z - z_max, 0.0)
            p = tl.where(other, tl.exp(scale * x), 0.0)
            p_sum += p
            p_weighted += x * p
            q_sum += tl.where(other, tl.exp(x), 0.0)
        target_x = x_label
        if SMOOTH:
            target_x = (1.0 - smoothing) * x_label + smoothing * (plain / classes - z_max)
        f_dir = share * scale * inverse_count
        f_ce = (1.0 - share) * inverse_count
        one = tl.full((), 1.0, dtype)
        l_dir, g_p, g_p_label, along = _losses(
            tl.sum(p_sum, axis=0), tl.sum(p_weighted, axis=0), tl.exp(scale * x_label), x_label, target_x, scale, f_dir,
            share, norm, smoothing, True,
        )  # fmt: skip
        l_ce, g_q, g_q_label, _ = _losses(
            tl.sum(q_sum, axis=0), tl.sum(q_sum, axis=0), tl.exp(x_label), x_label, target_x, one, f_ce, 1.0 - share,
            norm, smoothing, False,
        )  # fmt: skip
        row_loss = tl.where(finite, l_dir + l_ce, float("nan"))
        total += tl.where(valid, row_loss, 0.0).to(tl.float64)
        # Third read: the gradient.
        if NEED_GRAD:
            away = (f_dir + f_ce) * smoothing / classes
            for start in range(0, classes, BLOCK):
                at = start + c.to(tl.int64)
                inside = at < classes
                z = tl.load(base + at * logits_stride_c, mask=inside, other=0.0).to(dtype)
                x = tl.where(inside, z - z_max, 0.0)
                g = tl.exp(scale * x) * g_p + tl.exp(x) * g_q
                g = tl.where(at == label, g_p_label + g_q_label, g) - z * along - away
                g = tl.where(valid, tl.where(finite, g, float("nan")), 0.0)
                tl.store(grad_ptr + row * classes + at, g.to(grad_ptr.dtype.element_ty), mask=inside)
        tl.store(typicalness_ptr + row, tau)
        tl.store(weight_ptr + row, w)
        tl.store(temperature_ptr + row, temperature)
        tl.store(right_ptr + row, right)
        tl.store(accepted_ptr + row, accepted)
        row += tl.num_programs(0)
    _finish(total, partials_ptr, ticket_ptr, loss_ptr, count, PROGRAMS)


@triton.jit
def batch_sums_kernel(
    logits_ptr,  # (B, C)
    labels_ptr,  # (B,) int64
    distance_ptr,  # (B,)
    batch_ptr,  # (6,) float64; the last three are written
    constants_ptr,  # (5,) float64; the fourth is the confidence threshold
    ticket_ptr,  # (1,) int32, 0 before and after
    partials_ptr,  # (3, PROGRAMS) float64
    rows,
    classes,
    logits_stride_b,
    logits_stride_c,
    labels_stride,
    ignore_index,
    FLOAT64: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
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
        base = logits_ptr + row * logits_stride_b
        z_max, prediction, norm, finite, _ = _scan_long_row(base, classes, logits_stride_c, dtype, BLOCK)
        right = valid & (prediction == label)
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
    tl.store(partials_ptr + PROGRAMS + pid, n_one)
    tl.store(partials_ptr + 2 * PROGRAMS + pid, sum_distance)
    if is_last(ticket_ptr, programs):
        i = tl.arange(0, PROGRAMS)
        for k in tl.static_range(3):
            parts = tl.load(partials_ptr + k * PROGRAMS + i, mask=i < programs, other=0.0, cache_modifier=".cg")
            tl.store(batch_ptr + 3 + k, tl.sum(parts, axis=0))


def programs_of(rows: int, num_warps: int, target: Target) -> int:
    """As many programs as run at once at 64 registers a thread (32 warps of 32 a multiprocessor), or one a row; at
    least one, which writes the loss of no rows. (Not yet tuned on a GPU.)"""
    at_once = max(1, 1024 // (num_warps * target.warp_size))
    return max(1, min(rows, at_once * target.multiprocessors))


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
) -> tuple[Launch, tuple[Tensor, ...]]:
    """The launch and what it fills: loss, gradient, typicalness, weight, temperature, right, accepted."""
    rows, classes = logits.shape
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # float16 would lose small gradients before a gradient scaler multiplies them: kept in float32.
    stored = wide if logits.dtype == torch.float16 else logits.dtype
    loss = logits.new_empty((), dtype=wide)
    grad = logits.new_empty((rows, classes) if need_grad else (0,), dtype=stored)
    typicalness, weight, temperature = (logits.new_empty(rows, dtype=wide) for _ in range(3))
    right, accepted = (logits.new_empty(rows, dtype=torch.bool) for _ in range(2))
    config = loss_config(classes, logits.dtype, target)
    programs = programs_of(rows, config.num_warps, target)
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
        "typicalness_ptr": typicalness,
        "weight_ptr": weight,
        "temperature_ptr": temperature,
        "right_ptr": right,
        "accepted_ptr": accepted,
        "rows": rows,
        "classes": classes,
        "logits_stride_b": logits.stride(0),
        "logits_stride_c": logits.stride(1),
        "labels_stride": labels.stride(0),
        "ignore_index": ignore_index,
    }
    constexprs = {
        "RELEASED": variant == "released",
        "HAS_T_WRONG": has_t_wrong,
        "SMOOTH": smooth,
        "WARMUP": warmup,
        "NEED_GRAD": need_grad,
        "BLOCK": config.block,
        "PROGRAMS": triton.next_power_of_2(programs),
    }
    kernel = loss_kernel if config.in_one_block else long_row_loss_kernel
    outputs = (loss, grad, typicalness, weight, temperature, right, accepted)
    return Launch(kernel, (programs,), arguments, constexprs, config.num_warps), outputs


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
) -> tuple[Tensor, ...]:
    """The mean loss, its gradient, and the per-sample statistics.

    Args:
        logits: (B, C) floating point, any strides.
        labels: (B,) int64 in [0, C) or ``ignore_index``. Not checked: that would wait for the device. A label out of
            range reads nothing outside the logits and gives a meaningless loss.
        distance: (B,) floating point.
        batch: (6,) float64, ``reference.batch_summary``; the last three are read in variant ``released`` only.
        ticket: (1,) int32, zero; zero again afterwards.
        need_grad: whether to compute the gradient.

    Returns:
        loss (), gradient (B, C) in the logits' dtype (float32 for float16) or empty, typicalness, weight, temperature
        (B,), right and accepted (B,) bool. Floats are float32, float64 for float64 logits.
    """
    constants = constants_on(
        logits.device, t_min, t_max - t_min, 0.0 if t_wrong is None else t_wrong, confidence_threshold, label_smoothing
    )
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
    block = min(LONG_BLOCK, triton.next_power_of_2(classes))
    num_warps = max(1, min(1024 // target.warp_size, block // (16 * target.warp_size)))
    programs = programs_of(rows, num_warps, target)
    padded = triton.next_power_of_2(programs)
    arguments = {
        "logits_ptr": logits,
        "labels_ptr": labels,
        "distance_ptr": distance,
        "batch_ptr": batch,
        "constants_ptr": constants,
        "ticket_ptr": ticket,
        "partials_ptr": batch.new_empty(3 * padded),
        "rows": rows,
        "classes": classes,
        "logits_stride_b": logits.stride(0),
        "logits_stride_c": logits.stride(1),
        "labels_stride": labels.stride(0),
        "ignore_index": ignore_index,
    }
    constexprs = {"FLOAT64": logits.dtype == torch.float64, "BLOCK": block, "PROGRAMS": padded}
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
    constants = constants_on(logits.device, 0.0, 0.0, 0.0, confidence_threshold, 0.0)
    plan_batch_sums(
        logits, labels, distance, batch, ticket, constants, ignore_index, target_of(logits.device)
    ).run()
