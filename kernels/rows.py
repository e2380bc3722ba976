"""Rows of logits in the kernels: reading, scanning and storing them.

Rows are read in chunks of WIDTH logits, V of which make a vector in one thread. Where rows do not begin and end with an
aligned vector (EDGES), the logits before the first and after the last whole vector of a row are a small tile of their
own.

The label's exponential is left out of the sums, because the gradient of a confident row at the label is
-(sum of the other exponentials) / (sum of all), which softmax - 1 would round to zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tal_fast.kernels.distance import sqrt_rn

NORM_EPS = tl.constexpr(1e-7)  # added to a row's norm; reference.NORM_EPS
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PARTS = tl.constexpr(1024)  # partial sums added at a time


@triton.jit
def ordered_sum(parts_ptr, count):
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
    """Value in place of the label's logit and of columns outside a row.

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
    """Both exponentials, and the sums with them added."""
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
