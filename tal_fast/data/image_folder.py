"""Image files of a data set: those of each class of a folder, and their sizes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import logging
import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
from PIL import Image

from tal_fast.data import imagenet
from tal_fast.data.cache import cache_dir
from tal_fast.data.headers import EXTENSIONS, HEIF, error_summary, image_size, size_of, unusable
from tal_fast.data.text import read_text
from tal_fast.data.walk import ABOVE, ending, report_left_out, walk
from tal_fast.utils.io import replacing
from tal_fast.utils.logs import say

logger = logging.getLogger(__name__)

OOD_LABEL = -1
"""Label of out-of-distribution images."""

NO_SIZES = np.zeros((0, 2), np.int32)
"""Sizes of images before they are read."""

_THREADS = min(16, 2 * (os.cpu_count() or 1))


@dataclass(frozen=True)
class ImageFiles:
    """Image files of one split."""

    paths: Sequence[str]  # N absolute paths
    labels: np.ndarray  # (N,) int64 classes, or ``OOD_LABEL``
    sizes: np.ndarray  # (N, 2) int32 heights and widths in pixels
    # (N, 2) int64 sizes in bytes and times of change in ns.
    stamps: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    upright: bool = False  # turned as EXIF says; else as stored

    _ARRAYS: ClassVar[tuple[str, ...]] = ("labels", "sizes", "stamps")

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: np.ndarray) -> ImageFiles:
        """Images at ``indices``."""
        arrays = {name: getattr(self, name)[indices] for name in self._ARRAYS}
        return dataclasses.replace(self, paths=[self.paths[i] for i in indices], **arrays)

    def file(self, index: int) -> str:
        """File on disk that holds an image."""
        return self.paths[index]

    def open(self, index: int) -> str | io.BytesIO:
        """Path or content of an image, for Pillow to open."""
        return self.paths[index]

    def read(self, index: int) -> bytes:
        """Content of an image's file."""
        return Path(self.paths[index]).read_bytes()

    def turned(self) -> ImageFiles:
        """Copy whose images are turned as their EXIF data say."""
        return with_sizes(dataclasses.replace(self, upright=True))

    @cached_property
    def torch_only(self) -> bool:
        """Whether only the torch loader reads them: there are HEIF files."""
        return any(path.lower().endswith(HEIF) for path in self.paths)


def class_folders(root: Path, split: str) -> list[str]:
    """Sorted names of the class folders of ``root/split``; raises ValueError if there are none."""
    folder = root / split
    if not root.is_dir():
        raise ValueError(f"data.root {root} is not a folder; name one that holds train/ and val/")
    if not folder.is_dir():
        raise ValueError(
            f"{root} has no folder {split}/; it must hold train/ and val/ with one folder a class in each; class "
            "folders alone are split by --data.split 0.2"
        )
    names = _folders_in(folder)
    if not names:
        raise ValueError(f"{folder} has no class folders; put each class's images into a folder of its own")
    return names


def _folders_in(folder: Path) -> list[str]:
    """Sorted names of the folders in a folder, without hidden ones."""
    try:
        return sorted(e.name for e in os.scandir(folder) if not e.name.startswith(".") and os.path.isdir(e.path))
    except OSError as error:
        raise ValueError(f"{folder} cannot be read ({error.strerror}); give it the permission to be read") from None


def read_list(path: Path, root: Path) -> dict[str, tuple[int, int]]:
    """Size in bytes and time of change in ns of the files in a list, by absolute path.

    The list has one path per line, relative to ``root`` or absolute. Empty lines and lines that start with ``#`` are
    skipped. Raises ValueError if the list cannot be read, is empty, or names a missing file or one that is not below
    ``root``.
    """
    names = list_lines(path, root)
    start, real = os.path.abspath(root), os.path.realpath(root)
    resolve = functools.cache(os.path.realpath)  # of folders, which many files share

    def below(name: str) -> str:
        """Path below the root, also of an absolute path that leads to it through other links; empty elsewhere."""
        path = os.path.abspath(os.path.join(start, name))
        folder = os.path.dirname(path)
        if not path.startswith(start + os.sep) and os.path.commonpath([real, resolve(folder)]) == real:
            folder = os.path.normpath(os.path.join(start, os.path.relpath(resolve(folder), real)))
        return os.path.join(folder, os.path.basename(path)) if (folder + os.sep).startswith(start + os.sep) else ""

    listed = [below(name) for name in names]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(_stamp, listed))
    refuse_missing([name for name, stamp in zip(names, found, strict=True) if stamp is None], "files", path, root)
    return {path: stamp for path, stamp in zip(listed, found, strict=True) if stamp}


