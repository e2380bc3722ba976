"""Feature statistics, distance to the nearest queue entry, and the batch's distance range, in one launch.

Cost: B·N comparisons of 6 operations each, and B·D·itemsize + 8·N bytes read. At B = 256 and N = 880,880 the
comparisons dominate and the queue (7 MB) stays in the L2 cache.

The grid is (query blocks) x (queue splits). Each program computes the statistics of its own queries (reading a few rows
again from the L2 cache costs less than a second launch), compares them with its split of the queue and stores the
minima in scratch memory. The last program to finish, identified by a ticket counter, reduces the minima over the
splits. This needs no second launch and no floating-point atomics, and the result does not depend on timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tal_fast.kernels.launch import Launch, Target, cdiv, device_target

QUERIES = 16  # queries per program; every queue entry loaded serves all of them
ENTRIES = 128  # queue entries per iteration: a 16 x 128 tile of minima takes 16 float32 registers a thread at 4 warps
FEATURES = 64  # features per iteration: two 16 x 64 tiles of float64 sums take 32 registers a thread
ROWS = 256  # rows per iteration of the last program's reduction
NUM_WARPS = 4


@triton.jit
def sqrt_rn(x):
    """Correctly rounded square root (``tl.sqrt`` is approximate in float32)."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _nearest_in_split(
    queue_mean_ptr, queue_std_ptr, length, m, s,
    QUERIES: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Smallest squared distance of each query to this program's split of the queue.

    Split i of n holds the tiles i, i + n, i + 2n, ... of ENTRIES queue entries. ``m`` and ``s`` are (QUERIES,).
    """
    best = tl.full((QUERIES, ENTRIES), float("inf"), m.dtype)
    start = tl.program_id(1).to(tl.int64) * ENTRIES
    step = tl.num_programs(1).to(tl.int64) * ENTRIES
    while start < length:
        j = start + tl.arange(0, ENTRIES)
        inside = j < length
        # An infinite mean past the end: its distance is never the smallest.
        qm = tl.load(queue_mean_ptr + j, mask=inside, other=float("inf"))
        qs = tl.load(queue_std_ptr + j, mask=inside, other=0.0)
        dm = m[:, None] - qm[None, :]
        ds = s[:, None] - qs[None, :]
        best = tl.minimum(best, dm * dm + ds * ds)
        start += step
    return tl.min(best, axis=1)


@triton.jit
def _length(cursor_ptr, capacity):
    """Number of entries; 0 if the cursor holds a number that cannot be it, so that nothing outside the ring is read."""
    length = tl.load(cursor_ptr + 1)
    return tl.where((length >= 0) & (length <= capacity), length, 0)


@triton.jit
def is_last_program(ticket_ptr, programs):
    """Whether this is the last program of the launch to arrive; it then sees the stores of all the others.

    ``ticket_ptr`` is a (1,) int32 arrival counter, zero before the launch and after it.
    """
    tl.debug_barrier()  # orders the stores of all this program's threads before its ticket
    ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    last = ticket == programs - 1
    if last:
        tl.store(ticket_ptr, 0)  # for the next launch
    tl.debug_barrier()
    return last


@triton.jit
def statistics_distance_kernel(
    features_ptr, labels_ptr, queue_mean_ptr, queue_std_ptr, cursor_ptr, ticket_ptr, mean_ptr, std_ptr, distance_ptr,
    summary_ptr, scratch_ptr, rows, width, capacity, features_stride_b, features_stride_d, labels_stride, ignore_index,
    QUERIES: tl.constexpr, ENTRIES: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Statistics of each row, its distance to the nearest queue entry, and the batch's distance range.

    Pointers are the arguments and results of ``statistics_distance``, and:
        summary: (6,) float64 out: smallest and largest distance, number of valid rows, three zeros.
        scratch: (splits, rows), squared distance to each split of the queue.
    """
    row = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    in_batch = row < rows
    base = features_ptr + row[:, None] * features_stride_b

    # 1. Mean and standard deviation in float64, from one pass of sums shifted by each row's first feature. Because the
    #    shift is one of the values, cancellation costs a relative error of at most D times 1e-16.
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
    # Rounding may leave the variance of a constant row just below zero; NaN stays NaN.
    s = sqrt_rn(tl.where(variance < 0, 0.0, variance)).to(dtype)
    if tl.program_id(1) == 0:
        tl.store(mean_ptr + row, m, mask=in_batch)
        tl.store(std_ptr + row, s, mask=in_batch)

    # 2. Smallest squared distances to this program's split of the queue.
    length = _length(cursor_ptr, capacity)
    best = _nearest_in_split(queue_mean_ptr, queue_std_ptr, length, m, s, QUERIES, ENTRIES)
    tl.store(scratch_ptr + tl.program_id(1).to(tl.int64) * rows + row, best, mask=in_batch)

    # 3. In the last program: reduce over the splits, write the distances and the batch's summary.
    if is_last_program(ticket_ptr, tl.num_programs(0) * tl.num_programs(1)):
        smallest = tl.full((ROWS,), float("inf"), tl.float64)
        largest = tl.full((ROWS,), float("-inf"), tl.float64)
        valid_rows = tl.zeros((ROWS,), tl.int64)
        for start in range(0, rows, ROWS):
            r = start + tl.arange(0, ROWS).to(tl.int64)
            present = r < rows
            squared = tl.full((ROWS,), float("inf"), dtype)
            for split in range(0, tl.num_programs(1)):
                # .cg reads from the L2 cache, where the other programs' stores are.
                part = tl.load(
                    scratch_ptr + tl.cast(split, tl.int64) * rows + r,
                    mask=present,
                    other=float("inf"),
                    cache_modifier=".cg",
                )
                squared = tl.minimum(squared, part)
            distance = sqrt_rn(squared)
            tl.store(distance_ptr + r, distance, mask=present)
            label = tl.load(labels_ptr + r * labels_stride, mask=present, other=ignore_index)
            valid = present & (label != ignore_index)
            measured = valid & (distance < float("inf"))  # false for NaN too
            wide = distance.to(tl.float64)
            smallest = tl.where(measured & (wide < smallest), wide, smallest)
            largest = tl.where(measured & (wide > largest), wide, largest)
            valid_rows += valid.to(tl.int64)
        tl.store(summary_ptr, tl.min(smallest, axis=0))
        tl.store(summary_ptr + 1, tl.max(largest, axis=0))
        tl.store(summary_ptr + 2, tl.sum(valid_rows, axis=0).to(tl.float64))
        for k in tl.static_range(3, 6):
            tl.store(summary_ptr + k, tl.zeros((), tl.float64))


