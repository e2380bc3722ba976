"""TAL loss and its gradient from logits (paper, equations 2 to 6).

``loss_kernel`` holds a row on chip where it fits (see ``layout.loss_config``), so that each logit is read once and each
gradient element written once. A wider row is read three times in tiles (norm and maximum; exponential sums; gradient),
the second and third time from the L2 cache. Each program stores one partial sum of the loss, and the last program to
finish adds them in order, so the loss needs no second launch and does not depend on timing.

Variant ``released`` needs the mean weight of the batch before the loss of any row, from ``sums.py``. A batch is
summarised by seven numbers (``tal_fast.loss.reference.batch_summary``), which may also cover all ranks of a distributed
run.

A row whose squares overflow (float32: logits beyond 1e19) counts as not finite, so that its loss is NaN; the
definition, which scales such rows, has a loss for it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from tal_fast.kernels import layout
from tal_fast.kernels.distance import LOSS_TICKET, is_last_program
from tal_fast.kernels.launch import Launch, Target, cdiv, device_target, planner
from tal_fast.kernels.layout import SMOOTHING, T_MIN, T_RANGE, T_WRONG, THRESHOLD
from tal_fast.kernels.rows import (
    LN2,
    LOG2E,
    NORM_EPS,
    add3,
    add_exponentials,
    class_weights,
    edge_columns,
    exponentials,
    fetch_rows,
    load_chunk,
    masked_chunk,
    masked_logit,
    ordered_sum,
    other_logits,
    plain_chunks,
    scan_rows,
    store_chunk,
)

RANGE_EPS = tl.constexpr(1e-8)  # added to the batch's distance range; reference.RANGE_EPS
SCALE_BLOCK = 4096  # values per iteration of scale_kernel


@triton.jit
def _batch_terms(summary_ptr, dtype: tl.constexpr, RELEASED: tl.constexpr, WARMUP: tl.constexpr, MEAN: tl.constexpr):
    """Smallest distance, inverse distance range, inverse loss divisor, mean weight (``released``), and whether
    typicalness is inactive.

    ``summary_ptr`` is the (7,) float64 summary. Differences are taken in float64 and divisions in ``dtype``, because a
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
    inverse = tl.full((), 1.0, dtype)
    if MEAN:
        weight_sum = tl.load(summary_ptr + 6)
        weight_sum = tl.where(weight_sum > 0, weight_sum, float("nan"))  # as reference.mean_divisor
        inverse = 1.0 / tl.where(n_valid > 0, weight_sum, 1.0).to(dtype)
    w_bar = tl.full((), 1.0, dtype)
    inactive = n_valid < 0  # always false, as a tensor
    if RELEASED and not WARMUP:
        n_one = tl.load(summary_ptr + 4)
        inactive = tl.load(summary_ptr + 3) == n_valid
        # Typicalness is affine in the distance, so its sum follows from the sum of the distances.
        n_weighted = n_valid - n_one
        above = (tl.load(summary_ptr + 5) - n_weighted * low).to(dtype)
        count = tl.where(n_valid > 0, n_valid, 1.0).to(dtype)
        mean = (n_valid.to(dtype) - above / spread) / count
        w_bar = tl.where(inactive | (n_weighted <= 0), 1.0, mean)
    return d_min, spread, inverse, w_bar, inactive


@triton.jit
def _log_sum_exp(others, at_label):
    """log(others + at_label), also accurate where at_label is 1 and others is tiny (``tl`` has no log1p)."""
    series = others * (1.0 - others * (0.5 - others * (1.0 / 3.0)))  # error x^4 / 4: 2.5e-13 at 1e-3
    return tl.where((at_label == 1.0) & (others < 1e-3), series, tl.log(others + at_label))


