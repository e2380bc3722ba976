"""Image files on disk: search for them, and a check of their headers before training starts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from tal_fast.data import imagenet
from tal_fast.data.cache import cache_dir
from tal_fast.utils.io import replacing

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
"""Endings of image files, in upper or lower case; other files are ignored."""

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")
"""Pillow's names of the formats that Pillow and DALI both read, whatever the ending of the file."""

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pillow's modes that both loaders convert to the same 8-bit pixels, unlike 16-bit gray or floating point."""

OOD_LABEL = -1
"""Label of out-of-distribution images."""

_THREADS = min(16, 2 * (os.cpu_count() or 1))


class UnreadableImage(ValueError):
    """Error for a file that is no image or does not decode."""


@dataclass(frozen=True)
class ImageFiles:
    """Image files of one split.

    Attributes:
        paths: N absolute paths.
        labels: (N,) int64 classes, or ``OOD_LABEL``.
        sizes: (N, 2) int32 heights and widths in pixels as stored, without the rotation in EXIF.
        stamps: (N, 2) int64 sizes in bytes and times of change in ns.
    """

    paths: Sequence[str]
    labels: np.ndarray
    sizes: np.ndarray
    stamps: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: np.ndarray) -> ImageFiles:
        """Images at ``indices``."""
        paths = [self.paths[i] for i in indices]
        return ImageFiles(paths, self.labels[indices], self.sizes[indices], self.stamps[indices])


def class_folders(root: Path, split: str) -> list[str]:
    """Sorted names of the class folders of ``root/split``.

    Raises:
        ValueError: the folder is missing or has no class folder.
    """
    folder = root / split
    if not root.is_dir():
        raise ValueError(f"data.root {root} is not a folder; name one that holds train/ and val/")
    if not folder.is_dir():
        raise ValueError(f"{root} has no folder {split}/; it must hold train/ and val/ with one folder a class in each")
    names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise ValueError(f"{folder} has no class folders; put each class's images into a folder of its own")
    return names


