"""Preprocessing of single images as in validation, without a data set."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tal_fast.config.schema import DataConfig
from tal_fast.data.headers import UnreadableImage, error_summary, unsupported_pixels
from tal_fast.data.loader import ImageFormat, Normalizer
from tal_fast.data.pillow import resized_crop
from tal_fast.data.pixels import as_image
from tal_fast.data.sampler import central_boxes

IN_MEMORY = ("cifar10", "cifar100", "fashion-mnist", "synthetic")
"""Data sets of the package whose images are square and resized whole."""


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of validation images, whose fields are entries of ``threshold.json``.

    The central square, of side ``crop_fraction`` times the image's shorter side, is resized by Pillow to
    ``image_size``, scaled to [0, 1] and normalized.
    """

    image_size: int  # side in pixels
    channels: int  # 3 for RGB, 1 for grayscale
    mean: list[float]  # per channel, for values in [0, 1]
    std: list[float]
    crop_fraction: float
    interpolation: str  # filter for resizing, one of ``tal_fast.config.names.INTERPOLATIONS``
    exif_rotation: bool  # turn images first as their EXIF data say

    @classmethod
    def of(cls, config: DataConfig, image_size: int, loader: str = "") -> Preprocessing:
        """Preprocessing of a run's validation images, ``image_size`` pixels a side, that this loader read."""
        fraction = 1.0 if loader == "memory" or config.dataset in IN_MEMORY else config.central_crop
        return cls(
            image_size, config.channels, *config.normalization(), fraction, config.resampling, config.exif_rotation
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Preprocessing in ``threshold.json``; raises ValueError if an entry is missing."""
        missing = [name for name in cls.__dataclass_fields__ if name not in values]
        if missing:
            raise ValueError(f"the preprocessing lacks {', '.join(missing)}; export the model again")
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})

    def read(self, path: str) -> np.ndarray:
        """Pixels (S, S, C) uint8 of a file; raises UnreadableImage if it is no image or does not decode."""
        problem: str | None = "not a file"
        try:
            if stat.S_ISREG(os.stat(path).st_mode):  # a reader of a pipe would wait forever
                with Image.open(path) as image:
                    problem = unsupported_pixels(image)
                    if problem is None:
                        return self.pixels(image)
        except Exception as error:  # damage can surface anywhere in a decoder
            problem = getattr(error, "strerror", None) or error_summary(error, path)
        raise UnreadableImage(f"{path} cannot be read as an image ({problem})")

    def pixels(self, image: Any) -> np.ndarray:
        """Pixels (S, S, C) uint8 of what ``as_image`` takes, whose errors it raises."""
        image = as_image(image)
        if self.exif_rotation:
            image = ImageOps.exif_transpose(image)
        box = central_boxes(np.array([[image.height, image.width]], np.float64), self.crop_fraction)[0]
        size, resampling = self.image_size, Image.Resampling[self.interpolation.upper()]
        return np.asarray(resized_crop(image, self.channels, box, size, resampling)).reshape(size, size, self.channels)

    def normalizer(self) -> Normalizer:
        """Normalization of (B, S, S, C) uint8 to (B, C, S, S) float32 on the CPU."""
        return Normalizer(ImageFormat(self.channels, self.mean, self.std, torch.device("cpu")))

    def check(self, images: Tensor) -> None:
        """Raise ValueError unless images are (B, C, S, S) of a float type."""
        if not images.is_floating_point():
            raise ValueError(f"preprocessed images must be float, not {images.dtype}; give pixels as arrays")
        channels, size = self.channels, self.image_size
        if images.shape[1:] != (channels, size, size):
            raise ValueError(f"preprocessed images must be (B, {channels}, {size}, {size}), not {tuple(images.shape)}")
