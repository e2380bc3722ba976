"""Data sets of the user's own: ``FILE.py:NAME``, or an entry point of an installed package."""

from __future__ import annotations

import hashlib
import io
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from reprlib import repr as short
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageOps

from tal_fast.config.schema import DataConfig
from tal_fast.data.datasets import FOLDER_IMAGE_SIZE, DataBundle, MemoryImages, Split
from tal_fast.data.image_folder import OOD_LABEL, ImageFiles, listed_files
from tal_fast.data.pixels import as_image
from tal_fast.data.sources import flat_images
from tal_fast.utils.arrays import as_classes, to_numpy
from tal_fast.utils.own_code import DATA, load, running


@dataclass(frozen=True)
class Items(ImageFiles):
    """Items of a map-style dataset, each an image or (image, label); ``paths`` are their names in messages.

    All are read once, for their sizes, labels and hashes; an item that is another image later counts as unreadable.
    """

    _ARRAYS: ClassVar[tuple[str, ...]] = (*ImageFiles._ARRAYS, "rows", "hashes")
    torch_only = True
    dataset: Any = None
    turn: bool = False  # turn images as their EXIF data say
    rows: Any = None  # (N,) int64 positions in the dataset
    hashes: Any = None  # (N, 32) uint8 SHA-256 of each image

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


def _read(dataset: Any, row: int, name: str, turn: bool) -> tuple[Image.Image, Any]:
    """Gray or RGB image of an item, and its label."""
    with running(name):
        item = dataset[row]
        image, label = item if isinstance(item, (tuple, list)) else (item, OOD_LABEL)
        image = as_image(image)
        if 0 in image.size:
            raise ValueError("the image has no pixels")
    image = ImageOps.exif_transpose(image) if turn else image
    return image if image.mode in ("L", "RGB") else image.convert("RGB"), label


def _items(dataset: Any, count: int, name: str, turn: bool, labelled: bool) -> Items:
    names, found = [f"{name}[{i}]" for i in range(count)], []
    for row, item in enumerate(names):
        image, label = _read(dataset, row, item, turn)
        with running(f"the label of {item}"):
            label = operator.index(label) if labelled else OOD_LABEL
        found.append((label, (image.height, image.width), [*hashlib.sha256(image.tobytes()).digest()]))
    labels, sizes, hashes = map(np.array, zip(*found, strict=True))
    stamps, rows = np.zeros((len(names), 2), np.int64), np.arange(len(names))
    return Items(names, labels, sizes.astype(np.int32), stamps, True, dataset, turn, rows, hashes.astype(np.uint8))


def own_data(config: DataConfig, training: bool) -> DataBundle:
    """Data set that ``NAME(data.root)`` returns, see ``docs/data.md``; without training it needs no ``train``."""
    name, make = config.dataset, load(config.dataset, DATA)
    with running(name):
        made = make(config.root)
        get = made.get if isinstance(made, Mapping) else lambda part: getattr(made, part, None)
        train, val, classes, ood = map(get, ("train", "val", "classes", "ood"))
        known = [] if isinstance(classes, str) or not np.iterable(classes) else list(map(str, classes))
    if classes is None or (training and train is None) or (config.holdout is None and val is None):
        raise ValueError(f"{name} must return train, val, classes and optionally ood, by name; it lacks some")
    if not known or len(set(known)) < len(known):
        raise ValueError(f"classes of {name} must be a list of different names, not {short(classes)}")
    if not isinstance(ood, Mapping | None) or not all(isinstance(key, str) for key in ood or {}):
        raise ValueError(f"ood of {name} must be a mapping from names, which are text, to images, not {short(ood)}")
    if replaced := sorted(set(ood or {}) & set(config.ood)):
        raise ValueError(f"data.ood has a set {replaced[0]!r}, a name that {name} gives to its own; rename it")
    parts = (("train", train), ("val", val))
    found = [value and _split(value, len(known), config) for value in (_checked(f"{name} {k}", v) for k, v in parts)]
    splits = [split for split in found if split is not None]
    if len({isinstance(split, MemoryImages) for split in splits}) != 1:
        raise ValueError(f"train and val of {name} must both be arrays of pixels, or neither")
    if found[0] and (without := set(range(len(known))) - set(found[0].labels.tolist())):
        raise ValueError(f"{name} train has no image of class {known[min(without)]!r}; add some or remove the class")
    train, val = (split or splits[0].subset(np.zeros(0, np.int64)) for split in found)
    size = splits[0].pixels.shape[1] if isinstance(splits[0], MemoryImages) else FOLDER_IMAGE_SIZE
    checked = {key: _checked(f"{name} ood {key}", value) for key, value in (ood or {}).items()}
    sets: Any = {key: partial(_split, value, 0, config) for key, value in checked.items() if value}
    sets |= {key: partial(flat_images, spec, key) for key, spec in config.ood.items()}
    return DataBundle(config, known, config.image_size or size, train, val, sets)


def _checked(name: str, value: Any) -> tuple[str, Any, Any, int] | None:
    """Name, images, labels and length of a split, before any image is read; None if there is no split."""
    if value is None:
        return None
    images, labels = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    with running(name):
        images = to_numpy(images) if hasattr(images, "detach") else images
        if isinstance(images, np.ndarray) and images.dtype.kind in "OU":  # a column of paths
            images = images.tolist()
        listed = hasattr(images, "__getitem__") and hasattr(images, "__len__") and not isinstance(images, str)
        count = len(images) if listed else 0
    if not count:
        raise ValueError(f"{name} must be (pixels, labels), (paths, labels) or a map-style dataset, and not empty")
    if isinstance(images, np.ndarray):
        kind, shape = images.dtype, images.shape
        square = len(shape) >= 3 and shape[1] == shape[2] > 0
        if kind != np.uint8 or not square or shape[3:] not in ((), (1,), (3,)):
            raise ValueError(f"{name} must be (N, S, S), (N, S, S, 1) or (N, S, S, 3) uint8; it is {kind} {shape}")
    with running(f"labels of {name}"):
        return name, images, None if labels is None else to_numpy(labels), count


def _split(found: tuple[str, Any, Any, int], classes: int, config: DataConfig) -> Split:
    """Images of what a user's data set has for a split; without classes an OOD set."""
    name, images, labels, count = found
    if isinstance(images, np.ndarray):
        split: Split = MemoryImages.unlabelled(images, config.channels)
    elif isinstance(images, (list, tuple)) and isinstance(images[0], (str, os.PathLike)):
        split = listed_files([os.path.join(config.root or "", path) for path in images], name)
    else:
        split = _items(images, count, name, config.exif_rotation, bool(classes) and labels is None)
        labels = split.labels if labels is None else labels
    ood = np.full(len(split), OOD_LABEL)
    return replace(split, labels=as_classes(labels, classes, f"labels of {name}", len(split)) if classes else ood)