@triton.jit
def loss_kernel(
    logits_ptr, labels_ptr, distance_ptr, summary_ptr, constants_ptr, class_weight_ptr, tickets_ptr, partials_ptr,
    loss_ptr, grad_ptr, stats_ptr, flags_ptr, rows, stride_b, stride_c, labels_stride, grad_stride_b, ignore_index,
    RELEASED: tl.constexpr, HAS_T_WRONG: tl.constexpr, SMOOTH: tl.constexpr, WARMUP: tl.constexpr,
    NEED_GRAD: tl.constexpr, MEAN: tl.constexpr, ROW_LOSS: tl.constexpr, WEIGHTED: tl.constexpr,
    CLASSES: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr,
    EDGES: tl.constexpr, HELD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Loss, gradient and statistics of ROWS rows at a time, held on chip (HELD) or read three times.

    Pointers:
        logits: (rows, CLASSES), strides stride_b and stride_c.
        labels, distance, summary, tickets: as for ``loss_forward``; the labels' stride is labels_stride.
        constants: (5,) float64 from ``loss_constants``.
        class_weight: (CLASSES,), contiguous, if WEIGHTED.
        partials: (programs,) float64 scratch.
        loss: () out, or (rows,) with ROW_LOSS.
        grad: (rows, CLASSES) out, stride grad_stride_b between rows; may be the logits.
        stats: (3, rows) out: typicalness, weight, temperature; its dtype is the compute dtype.
        flags: (2, rows) bool out: correct, accepted.

    Constants:
        V: logits in a vector of up to 16 bytes where rows are contiguous, else 1.
        EDGES: whether rows may begin or end within a vector. Without, stride_b, grad_stride_b and CLASSES are
            multiples of V; with, stride_b and grad_stride_b are equal.
    """
    dtype = stats_ptr.dtype.element_ty
    if not EDGES:  # what the compiler then knows lets it use vectors
        stride_b = stride_b // V * V
        grad_stride_b = grad_stride_b // V * V
    if V == 1:  # the logits of a row may lie apart; otherwise stride_c is 1
        stride_c = tl.cast(stride_c, tl.int64)
    d_min, spread, inverse, w_bar, inactive = _batch_terms(summary_ptr, dtype, RELEASED, WARMUP, MEAN)
    inverse_spread = 1.0 / spread
    t_min = tl.load(constants_ptr + T_MIN).to(dtype)
    t_range = tl.load(constants_ptr + T_RANGE).to(dtype)
    t_wrong = tl.load(constants_ptr + T_WRONG).to(dtype)
    threshold = tl.load(constants_ptr + THRESHOLD).to(dtype)
    smoothing = tl.load(constants_ptr + SMOOTHING).to(dtype)
    total = tl.zeros((ROWS,), tl.float64)

    # Rows that are held are fetched while those before are worked on, and their labels one turn earlier.
    step = tl.num_programs(0) * ROWS
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    next_label = tl.load(labels_ptr + row * labels_stride, mask=row < rows, other=ignore_index)
    ahead = fetch_rows(
        logits_ptr, distance_ptr, row, next_label, rows, stride_b, stride_c, ignore_index,
        CLASSES, CHUNKS, WIDTH, V, EDGES, HELD,
    )  # fmt: skip
    next_row = row + step
    next_label = tl.load(labels_ptr + next_row * labels_stride, mask=next_row < rows, other=ignore_index)
    for turn in range(tl.program_id(0) * ROWS, rows, step):  # noqa: B007
        valid, in_range, column, base, head, length, z_label, d, z_edge, held = ahead
        if HELD:
            ahead = fetch_rows(
                logits_ptr, distance_ptr, next_row, next_label, rows, stride_b, stride_c, ignore_index,
                CLASSES, CHUNKS, WIDTH, V, EDGES, HELD,
            )  # fmt: skip
            next_row += step
            next_label = tl.load(labels_ptr + next_row * labels_stride, mask=next_row < rows, other=ignore_index)
        present = row < rows
        z_label = z_label.to(dtype)
        d = d.to(dtype)
        c_y = tl.full((ROWS,), 1.0, dtype)
        if WEIGHTED:
            c_y = tl.load(class_weight_ptr + column, mask=in_range, other=0.0).to(dtype)

        # 1. Norm, largest logit, correct and accepted rows.
        largest, norm, correct, z_sum, c_sum = scan_rows(
            held, z_edge, base, z_label, column, in_range, valid, head, length, stride_c, class_weight_ptr,
            dtype, CLASSES, ROWS, CHUNKS, WIDTH, V, EDGES, HELD, UNROLL, SMOOTH, WEIGHTED,
        )  # fmt: skip
        finite = norm < float("inf")  # false for any NaN or infinity, too
        z_max = tl.maximum(largest, z_label)
        inverse_norm = 1.0 / (norm + NORM_EPS)
        accepted = correct & finite & (z_max * inverse_norm > threshold)

        # 2. Typicalness, weight, temperature.
        tau = tl.full((ROWS,), 1.0, dtype)
        if not WARMUP:
            measured = valid & (tl.abs(d) < float("inf")) & (inactive == 0)
            tau = tl.where(measured, 1.0 - (d - d_min) * inverse_spread, 1.0)
        temperature = t_min + (1.0 - tau) * t_range
        if HAS_T_WRONG:
            temperature = tl.where(correct | (valid == 0), temperature, t_wrong)
        w = tl.where(valid, tl.where(correct, tau, 1.0), 0.0)
        tl.store(stats_ptr + row, tau, mask=present)
        tl.store(stats_ptr + rows + row, w, mask=present)
        tl.store(stats_ptr + 2 * rows + row, temperature, mask=present)
        tl.store(flags_ptr + row, correct, mask=present)
        tl.store(flags_ptr + rows + row, accepted, mask=present)

        # 3. Sums of the exponentials of x = z - z_max without the label, from y = scale x log2(e).
        dir_weight = w
        if RELEASED:
            dir_weight = w * 0.0 + w_bar
        rate = temperature * inverse_norm  # the direction loss is the cross-entropy of rate z
        scale = rate * LOG2E
        ratio = (norm + NORM_EPS) / temperature
        p_sum = tl.zeros((ROWS, WIDTH), dtype)
        yp_sum = tl.zeros((ROWS, WIDTH), dtype)
        q_sum = tl.zeros((ROWS, WIDTH), dtype)
        at = tl.arange(0, WIDTH)[None, :]
        label_at = tl.where(in_range, column - head, -1)
        kept = ()
        if HELD:
            for i in tl.static_range(CHUNKS):
                others = other_logits(held[i].to(dtype), i * WIDTH, length, label_at, dtype, WIDTH, V)
                y = (others - z_max[:, None]) * scale[:, None]
                p, q, p_sum, yp_sum, q_sum = add_exponentials(y, ratio, p_sum, yp_sum, q_sum, dtype)
                kept = kept + ((others, p, q),)  # type: ignore[assignment]  # noqa: RUF005
        else:
            full, label_chunk, plain = plain_chunks(label_at, length, valid, WIDTH)
            for j in tl.range(0, plain, loop_unroll_factor=UNROLL):
                begin = (j + (j >= label_chunk).to(tl.int32)) * WIDTH
                z = tl.load(base[:, None] + (begin + at) * stride_c).to(dtype)
                y = (z - z_max[:, None]) * scale[:, None]
                p, q, p_sum, yp_sum, q_sum = add_exponentials(y, ratio, p_sum, yp_sum, q_sum, dtype)
            for j in range(2):
                begin, end = masked_chunk(j, full, label_chunk, length, WIDTH)
                z = load_chunk(base, begin, end, valid, stride_c, WIDTH, V).to(dtype)
                y = (other_logits(z, begin, end, label_at, dtype, WIDTH, V) - z_max[:, None]) * scale[:, None]
                p, q, p_sum, yp_sum, q_sum = add_exponentials(y, ratio, p_sum, yp_sum, q_sum, dtype)
        p_sum, yp_sum, q_sum = tl.reduce((p_sum, yp_sum, q_sum), 1, add3)
        if EDGES:
            edge_column, in_edge = edge_columns(head, length, CLASSES, V)
            edge_others = tl.where(in_edge & (edge_column != column[:, None]), z_edge.to(dtype), masked_logit(dtype))
            y_edge = (edge_others - z_max[:, None]) * scale[:, None]
            p_edge, q_edge = exponentials(y_edge, ratio[:, None], dtype)
            p_k, yp_k, q_k = tl.reduce((p_edge, y_edge * p_edge, q_edge), 1, add3)
            p_sum += p_k
            yp_sum += yp_k
            q_sum += q_k

        # 4. Loss of each row. The target puts (1 - smoothing) c_y on the label and smoothing c_k / C on every class k.
        x_label = z_label - z_max
        y_label = x_label * scale
        mass = c_y  # of the target
        target_x = c_y * x_label  # <target, x>
        spread_mass = c_y * 0.0
        if SMOOTH:
            spread_mass = spread_mass + smoothing
            spread_x = smoothing * (z_sum * (1.0 / CLASSES) - z_max)
            if WEIGHTED:
                spread_mass = smoothing * (c_sum * (1.0 / CLASSES))
                spread_x = smoothing * ((z_sum - c_sum * z_max) * (1.0 / CLASSES))
            mass = (1.0 - smoothing) * c_y + spread_mass
            target_x = (1.0 - smoothing) * target_x + spread_x
        p_label, q_label = exponentials(y_label, ratio, dtype)
        l_dir = mass * _log_sum_exp(p_sum, p_label) - rate * target_x
        l_ce = mass * _log_sum_exp(q_sum, q_label) - target_x
        # Logits that are not finite give NaN: cross-entropy is not finite either, or, with a logit of -inf, the
        # direction is undefined.
        row_loss = tl.where(finite, dir_weight * l_dir + (1.0 - dir_weight) * l_ce, float("nan"))
        row_loss = tl.where(valid, row_loss, 0.0)
        if ROW_LOSS:
            tl.store(loss_ptr + row, row_loss, mask=present)
        total += row_loss.to(tl.float64)

        # 5. Gradient g_p p + g_q q - z_coef z + constant; at the label in a store of its own.
        if NEED_GRAD:
            inverse_p = 1.0 / (p_sum + p_label)
            inverse_q = 1.0 / (q_sum + q_label)
            f_dir = tl.where(valid, dir_weight * inverse, 0.0) * rate
            f_ce = tl.where(valid, (1.0 - dir_weight) * inverse, 0.0)
            # <z, p - target>; the shift by the maximum cancels because p - target sums to 0.
            k = mass * (yp_sum + y_label * p_label) * (ratio * LN2) * inverse_p - target_x
            z_coef = tl.where(norm > 0, f_dir * k * inverse_norm / norm, 0.0)
            away = c_y * 0.0
            if SMOOTH:
                away = (f_dir + f_ce) * smoothing * (1.0 / CLASSES)
            g_label = f_dir * (spread_mass - mass * p_sum * inverse_p) + f_ce * (spread_mass - mass * q_sum * inverse_q)
            g_label -= z_label * z_coef + away * c_y
            known = finite | (valid == 0)
            g_label = tl.where(known, g_label, float("nan"))
            constant = tl.where(known, 0.0 if WEIGHTED else -away, float("nan"))
            g_p = f_dir * mass * inverse_p
            g_q = f_ce * mass * inverse_q
            out = row * grad_stride_b + head
            if EDGES:  # a multiple of V, as the row's offset is
                out = out // V * V
            out = grad_ptr + out
            if HELD:
                for i in tl.static_range(CHUNKS):
                    others, p, q = kept[i]
                    store_chunk(
                        others, p, q, out, i * WIDTH, head, length, present, g_p, g_q, z_coef, constant, away,
                        class_weight_ptr, dtype, WIDTH, V, SMOOTH and WEIGHTED,
                    )  # fmt: skip
            else:
                for begin in tl.range(0, tl.max(length, axis=0), WIDTH, loop_unroll_factor=UNROLL):
                    z = load_chunk(base, begin, length, valid, stride_c, WIDTH, V).to(dtype)
                    y = (z - z_max[:, None]) * scale[:, None]
                    p, q = exponentials(y, ratio[:, None], dtype)
                    store_chunk(
                        z, p, q, out, begin, head, length, present, g_p, g_q, z_coef, constant, away,
                        class_weight_ptr, dtype, WIDTH, V, SMOOTH and WEIGHTED,
                    )  # fmt: skip
            if EDGES:
                g = g_p[:, None] * p_edge + (
                    g_q[:, None] * q_edge + (constant[:, None] - z_coef[:, None] * edge_others)
                )
                if SMOOTH and WEIGHTED:
                    g -= away[:, None] * class_weights(class_weight_ptr, edge_column, in_edge, dtype)
                at_edge = edge_column - head[:, None]
                tl.store(out[:, None] + at_edge, g.to(grad_ptr.dtype.element_ty), mask=in_edge & present[:, None])
            tl.debug_barrier()  # the label's gradient is the last to be stored at its address
            tl.store(out + (column - head), g_label.to(grad_ptr.dtype.element_ty), mask=in_range)

        row += step
        if not HELD:
            ahead = fetch_rows(
                logits_ptr, distance_ptr, row, next_label, rows, stride_b, stride_c, ignore_index,
                CLASSES, CHUNKS, WIDTH, V, EDGES, HELD,
            )  # fmt: skip
            next_row += step
            next_label = tl.load(labels_ptr + next_row * labels_stride, mask=next_row < rows, other=ignore_index)
    if not ROW_LOSS:
        tl.store(partials_ptr + tl.program_id(0), tl.sum(total, axis=0))
        programs = tl.num_programs(0)
        if is_last_program(tickets_ptr + LOSS_TICKET, programs):
            loss = ordered_sum(partials_ptr, programs)
            tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty) * inverse)


@triton.jit
def scale_kernel(
    values_ptr, factor_ptr, out_ptr, size,
    IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values times a scalar; in place, a factor of 1 moves no memory."""
    factor = tl.load(factor_ptr)
    blocks = tl.cdiv(size, BLOCK)
    if IN_PLACE:
        blocks = tl.where(factor == 1, 0, blocks)
    dtype = values_ptr.dtype.element_ty
    wide: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + at, mask=at < size, other=0.0).to(wide)
        tl.store(out_ptr + at, (values * factor.to(wide)).to(out_ptr.dtype.element_ty), mask=at < size)


