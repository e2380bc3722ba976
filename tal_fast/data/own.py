"""Data sets of the user's own: ``FILE.py:NAME``, or an entry point of an installed package."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageOps

from tal_fast.config.schema import DataConfig
from tal_fast.data.datasets import FOLDER_IMAGE_SIZE, DataBundle, MemoryImages, Split
from tal_fast.data.image_folder import OOD_LABEL, ImageFiles, listed_files
from tal_fast.data.pixels import as_image
from tal_fast.data.sources import flat_images
from tal_fast.utils.arrays import to_numpy
from tal_fast.utils.own_code import DATA, load, running

PARTS = ("train", "val", "classes", "ood")


@dataclass(frozen=True)
class Items(ImageFiles):
    """Items of a map-style dataset, each an image or (image, label); ``paths`` are their names in messages.

    All are read once, for their sizes, labels and hashes; an item that is another image later counts as unreadable.
    """

    _ARRAYS: ClassVar[tuple[str, ...]] = (*ImageFiles._ARRAYS, "rows", "hashes")
    torch_only = True

    dataset: Any = None
    turn: bool = False  # turn images as their EXIF data say
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (N,) positions in the dataset
    hashes: np.ndarray = field(default_factory=lambda: np.zeros((0, 32), np.uint8))  # (N, 32) SHA-256 of each image

    def file(self, index: int) -> str:
        return __file__  # where an item is on the disk is not known

    def open(self, index: int) -> io.BytesIO:
        return io.BytesIO(self.read(index))

    def read(self, index: int) -> bytes:
        image, _ = _read(self.dataset, int(self.rows[index]), self.paths[index], self.turn)
        if hashlib.sha256(image.tobytes()).digest() != self.hashes[index].tobytes():
            raise ValueError("it is another image than at the start; leave random changes to data.augment")
        image.save(buffer := io.BytesIO(), "ppm")
        return buffer.getvalue()

    def sha256(self) -> str:
        """SHA-256 of all images and labels, in hexadecimal."""
        return hashlib.sha256(self.hashes.tobytes() + self.labels.tobytes()).hexdigest()


def _read(dataset: Any, row: int, name: str, turn: bool) -> tuple[Image.Image, Any]:
    """Gray or RGB image of an item, and its label."""
    with running(name):
        item = dataset[row]
        image, label = item if isinstance(item, (tuple, list)) else (item, OOD_LABEL)
        image = as_image(image)
    image = ImageOps.exif_transpose(image) if turn else image
    return image if image.mode in ("L", "RGB") else image.convert("RGB"), label


def _items(dataset: Any, name: str, turn: bool) -> Items:
    names, sizes, labels, hashes = [f"{name}[{i}]" for i in range(len(dataset))], [], [], []
    for row, item in enumerate(names):
        image, label = _read(dataset, row, item, turn)
        sizes.append((image.height, image.width))
        labels.append(label)
        hashes.append(hashlib.sha256(image.tobytes()).digest())
    arrays = np.array(labels), np.array(sizes, np.int32), np.zeros((len(names), 2), np.int64)
    rows, digests = np.arange(len(names)), np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
    return Items(names, *arrays, True, dataset, turn, rows, digests)


def own_data(config: DataConfig, training: bool) -> DataBundle:
    """Data set that ``NAME(data.root)`` returns, see ``docs/data.md``; without training it needs no ``train``.

    Raises ValueError if the user's code fails, or returns something else.
    """
    name, make = config.dataset, load(config.dataset, DATA)
    with running(name):
        made = make(config.root)
        parts = made if isinstance(made, Mapping) else {part: getattr(made, part, None) for part in PARTS}
    needed = ["classes", *["train"] * training, *["val"] * (config.holdout is None)]
    if missing := [part for part in needed if parts.get(part) is None]:
        raise ValueError(f"{name} must return train, val, classes and optionally ood, by name; it lacks {missing[0]}")
    classes = [str(name) for name in parts["classes"] or ()]
    found = [_split(f"{name} {part}", parts.get(part), len(classes), config) for part in ("train", "val")]
    splits = [split for split in found if split is not None]
    if len({isinstance(split, MemoryImages) for split in splits}) != 1:
        raise ValueError(f"train and val of {name} must both be arrays of pixels, or neither")
    train, val = (split or splits[0].subset(np.zeros(0, np.int64)) for split in found)
    size = splits[0].pixels.shape[1] if isinstance(splits[0], MemoryImages) else FOLDER_IMAGE_SIZE
    sets = parts.get("ood") or {}
    ood: Any = {key: partial(_split, f"{name} ood {key}", value, 0, config) for key, value in sets.items()}
    ood |= {key: partial(flat_images, spec, key) for key, spec in config.ood.items()}
    return DataBundle(config, classes, config.image_size or size, train, val, ood)


def _split(name: str, value: Any, classes: int, config: DataConfig) -> Split | None:
    """Images of what a user's data set has for a split; without classes an OOD set."""
    if value is None:
        return None
    images, labels = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    images = to_numpy(images) if hasattr(images, "detach") else images
    if isinstance(images, np.ndarray) and images.dtype.kind in "OU":  # a column of paths
        images = images.tolist()
    if not hasattr(images, "__getitem__") or not hasattr(images, "__len__") or not len(images):
        what = type(images).__name__ if not hasattr(images, "__len__") else "no images"
        raise ValueError(f"{name} must be (pixels, labels), (paths, labels) or a map-style dataset, not {what}")
    split: Split
    if isinstance(images, np.ndarray):
        kind, shape = images.dtype, images.shape
        if kind != np.uint8 or len(shape) < 3 or shape[1] != shape[2] or shape[3:] not in ((), (1,), (3,)):
            raise ValueError(f"{name} must be (N, S, S), (N, S, S, 1) or (N, S, S, 3) uint8; it is {kind} {shape}")
        split = MemoryImages.unlabelled(images, config.channels)
    elif isinstance(images, (list, tuple)) and isinstance(images[0], (str, os.PathLike)):
        split = listed_files([os.path.join(config.root or "", path) for path in images], name)
    else:
        split = _items(images, name, config.exif_rotation)
        labels = split.labels if labels is None else labels
    labels = split.labels if not classes else np.zeros(0) if labels is None else to_numpy(labels)
    if labels.shape != (len(split),) or labels.dtype.kind not in "iu":
        raise ValueError(f"{name} must have an integer label for each of {len(split)} images")
    if classes and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"{name} has labels {labels.min()} to {labels.max()} but there are {classes} classes, from 0")
    return replace(split, labels=labels.astype(np.int64) if classes else np.full(len(split), OOD_LABEL))
