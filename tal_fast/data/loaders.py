"""The loader every split is read through, whatever reads the images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tal_fast.data.plan import Batch, Plan

Images = tuple[Tensor, Tensor, Tensor]
"""(images, labels, indices): (B, C, H, W) float32 normalised; (B,) int64, -1 for OOD; (B,) int64 line of the split."""


@dataclass(frozen=True)
class ImageFormat:
    """What images are made into.

    Attributes:
        image_size: side in pixels.
        channels: 1 or 3.
        mean, std: per channel, of values scaled to [0, 1].
        device: where they end up.
    """

    image_size: int
    channels: int
    mean: list[float]
    std: list[float]
    device: torch.device


class Source(Protocol):
    """Reads the images of a split. One for each way of reading: PyTorch, DALI, memory."""

    def images(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, indices) of each of the plan's steps, the images on the loader's device, the indices anywhere."""
        ...


class Loader:
    """Iterable over the (images, labels, indices) of an epoch's steps on one rank.

    ``len()`` is in steps. In training each epoch has another order, which depends on the seed and the epoch alone;
    call ``set_epoch`` before iterating.

    Attributes:
        num_samples: images of the split over all ranks; with one rank, those an epoch of evaluation yields.
    """

    def __init__(self, source: Source, plan: Plan, labels: np.ndarray, device: torch.device) -> None:
        self._source = source
        self._plan = plan
        self._labels = torch.from_numpy(labels).to(device)
        self._epoch = 0
        self._start_step = 0

    @property
    def num_samples(self) -> int:
        """See the class."""
        return self._plan.num_samples

    def __len__(self) -> int:
        return len(self._plan)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """The epoch to read next, from ``start_step`` on; following iterations read the same one again."""
        self._epoch, self._start_step = epoch, start_step

    def __iter__(self) -> Iterator[Images]:
        for images, indices in self._source.images(self._epoch, self._start_step):
            indices = indices.to(self._labels.device, non_blocking=True)
            yield images, self._labels[indices], indices


def normalize(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """(B, H, W, C) uint8 to (B, C, H, W) float32: ``(x / 255 - mean) / std``."""
    scale = torch.tensor(std, device=images.device).mul(255).reciprocal()
    offset = torch.tensor(mean, device=images.device) / torch.tensor(std, device=images.device)
    return (images.float() * scale - offset).permute(0, 3, 1, 2).contiguous()


class MemorySource:
    """A split held in memory on the loader's device.

    Args:
        plan: the steps to make.
        pixels: (N, H, W, C) uint8.
        form: of the batches; they are resized if need be.
    """

    def __init__(self, plan: Plan, pixels: Tensor, form: ImageFormat) -> None:
        self._plan = plan
        self._pixels = pixels.to(form.device)
        self._form = form

    def images(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``Source``."""
        for batch in self._plan.batches(epoch, start_step):
            yield self._make(batch), torch.from_numpy(batch.indices)

    def _make(self, batch: Batch) -> Tensor:
        form = self._form
        pixels = self._pixels[torch.from_numpy(batch.indices).to(form.device)]
        if batch.mirror.any():
            mirror = torch.from_numpy(batch.mirror).to(form.device).bool()
            pixels = torch.where(mirror[:, None, None, None], pixels.flip(2), pixels)
        if batch.shift.any():
            pixels = _shift(pixels, torch.from_numpy(batch.shift).to(form.device))
        images = normalize(pixels, form.mean, form.std)
        size = (form.image_size, form.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return images


def _shift(pixels: Tensor, shift: Tensor) -> Tensor:
    """(B, H, W, C) moved by (B, 2) pixels (down, right); black moves in."""
    rows, height, width = pixels.shape[:3]
    y = torch.arange(height, device=pixels.device) - shift[:, :1]  # (B, H), where each row comes from
    x = torch.arange(width, device=pixels.device) - shift[:, 1:]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    at = torch.arange(rows, device=pixels.device)[:, None, None]
    moved = pixels[at, y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None, :]]
    return moved * inside[..., None]
