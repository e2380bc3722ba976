"""Feature statistics, distance to the nearest queue entry, and the batch's distance range, in two launches.

The search costs B·N comparisons of 5 operations each, and reads 8·N bytes. At B = 256 and N = 880,880 the comparisons
dominate and the queue (7 MB) stays in the L2 cache. Its grid is (query blocks) x (queue splits): each program compares
its queries with its split of the queue, and an atomic minimum of bit patterns, which order as the distances do, joins
the splits. The last program to finish, identified by a ticket counter, takes the roots and the batch's range. Nothing
depends on timing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tal_fast.kernels.launch import Launch, Target, cdiv, device_target, planner, tuned_options

ROWS = 256  # rows per iteration of the last program's reduction
FEATURES = 1024  # features per iteration of the statistics, 8 a thread

# Arrival counters of a step, one for each launch that needs to know its last program.
SEARCH_TICKET, SUMS_TICKET, LOSS_TICKET, TICKETS = (tl.constexpr(i) for i in range(4))


@triton.jit
def sqrt_rn(x):
    """Correctly rounded square root (``tl.sqrt`` is approximate in float32)."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


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
def statistics_kernel(
    features_ptr, mean_ptr, std_ptr, squared_ptr, tickets_ptr, rows, width, stride_b, stride_d,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """Mean and standard deviation of each row, and what the search needs before it: infinite distances, tickets of 0.

    In float64, from one pass of sums shifted by the row's first feature. Because the shift is one of the values,
    cancellation costs a relative error of at most D times 1e-16.
    """
    row = tl.program_id(0).to(tl.int64)
    if row == 0:
        for k in tl.static_range(TICKETS):
            tl.store(tickets_ptr + k, 0)
    if row < rows:  # false in the one program of an empty batch
        base = features_ptr + row * stride_b
        first = tl.load(base).to(tl.float64)
        total = tl.zeros((FEATURES,), tl.float64)
        squares = tl.zeros((FEATURES,), tl.float64)
        for start in range(0, width, FEATURES):
            d = start + tl.arange(0, FEATURES)
            x = tl.load(base + d.to(tl.int64) * stride_d, mask=d < width, other=0.0).to(tl.float64)
            x = tl.where(d < width, x - first, 0.0)
            total += x
            squares += x * x
        shifted = tl.sum(total, axis=0) / width
        variance = (tl.sum(squares, axis=0) - width * shifted * shifted) / (width - 1)
        dtype = mean_ptr.dtype.element_ty
        tl.store(mean_ptr + row, (first + shifted).to(dtype))
        # Rounding may leave the variance of a constant row just below zero; NaN stays NaN.
        tl.store(std_ptr + row, sqrt_rn(tl.where(variance < 0, 0.0, variance)).to(dtype))
        tl.store(squared_ptr + row, float("inf"))


@triton.jit
def load_entries(queue_mean_ptr, queue_std_ptr, start, length, ENTRIES: tl.constexpr, UNROLL: tl.constexpr):
    """UNROLL tiles of means and of standard deviations, in turns; past the end the last entry, which needs no mask."""
    entries = ()
    for i in tl.static_range(UNROLL):
        j = tl.minimum(start + i * ENTRIES + tl.arange(0, ENTRIES), tl.maximum(length - 1, 0))
        tile = tl.load(queue_mean_ptr + j), tl.load(queue_std_ptr + j)
        entries = entries + tile  # type: ignore[assignment]
    return entries


@triton.jit
def search_kernel(
    mean_ptr, std_ptr, queue_mean_ptr, queue_std_ptr, cursor_ptr, squared_ptr, tickets_ptr, labels_ptr,
    class_weight_ptr, summary_ptr, rows, capacity, labels_stride, classes, ignore_index,
    SUMMARY: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr, QUERIES: tl.constexpr, ENTRIES: tl.constexpr,
    ROWS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Distance of each (mean, std) to the nearest queue entry, and with SUMMARY the batch's summary.

    Pointers:
        squared: (rows,) in: inf; out: the distances.
        tickets: (3,) int32, 0.
        class_weight: (classes,), with HAS_CLASS_WEIGHT.
        summary: (7,) float64 out: smallest and largest distance, number of valid rows, three zeros, sum of the valid
            rows' class weights.
        The others are the arguments and results of ``statistics_distance``.
    """
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    in_batch = row < rows
    m = tl.load(mean_ptr + row, mask=in_batch, other=0.0)[:, None]
    s = tl.load(std_ptr + row, mask=in_batch, other=0.0)[:, None]
    length = tl.load(cursor_ptr + 1)
    # A cursor that cannot be one: nothing outside the ring is read.
    length = tl.where((length >= 0) & (length <= capacity), length, 0).to(tl.int32)
    dtype = m.dtype
    best = tl.full((QUERIES, ENTRIES), float("inf"), dtype)
    first = tl.program_id(1) * (UNROLL * ENTRIES)
    step = tl.num_programs(1) * (UNROLL * ENTRIES)
    # Entries are loaded while those before are compared.
    ahead = load_entries(queue_mean_ptr, queue_std_ptr, first, length, ENTRIES, UNROLL)
    for start in range(first, length, step):
        entries = ahead
        ahead = load_entries(queue_mean_ptr, queue_std_ptr, start + step, length, ENTRIES, UNROLL)
        for i in tl.static_range(UNROLL):
            dm = m - entries[2 * i][None, :]
            ds = s - entries[2 * i + 1][None, :]
            best = tl.minimum(best, dm * dm + ds * ds)
    bits = tl.int64 if dtype == tl.float64 else tl.int32
    tl.atomic_min(
        squared_ptr.to(tl.pointer_type(bits), bitcast=True) + row, tl.min(best, axis=1).to(bits, bitcast=True),
        mask=in_batch,
    )  # fmt: skip
    if is_last_program(tickets_ptr + SEARCH_TICKET, tl.num_programs(0) * tl.num_programs(1)):
        smallest = tl.full((ROWS,), float("inf"), tl.float64)
        largest = tl.full((ROWS,), float("-inf"), tl.float64)
        valid_rows = tl.zeros((ROWS,), tl.int64)
        weights = tl.zeros((ROWS,), tl.float64)
        for start in range(0, rows, ROWS):
            r = start + tl.arange(0, ROWS)
            present = r < rows
            # .cg reads from the L2 cache, where the other programs' minima are.
            distance = sqrt_rn(tl.load(squared_ptr + r, mask=present, other=float("inf"), cache_modifier=".cg"))
            tl.store(squared_ptr + r, distance, mask=present)
            if SUMMARY:
                label = tl.load(labels_ptr + r.to(tl.int64) * labels_stride, mask=present, other=ignore_index)
                valid = present & (label != ignore_index)
                measured = valid & (distance < float("inf"))  # false for NaN too
                wide = distance.to(tl.float64)
                smallest = tl.where(measured & (wide < smallest), wide, smallest)
                largest = tl.where(measured & (wide > largest), wide, largest)
                valid_rows += valid.to(tl.int64)
                if HAS_CLASS_WEIGHT:
                    in_range = valid & (label >= 0) & (label < classes)
                    weights += tl.load(class_weight_ptr + label, mask=in_range, other=0.0).to(tl.float64)
        if SUMMARY:
            n_valid = tl.sum(valid_rows, axis=0).to(tl.float64)
            tl.store(summary_ptr, tl.min(smallest, axis=0))
            tl.store(summary_ptr + 1, tl.max(largest, axis=0))
            tl.store(summary_ptr + 2, n_valid)
            for k in tl.static_range(3, 6):
                tl.store(summary_ptr + k, 0.0)
            tl.store(summary_ptr + 6, tl.sum(weights, axis=0) if HAS_CLASS_WEIGHT else n_valid)


@planner
def plan_statistics(rows: int, width: int, stride: tuple[int, ...]) -> Launch:
    """Launch of ``statistics_kernel``."""
    constants = {"FEATURES": min(FEATURES, triton.next_power_of_2(width))}
    return Launch(statistics_kernel, (max(1, rows),), (rows, width, *stride), constants, 4)


@dataclass(frozen=True)
class SearchConfig:
    """Tiles and programs of the search."""

    queries: int = 16  # of a program; every queue entry loaded serves all of them
    entries: int = 64  # of the queue at a time: one a thread
    num_warps: int = 2
    unroll: int = 4  # entries of a thread compared at a time, while as many are in flight
    programs: int = 16  # on a multiprocessor


def search_config(pairs: int, dtype: torch.dtype, architecture: str) -> SearchConfig:
    """Tiles and programs for a number of pairs of rows and entries; for float32 with the tuned options."""
    return SearchConfig(**tuned_options("search", pairs, architecture) if dtype == torch.float32 else {})


def num_splits_for(blocks: int, tiles: int, programs: int) -> int:
    """Number of queue splits for a number of query blocks, of tiles of entries in the queue, and of programs at once.

    The queue's length is on the device, so its capacity decides.
    """
    return max(1, min(programs // blocks, tiles))


@planner
def plan_search(
    rows: int, capacity: int, dtype: torch.dtype, labels_stride: int | None, classes: int | None, ignore_index: int,
    target: Target,
) -> Launch:  # fmt: skip
    """Launch of ``search_kernel``; ``labels_stride`` is None without labels, ``classes`` without class weights."""
    config = search_config(rows * capacity, dtype, target.architecture)
    blocks = max(1, cdiv(rows, config.queries))  # an empty batch needs a program too: it writes the summary
    tiles = cdiv(capacity, config.unroll * config.entries)
    splits = num_splits_for(blocks, tiles, config.programs * target.multiprocessors)
    constants = {
        "SUMMARY": labels_stride is not None, "HAS_CLASS_WEIGHT": classes is not None, "QUERIES": config.queries,
        "ENTRIES": config.entries, "ROWS": ROWS, "UNROLL": config.unroll,
    }  # fmt: skip
    numbers = rows, capacity, labels_stride or 0, classes or 0, ignore_index
    return Launch(search_kernel, (blocks, splits), numbers, constants, config.num_warps)


def statistics_distance(
    features: Tensor, labels: Tensor, queue_mean: Tensor, queue_std: Tensor, cursor: Tensor,
    class_weight: Tensor | None, ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Mean and standard deviation of each sample's features, and their distance to the nearest queue entry.

    Args:
        features: (B, D) floating point, any strides, D >= 2.
        labels: (B,) int64; rows labelled ``ignore_index`` are left out of the summary.
        queue_mean, queue_std: (N,) float32 or float64, contiguous, N < 2^31.
        cursor: (2,) int64, [next slot, number of entries].
        class_weight: (C,) floating point, contiguous, or None.
        ignore_index: label of the rows to ignore.

    Returns:
        ``(mean, std, distance, summary, tickets)``. The first three are (B,) in the queue's dtype; the (7,) float64
        summary is that of ``tal_fast.loss.reference.batch_summary``, with zeros for the three sums that need logits;
        the tickets are (3,) int32 zeros, for the other launches of the step.
    """
    rows, width = features.shape
    # Tensors of their own: on the host a view takes as long as an allocation.
    mean, std, distance = queue_mean.new_empty(rows), queue_mean.new_empty(rows), queue_mean.new_empty(rows)
    tickets = cursor.new_empty(TICKETS.value, dtype=torch.int32)
    summary = cursor.new_empty(7, dtype=torch.float64)
    plan_statistics(rows, width, features.stride()).run(features, mean, std, distance, tickets)
    search = plan_search(
        rows, queue_mean.numel(), queue_mean.dtype, labels.stride(0),
        None if class_weight is None else len(class_weight), ignore_index, device_target(features.device),
    )  # fmt: skip
    weights = mean if class_weight is None else class_weight
    search.run(mean, std, queue_mean, queue_std, cursor, distance, tickets, labels, weights, summary)
    return mean, std, distance, summary, tickets


def nearest(queue_mean: Tensor, queue_std: Tensor, cursor: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Distance of each (mean, std) to the nearest queue entry.

    Arguments as for ``statistics_distance``, with ``mean`` and ``std`` (B,) in the queue's dtype.

    Returns:
        (B,) distances; inf for an empty queue.
    """
    distance = torch.full_like(mean, float("inf"), memory_format=torch.contiguous_format)
    if mean.numel():
        tickets = torch.zeros(TICKETS.value, dtype=torch.int32, device=mean.device)
        target = device_target(mean.device)
        search = plan_search(mean.numel(), queue_mean.numel(), queue_mean.dtype, None, None, 0, target)
        mean, std = mean.contiguous(), std.contiguous()
        unused = cursor, mean, mean
        search.run(mean, std, queue_mean, queue_std, cursor, distance, tickets, *unused)
    return distance