@triton.jit
def nearest_kernel(
    mean_ptr, std_ptr, queue_mean_ptr, queue_std_ptr, cursor_ptr, squared_ptr, rows, capacity,
    QUERIES: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Squared distance of each (mean, std) to the nearest entry of each split of the queue: (splits, rows)."""
    row = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    in_batch = row < rows
    m = tl.load(mean_ptr + row, mask=in_batch, other=0.0)
    s = tl.load(std_ptr + row, mask=in_batch, other=0.0)
    length = _length(cursor_ptr, capacity)
    best = _nearest_in_split(queue_mean_ptr, queue_std_ptr, length, m, s, QUERIES, ENTRIES)
    tl.store(squared_ptr + tl.program_id(1).to(tl.int64) * rows + row, best, mask=in_batch)


def num_splits_for(rows: int, capacity: int, target: Target) -> int:
    """Number of queue splits: about two programs per multiprocessor, and at least four tiles of entries per split.

    The queue's length is on the device, so its capacity decides. Not yet tuned on a GPU.
    """
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
    """Launch of ``statistics_distance_kernel``, and its outputs: mean, std, distance (B,) and the summary (6,)."""
    rows, width = features.shape
    mean, std, distance = (queue_mean.new_empty(rows) for _ in range(3))
    summary = queue_mean.new_empty(6, dtype=torch.float64)
    splits = num_splits_for(rows, queue_mean.numel(), target)
    arguments = (
        features, labels, queue_mean, queue_std, cursor, ticket, mean, std, distance,
        summary, queue_mean.new_empty(splits * rows), rows, width, queue_mean.numel(), *features.stride(),
        labels.stride(0), ignore_index,
    )  # fmt: skip
    constants = {"QUERIES": QUERIES, "ENTRIES": ENTRIES, "FEATURES": FEATURES, "ROWS": ROWS}
    grid = (max(1, cdiv(rows, QUERIES)), splits)  # an empty batch needs a program too: it writes the summary
    return Launch(statistics_distance_kernel, grid, arguments, constants, NUM_WARPS), (mean, std, distance, summary)


def statistics_distance(
    features: Tensor,
    labels: Tensor,
    queue_mean: Tensor,
    queue_std: Tensor,
    cursor: Tensor,
    ticket: Tensor,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and standard deviation of each sample's features, and their distance to the nearest queue entry.

    Args:
        features: (B, D) floating point, any strides, D >= 2.
        labels: (B,) int64; rows labelled ``ignore_index`` are left out of the summary.
        queue_mean, queue_std: (N,) float32 or float64, contiguous.
        cursor: (2,) int64, [next slot, number of entries].
        ticket: (1,) int32, zero before and after. Launches that may overlap need separate tickets.
        ignore_index: label of the rows to ignore.

    Returns:
        ``(mean, std, distance, summary)``. The first three are (B,) in the queue's dtype; the (6,) float64 summary is
        that of ``tal_fast.loss.reference.batch_summary``, with zeros for the three sums that need logits.
    """
    launch, results = plan_statistics_distance(
        features, labels, queue_mean, queue_std, cursor, ticket, ignore_index, device_target(features.device)
    )
    launch.run()
    return results


def plan_nearest(
    queue_mean: Tensor, queue_std: Tensor, cursor: Tensor, mean: Tensor, std: Tensor, target: Target
) -> tuple[Launch, Tensor]:
    """Launch of ``nearest_kernel``, and its output: (splits, B) squared distances."""
    rows = mean.numel()
    splits = num_splits_for(rows, queue_mean.numel(), target)
    squared = mean.new_empty(splits, rows)
    arguments = (mean, std, queue_mean, queue_std, cursor, squared, rows, queue_mean.numel())
    constants = {"QUERIES": QUERIES, "ENTRIES": ENTRIES}
    return Launch(nearest_kernel, (cdiv(rows, QUERIES), splits), arguments, constants, NUM_WARPS), squared


def nearest(queue_mean: Tensor, queue_std: Tensor, cursor: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Distance of each (mean, std) to the nearest queue entry.

    Arguments as for ``statistics_distance``, with ``mean`` and ``std`` (B,) in the queue's dtype.

    Returns:
        (B,) distances; inf for an empty queue.
    """
    if mean.numel() == 0:
        return mean.clone()
    launch, squared = plan_nearest(
        queue_mean, queue_std, cursor, mean.contiguous(), std.contiguous(), device_target(mean.device)
    )
    launch.run()
    return squared.amin(0).sqrt()