def refuse_missing(missing: Sequence[str], kind: str, path: Path, root: str | Path) -> None:
    """Raise ValueError if a list names files or images that the data set does not have."""
    if missing:
        raise ValueError(
            f"data.file_list {path} names {len(missing)} {kind} that are not in {root} ({first_names(missing)}); "
            f"write it again with python -m tal_fast.check_data {root} --out {path}"
        )


def list_lines(path: Path, root: str | Path) -> list[str]:
    """Lines of a list that are neither empty nor comments; raises ValueError if there are none."""
    write = f"python -m tal_fast.check_data {root} --out {path}"
    try:
        lines = read_text(path).split("\n")
    except OSError as error:
        raise ValueError(f"data.file_list {path} cannot be read ({error.strerror}); write it with {write}") from None
    names = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#")]
    if not names:
        raise ValueError(f"data.file_list {path} names no files; write it with {write}")
    return names


def _stamp(path: str) -> tuple[int, int] | None:
    """Size in bytes and time of change in ns of a file; None if there is none."""
    try:
        info = os.stat(path)
    except (OSError, ValueError):
        return None
    return (info.st_size, info.st_mtime_ns) if stat.S_ISREG(info.st_mode) else None


Found = list[tuple[str, int, int]]
"""Path, size in bytes and time of change in ns of image files."""


def files_by_class(root: Path, split: str, listed: Mapping[str, tuple[int, int]] | None = None) -> dict[str, Found]:
    """Image files of each class of ``root/split``, sorted by path, sorted by class.

    Each class has a folder; only ``val`` may also be ImageNet's without class folders, see ``tal_fast.data.imagenet``.
    With ``listed``, see ``read_list``, no others are looked for. Raises ValueError if the folder is missing or empty,
    or has an image without a class.
    """
    folder = root / split
    left_out: Counter[str] = Counter()
    if listed is not None:
        start = os.path.abspath(folder) + os.sep
        images = sorted((path, *stamp) for path, stamp in listed.items() if path.startswith(start))
        found: dict[str, Found] = {}
        for image in images:
            name, separator, _ = image[0][len(start) :].partition(os.sep)
            found.setdefault(name if separator else "", []).append(image)
        without_class = found.pop("", [])
    elif split == "val" and folder.is_dir() and not _folders_in(folder):
        found, without_class = {}, _images(folder, left_out)
        if not without_class:
            class_folders(root, split)  # raises the error
    else:
        found = {name: _images(folder / name, left_out) for name in class_folders(root, split)}
        without_class = []
        left_out["without a class folder"] = sum(
            not e.name.startswith(".") and not os.path.isdir(e.path) for e in os.scandir(folder)
        )
    classes = imagenet.validation_classes(root) if without_class else {}
    for image in without_class:
        if Path(image[0]).stem not in classes or split != "val":
            raise ValueError(f"{image[0]} is none of ImageNet's validation images; remove it, or sort by class folders")
        found.setdefault(classes[Path(image[0]).stem], []).append(image)
    report_left_out(folder, left_out)
    return {name: sorted(images) for name, images in sorted(found.items())}


def read_split(
    root: Path, split: str, class_names: Sequence[str], listed: Mapping[str, tuple[int, int]] | None = None
) -> ImageFiles:
    """Images of ``root/split/CLASS/**``, see ``files_by_class``, labelled in the order of ``class_names``.

    Raises ValueError if a class folder is not in ``class_names`` or has no images, or a file is no image.
    """
    label_of = {name: label for label, name in enumerate(class_names)}
    images: Found = []
    labels: list[int] = []
    by_class = files_by_class(root, split, listed)
    without = [name for name in class_names if name not in by_class]
    if without and listed is not None and split == "train":
        raise ValueError(f"data.file_list names no image of {root / split / without[0]}; add one or remove the folder")
    if without and by_class:
        say(f"{root / split} has no image of {len(without)} of {len(class_names)} classes: {first_names(without)}")
    for name, found in by_class.items():
        folder = root / split / name
        if name not in label_of:
            raise ValueError(
                f"{folder} has no counterpart among the training classes ({first_names(class_names)}); "
                f"rename it, or move a test set of other classes to data.ood"
            )
        if not found:
            raise ValueError(f"{folder} holds no images ({', '.join(EXTENSIONS)}); fill or remove it")
        images += found
        labels += [label_of[name]] * len(found)
    if not images:
        raise ValueError(f"data.file_list names no image of {root / split}; add some")
    return _with_sizes(images, labels)


