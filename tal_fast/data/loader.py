"""Loader of one split, and the source of images in memory."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tal_fast.data.augment import PixelAugmentation
from tal_fast.data.headers import UnreadableImage
from tal_fast.data.sampler import Batch, Plan

Images = tuple[Tensor, Tensor, Tensor]
"""Images (B, C, H, W) float32, normalized; labels (B,) int64, -1 for OOD, -100 for a file that did not decode; indices
(B,) int64 in the split."""

IGNORED_LABEL = -100
"""Label of an image that could not be read: the ``ignore_index`` of cross-entropy and ``TALLoss``."""


MAPPED_BYTES = 8 << 20
"""Size from which a batch is a mapping of its own, whose pages cost 0.3 ms a MB; below, the heap reuses its blocks."""


@dataclass(frozen=True)
class ImageFormat:
    """Format of the images of a batch."""

    channels: int
    mean: list[float]  # per channel, for values in [0, 1]
    std: list[float]
    device: torch.device
    interpolation: str = "bilinear"  # filter for resizing, one of ``tal_fast.config.names.INTERPOLATIONS``


@dataclass(frozen=True)
class ImageBatch:
    """Images of one step."""

    images: Tensor  # (B, C, S, S) float32, normalized, on the loader's device
    indices: Tensor  # (B,) int64 on the CPU
    unreadable: dict[int, str] = field(default_factory=dict)  # black row -> reason that its file does not decode


class Source(Protocol):
    """Reader of the images of a split: from memory, through Pillow or through DALI."""

    def steps(self, epoch: int, start_step: int, image_size: int) -> Generator[ImageBatch, None, None]:
        """Steps of an epoch from ``start_step`` on, with images of ``image_size`` pixels a side."""
        ...

    def close(self) -> None:
        """End workers and threads; ``steps`` starts new ones."""
        ...


class Loader:
    """Iterable over the (images, labels, indices) of an epoch's steps on one rank.

    The length is the number of steps. The order of a training epoch depends on the seed and the epoch alone; call
    ``set_epoch`` before iterating. ``unreadable`` is path -> reason, for the files that did not decode so far on this
    rank. ``change`` changes the images of a step in place, given their indices, the epoch and the step.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        labels: np.ndarray,
        device: torch.device,
        *,
        image_size: int,
        paths: Sequence[str] = (),
        max_unreadable: int = 0,
        check_command: str = "",
        change: Callable[[Tensor, np.ndarray, int, int], None] | None = None,
    ) -> None:
        self._change = change
        self.unreadable: dict[str, str] = {}
        self._source, self._plan, self._device = source, plan, device
        self._labels, self._paths, self._default_size = torch.from_numpy(labels), paths, image_size
        self._max_unreadable, self._check_command = max_unreadable, check_command
        self.set_epoch(0)

    @property
    def num_samples(self) -> int:
        """Images of the split over all ranks."""
        return self._plan.num_samples

    def __len__(self) -> int:
        return len(self._plan)

    def set_epoch(self, epoch: int, start_step: int = 0, image_size: int | None = None) -> None:
        """Choose the epoch that iterations read, counted from 0, and the step of it that they start at.

        ``image_size`` is the side of the images in pixels, for progressive resizing; by default the data set's. The
        crops do not depend on it. Raises ValueError if it is below 1.
        """
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size is {image_size} but must be at least 1")
        self._epoch, self._start_step = epoch, start_step
        self._image_size = image_size or self._default_size

    def close(self) -> None:
        """End the processes and threads of the loader; the next iteration starts new ones."""
        self._source.close()

    def __iter__(self) -> Generator[Images, None, None]:
        try:
            with closing(self._source.steps(self._epoch, self._start_step, self._image_size)) as steps:
                for number, step in enumerate(steps, self._start_step):
                    labels = self._labels[step.indices]
                    for row, reason in step.unreadable.items():
                        labels[row] = IGNORED_LABEL
                        self._record_unreadable(self._paths[int(step.indices[row])], reason)
                    if self._change is not None:
                        self._change(step.images, step.indices.numpy(), self._epoch, number)
                    yield step.images, to_device(labels, self._device), to_device(step.indices, self._device)
        except Exception:
            self.close()
            raise

    def _record_unreadable(self, path: str, reason: str) -> None:
        count = len(self.unreadable.keys() | {path})
        if self._max_unreadable == 0:
            raise UnreadableImage(f"{reason}; remove or replace it, or {self._check_command}")
        if count > self._max_unreadable:  # not recorded, so that the run can go on once it is mended
            raise UnreadableImage(
                f"{reason}; it is file number {count} that does not decode, and data.max_unreadable is "
                f"{self._max_unreadable}; {self._check_command}"
            )
        self.unreadable[path] = reason


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to ``device`` without waiting for a GPU."""
    if device.type != "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


Item = TypeVar("Item")


def prefetch(
    items: Iterable[Item], make: Callable[[Item], ImageBatch], device: torch.device
) -> Generator[ImageBatch, None, None]:
    """Yield ``map(make, items)``; on a GPU one item ahead on a separate stream, so that copies overlap the step.

    Args:
        items: inputs on the CPU, in pinned memory.
        make: copies an item to the device and processes it there without waiting.
        device: device of the results.
    """
    if device.type != "cuda":
        yield from map(make, items)
        return
    remaining = iter(items)
    side = torch.cuda.Stream(device)

    def start() -> tuple[ImageBatch, torch.cuda.Event] | None:
        for item in remaining:
            with torch.cuda.stream(side):
                return make(item), side.record_event()
        return None

    ahead = start()
    while ahead is not None:
        result, ready = ahead
        ahead = start()
        current = torch.cuda.current_stream(device)
        current.wait_event(ready)
        result.images.record_stream(current)  # the side stream must not reuse the memory before the step is done
        yield result


def _new_batch(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Uninitialised float32 tensor; a large one on the CPU is a mapping of its own, returned to the system when freed.

    glibc's malloc keeps blocks up to 32 MiB in its heap, where batches of 19 MB left 0.2 to 0.6 GB of unused holes.
    """
    size = 4 * math.prod(shape)
    if device.type != "cpu" or size < MAPPED_BYTES:
        return torch.empty(shape, device=device)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.float32).view(shape)


