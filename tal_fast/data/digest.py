"""Digests of a data set's images, by which resumed runs and cached outputs notice that they are not the same."""

from __future__ import annotations

import functools
import hashlib
import os
import time

import numpy as np

from tal_fast.data.datasets import DataBundle, MemoryImages, Split
from tal_fast.data.image_folder import ImageFiles
from tal_fast.data.own import Items
from tal_fast.data.packed import PackedImages

SAMPLES = 64
"""Number of files of a split whose content is read: a million would take minutes."""


def data_digest(data: DataBundle) -> dict[str, str]:
    """SHA-256 in hexadecimal of the images of ``train`` and ``val``.

    Of image files, the path below the split's folder, the label and the size in bytes of each count, and the content of
    ``SAMPLES`` of them, but neither the folder nor times, so that a copy is the same; of images in memory, all pixels
    and labels.
    """
    return {name: _digest(data.split(name)) for name in ("train", "val")}


def newest_change(data: DataBundle) -> str | None:
    """Time at which an image file of ``train`` or ``val`` last changed; None for images in memory.

    It shows files that changed in place at the same size, which ``data_digest`` may miss.
    """
    splits = [data.split(name) for name in ("train", "val")]
    times = [int(split.stamps[:, 1].max()) for split in splits if isinstance(split, ImageFiles)]
    if not times:
        return None
    seconds, fraction = divmod(max(times), 10**9)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(seconds))}.{fraction:09} UTC"


def split_hash(split: Split) -> str:
    """SHA-256 of a split: labels, and its pixels in memory or the paths, sizes and modification times of its files.

    Cached outputs are found by it. Unlike ``data_digest`` it shows every change, reads no file and differs for a copy.
    """
    if isinstance(split, MemoryImages):
        return _sha256(split.labels, str(split.pixels.shape).encode(), split.pixels, split.rows).hexdigest()
    if isinstance(split, Items):
        return _digest(split)
    digest = _sha256(split.labels)
    status = functools.lru_cache(64)(os.stat)  # many images share a file
    extents = split.extents[:, 1:].tolist() if isinstance(split, PackedImages) else None
    for i, path in enumerate(split.paths):
        try:
            stamp = status(split.file(i))
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); put it back or evaluate again") from None
        within = "" if extents is None else f" {extents[i]}"
        digest.update(f"{path}\0{stamp.st_size} {stamp.st_mtime_ns}{within}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _digest(images: Split) -> str:
    if isinstance(images, MemoryImages):
        return _sha256(str(images.pixels.shape).encode(), images.pixels, images.labels, images.rows).hexdigest()
    if isinstance(images, Items):
        return _sha256(images.hashes, images.labels).hexdigest()
    paths = [path.replace("://", "/") for path in images.paths]  # addresses of shards
    folder = os.path.commonpath([min(paths), max(paths)])
    names = "\n".join(path[len(folder) :] for path in paths)
    digest = _sha256(names.encode(errors="surrogateescape"), images.labels, images.stamps[:, 0])
    for i in np.linspace(0, len(images) - 1, SAMPLES).astype(int):
        try:
            digest.update(hashlib.sha256(images.read(i)).digest())
        except OSError:  # reported when it is decoded
            digest.update(b"unreadable")
    return digest.hexdigest()


def _sha256(*parts: bytes | np.ndarray | None) -> hashlib._Hash:
    """SHA-256 of bytes and arrays one after the other; None is left out."""
    digest = hashlib.sha256()
    for part in parts:
        if part is not None:
            digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return digest
