"""CIFAR-10 and CIFAR-100 from their binary versions, see https://www.cs.toronto.edu/~kriz/cifar.html.

A record is one byte of label (CIFAR-100: a superclass and a class), then 1,024 bytes each of red, green and blue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tal_fast.data.text import read_text

SIDE = 32
PIXELS = 3 * SIDE * SIDE


@dataclass(frozen=True)
class Layout:
    """Binary archive and the folder and files it unpacks to."""

    archive: str
    folder: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    names: str  # file of class names
    label_bytes: int  # of a record, the last of which is the class
    num_classes: int
    pickles: str  # folder of the archive for Python


LAYOUTS = {
    "cifar10": Layout(
        archive="cifar-10-binary.tar.gz",
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        val=("test_batch.bin",),
        names="batches.meta.txt",
        label_bytes=1,
        num_classes=10,
        pickles="cifar-10-batches-py",
    ),
    "cifar100": Layout(
        archive="cifar-100-binary.tar.gz",
        folder="cifar-100-binary",
        train=("train.bin",),
        val=("test.bin",),
        names="fine_label_names.txt",
        label_bytes=2,
        num_classes=100,
        pickles="cifar-100-python",
    ),
}


def find_folder(dataset: str, root: str | Path) -> Path | None:
    """Folder of the binary files: ``root``, or the archive's folder in it; None if neither has them."""
    layout = LAYOUTS[dataset]
    return next((f for f in (Path(root), Path(root) / layout.folder) if (f / layout.val[0]).is_file()), None)


def read(dataset: str, root: str | None, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the images (N, 32, 32, 3) uint8, RGB, and the classes (N,) int64 of ``train`` or ``val``.

    ``root`` is the folder of the binary files, or the one they were unpacked in. Raises ValueError if a file is missing
    or damaged, or there are only pickles.
    """
    layout, folder = LAYOUTS[dataset], _folder(dataset, root)
    parts = [_read_records(folder / name, layout) for name in getattr(layout, split)]
    return np.concatenate([p for p, _ in parts]), np.concatenate([labels for _, labels in parts])


def class_names(dataset: str, root: str | None) -> Sequence[str]:
    """Read the names of the classes; raises ValueError if the list is missing or has too few or too many."""
    layout, folder = LAYOUTS[dataset], _folder(dataset, root)
    path = folder / layout.names
    if not path.is_file():
        raise ValueError(f"{folder} has no {layout.names}; unpack {layout.archive} again")
    names = read_text(path).split()
    if len(names) != layout.num_classes or len(set(names)) != len(names) or not "".join(names).isprintable():
        raise ValueError(
            f"{path} has {len(names)} names but must have {layout.num_classes}, all different; "
            f"unpack {layout.archive} again"
        )
    return names


def _folder(dataset: str, root: str | None) -> Path:
    layout = LAYOUTS[dataset]
    wanted = f"the folder of {layout.val[0]}, as {layout.archive} unpacks"
    if root is None:
        raise ValueError(f"data.root is not set; name {wanted} with --data.root FOLDER")
    folder = find_folder(dataset, root)
    if folder is not None:
        return folder
    # Pickles are not read: unpickling can run any program.
    if any((p / "meta").is_file() or (p / "batches.meta").is_file() for p in (Path(root), Path(root) / layout.pickles)):
        raise ValueError(
            f"{root} holds CIFAR's version for Python, pickles, which can run programs and are not read; "
            f"get the binary version, {layout.archive}, from https://www.cs.toronto.edu/~kriz/cifar.html"
        )
    raise ValueError(f"data.root {root} has no {layout.val[0]}; name {wanted}")


def _read_records(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; unpack {layout.archive} again")
    length = layout.label_bytes + PIXELS
    data = np.fromfile(path, np.uint8)
    if data.size == 0 or data.size % length:
        raise ValueError(
            f"{path} has {data.size:,} bytes, which is not a whole number of records of {length:,}; "
            f"unpack {layout.archive} again"
        )
    records = data.reshape(-1, length)
    labels = records[:, layout.label_bytes - 1].astype(np.int64)
    if labels.max() >= layout.num_classes:
        raise ValueError(
            f"{path} has a label {labels.max()} but there are {layout.num_classes} classes; "
            f"unpack {layout.archive} again"
        )
    planes = records[:, layout.label_bytes :].reshape(-1, 3, SIDE, SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels
