"""Images inside other files, tar shards and Arrow tables, which are read at their place.

A split is an index: the file, offset and length of each image. Order, ranks, resuming, crops and the report of images
that do not decode are therefore those of image files.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from tal_fast.data.image_folder import NO_SIZES, OOD_LABEL, ImageFiles, first_names, with_sizes
from tal_fast.utils.logs import say

SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
"""Names of a split in data sets of others; the first one found is taken."""


@dataclass(frozen=True)
class PackedImages(ImageFiles):
    """Images inside other files; ``paths`` are their names in messages and lists."""

    _ARRAYS: ClassVar[tuple[str, ...]] = (*ImageFiles._ARRAYS, "extents")

    containers: Sequence[str] = ()  # paths of the files
    extents: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))  # (N, 3) container, offset, bytes

    def file(self, index: int) -> str:
        return self.containers[self.extents[index, 0]]

    def open(self, index: int) -> io.BytesIO:
        return io.BytesIO(self.read(index))

    def read(self, index: int) -> bytes:
        return read_extent(self.file(index), *map(int, self.extents[index, 1:]))


def read_extent(path: str, offset: int, size: int) -> bytes:
    """Bytes at a place of a file."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return file.read(size)


@dataclass(frozen=True)
class Packed:
    """Images of one split as found, each with the number or the name of its class, or None for no class."""

    where: str
    names: list[str]
    labels: list[int | str | None]
    containers: list[str]
    extents: np.ndarray  # (N, 3) int64 container, offset, bytes

    def only(self, listed: frozenset[str]) -> Packed:
        """The images whose names are in a list."""
        kept = [i for i, name in enumerate(self.names) if name in listed]
        if not kept:
            raise ValueError(f"data.file_list names no image of {self.where}; add some")
        names, labels = [self.names[i] for i in kept], [self.labels[i] for i in kept]
        return Packed(self.where, names, labels, self.containers, self.extents[kept])

    def class_names(self) -> list[str]:
        """Sorted names of the classes; where they are numbers, 0 to the largest one."""
        labels = self._known_labels()
        numbers = [label for label in labels if isinstance(label, int)]
        if len(numbers) == len(labels):
            return [str(number) for number in range(max(numbers) + 1)]
        if numbers:
            raise ValueError(f"{self.where} has classes by name and by number; write classes.txt, one name per line")
        return sorted({str(label) for label in labels})

    def _known_labels(self) -> list[int | str]:
        for name, label in zip(self.names, self.labels, strict=True):
            if label is None:
                raise ValueError(f"{name} has no label; add it, or use these images as an out-of-distribution set")
        return [label for label in self.labels if label is not None]

    def images(self, class_names: Sequence[str] | None) -> PackedImages:
        """The images with their classes, or none for None, and their sizes.

        Raises ValueError if one has no class or another, or is no image.
        """
        labels = np.full(len(self.names), OOD_LABEL, np.int64)
        if class_names is not None:
            labels = np.array(self._numbers(class_names), np.int64)
            missing = sorted(set(range(len(class_names))) - set(labels.tolist()))
            if missing:
                names = first_names([class_names[label] for label in missing])
                say(f"{self.where} has no image of {len(missing)} of {len(class_names)} classes: {names}")
        changed = np.array([os.stat(path).st_mtime_ns for path in self.containers], np.int64)
        stamps = np.stack([self.extents[:, 2], changed[self.extents[:, 0]]], axis=1)
        return with_sizes(PackedImages(self.names, labels, NO_SIZES, stamps, False, self.containers, self.extents))

    def _numbers(self, class_names: Sequence[str]) -> list[int]:
        number_of = {name: number for number, name in enumerate(class_names)}
        numbers = []
        for name, label in zip(self.names, self._known_labels(), strict=True):
            number = number_of.get(label) if isinstance(label, str) else label
            if number is None or not 0 <= number < len(class_names):
                raise ValueError(
                    f"{name} has the label {label!r}, but there are {len(class_names)} classes "
                    f"({first_names(class_names)}), numbered from 0; mend the label, or the names of the classes"
                )
            numbers.append(number)
        return numbers