class Normalizer:
    """Normalization ``(x / 255 - mean) / std`` of (B, H, W, C) uint8 to (B, C, H, W) float32.

    The strides are channels-first, too: for one channel PyTorch could not tell both memory formats apart, and the
    network would run in channels-last format whatever ``model.channels_last`` is. ``black`` and ``white`` are the
    normalized values (C, 1, 1) of 0 and 255.
    """

    def __init__(self, form: ImageFormat) -> None:
        mean, std = torch.tensor(form.mean), torch.tensor(form.std)
        self._scale = std.mul(255).reciprocal().to(form.device)
        self._offset = (mean / std).to(form.device)
        self.black = -self._offset[:, None, None]
        self.white = (255 * self._scale - self._offset)[:, None, None]

    def __call__(self, pixels: Tensor) -> Tensor:
        batch, height, width, channels = pixels.shape
        images = _new_batch((batch, channels, height, width), pixels.device)
        images.copy_(pixels.permute(0, 3, 1, 2))
        # In place: temporary tensors took three times the memory.
        return images.mul_(self._scale[:, None, None]).sub_(self._offset[:, None, None])


class MemorySource:
    """Source of images held in memory on the loader's device; the arrays are those of ``MemoryImages``.

    With ``augment`` they stay on the CPU, where each is augmented before it is mirrored and shifted.
    """

    def __init__(
        self,
        plan: Plan,
        pixels: Tensor,
        rows: Tensor | None,
        form: ImageFormat,
        augment: PixelAugmentation | None = None,
    ) -> None:
        self._plan = plan
        self._device = form.device
        self._augment = augment
        self._pixels = pixels.to(form.device) if augment is None else pixels
        self._rows = rows
        self._normalize = Normalizer(form)
        self._interpolation = form.interpolation

    def steps(self, epoch: int, start_step: int, image_size: int) -> Generator[ImageBatch, None, None]:
        batches = self._plan.batches(epoch, start_step)
        return prefetch(batches, lambda batch: self._make(batch, image_size), self._device)

    def close(self) -> None:
        pass

    def _make(self, batch: Batch, image_size: int) -> ImageBatch:
        indices = torch.from_numpy(batch.indices)
        rows = indices if self._rows is None else self._rows[indices]
        if self._augment is None:
            pixels = self._pixels[to_device(rows, self._device)]
        else:
            assert batch.draws is not None
            pixels = to_device(self._augment.batch(self._pixels[rows], batch.draws), self._device)
        if batch.mirror.any():
            mirror = to_device(torch.from_numpy(batch.mirror), self._device).bool()
            pixels = torch.where(mirror[:, None, None, None], pixels.flip(2), pixels)
        if batch.shift.any():
            pixels = _shift(pixels, to_device(torch.from_numpy(batch.shift), self._device))
        images = self._normalize(pixels)
        size = (image_size, image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode=self._interpolation, antialias=True)
            if self._interpolation == "bicubic":  # overshoots at edges, unlike the resizing of 8-bit files
                images = images.clamp(self._normalize.black, self._normalize.white)
        return ImageBatch(images, indices)


def _shift(pixels: Tensor, shift: Tensor) -> Tensor:
    """Move images (B, H, W, C) down and right by (B, 2) pixels, padding with black."""
    rows, height, width = pixels.shape[:3]
    y = torch.arange(height, device=pixels.device) - shift[:, :1]  # (B, H) source of each row
    x = torch.arange(width, device=pixels.device) - shift[:, 1:]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    at = torch.arange(rows, device=pixels.device)[:, None, None]
    moved = pixels[at, y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None, :]]
    return moved * inside[..., None]
