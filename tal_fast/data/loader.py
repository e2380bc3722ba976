"""The loader every split is read through, whatever reads the images."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tal_fast.data.image_folder import UnreadableImage
from tal_fast.data.sampler import Batch, Plan

Images = tuple[Tensor, Tensor, Tensor]
"""(images, labels, indices): (B, C, H, W) float32 normalised; (B,) int64, -1 for OOD, -100 for a file that did not
decode; (B,) int64 line of the split."""

IGNORED_LABEL = -100
"""Of an image that could not be read: what cross-entropy and ``TALLoss`` take as ``ignore_index``."""


@dataclass(frozen=True)
class ImageFormat:
    """What images are made into.

    Attributes:
        channels: 1 or 3.
        mean, std: per channel, of values scaled to [0, 1].
        device: where they end up.
        interpolation: one of ``tal_fast.config.names.INTERPOLATIONS``.
    """

    channels: int
    mean: list[float]
    std: list[float]
    device: torch.device
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class Step:
    """What a source makes of a batch of the plan.

    Attributes:
        images: (B, C, S, S) float32, normalised, on the loader's device.
        indices: (B,) int64 on the CPU.
        unreadable: row -> a sentence that names its file and why it does not decode; the image is black.
    """

    images: Tensor
    indices: Tensor
    unreadable: dict[int, str] = field(default_factory=dict)


class Source(Protocol):
    """Reads the images of a split. One for each way of reading: PyTorch, DALI, memory."""

    def steps(self, epoch: int, start_step: int, image_size: int) -> Generator[Step, None, None]:
        """The plan's steps of an epoch from ``start_step`` on, with images of so many pixels a side."""
        ...

    def close(self) -> None:
        """End workers and threads; ``steps`` starts them anew."""
        ...


class Loader:
    """Iterable over the (images, labels, indices) of an epoch's steps on one rank.

    ``len()`` is in steps. In training each epoch has another order, which depends on the seed and the epoch alone;
    call ``set_epoch`` before iterating.

    Attributes:
        num_samples: images of the split over all ranks; with one rank, those an epoch of evaluation yields.
        unreadable: path -> why, of the files that did not decode so far on this rank.
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
    ) -> None:
        self.unreadable: dict[str, str] = {}
        self._source = source
        self._plan = plan
        self._labels = torch.from_numpy(labels)
        self._device = device
        self._paths = paths
        self._max_unreadable = max_unreadable
        self._check_command = check_command
        self._default_size = image_size
        self.set_epoch(0)

    @property
    def num_samples(self) -> int:
        """See the class."""
        return self._plan.num_samples

    def __len__(self) -> int:
        return len(self._plan)

    def set_epoch(self, epoch: int, start_step: int = 0, image_size: int | None = None) -> None:
        """The epoch to read next, from ``start_step`` on; following iterations read the same one again.

        Args:
            epoch: from 0.
            start_step: of the epoch.
            image_size: side of this epoch's images in pixels, for progressive resizing; None: the data set's. What is
                cut out of an image does not depend on it.

        Raises:
            ValueError: an image size below 1.
        """
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size is {image_size} but must be at least 1")
        self._epoch, self._start_step = epoch, start_step
        self._image_size = image_size or self._default_size

    def __iter__(self) -> Generator[Images, None, None]:
        try:
            with closing(self._source.steps(self._epoch, self._start_step, self._image_size)) as steps:
                for step in steps:
                    labels = self._labels[step.indices]
                    for row, reason in step.unreadable.items():
                        labels[row] = IGNORED_LABEL
                        self._note(self._paths[int(step.indices[row])], reason)
                    yield step.images, to_device(labels, self._device), to_device(step.indices, self._device)
        except UnreadableImage:
            self._source.close()  # now: collected as garbage, worker processes would be waited for in vain
            raise

    def _note(self, path: str, reason: str) -> None:
        self.unreadable[path] = reason
        if self._max_unreadable == 0:
            raise UnreadableImage(f"{reason}; remove or replace it, or {self._check_command}")
        if len(self.unreadable) > self._max_unreadable:
            raise UnreadableImage(
                f"{reason}; it is file number {len(self.unreadable)} that does not decode, and data.max_unreadable is "
                f"{self._max_unreadable}; {self._check_command}"
            )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``, without waiting for a GPU."""
    if device.type != "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


Made = TypeVar("Made")
Raw = TypeVar("Raw")


