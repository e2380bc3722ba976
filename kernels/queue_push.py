"""Kernel that appends the accepted rows of a batch to the queue, in one launch of one program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tal_fast.kernels.launch import Launch, planner

ROWS = 1024  # rows per iteration, 8 a thread
NUM_WARPS = 4


@triton.jit
def _load_rows(mean_ptr, std_ptr, accepted_ptr, r, rows, HAS_ACCEPTED: tl.constexpr):
    """Mask of the rows to push (accepted, with finite statistics), and their statistics."""
    present = r < rows
    m = tl.load(mean_ptr + r, mask=present, other=float("nan"))
    s = tl.load(std_ptr + r, mask=present, other=float("nan"))
    keep = present & (tl.abs(m) < float("inf")) & (tl.abs(s) < float("inf"))
    if HAS_ACCEPTED:
        keep = keep & (tl.load(accepted_ptr + r, mask=present, other=0) != 0)
    return keep, m, s


@triton.jit
def push_kernel(
    queue_mean_ptr, queue_std_ptr, cursor_ptr, mean_ptr, std_ptr, accepted_ptr, rows, capacity,
    HAS_ACCEPTED: tl.constexpr, MORE_THAN_SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Append rows to a ring buffer in batch order; pointers are the arguments of ``push``.

    A cursor outside the ring, which only the host can report, stays as it is, and nothing is written.
    """
    head = tl.load(cursor_ptr)
    length = tl.load(cursor_ptr + 1)
    is_valid = (head >= 0) & (head < capacity) & (length >= 0) & (length <= capacity)
    # 1. If the rows to push may outnumber the slots, count them: only the last `capacity` of them are written.
    skipped = tl.zeros((), tl.int32)
    if MORE_THAN_SLOTS:
        counts = tl.zeros((ROWS,), tl.int32)
        for start in range(0, rows, ROWS):
            keep, _, _ = _load_rows(mean_ptr, std_ptr, accepted_ptr, start + tl.arange(0, ROWS), rows, HAS_ACCEPTED)
            counts += keep.to(tl.int32)
        skipped = tl.maximum(tl.sum(counts, axis=0) - capacity, 0)
    # 2. Write each kept row to the slot given by its rank among those that are written.
    first = (head + skipped) % capacity
    before = -skipped
    for start in range(0, rows, ROWS):
        keep, m, s = _load_rows(mean_ptr, std_ptr, accepted_ptr, start + tl.arange(0, ROWS), rows, HAS_ACCEPTED)
        ones = keep.to(tl.int32)
        rank = before + tl.cumsum(ones, axis=0) - 1
        slot = first + rank
        slot = tl.where(slot >= capacity, slot - capacity, slot)
        is_written = keep & (rank >= 0) & is_valid
        tl.store(queue_mean_ptr + slot, m, mask=is_written)
        tl.store(queue_std_ptr + slot, s, mask=is_written)
        before += tl.sum(ones, axis=0)
    kept = (before + skipped).to(tl.int64)
    # 3. Move the cursor, after every thread has read it.
    tl.debug_barrier()
    tl.store(cursor_ptr, (head + kept) % capacity, mask=is_valid)
    tl.store(cursor_ptr + 1, tl.minimum(length + kept, capacity), mask=is_valid)


@planner
def plan_push(rows: int, capacity: int, has_accepted: bool) -> Launch:
    """Launch of ``push_kernel``."""
    constants = {
        "HAS_ACCEPTED": has_accepted,
        "MORE_THAN_SLOTS": rows > capacity,
        "ROWS": min(ROWS, triton.next_power_of_2(rows)),
    }
    return Launch(push_kernel, (1,), (rows, capacity), constants, NUM_WARPS)


def push(
    queue_mean: Tensor, queue_std: Tensor, cursor: Tensor, mean: Tensor, std: Tensor, accepted: Tensor | None
) -> None:
    """Append rows to the queue in batch order, overwriting the oldest entries.

    Args:
        queue_mean, queue_std: (N,) float32 or float64, contiguous; modified.
        cursor: (2,) int64, [next slot, number of entries]; modified.
        mean, std: (B,) in the queue's dtype; pairs that are not finite are skipped. B may exceed N.
        accepted: (B,) bool, the rows to append; None appends all of them.
    """
    if mean.numel() == 0:
        return
    flags = cursor if accepted is None else accepted.contiguous()
    launch = plan_push(mean.numel(), queue_mean.numel(), accepted is not None)
    launch.run(queue_mean, queue_std, cursor, mean.contiguous(), std.contiguous(), flags)
