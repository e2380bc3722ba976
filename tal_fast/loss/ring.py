"""Ring buffer of feature statistics: the memory of ``FeatureQueue``, which the backends read and write."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tal_fast.loss import _extension
from tal_fast.loss.options import CHECK_LABELS_ON_GPU

COMPILED_INTO_CUDA_GRAPHS = ("cuda",)  # types of devices


@dataclass
class RingBuffer:
    """Ring buffer of (mean, std) pairs on one device."""

    mean: Tensor  # (N,) float32 or float64, where N is the capacity
    std: Tensor
    cursor: Tensor  # (2,) int64, [slot of the next entry, number of entries]
    indexed: bool = False  # whether the C++ extension may keep an index
    index: Tensor | None = None  # uint8, search index of the C++ extension; all zeros is an empty index

    @classmethod
    def empty(cls, capacity: int, dtype: torch.dtype, device: torch.device | str | None, indexed: bool) -> RingBuffer:
        """Ring buffer without entries."""
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"queue dtype is {dtype}; use torch.float32 or torch.float64")
        ring = cls(
            mean=torch.zeros(capacity, dtype=dtype, device=device),
            std=torch.zeros(capacity, dtype=dtype, device=device),
            cursor=torch.zeros(2, dtype=torch.int64, device=device),
            indexed=indexed,
        )
        ring.allocate_index()
        return ring

    @classmethod
    def of_entries(cls, mean: Tensor, std: Tensor, device: torch.device) -> RingBuffer:
        """Full ring buffer of (N,) entries on the device, N >= 0, for searching only; contiguous tensors are shared.

        Raises ValueError if their shapes differ or are not (N,).
        """
        if mean.dim() != 1 or mean.shape != std.shape:
            raise ValueError(
                f"queue_mean and queue_std must both be (N,), not {tuple(mean.shape)} and {tuple(std.shape)}"
            )
        ring = cls.empty(1, mean.dtype, device, indexed=False)  # the kernels need one slot at least
        if mean.numel():
            ring.mean, ring.std = mean.detach().contiguous(), std.detach().contiguous()
            ring.cursor[1] = mean.numel()
        return ring

    @property
    def capacity(self) -> int:
        """Largest number of entries."""
        return self.mean.numel()

    def allocate_index(self) -> None:
        """Allocate an empty search index if ``indexed`` and the C++ extension has one for this ring."""
        self.index = None
        if self.indexed and self.mean.device.type == "cpu" and _extension.load()[0]:
            size = torch.ops.tal_fast.index_bytes(self.capacity, self.mean.dtype == torch.float64)
            self.index = torch.zeros(size, dtype=torch.uint8, device="cpu") if size else None

    def keep_addresses(self) -> None:
        """Tell ``torch.compile`` that the tensors stay where they are, so that CUDA graphs may change them in place."""
        if self.mean.device.type in COMPILED_INTO_CUDA_GRAPHS:  # elsewhere the seconds to load torch._dynamo are saved
            for tensor in (self.mean, self.std, self.cursor):
                torch._dynamo.mark_static_address(tensor, guard=False)

    def invalidate_index(self) -> None:
        """Have the next push rebuild the index, after a change of the ring by other means."""
        if self.index is not None:
            self.index[:8] = 0

    def check(self, wait: bool = False) -> None:
        """Raise RuntimeError if the cursor lies outside the ring, as in memory that was never initialised.

        It is read on CPUs, and on GPUs, where that waits for the device, with ``wait`` or TAL_FAST_DEBUG=1.
        """
        if self.cursor.is_meta or torch.compiler.is_compiling():
            return
        if wait or CHECK_LABELS_ON_GPU or self.cursor.device.type == "cpu":
            problem = cursor_problem(self.cursor, self.capacity)
            if problem:
                raise RuntimeError(f"the queue's {problem}; call reset_parameters() or load a state")

    def clear(self) -> None:
        """Remove all entries, whatever the memory holds."""
        for tensor in (self.mean, self.std, self.cursor):
            tensor.zero_()
        self.invalidate_index()

    def convert(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a conversion such as ``.to(device)``; one to half precision moves the statistics without converting.

        One that keeps no values, as ``to_empty`` does after construction on the meta device, leaves an empty ring.
        """
        probe = torch.tensor(time.perf_counter_ns(), device=self.cursor.device)
        converted = function(probe)
        for name in ("mean", "std"):
            old = getattr(self, name)
            new = function(old)
            setattr(self, name, new if new.dtype in (torch.float32, torch.float64) else old.to(new.device))
        self.cursor = function(self.cursor)
        self.allocate_index()
        if not converted.is_meta and (probe.is_meta or int(converted) != int(probe)):
            self.clear()

    def load(self, mean: Tensor, std: Tensor, cursor: Tensor) -> None:
        """Copy the state of another ring, of its newest entries if its capacity differs."""
        self.invalidate_index()
        if mean.numel() != self.capacity:
            mean, std = newest_entries(mean, std, cursor, self.capacity)
            cursor = torch.tensor([mean.numel() % self.capacity, mean.numel()])
        self.mean[: mean.numel()] = mean.to(self.mean)
        self.std[: std.numel()] = std.to(self.std)
        self.cursor.copy_(cursor)


def newest_entries(mean: Tensor, std: Tensor, cursor: Tensor, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Copies of the newest entries of a ring, at most ``limit``, oldest first; waits for the device."""
    head, length = cursor.tolist()
    kept = length if limit is None else min(length, limit)
    slots = (torch.arange(kept, device=mean.device) + head - kept) % mean.numel()
    return mean[slots], std[slots]


def cursor_problem(cursor: Tensor, capacity: int) -> str | None:
    """Reason why this is not the cursor of a ring, or None if it may be; waits for the device."""
    head, length = cursor.tolist()
    if 0 <= head < capacity and 0 <= length <= capacity:
        return None
    # csrc/ops_cpu.cpp has a copy of it.
    return f"cursor ({head}, {length}) lies outside a ring of {capacity} entries: never initialised, or overwritten"


def invalid_state(mean: Any, std: Any, cursor: Any) -> str | None:
    """Reason why these are not the state of a ring buffer, or None if they are."""
    if not all(isinstance(t, Tensor) for t in (mean, std, cursor)):
        return "mean, std and cursor must be tensors"
    if not (mean.is_floating_point() and std.is_floating_point()) or any(t.is_meta for t in (mean, std, cursor)):
        return f"mean and std must hold real numbers, not {mean.dtype} and {std.dtype} on {mean.device}"
    if mean.dim() != 1 or mean.numel() < 1 or mean.shape != std.shape:
        return f"mean and std must both be (N,) with N >= 1, not {tuple(mean.shape)} and {tuple(std.shape)}"
    if cursor.shape != (2,) or cursor.dtype != torch.int64:
        return f"cursor must be 2 int64 values, not {cursor.dtype} of shape {tuple(cursor.shape)}"
    problem = cursor_problem(cursor, mean.numel())
    if problem:
        return problem
    head, length = cursor.tolist()
    if not (mean[: max(length, head)].isfinite().all() and std[: max(length, head)].isfinite().all()):
        return "it holds values that are not finite"
    if (std[: max(length, head)] < 0).any():
        return "it holds standard deviations below 0"
    return None
