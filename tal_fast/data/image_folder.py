"""Image files on disk: finding them, checking each one's header before training starts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from tal_fast.data import imagenet
from tal_fast.data.cache import cache_dir
from tal_fast.utils.io import replacing

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
"""Endings, in any case, of the files that count as images; both loaders read all of them. Others are passed over."""

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")
"""Pillow's names of the formats that both loaders read, whatever the files' endings."""

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pillow's modes that both loaders make the same 8-bit pixels of; of 16-bit gray or floating point they do not."""

OOD_LABEL = -1

_THREADS = min(16, 2 * (os.cpu_count() or 1))


class UnreadableImage(ValueError):
    """A file that is no image, or does not decode."""


@dataclass(frozen=True)
class ImageFiles:
    """The images of one split; an image's index is its place here.

    Attributes:
        paths: N absolute paths.
        labels: (N,) int64 classes, or ``OOD_LABEL``.
        sizes: (N, 2) int32, (height, width) in pixels as stored, before any rotation that EXIF asks for.
    """

    paths: Sequence[str]
    labels: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: np.ndarray) -> ImageFiles:
        """The images at ``indices``."""
        return ImageFiles([self.paths[i] for i in indices], self.labels[indices], self.sizes[indices])


def class_folders(root: Path, split: str) -> list[str]:
    """Names of the class folders of ``root/split``, sorted.

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
        raise ValueError(f"{folder} is empty of class folders; put each class's images into a folder of its own")
    return names


def read_list(path: Path, root: Path) -> set[str]:
    """Absolute paths of the files a list names: one a line, relative to ``root``; empty lines and ``#`` comments are
    passed over.

    Raises:
        ValueError: the list is not there, is empty or names a file that is not there.
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
            f"data.file_list {path} names {len(missing)} files that are not in {root} ({_some(missing)}); "
            f"write it anew with python -m tal_fast.check_data {root} --out {path}"
        )
    return set(listed)


def files_by_class(root: Path, split: str) -> dict[str, list[tuple[str, int, int]]]:
    """The image files of each class of ``root/split``, as ``_walk`` lists them, by the class's name in order.

    A class is a folder; but ``val`` may also be ImageNet's as it unpacks, see ``tal_fast.data.imagenet``.

    Raises:
        ValueError: the folder is missing, has neither, or holds an image that no file gives a class.
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
        return {name: [] for name in class_folders(root, split)}  # which says that it is empty
    classes = imagenet.validation_classes(root)
    found: dict[str, list[tuple[str, int, int]]] = {}
    for image in images:
        name = classes.get(Path(image[0]).stem)
        if name is None:
            raise ValueError(f"{image[0]} is none of ImageNet's validation images; remove it, or sort by class folders")
        found.setdefault(name, []).append(image)
    return dict(sorted(found.items()))


def read_split(root: Path, split: str, class_names: Sequence[str], listed: Set[str] | None = None) -> ImageFiles:
    """The images of ``root/split/CLASS/**`` (see ``files_by_class``); labels are places in ``class_names``.

    Args:
        root, split: where.
        class_names: folders, in the order of their labels.
        listed: absolute paths of the files to use; None: all.

    Raises:
        ValueError: a class folder that ``class_names`` lacks, one without images, or a file that is no image.
    """
    label_of = {name: label for label, name in enumerate(class_names)}
    paths: list[str] = []
    labels: list[int] = []
    stamps: list[tuple[int, int]] = []
    for name, found in files_by_class(root, split).items():
        folder = root / split / name
        if name not in label_of:
            raise ValueError(
                f"{folder} has no counterpart among the training classes ({_some(class_names)}); "
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
    return ImageFiles(paths, np.array(labels, np.int64), _sizes(paths, stamps))


def read_flat(folder: Path, name: str) -> ImageFiles:
    """All images under an out-of-distribution folder, whatever folders they are in, labelled ``OOD_LABEL``.

    Raises:
        ValueError: there are none, or a file is no image.
    """
    if not folder.is_dir():
        raise ValueError(f"data.ood {name!r}: {folder} is not a folder")
    found = _walk(str(folder))
    if not found:
        raise ValueError(f"data.ood {name!r}: {folder} holds no images ({', '.join(EXTENSIONS)})")
    paths = [path for path, _, _ in found]
    sizes = _sizes(paths, [(size, changed) for _, size, changed in found])
    return ImageFiles(paths, np.full(len(paths), OOD_LABEL, np.int64), sizes)


def image_size(path: str) -> tuple[int, int]:
    """(height, width) from the header.

    Raises:
        UnreadableImage: the file is not an image, cannot be read, or holds pixels the loaders do not agree on.
    """
    try:
        with Image.open(path) as image:
            problem = odd_pixels(image)
            if problem is None:
                return image.height, image.width
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        problem = why(error, path)
    raise UnreadableImage(
        f"{path} cannot be read as an image ({problem}); remove or replace it, or leave it out with "
        "python -m tal_fast.check_data FOLDER --out list.txt and --data.file_list list.txt"
    )


def odd_pixels(image: Image.Image) -> str | None:
    """Why the loaders would not make the same 8-bit pixels of an opened image; None if they do."""
    if image.format not in FORMATS:
        return f"format {image.format}, which the loaders do not both read"
    if image.mode not in MODES:
        return f"pixels of mode {image.mode}, which have no one meaning in 8 bits"
    return None


def undecodable(path: str, size: np.ndarray) -> str | None:
    """A sentence on why a file that was (height, width) pixels large does not decode; None if it does."""
    try:
        with Image.open(path) as image:
            if (image.height, image.width) != tuple(size):
                return f"{path} cannot be used (it was {size[0]} x {size[1]} and is {image.height} x {image.width} now)"
            image.load()
    except Exception as error:
        return f"{path} cannot be decoded ({why(error, path)})"
    return None


def why(error: Exception, path: str) -> str:
    """What an error of Pillow's says about a file, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "it is empty" if os.path.exists(path) and os.path.getsize(path) == 0 else "no image format fits it"
    return " ".join(str(error).split()) or type(error).__name__


def _walk(folder: str) -> list[tuple[str, int, int]]:
    """(path, bytes, time of change in ns) of the images at any depth, sorted by path; hidden ones are passed over."""
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
    """(N, 2) sizes of the images; kept in the cache, for reading a million headers takes minutes."""
    digest = hashlib.sha256()
    for path, stamp in zip(paths, stamps, strict=True):
        digest.update(f"{path}\0{stamp}\n".encode(errors="surrogateescape"))
    cached = cache_dir() / "image-sizes-2" / f"{digest.hexdigest()[:32]}.npy"
    try:
        sizes = np.load(cached, allow_pickle=False)
        if sizes.shape == (len(paths), 2) and sizes.dtype == np.int32:
            return sizes
    except (OSError, ValueError, EOFError):
        pass  # not there or damaged: read the headers
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = np.array(list(pool.map(image_size, paths, chunksize=64)), np.int32)
    with replacing(cached) as temporary:
        np.save(temporary, sizes, allow_pickle=False)
    return sizes


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
