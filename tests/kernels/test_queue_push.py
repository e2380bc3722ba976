"""Push kernel: a first-in-first-out list in a ring buffer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.kernels import AVAILABLE, DEVICE, REASON, gpu_too, on_device

if not AVAILABLE:
    pytest.skip(REASON, allow_module_level=True)

from tal_fast import kernels
from tal_fast.kernels import queue_push

pytestmark = pytest.mark.usefixtures("poison")


@gpu_too
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("capacity", [1, 13, 1500])
def test_push_drops_the_oldest_entries_of_a_list(capacity: int, dtype: torch.dtype) -> None:
    queue = [torch.full((capacity,), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    cursor = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    expected: list[tuple[float, float]] = []
    pushed = 0
    block = queue_push.ROWS
    for rows in (0, 1, 12, 13, 14, 400, block, block + 1, 2 * block + 453, 5):
        mean, std = torch.randn(rows, dtype=dtype), torch.rand(rows, dtype=dtype)
        accepted: Tensor | None = torch.rand(rows) < 0.8
        if rows > 12:
            mean[3], std[7], mean[11] = torch.nan, torch.inf, -torch.inf
        if rows == 13:
            accepted = torch.zeros(rows, dtype=torch.bool)
        if rows == 400:
            accepted = None
        keep = mean.isfinite() & std.isfinite() & (True if accepted is None else accepted)
        flags = None if accepted is None else on_device(accepted.repeat_interleave(2)[::2])[0]
        kernels.push(*queue, cursor, *on_device(mean, std), flags)
        pushed += int(keep.sum())
        expected = (expected + list(zip(mean[keep].tolist(), std[keep].tolist(), strict=True)))[-capacity:]
        head, length = cursor.tolist()
        assert (head, length) == (pushed % capacity, min(pushed, capacity))
        slots = (torch.arange(length) + head - length) % capacity
        assert list(zip(*(q.cpu()[slots].tolist() for q in queue), strict=True)) == expected
    assert pushed > 2 * capacity


@pytest.mark.parametrize("cursor", [[1 << 40, 3], [-1, 0], [0, 1 << 40], [2, -5]])
def test_cursor_outside_the_ring_touches_nothing(cursor: list[int]) -> None:
    """The host reports it where it may read it; the kernels alone must neither write nor read outside the queue."""
    entries = torch.rand(2, 3 * 7, device=DEVICE)
    queue = entries[0, 7:14].clone(), entries[1, 7:14].clone()
    place = torch.tensor(cursor, device=DEVICE)
    kernels.push(*queue, place, torch.rand(3, device=DEVICE), torch.rand(3, device=DEVICE), None)
    assert place.tolist() == cursor
    assert torch.equal(queue[0], entries[0, 7:14])
    if not 0 <= cursor[1] <= 7:
        assert kernels.nearest(*queue, place, *entries[:, :2]).isposinf().all()
