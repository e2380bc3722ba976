"""The queue of past well-classified samples, as a ring buffer of feature statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tal_fast.loss import _extension, backends

_KEYS = ("mean", "std", "cursor")


class FeatureQueue(nn.Module):
    """First-in-first-out queue of (mean, std) pairs (paper, section 3.1), searched for the nearest one.

    A ring buffer on one device: pushing and searching never wait for a GPU. Memory is 8 bytes an entry in float32; the
    C++ extension keeps an index beside the rings of large queues on the CPU (about 23 bytes an entry more), so that a
    search looks at some ten entries. Its result is brute force's, to the bit.

    The ring is state, not parameters or buffers: ``state_dict`` holds it and ``.to(device)`` moves it, but
    ``DistributedDataParallel`` does not see it, which would otherwise overwrite every rank's queue with rank 0's.
    ``.half()`` and ``.bfloat16()`` leave it in float32; ``.double()`` makes it float64.

    Args:
        capacity: entries kept, >= 1; 880,880 for ImageNet and 30,000 for CIFAR-100 in the released code.
        dtype: torch.float32 or torch.float64.
        device: where the ring lives.
        backend: ``"auto"`` (the C++ extension where it runs, else Triton on GPUs, else plain PyTorch) or one of
            ``"native"``, ``"triton"``, ``"reference"``.

    Raises:
        ValueError: capacity < 1 or an unknown backend.
        TypeError: another dtype.
    """

    def __init__(
        self,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if capacity < 1:
            raise ValueError(f"queue capacity is {capacity} but must be at least 1; 20000 is a good default")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"queue dtype is {dtype}; use torch.float32 or torch.float64")
        self.backend = backends.check_name(backend)
        # Plain attributes, not buffers: see the class's docstring.
        self.mean_ring = torch.zeros(capacity, dtype=dtype, device=device)
        self.std_ring = torch.zeros(capacity, dtype=dtype, device=device)
        # [slot the next entry goes to, number of entries]
        self.cursor = torch.zeros(2, dtype=torch.int64, device=device)
        # Counts the programs of a Triton launch that have finished; 0 between launches.
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)
        self.index = self._new_index()
        self._due: Callable[[], None] | None = None

    @property
    def capacity(self) -> int:
        """Entries kept."""
        return self.mean_ring.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of the statistics kept and the distances given."""
        return self.mean_ring.dtype

    @property
    def device(self) -> torch.device:
        """Where the ring lives."""
        return self.mean_ring.device

    def __len__(self) -> int:
        """Number of entries; waits for the device."""
        self.settle()
        return int(self.cursor[1])

    def extra_repr(self) -> str:
        return f"capacity={self.capacity}, dtype={self.dtype}, device={self.device}"

    def forward(self, mean: Tensor, std: Tensor) -> Tensor:
        """The same as ``nearest``."""
        return self.nearest(mean, std)

    @torch.no_grad()
    def push(self, mean: Tensor, std: Tensor, accepted: Tensor | None = None) -> None:
        """Append a batch's statistics, in order; beyond the capacity the oldest leave first.

        Args:
            mean, std: (B,) floating point; pairs that are not finite are left out. B may exceed the capacity.
            accepted: (B,) bool, the rows to append; all of them by default.

        Raises:
            ValueError: shapes that differ, or another device than the queue's.
            TypeError: ``accepted`` is not bool.
        """
        self.settle()
        mean, std = self._entries(mean, std)
        if accepted is not None:
            if accepted.dtype != torch.bool:
                raise TypeError(f"accepted is {accepted.dtype} but must be torch.bool")
            if accepted.shape != mean.shape:
                raise ValueError(f"accepted is {tuple(accepted.shape)} but mean is {tuple(mean.shape)}")
        backends.for_queue(self.backend, self.device).push(self, mean, std, accepted)

    @torch.no_grad()
    def nearest(self, mean: Tensor, std: Tensor) -> Tensor:
        """Distance of each sample to the nearest entry.

        Args:
            mean, std: (B,) floating point.

        Returns:
            (B,) in the queue's dtype: ``min_j sqrt((m - m_j)² + (s - s_j)²)``; inf while the queue is empty, and not
            finite where ``mean`` or ``std`` is not.

        Raises:
            ValueError: shapes that differ, or another device than the queue's.
        """
        self.settle()
        mean, std = self._entries(mean, std)
        return backends.for_queue(self.backend, self.device).nearest(self, mean, std)

    def contents(self) -> tuple[Tensor, Tensor]:
        """Copies of (mean, std), each (len(self),), oldest first; waits for the device."""
        self.settle()
        return newest_entries(self.mean_ring, self.std_ring, self.cursor)

    def reset(self) -> None:
        """Empty the queue."""
        self.settle()
        self.cursor.zero_()
        self._forget_index()

    def push_later(self, push: Callable[[], None]) -> None:
        """Have ``push``, which may wait for entries of other ranks, called before the queue is next read or written.

        While ``torch.compile`` traces it is called at once.
        """
        if torch.compiler.is_compiling():
            push()
        else:
            self._due = push

    def settle(self) -> None:
        """Do what ``push_later`` put off; for those who read the rings themselves."""
        if self._due is not None:
            due, self._due = self._due, None
            with torch.no_grad():
                due()

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return self.__dict__.copy()

    def _entries(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        if mean.dim() != 1 or mean.shape != std.shape:
            raise ValueError(f"mean and std must both be (B,), not {tuple(mean.shape)} and {tuple(std.shape)}")
        if mean.device != self.device or std.device != self.device:
            raise ValueError(f"mean is on {mean.device}, std on {std.device} but the queue is on {self.device}")
        return mean.to(self.dtype), std.to(self.dtype)

    def _new_index(self) -> Tensor | None:
        """Memory for the extension's index; None where it has none. All zeros is an index of nothing."""
        if self.device.type != "cpu" or self.backend not in ("auto", "native") or not _extension.load()[0]:
            return None
        size = torch.ops.tal_fast.index_bytes(self.capacity, self.dtype == torch.float64)
        return torch.zeros(size, dtype=torch.uint8) if size else None

    def _forget_index(self) -> None:
        """To be called when the rings change by other means than ``push``; the next push builds the index anew."""
        if self.index is not None:
            self.index[:8] = 0

    # ---- State ------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureQueue:
        self.settle()
        super()._apply(fn, recurse)
        for name in ("mean_ring", "std_ring"):
            old = getattr(self, name)
            new = fn(old)
            setattr(self, name, new if new.dtype in (torch.float32, torch.float64) else old.to(new.device))
        self.cursor = fn(self.cursor)
        self.ticket = fn(self.ticket)
        self.index = self._new_index()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, value in zip(_KEYS, (self.mean_ring, self.std_ring, self.cursor), strict=True):
            destination[prefix + key] = value

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes a queue of another capacity too: its newest entries are kept."""
        missing = [prefix + key for key in _KEYS if prefix + key not in state_dict]
        missing_keys += missing
        known = {prefix + key for key in _KEYS}
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known]
        if missing:
            return
        mean, std, cursor = (state_dict[prefix + key] for key in _KEYS)
        problem = _problem_of_state(mean, std, cursor)
        if problem:
            error_msgs.append(f"the queue in {prefix or 'the state'} cannot be loaded: {problem}")
            return
        self.settle()
        self._forget_index()
        with torch.no_grad():
            if mean.numel() == self.capacity:
                self.mean_ring.copy_(mean)
                self.std_ring.copy_(std)
                self.cursor.copy_(cursor)
                return
            mean, std = newest_entries(mean, std, cursor, self.capacity)
            kept = mean.numel()
            self.mean_ring[:kept] = mean.to(self.mean_ring)
            self.std_ring[:kept] = std.to(self.std_ring)
            self.cursor.copy_(torch.tensor([kept % self.capacity, kept]))


def newest_entries(mean: Tensor, std: Tensor, cursor: Tensor, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Copies of the entries of a ring, oldest first, ``limit`` at most; waits for the device.

    Args:
        mean, std, cursor: of a queue's state.
        limit: the newest so many; None: all.
    """
    head, length = cursor.tolist()
    kept = length if limit is None else min(length, limit)
    slots = (torch.arange(kept, device=mean.device) + head - kept) % mean.numel()
    return mean[slots], std[slots]


def _problem_of_state(mean: Any, std: Any, cursor: Any) -> str | None:
    if not all(isinstance(t, Tensor) for t in (mean, std, cursor)):
        return "mean, std and cursor must be tensors"
    if mean.dim() != 1 or mean.numel() < 1 or mean.shape != std.shape:
        return f"mean and std must both be (N,) with N >= 1, not {tuple(mean.shape)} and {tuple(std.shape)}"
    if cursor.shape != (2,) or cursor.dtype != torch.int64:
        return f"cursor must be 2 int64 values, not {cursor.dtype} of shape {tuple(cursor.shape)}"
    head, length = cursor.tolist()
    if not (0 <= head < mean.numel() and 0 <= length <= mean.numel()):
        return f"cursor ({head}, {length}) lies outside a ring of {mean.numel()} entries"
    if not (mean[: max(length, head)].isfinite().all() and std[: max(length, head)].isfinite().all()):
        return "it holds values that are not finite"
    return None