def read_list(path: Path, root: Path) -> set[str]:
    """Absolute paths of the files in a list of one path per line, relative to ``root``.

    Empty lines and lines that start with ``#`` are skipped.

    Raises:
        ValueError: the list cannot be read, is empty, or names a missing file.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError as error:
        raise ValueError(
            f"data.file_list {path} cannot be read ({error.strerror}); "
            f"write it with python -m tal_fast.check_data {root} --out {path}"
        ) from None
    names = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#")]
    if not names:
        raise ValueError(f"data.file_list {path} names no files; write it with python -m tal_fast.check_data {root}")
    listed = [os.path.abspath(root / name) for name in names]
    with ThreadPoolExecutor(_THREADS) as pool:
        missing = [name for name, there in zip(names, pool.map(os.path.isfile, listed), strict=True) if not there]
    if missing:
        raise ValueError(
            f"data.file_list {path} names {len(missing)} files that are not in {root} ({first_names(missing)}); "
            f"write it again with python -m tal_fast.check_data {root} --out {path}"
        )
    return set(listed)


def files_by_class(root: Path, split: str) -> dict[str, list[tuple[str, int, int]]]:
    """Image files of each class of ``root/split``, as ``_walk`` lists them, sorted by class.

    Each class has a folder; only ``val`` may also be ImageNet's without class folders, see ``tal_fast.data.imagenet``.

    Raises:
        ValueError: the folder is missing or empty, or has an image without a class.
    """
    folder = root / split
    if (
        split != "val"
        or not folder.is_dir()
        or any(e.is_dir() and not e.name.startswith(".") for e in folder.iterdir())
    ):
        return {name: _walk(str(folder / name)) for name in class_folders(root, split)}
    images = _walk(str(folder))
    if not images:
        return {name: [] for name in class_folders(root, split)}  # raises the error
    classes = imagenet.validation_classes(root)
    found: dict[str, list[tuple[str, int, int]]] = {}
    for image in images:
        name = classes.get(Path(image[0]).stem)
        if name is None:
            raise ValueError(f"{image[0]} is none of ImageNet's validation images; remove it, or sort by class folders")
        found.setdefault(name, []).append(image)
    return dict(sorted(found.items()))


def read_split(root: Path, split: str, class_names: Sequence[str], listed: Set[str] | None = None) -> ImageFiles:
    """Images of ``root/split/CLASS/**``, see ``files_by_class``.

    Args:
        root: folder of the splits.
        split: name of the split's folder.
        class_names: class folders in the order of their labels.
        listed: absolute paths of the files to use; None for all.

    Raises:
        ValueError: a class folder is not in ``class_names`` or has no images, or a file is no image.
    """
    label_of = {name: label for label, name in enumerate(class_names)}
    paths: list[str] = []
    labels: list[int] = []
    stamps: list[tuple[int, int]] = []
    for name, found in files_by_class(root, split).items():
        folder = root / split / name
        if name not in label_of:
            raise ValueError(
                f"{folder} has no counterpart among the training classes ({first_names(class_names)}); "
                f"rename it, or move a test set of other classes to data.ood"
            )
        if not found:
            raise ValueError(f"{folder} holds no images ({', '.join(EXTENSIONS)}); fill or remove it")
        if listed is not None:
            found = [file for file in found if file[0] in listed]
            if not found and split == "train":
                raise ValueError(f"data.file_list names no image of {folder}; add one or remove the folder")
        for path, size, changed in found:
            paths.append(path)
            labels.append(label_of[name])
            stamps.append((size, changed))
    if not paths:
        raise ValueError(f"data.file_list names no image of {root / split}; add some")
    return ImageFiles(paths, np.array(labels, np.int64), _sizes(paths, stamps), np.array(stamps, np.int64))


def read_flat(folder: Path, name: str) -> ImageFiles:
    """All images under an out-of-distribution folder, at any depth.

    Raises:
        ValueError: there are none, or a file is no image.
    """
    if not folder.is_dir():
        raise ValueError(f"data.ood {name!r}: {folder} is not a folder")
    found = _walk(str(folder))
    if not found:
        raise ValueError(f"data.ood {name!r}: {folder} holds no images ({', '.join(EXTENSIONS)})")
    paths = [path for path, _, _ in found]
    stamps = [(size, changed) for _, size, changed in found]
    labels = np.full(len(paths), OOD_LABEL, np.int64)
    return ImageFiles(paths, labels, _sizes(paths, stamps), np.array(stamps, np.int64))


def image_size(path: str) -> tuple[int, int]:
    """Height and width from the header of an image file.

    Raises:
        UnreadableImage: the file is no image, cannot be read, or has pixels that the loaders read differently.
    """
    try:
        with Image.open(path) as image:
            problem = unsupported_pixels(image)
            if problem is None:
                return image.height, image.width
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        problem = error_summary(error, path)
    raise UnreadableImage(
        f"{path} cannot be read as an image ({problem}); remove or replace it, or leave it out with "
        "python -m tal_fast.check_data FOLDER --out list.txt and --data.file_list list.txt"
    )


def unsupported_pixels(image: Image.Image) -> str | None:
    """Reason that the loaders would read different 8-bit pixels of an opened image; None if they read the same."""
    if image.format not in FORMATS:
        return f"format {image.format}, which not every loader reads"
    if image.mode not in MODES:
        return f"pixels of mode {image.mode}, which the loaders convert to 8 bits in different ways"
    return None


def undecodable(path: str, size: np.ndarray) -> str | None:
    """Reason that a file of ``size`` (height, width) does not decode; None if it does."""
    try:
        with Image.open(path) as image:
            if (image.height, image.width) != tuple(size):
                return f"{path} cannot be used (it was {size[0]} x {size[1]} and is {image.height} x {image.width} now)"
            image.load()
    except Exception as error:
        return f"{path} cannot be decoded ({error_summary(error, path)})"
    return None


def error_summary(error: Exception, path: str) -> str:
    """Short text of a Pillow error about a file."""
    if isinstance(error, UnidentifiedImageError):
        return "it is empty" if os.path.exists(path) and os.path.getsize(path) == 0 else "no image format fits it"
    return " ".join(str(error).split()) or type(error).__name__


def _walk(folder: str) -> list[tuple[str, int, int]]:
    """Path, size in bytes and time of change in ns of the images at any depth, sorted, without hidden ones."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found += _walk(entry.path)
            elif entry.name.lower().endswith(EXTENSIONS):
                info = entry.stat()
                found.append((os.path.abspath(entry.path), info.st_size, info.st_mtime_ns))
    return sorted(found)


def _sizes(paths: Sequence[str], stamps: Sequence[tuple[int, int]]) -> np.ndarray:
    """(N, 2) int32 heights and widths of images, from the cache if possible: a million headers take minutes."""
    digest = hashlib.sha256()
    for path, stamp in zip(paths, stamps, strict=True):
        digest.update(f"{path}\0{stamp}\n".encode(errors="surrogateescape"))
    cached = cache_dir() / "image-sizes-2" / f"{digest.hexdigest()[:32]}.npy"
    try:
        sizes = np.load(cached, allow_pickle=False)
        if sizes.shape == (len(paths), 2) and sizes.dtype == np.int32:
            return sizes
    except (OSError, ValueError, EOFError):
        pass  # missing or damaged
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = np.array(list(pool.map(image_size, paths, chunksize=64)), np.int32)
    with replacing(cached) as temporary:
        np.save(temporary, sizes, allow_pickle=False)
    return sizes


def first_names(names: Sequence[str], limit: int = 5) -> str:
    """Text with the first names of a list and the number of the others."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
