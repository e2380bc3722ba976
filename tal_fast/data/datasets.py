"""Splits of a data set: training, validation and out-of-distribution images."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tal_fast.config.data import DATASETS, DataConfig
from tal_fast.data import dali
from tal_fast.data.augment import PixelAugmentation
from tal_fast.data.erasing import Eraser
from tal_fast.data.image_folder import OOD_LABEL, ImageFiles
from tal_fast.data.loader import ImageFormat, Loader, MemorySource, Source
from tal_fast.data.packed import PackedImages
from tal_fast.data.pillow import TorchSource
from tal_fast.data.pixels import as_channels
from tal_fast.data.sampler import Augmentation, Plan

FOLDER_IMAGE_SIZE = 224

MIN_UNREADABLE, UNREADABLE_SHARE = 10, 0.01
"""Files per rank that may fail to decode by default: a share of the split, but at least this number."""


@dataclass(frozen=True)
class MemoryImages:
    """Split held in memory."""

    pixels: np.ndarray  # (P, H, W, C) uint8
    labels: np.ndarray  # (N,) int64
    rows: np.ndarray | None = None  # (N,) int64, row of ``pixels`` that holds each image; None if they are in order

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> np.ndarray:
        """(N, 2) int32 heights and widths."""
        return np.broadcast_to(np.array(self.pixels.shape[1:3], np.int32), (len(self), 2))

    @classmethod
    def unlabelled(cls, pixels: np.ndarray, channels: int) -> MemoryImages:
        """Out-of-distribution images with ``channels`` channels, from any array that ``as_channels`` takes."""
        return cls(as_channels(pixels, channels), np.full(len(pixels), OOD_LABEL, np.int64))

    def subset(self, indices: np.ndarray) -> MemoryImages:
        """Images at ``indices``."""
        if self.rows is not None:
            return MemoryImages(self.pixels, self.labels[indices], self.rows[indices])
        return MemoryImages(self.pixels[indices], self.labels[indices])


Split = ImageFiles | MemoryImages


class DataBundle:
    """All splits of a data set, made by ``build_data``.

    ``class_names`` has the name of each label; ``image_size`` is the side of the images in pixels.
    """

    def __init__(
        self,
        config: DataConfig,
        class_names: Sequence[str],
        image_size: int,
        train: Split,
        val: Split,
        ood: dict[str, Callable[[], Split]],
    ) -> None:
        self.config = config
        self.class_names = tuple(class_names)
        self.image_size = image_size
        train, val = self._turned(train), self._turned(val)
        self._splits: dict[str, Split] = {"train": train, "train-eval": train, "val": val}
        self._ood = ood

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Number of channels of the images, 1 or 3."""
        return self.config.channels

    @property
    def ood_names(self) -> tuple[str, ...]:
        """Names of the out-of-distribution sets, which are splits for ``loader``."""
        return tuple(self._ood)

    @cached_property
    def loader_name(self) -> str:
        """Reader of the images: ``memory``, ``dali`` or ``torch``."""
        if isinstance(self._splits["train"], MemoryImages):
            return "memory"
        if self.config.loader == "auto":
            files = [split for split in self._splits.values() if isinstance(split, ImageFiles)]
            torch_only = self.config.needs_torch_loader or any(split.torch_only for split in files)
            return "dali" if dali.available() and not torch_only else "torch"
        return self.config.loader

    def summary(self) -> str:
        """One line with the numbers of images and classes."""
        train, val = (len(self._splits[name]) for name in ("train", "val"))
        return f"{self.config.dataset}: {train:,} training and {val:,} validation images, {self.num_classes} classes"

    def split(self, name: str) -> Split:
        """Images of ``train``, ``train-eval``, ``val`` or one of ``ood_names``; raises ValueError for other names."""
        if name not in self._splits:
            if name not in self._ood:
                raise ValueError(f"no split {name!r}; there are {', '.join([*self._splits, *self._ood])}")
            self._splits[name] = self._turned(self._ood[name]())
        return self._splits[name]

    def _turned(self, split: Split) -> Split:
        turn = self.config.exif_rotation and isinstance(split, ImageFiles) and not split.upright
        return split.turned() if turn else split  # type: ignore[union-attr]

    def replace(self, *, train: Split | None = None, val: Split | None = None) -> None:
        """Replace splits by other images of the same classes."""
        if train is not None:
            self._splits["train"] = self._splits["train-eval"] = train
        if val is not None:
            self._splits["val"] = val

    def loader(
        self,
        split: str | Split,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
        skip_unreadable: bool = False,
        training: bool | None = None,
    ) -> Loader:
        """Loader of a split for one rank.

        Args:
            split: ``train`` (shuffled and augmented anew each epoch; images that do not fill a step of all ranks are
                dropped), ``train-eval`` (the same images in order, each once, not augmented), ``val`` or one of
                ``ood_names`` (as ``train-eval``; labels are -1). Or any images, which are read as ``val``.
            batch_size: images per step and rank.
            rank: global rank.
            world_size: number of ranks; each reads its share.
            seed: seed of the order and augmentation of ``train``.
            device: device of the batches.
            skip_unreadable: replace a file that does not decode by a black image with label -100, which losses ignore,
                and list it in ``Loader.unreadable``.
            training: shuffle, augment and drop as for ``train``; by default for ``train`` alone.

        Returns:
            Loader of images (B, C, S, S) float32, normalized; labels (B,) int64; indices (B,) int64 in the split.

        Raises:
            ValueError: there is no such split, or it has too few images for one training step.
            UnreadableImage: while iterating, a file does not decode; with ``skip_unreadable``, more than
                ``config.max_unreadable`` files do not.
        """
        images = self.split(split) if isinstance(split, str) else self._turned(split)
        config, device = self.config, torch.device(device)
        if training is None:
            training = isinstance(split, str) and split == "train"
        paths, shift = ((), config.shift) if isinstance(images, MemoryImages) else (images.paths, 0)
        augment = PixelAugmentation(config) if training and config.changes_pixels else None
        draws = 0 if augment is None else augment.draws
        augmentation = Augmentation(config.crop_area, config.crop_ratio, config.flip, shift, draws)
        order: dict[str, Any] = {}
        if split == "train":  # not the outliers of a method
            order = {"balanced": images.labels if config.sampling == "balanced" else None, "repeats": config.repeats}
        plan = Plan(
            images.sizes, batch_size, rank, world_size, training, seed, config.central_crop, augmentation, **order
        )
        limit = config.max_unreadable
        if limit is None:
            limit = max(MIN_UNREADABLE, int(UNREADABLE_SHARE * len(images)))
        return Loader(
            self._source(images, plan, device, augment), plan, images.labels, device, image_size=self.image_size,
            paths=paths, max_unreadable=limit if skip_unreadable else 0, check_command=self._check_command(split),
            change=Eraser(plan, config.erase, device) if training and config.erase else None,
        )  # fmt: skip

    def _check_command(self, split: str | Split) -> str:
        """Advice for a split with files that do not decode."""
        if self.config.dataset not in DATASETS:
            return f"leave it out of {self.config.dataset}"
        if not isinstance(split, str):
            return "find the others with python -m tal_fast.check_data FOLDER"
        if split in self._ood:
            return f"find them with python -m tal_fast.check_data {shlex.quote(self.config.ood.get(split, split))}"
        packed = isinstance(self._splits["train"], PackedImages)
        root = shlex.quote((f"{self.config.dataset}:" if packed else "") + (self.config.root or "FOLDER"))
        return (
            f"list the others with python -m tal_fast.check_data {root} --out list.txt, "
            "then resume with --data.file_list list.txt --resume auto"
        )

    def _source(self, images: Split, plan: Plan, device: torch.device, augment: PixelAugmentation | None) -> Source:
        form = ImageFormat(self.channels, *self.config.normalization(), device, self.config.resampling)
        if isinstance(images, MemoryImages):
            rows = None if images.rows is None else torch.from_numpy(images.rows)
            return MemorySource(plan, torch.from_numpy(images.pixels), rows, form, augment)
        if self.loader_name == "dali" and not images.torch_only:
            return dali.DaliSource(plan, images, form, self.config.workers, self.config.timeout)
        return TorchSource(plan, images, form, self.config.workers, self.config.timeout, augment)
