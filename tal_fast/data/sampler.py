"""Order, crops and mirroring of the images of an epoch.

All of it is a function of (seed, epoch, image index) and does not depend on the loader, the number of ranks or workers,
or earlier reads. So all loaders give the same batches, k ranks together see the images of one rank with the whole
batch, and a run resumes at any step. Where an epoch may read an image more than once, the place in the epoch's order
stands for the index, so that each reading is augmented anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Batch:
    """Images of one step of one rank."""

    indices: np.ndarray  # (B,) int64 in the split
    boxes: np.ndarray  # (B, 4) int32 crops (top, left, height, width) in pixels of the stored image
    mirror: np.ndarray  # (B,) int32, 1 to swap left and right
    shift: np.ndarray  # (B, 2) int64 shift (down, right) in pixels, for images in memory
    draws: np.ndarray | None = None  # (B, ``Augmentation.draws``) float32 random numbers in [0, 1)


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation; the fields are those of ``tal_fast.config.schema.DataConfig``."""

    crop_area: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    shift: int = 0
    draws: int = 0  # random numbers that ``tal_fast.data.augment.PixelAugmentation`` takes for an image


@dataclass(frozen=True)
class Plan:
    """Batches of one split on one rank; raises ValueError if there are too few training images for a step."""

    sizes: np.ndarray  # (N, 2) int32 height and width of each image in pixels
    batch_size: int  # images per step on this rank
    rank: int = 0
    world_size: int = 1
    # Shuffle, and drop the images that do not fill a step of all ranks, so that all have the same number of steps.
    # Otherwise each image is read once over all ranks, in order; the last batch may be short, and a rank may have none.
    training: bool = False
    seed: int = 0  # of the order and augmentation
    crop_fraction: float = 1.0  # side of the central crop as a share of the shorter side
    augmentation: Augmentation | None = None  # in training; None for crops as in validation
    # (N,) classes to read equally often in training, drawing images with replacement; None to read each image once.
    balanced: np.ndarray | None = None
    repeats: int = 1  # readings in a row of each image in training; an epoch then has a ``repeats``-th of the images

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size
        if self.batch_size < 1:
            raise ValueError(f"batch size is {self.batch_size} but must be at least 1")
        step = self.batch_size * self.world_size
        if self.training and step > self.num_samples:
            raise ValueError(
                f"a step takes {step} images ({self.batch_size} on each of {self.world_size} ranks) but there are only "
                f"{self.num_samples} training images; lower batch_size"
            )

    @property
    def num_samples(self) -> int:
        """Images of the split over all ranks."""
        return len(self.sizes)

    def __len__(self) -> int:
        """Steps of an epoch on this rank."""
        if self.training:
            return self.num_samples // (self.batch_size * self.world_size)
        return -(-self._share().size // self.batch_size)

    def _share(self) -> np.ndarray:
        return np.arange(self.rank, self.num_samples, self.world_size)

    def batches(self, epoch: int = 0, start_step: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from ``start_step`` on."""
        order = self._order(epoch) if self.training else self._share()
        random = draws = None
        if self.training and self.augmentation is not None:
            random = self.draws(epoch, 1, 7)
            draws = self.draws(epoch, 2, self.augmentation.draws) if self.augmentation.draws else None
        for step in range(start_step, len(self)):
            places = (
                self._places(step) if self.training else slice(step * self.batch_size, (step + 1) * self.batch_size)
            )
            indices = order[places]
            rows = self.rows(step, indices)
            yield self._batch(indices, None if random is None else random[rows], None if draws is None else draws[rows])

    def _order(self, epoch: int) -> np.ndarray:
        """Images at the places of a training epoch."""
        random = np.random.default_rng([self.seed, epoch, 0])
        count = -(-self.num_samples // self.repeats)
        if self.balanced is None:
            order = random.permutation(self.num_samples)[:count]
        else:
            by_class, counts = np.argsort(self.balanced, kind="stable"), np.bincount(self.balanced)
            chosen = random.choice(np.flatnonzero(counts), count)
            order = by_class[(np.cumsum(counts) - counts)[chosen] + random.integers(counts[chosen])]
        return np.repeat(order, self.repeats)[: self.num_samples]

    def _places(self, step: int) -> np.ndarray:
        """(B,) places in the epoch's order of the images of a training step on this rank."""
        whole = self.batch_size * self.world_size
        if self.repeats > 1:  # the readings of an image go to different ranks, as in DeiT
            return np.arange(step * whole + self.rank, (step + 1) * whole, self.world_size)
        first = step * whole + self.rank * self.batch_size
        return np.arange(first, first + self.batch_size)

    def draws(self, epoch: int, stream: int, columns: int) -> np.ndarray:
        """(N, columns) float32 random numbers in [0, 1) of a training epoch; streams are independent."""
        return np.random.default_rng([self.seed, epoch, stream]).random((self.num_samples, columns), dtype=np.float32)

    def rows(self, step: int, indices: np.ndarray) -> np.ndarray:
        """(B,) rows of ``draws`` for the images of a training step."""
        return indices if self.balanced is None and self.repeats == 1 else self._places(step)

    def _batch(self, indices: np.ndarray, random: np.ndarray | None, draws: np.ndarray | None = None) -> Batch:
        sizes = self.sizes[indices].astype(np.float64)
        augmentation = self.augmentation
        mirror = np.zeros(len(indices), np.int32)
        shift = np.zeros((len(indices), 2), np.int64)
        if random is None or augmentation is None:
            return Batch(indices.astype(np.int64), central_boxes(sizes, self.crop_fraction), mirror, shift)
        if augmentation.crop_area is None:
            boxes = central_boxes(sizes, self.crop_fraction)
        else:
            boxes = random_boxes(sizes, augmentation.crop_area, augmentation.crop_ratio, random[:, :4])
        if augmentation.flip:
            mirror = (random[:, 4] < 0.5).astype(np.int32)
        if augmentation.shift:
            shift = np.floor(random[:, 5:7] * (2 * augmentation.shift + 1)).astype(np.int64) - augmentation.shift
        return Batch(indices.astype(np.int64), boxes, mirror, shift, draws)


def central_boxes(sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Boxes (B, 4) int32 (top, left, height, width) of the central squares of images.

    ``sizes`` (B, 2) float64 are heights and widths, and the squares' sides are ``fraction`` of the shorter one. They
    hold the same pixels as resizing the shorter side to ``size / fraction`` and cropping the centre.
    """
    side = np.maximum(1, np.round(sizes.min(axis=1) * fraction))
    corner = np.floor((sizes - side[:, None]) / 2)
    return np.concatenate([corner, side[:, None], side[:, None]], axis=1).astype(np.int32)


def random_boxes(
    sizes: np.ndarray, area: tuple[float, float], ratio: tuple[float, float], random: np.ndarray
) -> np.ndarray:
    """Boxes of random area, aspect ratio (log-uniform) and position, as in the training of Inception and torchvision.

    A box that exceeds the image is narrowed to it, where torchvision draws again.

    Args:
        sizes: (B, 2) float64 heights and widths.
        area: smallest and largest share of the image's area.
        ratio: smallest and largest ratio of width to height.
        random: (B, 4) random numbers in [0, 1).

    Returns:
        (B, 4) int32 (top, left, height, width).
    """
    pixels = sizes.prod(axis=1) * (area[0] + random[:, 0] * (area[1] - area[0]))
    shape = np.exp(np.log(ratio[0]) + random[:, 1] * (np.log(ratio[1]) - np.log(ratio[0])))
    box = np.round(np.stack([np.sqrt(pixels / shape), np.sqrt(pixels * shape)], axis=1))
    box = np.clip(box, 1, sizes)
    corner = np.floor(random[:, 2:4] * (sizes - box + 1))
    return np.concatenate([np.minimum(corner, sizes - box), box], axis=1).astype(np.int32)
