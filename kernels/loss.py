"""TAL loss and its gradient from logits (paper, equations 2 to 6).

``loss_kernel`` holds a row on chip where it fits (see ``loss_config``), so that each logit is read once and each
gradient element written once. A wider row is read three times in tiles (norm and maximum; exponential sums; gradient),
the second and third time from the L2 cache. Each program stores one partial sum of the loss, and the last program to
finish adds them in order, so the loss needs no second launch and does not depend on timing.

Variant ``released`` needs the mean weight of the batch before the loss of any row; ``batch_sums_kernel`` reads the
logits once more for it. A batch is summarised by seven numbers (``tal_fast.loss.reference.batch_summary``), which may
also cover all ranks of a distributed run.

Rows are read in chunks of WIDTH logits, V of which make a vector in one thread. Where rows do not begin and end with an
aligned vector (EDGES), the logits before the first and after the last whole vector of a row are a small tile of their
own.

The label's exponential is left out of the sums, because the gradient of a confident row at the label is
-(sum of the other exponentials) / (sum of all), which softmax - 1 would round to zero.

A row whose squares overflow (float32: logits beyond 1e19) counts as not finite, so that its loss is NaN; the
definition, which scales such rows, has a loss for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tal_fast.kernels.distance import LOSS_TICKET, SUMS_TICKET, is_last_program, sqrt_rn
from tal_fast.kernels.launch import Launch, Target, cdiv, device_constants, device_target, planner, tuned_options

NORM_EPS = tl.constexpr(1e-7)  # added to a row's norm; reference.NORM_EPS
RANGE_EPS = tl.constexpr(1e-8)  # added to the batch's distance range; reference.RANGE_EPS
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Indices into the tensor of ``loss_constants``.
T_MIN, T_RANGE, T_WRONG, THRESHOLD, SMOOTHING = (tl.constexpr(i) for i in range(5))

PARTS = tl.constexpr(1024)  # partial sums added at a time
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
def _ordered_sum(parts_ptr, count):
    """Sum, in a fixed order, of ``count`` float64 values stored by all programs of this launch."""
    total = tl.zeros((PARTS,), tl.float64)
    for start in range(0, count, PARTS):
        i = start + tl.arange(0, PARTS)
        # .cg reads from the L2 cache, where the other programs' stores are.
        total += tl.load(parts_ptr + i, mask=i < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


@triton.jit
def add3(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _max_and_add(a, b, c, d):
    return tl.maximum(a, c), b + d


@triton.jit
def masked_logit(dtype: tl.constexpr):
    """Stands for the label's logit and for columns outside a row.

    It is below every logit of a row with a finite norm, its exponential is 0 at every scale of such a row, and its
    product with that 0 is 0, for temperatures from 3e-4 to 2e6.
    """
    if dtype == tl.float64:
        return -1e200
    else:
        return -1e25


@triton.jit
def exponentials(y, ratio, dtype: tl.constexpr):
    """exp(scale x) and exp(x) from y = scale x log2(e) and ratio = 1 / scale."""
    if dtype == tl.float64:
        return tl.exp(y * LN2), tl.exp(y * (ratio * LN2))
    else:
        return tl.exp2(y), tl.exp2(y * ratio)


@triton.jit
def class_weights(class_weight_ptr, column, inside, dtype: tl.constexpr):
    return tl.load(class_weight_ptr + column, mask=inside, other=0.0).to(dtype)


@triton.jit
def locate_rows(row, label, rows, stride_b, ignore_index, CLASSES: tl.constexpr, V: tl.constexpr, EDGES: tl.constexpr):
    """Whether rows are valid and their label in range; the label's column, 0 if not; offset and column of the first
    whole vector; and the number of logits in whole vectors.
    """
    valid = (row < rows) & (label != ignore_index)
    in_range = valid & (label >= 0) & (label < CLASSES)
    column = tl.where(in_range, label, 0).to(tl.int32)
    offset = row * stride_b
    head = tl.zeros_like(column)
    length = head + CLASSES
    if EDGES:
        head = ((V - offset % V) % V).to(tl.int32)
        length = (CLASSES - head) // V * V
        offset = (offset + (V - 1)) // V * V
    return valid, in_range, column, offset, head, length


@triton.jit
def load_chunk(base, begin, length, valid, stride_c, WIDTH: tl.constexpr, V: tl.constexpr):
    """WIDTH logits of each row from position ``begin``; 0 from ``length``."""
    at = begin + tl.arange(0, WIDTH)[None, :]
    # The same predicate for the V logits of a vector, so that they are one load.
    mask = (at // V * V < length[:, None]) & valid[:, None]
    return tl.load(base[:, None] + at * stride_c, mask=mask, other=0.0)


@triton.jit
def load_rows(base, length, valid, stride_c, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr):
    held = ()
    for i in tl.static_range(CHUNKS):
        chunk = load_chunk(base, i * WIDTH, length, valid, stride_c, WIDTH, V)
        held = held + (chunk,)  # type: ignore[assignment]  # noqa: RUF005 (Triton has no unpacking)
    return held


@triton.jit
def other_logits(z, begin, length, label_at, dtype: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr):
    """A chunk's logits with MASKED at the label and from ``length``."""
    at = tl.arange(0, WIDTH)[None, :]
    keep = (at != (label_at - begin)[:, None]) & ((begin + at) // V * V < length[:, None])
    return tl.where(keep, z, masked_logit(dtype))


@triton.jit
def edge_columns(head, length, CLASSES: tl.constexpr, V: tl.constexpr):
    """Columns before the first and after the last whole vector of each row (rows, 2 V), and which of them there are."""
    e = tl.arange(0, 2 * V)[None, :]
    column = tl.where(e < V, e, (head + length)[:, None] + (e - V))
    return column, tl.where(e < V, e < head[:, None], column < CLASSES)


@triton.jit
def add_scan(others, z, largest, squares):
    return tl.maximum(largest, others), squares + z * z


@triton.jit
def add_exponentials(y, ratio, p_sum, yp_sum, q_sum, dtype: tl.constexpr):
    """Both exponentials, and the sums with them."""
    p, q = exponentials(y, ratio[:, None], dtype)
    return p, q, p_sum + p, yp_sum + y * p, q_sum + q


@triton.jit
def plain_chunks(label_at, length, valid, WIDTH: tl.constexpr):
    """Number of a row's full chunks; which of them holds the label, or that number; and how many need no mask."""
    full = tl.max(length, axis=0) // WIDTH
    at = tl.max(label_at, axis=0)
    label_chunk = tl.where(at >= 0, tl.minimum(at // WIDTH, full), full)
    plain = full - (label_chunk < full).to(tl.int32)
    return full, label_chunk, tl.where(tl.max(valid.to(tl.int32), axis=0) != 0, plain, 0)


@triton.jit
def masked_chunk(j, full, label_chunk, length, WIDTH: tl.constexpr):
    """Begin and end of the chunks that are left: the label's (j = 0), and the row's last, which is not full (j = 1)."""
    begin = tl.where(j == 0, label_chunk, full) * WIDTH
    return begin, tl.where((j == 1) | (label_chunk < full), length, 0)


@triton.jit
def scan_rows(
    held, z_edge, base, z_label, column, in_range, valid, head, length, stride_c, class_weight_ptr,
    dtype: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
    V: tl.constexpr, EDGES: tl.constexpr, HELD: tl.constexpr, UNROLL: tl.constexpr, SUM: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Largest other logit, norm, whether the label is the first largest, and sums for label smoothing, of each row.

    ``held`` are the chunks of the rows if they are HELD, ``z_edge`` their edges with EDGES.
    """
    largest = tl.full((ROWS, WIDTH), masked_logit(dtype), dtype)
    squares = tl.zeros((ROWS, WIDTH), dtype)
    z_sum = tl.zeros((ROWS, WIDTH), dtype)
    c_sum = tl.zeros((ROWS, WIDTH), dtype)
    at = tl.arange(0, WIDTH)[None, :]
    label_at = tl.where(in_range, column - head, -1)
    if HELD:
        for i in tl.static_range(CHUNKS):
            z = held[i].to(dtype)
            others = other_logits(z, i * WIDTH, length, label_at, dtype, WIDTH, V)
            largest, squares = add_scan(others, z, largest, squares)
            if SUM:
                z_sum, c_sum = add_smoothing(
                    z, head[:, None] + i * WIDTH + at, i * WIDTH + at < length[:, None], z_sum, c_sum,
                    class_weight_ptr, dtype, WEIGHTED,
                )  # fmt: skip
    else:
        full, label_chunk, plain = plain_chunks(label_at, length, valid, WIDTH)
        for j in tl.range(0, plain, loop_unroll_factor=UNROLL):
            begin = (j + (j >= label_chunk).to(tl.int32)) * WIDTH
            z = tl.load(base[:, None] + (begin + at) * stride_c).to(dtype)
            largest, squares = add_scan(z, z, largest, squares)
            if SUM:
                z_sum, c_sum = add_smoothing(
                    z, head[:, None] + begin + at, at >= 0, z_sum, c_sum, class_weight_ptr, dtype, WEIGHTED
                )
        for j in range(2):
            begin, end = masked_chunk(j, full, label_chunk, length, WIDTH)
            z = load_chunk(base, begin, end, valid, stride_c, WIDTH, V).to(dtype)
            others = other_logits(z, begin, end, label_at, dtype, WIDTH, V)
            largest, squares = add_scan(others, z, largest, squares)
            if SUM:
                z_sum, c_sum = add_smoothing(
                    z, head[:, None] + begin + at, begin + at < end[:, None], z_sum, c_sum,
                    class_weight_ptr, dtype, WEIGHTED,
                )  # fmt: skip
    largest, squares = tl.reduce((largest, squares), 1, _max_and_add)
    z_sum = tl.sum(z_sum, axis=1)
    c_sum = tl.sum(c_sum, axis=1)
    if EDGES:
        edge_column, in_edge = edge_columns(head, length, CLASSES, V)
        z_edge = z_edge.to(dtype)
        others = tl.where(in_edge & (edge_column != column[:, None]), z_edge, masked_logit(dtype))
        edge_largest, edge_squares = tl.reduce((others, z_edge * z_edge), 1, _max_and_add)
        largest = tl.maximum(largest, edge_largest)
        squares += edge_squares
        if SUM:
            edge_z, edge_c = add_smoothing(
                z_edge, edge_column, in_edge, z_edge * 0.0, z_edge * 0.0, class_weight_ptr, dtype, WEIGHTED
            )
            z_sum += tl.sum(edge_z, axis=1)
            c_sum += tl.sum(edge_c, axis=1)
    # A class as large as the label comes before it: rare, so that the second look costs little.
    tied = in_range & (largest == z_label)
    ahead = tl.zeros_like(column)
    if tl.max(tied.to(tl.int32), axis=0) != 0:
        if HELD:
            for i in tl.static_range(CHUNKS):
                equal = (held[i].to(dtype) == z_label[:, None]) & (i * WIDTH + at < (column - head)[:, None])
                ahead += tl.sum((equal & (i * WIDTH + at < length[:, None])).to(tl.int32), axis=1)
        else:
            for begin in range(0, tl.max(length, axis=0), WIDTH):
                z = load_chunk(base, begin, length, valid, stride_c, WIDTH, V).to(dtype)
                equal = (z == z_label[:, None]) & (begin + at < (column - head)[:, None])
                ahead += tl.sum((equal & (begin + at < length[:, None])).to(tl.int32), axis=1)
        if EDGES:
            equal = in_edge & (z_edge == z_label[:, None]) & (edge_column < column[:, None])
            ahead += tl.sum(equal.to(tl.int32), axis=1)
    norm = sqrt_rn(squares)
    is_first = in_range & ((largest < z_label) | (tied & (ahead == 0))) & (norm == norm)
    return largest, norm, is_first, z_sum, c_sum


@triton.jit
def add_smoothing(z, column, inside, z_sum, c_sum, class_weight_ptr, dtype: tl.constexpr, WEIGHTED: tl.constexpr):
    """Sums of the logits and of 1 for label smoothing, weighted by the class weights if there are any."""
    if WEIGHTED:
        c_k = class_weights(class_weight_ptr, column, inside, dtype)
        return z_sum + z * c_k, c_sum + c_k
    else:
        return z_sum + z, c_sum


@triton.jit
def fetch_rows(
    logits_ptr, distance_ptr, row, label, rows, stride_b, stride_c, ignore_index,
    CLASSES: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr, EDGES: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """Position, label's logit, distance and logits of rows whose label is known; see ``locate_rows``."""
    valid, in_range, column, offset, head, length = locate_rows(
        row, label, rows, stride_b, ignore_index, CLASSES, V, EDGES
    )
    base = logits_ptr + offset
    z_label = tl.load(base + (column - head) * stride_c, mask=in_range, other=0.0)
    d = tl.load(distance_ptr + row, mask=row < rows, other=0.0)
    held = ()
    z_edge = z_label
    if HELD:
        held = load_rows(base, length, valid, stride_c, CHUNKS, WIDTH, V)
    if EDGES:
        edge_column, in_edge = edge_columns(head, length, CLASSES, V)
        at = edge_column - head[:, None]
        z_edge = tl.load(base[:, None] + at, mask=in_edge & valid[:, None], other=0.0)
    return valid, in_range, column, base, head, length, z_label, d, z_edge, held


@triton.jit
def store_chunk(
    z, p, q, out, begin, head, length, present, g_p, g_q, z_coef, constant, away, class_weight_ptr,
    dtype: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr, WEIGHTED_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """Store the gradient g_p p + g_q q - z_coef z + constant of a chunk."""
    at = begin + tl.arange(0, WIDTH)[None, :]
    mask = (at // V * V < length[:, None]) & present[:, None]
    g = g_p[:, None] * p + (g_q[:, None] * q + (constant[:, None] - z_coef[:, None] * z))
    if WEIGHTED_SMOOTHING:
        g -= away[:, None] * class_weights(class_weight_ptr, head[:, None] + at, mask, dtype)
    tl.store(out[:, None] + at, g.to(out.dtype.element_ty), mask=mask)


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
            loss = _ordered_sum(partials_ptr, programs)
            tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty) * inverse)


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
            tl.store(summary_ptr + 3 + k, _ordered_sum(partials_ptr + k * programs, programs))


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


@dataclass(frozen=True)
class LossConfig:
    """How rows of logits are laid out over a program."""

    rows: int  # at a time
    chunks: int  # of a row that is held
    width: int  # logits of a row in a chunk
    held: bool  # whether the chunks cover a row
    num_warps: int
    programs: int  # most programs on a multiprocessor
    unroll: int = 1  # chunks in flight, of a row that is not held
    max_registers: int | None = None  # per thread


WIDEST_HELD = 8192  # classes of rows that are held on chip


def loss_config(classes: int, dtype: torch.dtype, v: int, edges: bool, architecture: str = "") -> LossConfig:
    """Layout of rows of ``classes`` logits in vectors of ``v``, with the architecture's tuned options if it has some.

    Rows are held up to 8,192 logits, 32 in a thread, because the fixed work of a row, some 400 instructions in every
    warp, then costs least: on an H200 16,384 rows of 1,000 bfloat16 logits take 29 us with one warp a row, 38 with two.

    Wider rows are read three times, by few warps for the same reason, and so few at once that the second and third
    time they are in the L2 cache (of 50 MB): 528 rows of up to 45 KB, 264 of up to 90 KB. float64 serves checks only.
    """
    block = triton.next_power_of_2(classes)
    if dtype == torch.float64:
        return LossConfig(1, 1, min(block, 256), False, 4, 4)
    tuned = tuned_options(f"loss_{8 * dtype.itemsize}bit", classes, architecture) if v > 1 else {}
    if classes > WIDEST_HELD:
        kilobytes = classes * dtype.itemsize / 1000
        num_warps, programs = (4, 4) if kilobytes <= 45 or v == 1 else (8, 2) if kilobytes <= 90 else (16, 2)
        options = {"num_warps": num_warps, "programs": programs, "unroll": 4 if num_warps < 16 else 1, **tuned}
        return LossConfig(1, 1, 32 * options["num_warps"] * v, False, **options)
    # Of a warp; several float32 rows of few logits would spill.
    tile = 32 * tuned.get("logits", 16 if dtype.itemsize == 4 and block < 512 else 32)
    rows = max(1, min(64, tile // block))
    num_warps = max(1, block // tile)
    width = max(v, min(block, 32 * num_warps * v // rows))
    programs, registers = max(1, 8 // num_warps), None
    if "max_registers" in tuned and not edges:  # which would spill
        registers = tuned["max_registers"]
        programs = max(1, 65_536 // (32 * registers * num_warps))
    return LossConfig(rows, block // width, width, True, num_warps, programs, max_registers=registers)


def vector_of(
    classes: int, itemsize: int, stride: tuple[int, ...], aligned: bool, grad_stride: int | None = None
) -> tuple[int, bool]:
    """Logits in a vector of up to 16 bytes, and whether rows may begin or end within one.

    Args:
        stride: of the logits.
        aligned: whether they begin at a multiple of 16 bytes.
        grad_stride: elements from row to row of the gradient; None without one.
    """
    if stride[1] != 1 or not aligned:
        return 1, False
    widest, strides = 16 // itemsize, {stride[0], stride[0] if grad_stride is None else grad_stride}
    common = math.gcd(widest, classes, *strides)
    if common < widest and classes >= 256 and len(strides) == 1:
        return widest, True
    return common, False


def num_programs_for(turns: int, per_multiprocessor: int, target: Target) -> int:
    """Number of programs; an empty batch needs one, to write its loss."""
    return max(1, min(turns, per_multiprocessor * target.multiprocessors))


def loss_constants(
    device: torch.device, t_min: float, t_max: float, t_wrong: float | None, threshold: float, smoothing: float
) -> Tensor:
    """User-chosen numbers as a (5,) float64 tensor."""
    return device_constants(device, t_min, t_max - t_min, 0.0 if t_wrong is None else t_wrong, threshold, smoothing)


@planner
def plan_loss(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    aligned: bool,
    labels_stride: int,
    weighted: bool,
    released: bool,
    has_t_wrong: bool,
    smooth: bool,
    ignore_index: int,
    reduction: str,
    warmup: bool,
    need_grad: bool,
    inplace: bool,
    target: Target,
) -> Launch:
    """Launch of ``loss_kernel``; ``aligned`` is whether the logits begin at a multiple of 16 bytes."""
    rows, classes = shape
    grad_stride = stride[0] if inplace else classes
    v, edges = vector_of(classes, dtype.itemsize, stride, aligned, grad_stride if need_grad else None)
    config = loss_config(classes, dtype, v, edges, target.architecture)
    if smooth:  # takes more registers than the limits leave, and with class weights than a full tile does
        config = replace(config, unroll=1, max_registers=None)
        if weighted and config.held:
            block = triton.next_power_of_2(classes)
            width = min(block, 32 * v) if block <= 512 else block // 4
            config = LossConfig(1, block // width, width, block <= 512, 1 if block <= 512 else 4, 4)
    programs = num_programs_for(cdiv(rows, config.rows), config.programs, target)
    numbers = rows, *stride, labels_stride, grad_stride if need_grad else 1, ignore_index
    constants = {
        "RELEASED": released,
        "HAS_T_WRONG": has_t_wrong,
        "SMOOTH": smooth,
        "WARMUP": warmup,
        "NEED_GRAD": need_grad,
        "MEAN": reduction == "mean",
        "ROW_LOSS": reduction == "none",
        "WEIGHTED": weighted,
        **layout(classes, v, edges, config),
    }
    return Launch(loss_kernel, (programs,), numbers, constants, config.num_warps, config.max_registers)


def layout(classes: int, v: int, edges: bool, config: LossConfig) -> dict[str, Any]:
    """Compile-time constants of the kernels that read rows of logits."""
    return {
        "CLASSES": classes,
        "ROWS": config.rows,
        "CHUNKS": config.chunks,
        "WIDTH": config.width,
        "V": v,
        "EDGES": edges,
        "HELD": config.held,
        "UNROLL": config.unroll,
    }


def loss_forward(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    summary: Tensor,
    tickets: Tensor,
    class_weight: Tensor | None,
    variant: str,
    t_min: float,
    t_max: float,
    t_wrong: float | None,
    confidence_threshold: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    warmup: bool,
    need_grad: bool,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    constants = loss_constants(device, t_min, t_max, t_wrong, confidence_threshold, label_smoothing)
    launch.run(
        logits, labels, distance, summary, constants, constants if class_weight is None else class_weight, tickets,
        summary.new_empty(launch.grid[0]), loss, grad, stats, flags,
    )  # fmt: skip
    return loss, grad, stats, flags


@planner
def plan_batch_sums(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, aligned: bool, labels_stride: int,
    ignore_index: int, target: Target,
) -> Launch:  # fmt: skip
    """Launch of ``batch_sums_kernel``; arguments as for ``plan_loss``."""
    rows, classes = shape
    v, edges = vector_of(classes, dtype.itemsize, stride, aligned)
    config = loss_config(classes, dtype, v, edges, target.architecture)
    programs = num_programs_for(cdiv(rows, config.rows), max(1, 16 // config.num_warps), target)
    numbers = rows, *stride, labels_stride, ignore_index
    constants = {"FLOAT64": dtype == torch.float64, **layout(classes, v, edges, config)}
    return Launch(batch_sums_kernel, (programs,), numbers, constants, config.num_warps)


def batch_sums(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    summary: Tensor,
    tickets: Tensor,
    confidence_threshold: float,
    ignore_index: int,
) -> None:
    """Fill in the values 3 to 5 of ``summary`` (7,), which variant ``released`` needs before the loss.

    Arguments as for ``loss_forward``; ``tal_fast.loss.reference.batch_summary`` defines the values.
    """
    launch = plan_batch_sums(
        logits.shape, logits.stride(), logits.dtype, logits.data_ptr() % 16 == 0, labels.stride(0), ignore_index,
        device_target(logits.device),
    )  # fmt: skip
    constants = loss_constants(logits.device, 0.0, 0.0, None, confidence_threshold, 0.0)
    partials = summary.new_empty(3 * launch.grid[0])
    launch.run(logits, labels, distance, summary, constants, tickets, partials)


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
