"""Digests of a data set's images, by which a resumed run notices that they are not the same."""

from __future__ import annotations

import hashlib
import os
import time

import numpy as np

from tal_fast.data.datasets import DataBundle, MemoryImages, Split
from tal_fast.data.image_folder import ImageFiles
from tal_fast.data.own import Items

SAMPLES = 64
"""Number of files of a split whose content is read: a million would take minutes."""


def data_digest(data: DataBundle) -> dict[str, str]:
    """SHA-256 in hexadecimal of the images of ``train`` and ``val``.

    Of image files, the path below the split's folder, the label and the size in bytes of each count, and the content of
    ``SAMPLES`` of them, but neither the folder nor times, so that a copy is the same; of images in memory and of a
    user's own data set, all pixels and labels.
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


def _digest(images: Split) -> str:
    if isinstance(images, MemoryImages):
        digest = hashlib.sha256(str(images.pixels.shape).encode())
        for array in (images.pixels, images.labels, images.rows):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()
    if isinstance(images, Items):
        return images.sha256()
    paths = [path.replace("://", "/") for path in images.paths]  # addresses of shards
    folder = os.path.commonpath([min(paths), max(paths)])
    names = "\n".join(path[len(folder) :] for path in paths)
    digest = hashlib.sha256(names.encode(errors="surrogateescape"))
    digest.update(images.labels.tobytes())
    digest.update(images.stamps[:, 0].tobytes())
    for i in np.linspace(0, len(images) - 1, SAMPLES).astype(int):
        try:
            digest.update(hashlib.sha256(images.read(i)).digest())
        except OSError:  # reported when it is decoded
            digest.update(b"unreadable")
    return digest.hexdigest()