def read_flat(folder: Path, name: str) -> ImageFiles:
    """All images under an out-of-distribution folder, at any depth.

    Raises ValueError if there are none, or a file is no image.
    """
    if not folder.is_dir():
        raise ValueError(f"data.ood {name!r}: {folder} is not a folder")
    found = files_below(folder)
    if not found:
        raise ValueError(f"data.ood {name!r}: {folder} holds no images ({', '.join(EXTENSIONS)})")
    return _with_sizes(found, [OOD_LABEL] * len(found))


def files_below(folder: Path) -> Found:
    """Sorted image files in a folder, at any depth; warns of what is left out."""
    left_out: Counter[str] = Counter()
    found = _images(folder, left_out)
    report_left_out(folder, left_out)
    return found


def undecodable(files: ImageFiles, index: int) -> str | None:
    """Reason that an image does not decode; None if it does."""
    path, size = files.paths[index], files.sizes[index]
    if not os.path.isfile(files.file(index)):
        return f"{path} cannot be decoded (there is no such file)"
    try:
        with Image.open(files.open(index)) as image:
            height, width = size_of(image, files.upright)
            if (height, width) != tuple(size):
                return f"{path} cannot be used (it was {size[0]} x {size[1]} and is {height} x {width} now)"
            image.load()
    except Exception as error:
        return f"{path} cannot be decoded ({error_summary(error, path)})"
    return None


def _images(folder: Path, left_out: Counter[str]) -> Found:
    """Sorted image files at any depth, without hidden ones; counts the others in ``left_out``."""
    found = []
    for path, status, problem, is_folder in walk(folder):
        if problem == ABOVE:
            left_out[ABOVE] += 1
        elif is_folder:
            raise ValueError(f"{path} cannot be read ({problem}); give it the permission to be read, or remove it")
        elif not path.lower().endswith(EXTENSIONS):
            left_out[ending(path)] += 1
        elif problem or status is None:
            raise unusable(path, problem)
        else:
            found.append((path, status.st_size, status.st_mtime_ns))
    return sorted(found)


def _with_sizes(found: Found, labels: Sequence[int]) -> ImageFiles:
    """Image files with their labels and sizes in pixels."""
    paths, stamps = [path for path, _, _ in found], [(size, changed) for _, size, changed in found]
    return with_sizes(ImageFiles(paths, np.array(labels, np.int64), NO_SIZES, np.array(stamps, np.int64)))


def listed_files(paths: Sequence[str], where: str, labels: Sequence[int] = ()) -> ImageFiles:
    """Image files at these paths, with their labels or as OOD images; raises ValueError if some are missing."""
    found = [(path, _stamp(path)) for path in map(os.path.abspath, paths)]
    if missing := [path for path, stamp in found if stamp is None]:
        raise ValueError(f"{len(missing)} images that {where} lists are missing ({first_names(missing)})")
    return _with_sizes([(path, *stamp) for path, stamp in found if stamp], labels or [OOD_LABEL] * len(found))


Files = TypeVar("Files", bound=ImageFiles)


def with_sizes(files: Files) -> Files:
    """The files with the sizes of their images in pixels, from the cache if possible: a million headers take minutes.

    Raises UnreadableImage as ``image_size`` does.
    """
    digest = hashlib.sha256()
    for path, stamp in zip(files.paths, files.stamps.tolist(), strict=True):
        digest.update(f"{path}\0{tuple(stamp)}\n".encode(errors="surrogateescape"))
    cached = cache_dir() / f"image-sizes-3{'-upright' * files.upright}" / f"{digest.hexdigest()[:32]}.npz"
    try:
        with cached.open("rb") as file, np.load(file, allow_pickle=False) as data:  # verifies a checksum
            sizes = data["sizes"]
        if sizes.shape == (len(files), 2) and sizes.dtype == np.int32:
            return dataclasses.replace(files, sizes=sizes)
    except Exception:  # missing, or damaged in any way
        pass
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(
            lambda i: image_size(files.paths[i], files.open(i), files.upright), range(len(files)), chunksize=64
        )
        sizes = np.array(list(found), np.int32)
    try:
        with replacing(cached) as temporary:
            np.savez(temporary, sizes=sizes)
    except OSError as error:  # a read-only home, a full disk
        logger.debug("the sizes of the images could not be kept in %s (%s)", cached, error)
    return dataclasses.replace(files, sizes=sizes)


def first_names(names: Sequence[str], limit: int = 5) -> str:
    """Text with the first names of a list and the number of the others."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