@planner
def plan_loss(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, aligned: bool, labels_stride: int,
    weighted: bool, released: bool, has_t_wrong: bool, smooth: bool, ignore_index: int, reduction: str, warmup: bool,
    need_grad: bool, inplace: bool, target: Target,
) -> Launch:  # fmt: skip
    """Launch of ``loss_kernel``; ``aligned`` is whether the logits begin at a multiple of 16 bytes."""
    rows, classes = shape
    grad_stride = stride[0] if inplace else classes
    v, edges = layout.vector_of(classes, dtype.itemsize, stride, aligned, grad_stride if need_grad else None)
    config = layout.loss_config(classes, dtype, v, edges, target.architecture)
    if smooth:  # takes more registers than the limits leave, and with class weights than a full tile does
        config = replace(config, unroll=1, max_registers=None)
        if weighted and config.held:
            block = triton.next_power_of_2(classes)
            width = min(block, 32 * v) if block <= 512 else block // 4
            config = layout.LossConfig(1, block // width, width, block <= 512, 1 if block <= 512 else 4, 4)
    programs = layout.num_programs_for(cdiv(rows, config.rows), config.programs, target)
    numbers = rows, *stride, labels_stride, grad_stride if need_grad else 1, ignore_index
    constants = {
        "RELEASED": released, "HAS_T_WRONG": has_t_wrong, "SMOOTH": smooth, "WARMUP": warmup, "NEED_GRAD": need_grad,
        "MEAN": reduction == "mean", "ROW_LOSS": reduction == "none", "WEIGHTED": weighted,
        **layout.constants_of(classes, v, edges, config),
    }  # fmt: skip
    return Launch(loss_kernel, (programs,), numbers, constants, config.num_warps, config.max_registers)


def loss_forward(
    logits: Tensor, labels: Tensor, distance: Tensor, summary: Tensor, tickets: Tensor, class_weight: Tensor | None,
    variant: str, t_min: float, t_max: float, t_wrong: float | None, confidence_threshold: float,
    label_smoothing: float, ignore_index: int, reduction: str, warmup: bool, need_grad: bool, inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, its gradient, and the per-sample statistics.

    The options that are not listed are those of ``tal_fast.TALLoss``.

    Args:
        logits: (B, C) floating point, any strides.
        labels: (B,) int64 in [0, C) or ``ignore_index``. They are not checked, which would wait for the device: a label
            out of range reads nothing outside the logits and gives a meaningless loss.
        distance: (B,) floating point, distance to the queue.
        summary: (7,) float64, ``tal_fast.loss.reference.batch_summary``; values 3 to 5 are read for ``released`` only.
        tickets: (3,) int32 from ``distance.statistics_distance``, zero before and after.
        class_weight: (C,) floating point, contiguous, or None.
        warmup: whether typicalness is 1 for every sample.
        need_grad: whether to compute the gradient.
        inplace: write the gradient over the logits, which must be contiguous and not float16.

    Returns:
        ``(loss, gradient, stats, flags)``: a scalar, or (B,) with reduction "none"; (B, C) in the logits' dtype
        (float32 for float16), empty without ``need_grad``; (3, B) typicalness, weight and temperature; (2, B) bool,
        correct and accepted. Floats are float32, or float64 for float64 logits.
    """
    shape, dtype, device = logits.shape, logits.dtype, logits.device
    rows = shape[0]
    launch = plan_loss(
        shape, logits.stride(), dtype, logits.data_ptr() % 16 == 0, labels.stride(0), class_weight is not None,
        variant == "released", t_wrong is not None, label_smoothing != 0, ignore_index, reduction, warmup, need_grad,
        inplace, device_target(device),
    )  # fmt: skip
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # float32 for float16 logits: float16 would lose small gradients before a gradient scaler multiplies them.
    stored = wide if dtype == torch.float16 else dtype
    loss = logits.new_empty((rows,) if reduction == "none" else (), dtype=wide)
    grad = logits if inplace else logits.new_empty(shape if need_grad else (0,), dtype=stored)
    stats = logits.new_empty((3, rows), dtype=wide)
    flags = labels.new_empty((2, rows), dtype=torch.bool)
    constants = layout.loss_constants(device, t_min, t_max, t_wrong, confidence_threshold, label_smoothing)
    launch.run(
        logits, labels, distance, summary, constants, constants if class_weight is None else class_weight, tickets,
        summary.new_empty(launch.grid[0]), loss, grad, stats, flags,
    )  # fmt: skip
    return loss, grad, stats, flags


@planner
def plan_scale(size: int, in_place: bool, target: Target) -> Launch:
    """Launch of ``scale_kernel``."""
    programs = min(cdiv(size, SCALE_BLOCK), 8 * target.multiprocessors)
    return Launch(scale_kernel, (programs,), (size,), {"IN_PLACE": in_place, "BLOCK": SCALE_BLOCK}, 8)


def scale(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous ``values`` times a scalar tensor, without reading it back to the host.

    In their own memory if the dtype is theirs, else in new memory: the product is rounded once.
    """
    out = values if dtype == values.dtype else torch.empty_like(values, dtype=dtype)
    if values.numel():
        plan_scale(values.numel(), out is values, device_target(values.device)).run(values, factor, out)
    return out
