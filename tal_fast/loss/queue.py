"""Queue of past correctly classified samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tal_fast.loss import dispatch
from tal_fast.loss.options import whole_number
from tal_fast.loss.ring import RingBuffer, invalid_state, newest_entries

_KEYS = ("mean", "std", "cursor")


class FeatureQueue(nn.Module):
    """First-in-first-out queue of feature statistics (paper, section 3.1) with nearest-entry search.

    Each entry is the mean and the standard deviation of a sample's features. The queue is a ring buffer on one device:
    pushing and searching never wait for a GPU. It takes 8 bytes per entry in float32; on CPUs the C++ extension keeps a
    search index of about 23 bytes per entry beside it, with which a search in a large queue looks at some ten entries.
    The result is that of brute force, to the bit.

    The ring is neither parameters nor buffers: ``state_dict`` holds it and ``.to(device)`` moves it, but
    ``DistributedDataParallel``, which would overwrite every rank's queue with rank 0's, does not see it. ``.half()``
    and ``.bfloat16()`` leave it in float32; ``.double()`` makes it float64. ``to_empty`` leaves it empty.

    Threads may push and search at the same time; on GPUs, on one stream. ``reset``, ``load_state_dict`` and conversions
    are for one thread while no other uses the queue.

    Args:
        capacity: Largest number of entries, >= 1. The authors' code has 880,880 for ImageNet and 30,000 for CIFAR-100.
        dtype: ``torch.float32`` or ``torch.float64``.
        device: Device of the ring.
        backend: ``"auto"``, ``"reference"``, ``"native"`` or ``"triton"``; see ``tal_fast.loss.dispatch``.

    Raises:
        ValueError: If the capacity is less than 1 or no whole number, or the backend is unknown.
        TypeError: If the dtype is another one.

    Examples:
        >>> import torch
        >>> from tal_fast import FeatureQueue
        >>> queue = FeatureQueue(capacity=1000)
        >>> queue.push(mean=torch.tensor([0.0, 4.0]), std=torch.tensor([1.0, 1.0]))
        >>> queue.nearest(mean=torch.tensor([0.25, 4.0]), std=torch.tensor([1.0, 3.0]))
        tensor([0.2500, 2.0000])
        >>> len(queue)
        2
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
        capacity = whole_number("queue capacity", capacity)
        if capacity < 1:
            raise ValueError(f"queue capacity is {capacity} but must be at least 1; 20000 is a good default")
        self.backend = dispatch.check_name(backend)
        self.ring = RingBuffer.empty(capacity, dtype, device, indexed=backend in ("auto", "native"))
        self.ring.keep_addresses()
        self._pending_push: Callable[[], None] | None = None

    @property
    def capacity(self) -> int:
        """Largest number of entries."""
        return self.ring.capacity

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the entries and of the distances."""
        return self.ring.mean.dtype

    @property
    def device(self) -> torch.device:
        """Device of the ring."""
        return self.ring.mean.device

    def __len__(self) -> int:
        """Number of entries; waits for the device."""
        self.flush()
        self.ring.check(wait=True)
        return int(self.ring.cursor[1])

    def extra_repr(self) -> str:
        return f"capacity={self.capacity}, dtype={self.dtype}, device={self.device}"

    def forward(self, mean: Tensor, std: Tensor) -> Tensor:
        """Call ``nearest``."""
        return self.nearest(mean, std)

    @torch.no_grad()
    def push(self, mean: Tensor, std: Tensor, accepted: Tensor | None = None) -> None:
        """Append a batch's statistics in order; the oldest entries leave a full queue.

        Args:
            mean, std: (B,) floating point; pairs that are not finite are left out. B may exceed the capacity.
            accepted: (B,) bool, rows to append; all of them by default.

        Raises:
            ValueError: If shapes differ, or the device is not the queue's.
            TypeError: If ``accepted`` is not bool.
        """
        self.flush()
        mean, std = self._as_entries(mean, std)
        if accepted is not None:
            if accepted.dtype != torch.bool:
                raise TypeError(f"accepted is {accepted.dtype} but must be torch.bool")
            if accepted.shape != mean.shape:
                raise ValueError(f"accepted is {tuple(accepted.shape)} but must be {tuple(mean.shape)} as the mean")
        dispatch.for_device(self.backend, self.device).push(self.ring, mean, std, accepted)

    @torch.no_grad()
    def nearest(self, mean: Tensor, std: Tensor) -> Tensor:
        """Distance of each sample to its nearest entry.

        Args:
            mean, std: (B,) floating point.

        Returns:
            (B,) in the queue's dtype: ``min_j sqrt((m - m_j)² + (s - s_j)²)``; inf if the queue is empty, and not
            finite where ``mean`` or ``std`` is not.

        Raises:
            ValueError: If shapes differ, or the device is not the queue's.
        """
        self.flush()
        mean, std = self._as_entries(mean, std)
        return dispatch.for_device(self.backend, self.device).nearest(self.ring, mean, std)

    def contents(self) -> tuple[Tensor, Tensor]:
        """Copies of (mean, std), each (len(self),), oldest first; waits for the device."""
        self.flush()
        self.ring.check(wait=True)
        return newest_entries(self.ring.mean, self.ring.std, self.ring.cursor)

    def reset(self) -> None:
        """Remove all entries."""
        self.flush()
        self.ring.cursor.zero_()
        self.ring.invalidate_index()

    def reset_parameters(self) -> None:
        """Empty the queue, whatever its memory holds; to be called after ``to_empty``."""
        self._pending_push = None
        self.ring.clear()

    def push_later(self, push: Callable[[], None]) -> None:
        """Defer ``push``, which may wait for other ranks' entries, until the queue is next read or written.

        While ``torch.compile`` traces, it is called at once.
        """
        if torch.compiler.is_compiling():
            push()
        else:
            self._pending_push = push

    def flush(self) -> None:
        """Carry out a deferred push; to be called before the ring is read."""
        if self._pending_push is not None:
            push, self._pending_push = self._pending_push, None
            with torch.no_grad():
                push()

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        return self.__dict__.copy()

    def _as_entries(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics in the queue's dtype, if their shapes and devices are valid."""
        if mean.dim() != 1 or mean.shape != std.shape:
            raise ValueError(f"mean and std must both be (B,), not {tuple(mean.shape)} and {tuple(std.shape)}")
        if mean.device != self.device or std.device != self.device:
            raise ValueError(
                f"mean is on {mean.device}, std on {std.device} but the queue is on {self.device}; "
                "move them to one device"
            )
        return mean.to(self.dtype), std.to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureQueue:
        self.flush()
        super()._apply(fn, recurse)
        self.ring.convert(fn)
        self.ring.keep_addresses()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.flush()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in _KEYS:
            destination[prefix + key] = getattr(self.ring, key).detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Load a queue; of one with another capacity, the newest entries are kept."""
        known = [prefix + key for key in _KEYS]
        missing = [key for key in known if key not in state_dict]
        missing_keys += missing
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known]
        if missing:
            return
        mean, std, cursor = (state_dict[key] for key in known)
        problem = invalid_state(mean, std, cursor)
        if problem:
            error_msgs.append(f"the queue in {prefix or 'the state'} cannot be loaded: {problem}")
            return
        self.flush()
        with torch.no_grad():
            if self.ring.mean.is_meta:  # it holds nothing; the state's device is the one there is
                self.ring = RingBuffer.empty(self.capacity, self.dtype, mean.device, self.ring.indexed)
                self.ring.keep_addresses()
            self.ring.load(mean, std, cursor)
