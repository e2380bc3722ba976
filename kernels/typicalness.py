"""Features to statistics, nearest distance and the batch's smallest and largest distance, in one launch.

Work: B·N comparisons at 6 operations each, against B·D·size + 8·N bytes read. At B = 256 and N = 880,880 the
comparisons decide; the queue (7 MB) stays in the L2 cache.

The grid is (blocks of queries) x (shares of the queue). Each program computes its queries' statistics itself (reading a
few rows from the L2 cache again costs less than a launch), compares them with its share of the queue and leaves its
minima in scratch memory. The program that finishes last, known by a ticket, takes the minimum over the shares: no
second launch, no atomic on a float, and the same result whatever the order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tal_fast.kernels.launch import Launch, Target, cdiv, target_of

QUERIES = 16  # a program's queries: each queue entry loaded serves all of them
ENTRIES = 128  # queue entries at a time: a 16 x 128 tile of minima is 16 float32 registers a thread at 4 warps
FEATURES = 64  # features at a time: two 16 x 64 tiles of float64 sums are 32 registers a thread
ROWS = 256  # rows at a time in the last program's reduction
NUM_WARPS = 4


@triton.jit
def sqrt_exact(x):
    """Correctly rounded: plain tl.sqrt is only approximate in float32."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _nearest_in_share(
    queue_mean_ptr,
    queue_std_ptr,
    length,
    m,  # (QUERIES,)
    s,  # (QUERIES,)
    QUERIES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Smallest squared distance of each query to this program's share of the queue: every programs-th tile of it."""
    best = tl.full((QUERIES, ENTRIES), float("inf"), m.dtype)
    start = tl.program_id(1).to(tl.int64) * ENTRIES
    step = tl.num_programs(1).to(tl.int64) * ENTRIES
    while start < length:
        j = start + tl.arange(0, ENTRIES)
        inside = j < length
        # Beyond the length an infinite mean: its distance is never the smallest.
        qm = tl.load(queue_mean_ptr + j, mask=inside, other=float("inf"))
        qs = tl.load(queue_std_ptr + j, mask=inside, other=0.0)
        dm = m[:, None] - qm[None, :]
        ds = s[:, None] - qs[None, :]
        best = tl.minimum(best, dm * dm + ds * ds)
        start += step
    return tl.min(best, axis=1)


@triton.jit
def is_last(ticket_ptr, programs):
    """Whether all other programs of the launch have stored their results, visibly to this one."""
    tl.debug_barrier()  # all of this program's stores before its ticket, whichever thread made them
    ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    last = ticket == programs - 1
    if last:
        tl.store(ticket_ptr, 0)  # for the next launch
    tl.debug_barrier()
    return last


