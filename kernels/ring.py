"""Append the accepted rows of a batch to the ring, in one launch of one program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tal_fast.kernels.launch import Launch

ROWS = 1024  # rows at a time: 8 a thread at 4 warps
NUM_WARPS = 4


@triton.jit
def _kept(mean_ptr, std_ptr, accepted_ptr, r, rows, HAS_ACCEPTED: tl.constexpr):
    """Rows to push: accepted, with finite statistics. Returns the mask and the statistics."""
    present = r < rows
    m = tl.load(mean_ptr + r, mask=present, other=float("nan"))
    s = tl.load(std_ptr + r, mask=present, other=float("nan"))
    keep = present & (tl.abs(m) < float("inf")) & (tl.abs(s) < float("inf"))
    if HAS_ACCEPTED:
        keep = keep & (tl.load(accepted_ptr + r, mask=present, other=0) != 0)
    return keep, m, s


@triton.jit
def push_kernel(
    queue_mean_ptr,  # (N,) in and out
    queue_std_ptr,  # (N,) in and out
    cursor_ptr,  # (2,) int64 in and out: next slot, length
    mean_ptr,  # (B,)
    std_ptr,  # (B,)
    accepted_ptr,  # (B,) bool, or anything where HAS_ACCEPTED is not set
    rows,
    capacity,
    HAS_ACCEPTED: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.load(cursor_ptr)
    length = tl.load(cursor_ptr + 1)
    # 1. How many rows are kept: of more than the ring has slots, only the last get in.
    counts = tl.zeros((ROWS,), tl.int64)
    for start in range(0, rows, ROWS):
        r = start + tl.arange(0, ROWS).to(tl.int64)
        keep, _, _ = _kept(mean_ptr, std_ptr, accepted_ptr, r, rows, HAS_ACCEPTED)
        counts += keep.to(tl.int64)
    kept = tl.sum(counts, axis=0)
    # 2. Each kept row's place among them is its slot, counted from the head.
    before = tl.zeros((), tl.int64)
    for start in range(0, rows, ROWS):
        r = start + tl.arange(0, ROWS).to(tl.int64)
        keep, m, s = _kept(mean_ptr, std_ptr, accepted_ptr, r, rows, HAS_ACCEPTED)
        ones = keep.to(tl.int32)
        rank = before + tl.cumsum(ones, axis=0).to(tl.int64) - 1
        slot = (head + rank) % capacity
        gets_in = keep & (rank >= kept - capacity)
        tl.store(queue_mean_ptr + slot, m, mask=gets_in)
        tl.store(queue_std_ptr + slot, s, mask=gets_in)
        before += tl.sum(ones, axis=0).to(tl.int64)
    tl.debug_barrier()  # every thread has read the cursor
    tl.store(cursor_ptr, (head + kept) % capacity)
    tl.store(cursor_ptr + 1, tl.minimum(length + kept, capacity))


def plan_push(
    queue_mean: Tensor, queue_std: Tensor, cursor: Tensor, mean: Tensor, std: Tensor, accepted: Tensor | None
) -> Launch:
    """The launch."""
    arguments = {
        "queue_mean_ptr": queue_mean,
        "queue_std_ptr": queue_std,
        "cursor_ptr": cursor,
        "mean_ptr": mean,
        "std_ptr": std,
        "accepted_ptr": cursor if accepted is None else accepted,
        "rows": mean.numel(),
        "capacity": queue_mean.numel(),
    }
    constants = {"HAS_ACCEPTED": accepted is not None, "ROWS": ROWS}
    return Launch(push_kernel, (1,), arguments, constants, NUM_WARPS)


def push(
    queue_mean: Tensor, queue_std: Tensor, cursor: Tensor, mean: Tensor, std: Tensor, accepted: Tensor | None = None
) -> None:
    """Append rows to the ring in batch order; the oldest entries leave first.

    Args:
        queue_mean, queue_std: (N,) float32 or float64, contiguous; changed.
        cursor: (2,) int64, [next slot, number of entries]; changed.
        mean, std: (B,) in the queue's dtype; pairs that are not finite are left out. B may exceed N.
        accepted: (B,) bool, the rows to append; all of them by default.
    """
    if mean.numel() == 0:
        return
    kept = None if accepted is None else accepted.contiguous()
    plan_push(queue_mean, queue_std, cursor, mean.contiguous(), std.contiguous(), kept).run()