def prefetch(
    items: Iterable[Raw], make: Callable[[Raw], Made], tensors: Callable[[Made], Sequence[Tensor]], device: torch.device
) -> Generator[Made, None, None]:
    """``map(make, items)``, on a GPU one item ahead and on a stream of its own, so that copies run beside the step.

    Args:
        items: on the CPU, in pinned memory.
        make: copies to the device and works there; must not wait for it.
        tensors: those of a made item that live on the device.
        device: where.
    """
    if device.type != "cuda":
        yield from map(make, items)
        return
    rest = iter(items)
    side = torch.cuda.Stream(device)

    def start() -> tuple[Made, torch.cuda.Event] | None:
        for item in rest:
            with torch.cuda.stream(side):
                return make(item), side.record_event()
        return None

    ahead = start()
    while ahead is not None:
        made, ready = ahead
        ahead = start()
        current = torch.cuda.current_stream(device)
        current.wait_event(ready)
        for tensor in tensors(made):
            tensor.record_stream(current)  # its memory is the side stream's, and must not be given out while in use
        yield made


class Normalizer:
    """``(x / 255 - mean) / std`` from (B, H, W, C) uint8 to (B, C, H, W) float32; the constants stay on the device.

    The memory order is channels first, in the strides too: with one channel both orders are the same memory, PyTorch
    would go by the strides, and the network would run in channels-last order whatever ``model.channels_last`` says.

    Attributes:
        black, white: (C, 1, 1), what 0 and 255 become.
    """

    def __init__(self, form: ImageFormat) -> None:
        mean, std = torch.tensor(form.mean), torch.tensor(form.std)
        self._scale = std.mul(255).reciprocal().to(form.device)
        self._offset = (mean / std).to(form.device)
        self.black = -self._offset[:, None, None]
        self.white = (255 * self._scale - self._offset)[:, None, None]

    def __call__(self, pixels: Tensor) -> Tensor:
        images = (pixels.float() * self._scale - self._offset).permute(0, 3, 1, 2).contiguous()
        return images.flatten(1).view(images.shape)


class MemorySource:
    """A split held in memory on the loader's device; see ``Source``.

    Args:
        plan: the steps to make.
        pixels: (P, H, W, C) uint8.
        rows: (N,) int64, where in ``pixels`` each image of the split is; None: in order.
        form: of the batches; they are resized if need be.
    """

    def __init__(self, plan: Plan, pixels: Tensor, rows: Tensor | None, form: ImageFormat) -> None:
        self._plan = plan
        self._device = form.device
        self._pixels = pixels.to(form.device)
        self._rows = rows
        self._normalize = Normalizer(form)
        self._interpolation = form.interpolation

    def steps(self, epoch: int, start_step: int, image_size: int) -> Generator[Step, None, None]:
        """See ``Source``."""
        batches = self._plan.batches(epoch, start_step)
        return prefetch(batches, lambda batch: self._make(batch, image_size), lambda step: [step.images], self._device)

    def close(self) -> None:
        """See ``Source``: there is nothing to end."""

    def _make(self, batch: Batch, image_size: int) -> Step:
        indices = torch.from_numpy(batch.indices)
        pixels = self._pixels[self._to_device(indices if self._rows is None else self._rows[indices])]
        if batch.mirror.any():
            mirror = self._to_device(torch.from_numpy(batch.mirror)).bool()
            pixels = torch.where(mirror[:, None, None, None], pixels.flip(2), pixels)
        if batch.shift.any():
            pixels = _shift(pixels, self._to_device(torch.from_numpy(batch.shift)))
        images = self._normalize(pixels)
        size = (image_size, image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode=self._interpolation, antialias=True)
            if self._interpolation == "bicubic":  # which shoots over at edges; pixels of files end at 0 and 255
                images = images.clamp(self._normalize.black, self._normalize.white)
        return Step(images, indices)

    def _to_device(self, values: Tensor) -> Tensor:
        return to_device(values, self._device)


def _shift(pixels: Tensor, shift: Tensor) -> Tensor:
    """(B, H, W, C) moved by (B, 2) pixels (down, right); black moves in."""
    rows, height, width = pixels.shape[:3]
    y = torch.arange(height, device=pixels.device) - shift[:, :1]  # (B, H), where each row comes from
    x = torch.arange(width, device=pixels.device) - shift[:, 1:]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    at = torch.arange(rows, device=pixels.device)[:, None, None]
    moved = pixels[at, y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None, :]]
    return moved * inside[..., None]