@triton.jit
def statistics_distance_kernel(
    features_ptr,  # (B, D)
    labels_ptr,  # (B,) int64
    queue_mean_ptr,  # (N,)
    queue_std_ptr,  # (N,)
    cursor_ptr,  # (2,) int64: next slot, length
    ticket_ptr,  # (1,) int32, 0 before and after
    mean_ptr,  # (B,) out
    std_ptr,  # (B,) out
    distance_ptr,  # (B,) out
    batch_ptr,  # (6,) float64 out
    scratch_ptr,  # (shares, B)
    rows,
    width,
    features_stride_b,
    features_stride_d,
    labels_stride,
    ignore_index,
    QUERIES: tl.constexpr,
    ENTRIES: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    in_batch = row < rows
    base = features_ptr + row[:, None] * features_stride_b

    # 1. Statistics in float64, in one pass of sums shifted by each row's first feature. The shift is one of the values,
    #    so that the variance is at least its square over D: the cancellation costs no more than D times 1e-16.
    first = tl.load(features_ptr + row * features_stride_b, mask=in_batch, other=0.0).to(tl.float64)
    total = tl.zeros((QUERIES, FEATURES), tl.float64)
    squares = tl.zeros((QUERIES, FEATURES), tl.float64)
    for start in range(0, width, FEATURES):
        d = start + tl.arange(0, FEATURES)
        inside = in_batch[:, None] & (d < width)[None, :]
        x = tl.load(base + d[None, :].to(tl.int64) * features_stride_d, mask=inside, other=0.0).to(tl.float64)
        x = tl.where(inside, x - first[:, None], 0.0)
        total += x
        squares += x * x
    shifted = tl.sum(total, axis=1) / width
    variance = (tl.sum(squares, axis=1) - width * shifted * shifted) / (width - 1)
    dtype = queue_mean_ptr.dtype.element_ty
    m = (first + shifted).to(dtype)
    # Rounding may leave a constant row's variance just below zero; a NaN stays one.
    s = sqrt_exact(tl.where(variance < 0, 0.0, variance)).to(dtype)
    if tl.program_id(1) == 0:
        tl.store(mean_ptr + row, m, mask=in_batch)
        tl.store(std_ptr + row, s, mask=in_batch)

    # 2. This share's minima.
    length = tl.load(cursor_ptr + 1)
    best = _nearest_in_share(queue_mean_ptr, queue_std_ptr, length, m, s, QUERIES, ENTRIES)
    tl.store(scratch_ptr + tl.program_id(1).to(tl.int64) * rows + row, best, mask=in_batch)

    # 3. The last program: minimum over the shares, distances, and the batch's summary.
    if is_last(ticket_ptr, tl.num_programs(0) * tl.num_programs(1)):
        smallest = tl.full((ROWS,), float("inf"), tl.float64)
        largest = tl.full((ROWS,), float("-inf"), tl.float64)
        valid_rows = tl.zeros((ROWS,), tl.int64)
        for start in range(0, rows, ROWS):
            r = start + tl.arange(0, ROWS).to(tl.int64)
            present = r < rows
            squared = tl.full((ROWS,), float("inf"), dtype)
            for share in range(0, tl.num_programs(1)):
                # .cg: from the L2 cache, where the other programs' stores are
                part = tl.load(
                    scratch_ptr + tl.cast(share, tl.int64) * rows + r,
                    mask=present,
                    other=float("inf"),
                    cache_modifier=".cg",
                )
                squared = tl.minimum(squared, part)
            distance = sqrt_exact(squared)
            tl.store(distance_ptr + r, distance, mask=present)
            label = tl.load(labels_ptr + r * labels_stride, mask=present, other=ignore_index)
            valid = present & (label != ignore_index)
            measured = valid & (distance < float("inf"))  # false for NaN too
            wide = distance.to(tl.float64)
            smallest = tl.where(measured & (wide < smallest), wide, smallest)
            largest = tl.where(measured & (wide > largest), wide, largest)
            valid_rows += valid.to(tl.int64)
        tl.store(batch_ptr, tl.min(smallest, axis=0))
        tl.store(batch_ptr + 1, tl.max(largest, axis=0))
        tl.store(batch_ptr + 2, tl.sum(valid_rows, axis=0).to(tl.float64))
        for k in tl.static_range(3, 6):
            tl.store(batch_ptr + k, tl.zeros((), tl.float64))


@triton.jit
def nearest_kernel(
    mean_ptr,  # (B,)
    std_ptr,  # (B,)
    queue_mean_ptr,  # (N,)
    queue_std_ptr,  # (N,)
    cursor_ptr,  # (2,) int64
    squared_ptr,  # (shares, B) out
    rows,
    QUERIES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    in_batch = row < rows
    m = tl.load(mean_ptr + row, mask=in_batch, other=0.0)
    s = tl.load(std_ptr + row, mask=in_batch, other=0.0)
    best = _nearest_in_share(queue_mean_ptr, queue_std_ptr, tl.load(cursor_ptr + 1), m, s, QUERIES, ENTRIES)
    tl.store(squared_ptr + tl.program_id(1).to(tl.int64) * rows + row, best, mask=in_batch)


def shares_of(rows: int, capacity: int, target: Target) -> int:
    """Shares of the queue such that there are about two programs a multiprocessor, and none without entries. The
    queue's length is on the device, so its capacity decides. (Not yet tuned on a GPU.)"""
    blocks = cdiv(max(rows, 1), QUERIES)
    return max(1, min(cdiv(2 * target.multiprocessors, blocks), cdiv(capacity, 4 * ENTRIES)))


def plan_statistics_distance(
    features: Tensor,
    labels: Tensor,
    queue_mean: Tensor,
    queue_std: Tensor,
    cursor: Tensor,
    ticket: Tensor,
    ignore_index: int,
    target: Target,
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The launch and the tensors it fills: mean, std, distance (B,) and the summary (6,)."""
    rows, width = features.shape
    mean, std, distance = (queue_mean.new_empty(rows) for _ in range(3))
    batch = queue_mean.new_empty(6, dtype=torch.float64)
    shares = shares_of(rows, queue_mean.numel(), target)
    arguments = {
        "features_ptr": features,
        "labels_ptr": labels,
        "queue_mean_ptr": queue_mean,
        "queue_std_ptr": queue_std,
        "cursor_ptr": cursor,
        "ticket_ptr": ticket,
        "mean_ptr": mean,
        "std_ptr": std,
        "distance_ptr": distance,
        "batch_ptr": batch,
        "scratch_ptr": queue_mean.new_empty(shares * rows),
        "rows": rows,
        "width": width,
        "features_stride_b": features.stride(0),
        "features_stride_d": features.stride(1),
        "labels_stride": labels.stride(0),
        "ignore_index": ignore_index,
    }
    constants = {"QUERIES": QUERIES, "ENTRIES": ENTRIES, "FEATURES": FEATURES, "ROWS": ROWS}
    grid = (max(1, cdiv(rows, QUERIES)), shares)  # one program at least: it fills the summary of no rows
    return Launch(statistics_distance_kernel, grid, arguments, constants, NUM_WARPS), (mean, std, distance, batch)


def statistics_distance(
    features: Tensor,
    labels: Tensor,
    queue_mean: Tensor,
    queue_std: Tensor,
    cursor: Tensor,
    ticket: Tensor,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of the features and their nearest distance to the queue.

    Args:
        features: (B, D) floating point, any strides, D >= 2.
        labels: (B,) int64; rows with ``ignore_index`` have no part in the summary.
        queue_mean, queue_std: (N,) float32 or float64, contiguous.
        cursor: (2,) int64, [next slot, number of entries].
        ticket: (1,) int32, zero; zero again afterwards. Launches that may overlap need their own.

    Returns:
        ``(mean, std, distance, batch)``: (B,) in the queue's dtype, and (6,) float64 as
        ``reference.batch_summary``, with zeros in place of the three sums that need the logits.
    """
    launch, results = plan_statistics_distance(
        features, labels, queue_mean, queue_std, cursor, ticket, ignore_index, target_of(features.device)
    )
    launch.run()
    return results


def plan_nearest(
    queue_mean: Tensor, queue_std: Tensor, cursor: Tensor, mean: Tensor, std: Tensor, target: Target
) -> tuple[Launch, Tensor]:
    """The launch and the (shares, B) squared distances it fills."""
    rows = mean.numel()
    shares = shares_of(rows, queue_mean.numel(), target)
    squared = mean.new_empty(shares, rows)
    arguments = {
        "mean_ptr": mean,
        "std_ptr": std,
        "queue_mean_ptr": queue_mean,
        "queue_std_ptr": queue_std,
        "cursor_ptr": cursor,
        "squared_ptr": squared,
        "rows": rows,
    }
    constants = {"QUERIES": QUERIES, "ENTRIES": ENTRIES}
    return Launch(nearest_kernel, (cdiv(rows, QUERIES), shares), arguments, constants, NUM_WARPS), squared


def nearest(queue_mean: Tensor, queue_std: Tensor, cursor: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B,) distance of each (mean, std) to the nearest queue entry; inf for an empty queue."""
    if mean.numel() == 0:
        return mean.clone()
    launch, squared = plan_nearest(
        queue_mean, queue_std, cursor, mean.contiguous(), std.contiguous(), target_of(mean.device)
    )
    launch.run()
    return squared.amin(0).sqrt()
