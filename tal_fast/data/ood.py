"""Out-of-distribution and shifted sets from a specification, see ``docs/evaluation.md#sets``."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tal_fast.config.names import CORRUPTIONS
from tal_fast.config.typed import one_line
from tal_fast.data import builtin, cifar, image_folder
from tal_fast.data.corruptions import SEVERITIES, Corruption
from tal_fast.data.datasets import MemoryImages, Split
from tal_fast.data.image_folder import ImageFiles
from tal_fast.data.matlab import read_mat
from tal_fast.data.pixels import as_channels
from tal_fast.data.sources import PACKED, flat_images
from tal_fast.data.text import read_text
from tal_fast.utils.arrays import as_classes
from tal_fast.utils.io import refuse_pipe

GENERATED = 1000
"""Default number of generated images."""
NAMED = {
    "imagenet-v2": ("imagenetv2-*", 10_000), "imagenet-a": ("imagenet-a", 7_500), "imagenet-r": ("imagenet-r", 30_000),
    "imagenet-o": ("imagenet-o", 2_000), "imagenet-c": ("KIND/SEVERITY", 50_000),
}  # fmt: skip
"""Named set -> the folder that holds its class folders, and its number of images."""
CIFAR_10_1 = {"v4": 2021, "v6": 2000}
"""Version of CIFAR-10.1 -> number of images."""


def parse_named(texts: Sequence[str], option: str) -> dict[str, str]:
    """Parse texts such as ``svhn=svhn:FILE`` to specifications by name.

    Raises ValueError if a name is missing or given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, spec = text.partition("=")
        if not equals or not name or not spec:
            raise ValueError(f"{option} takes NAME=WHERE, such as svhn=svhn:test_32x32.mat, not {text!r}")
        if name in found:
            raise ValueError(f"{option} names {name!r} twice; give each set its own name")
        found[name] = spec
    return found


@contextlib.contextmanager
def set_named(name: str) -> Iterator[None]:
    """Context in which a set is read: its errors begin with the name that the user gave it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"the set {name!r} cannot be used: {error}") from None


def ood_set(spec: str, image_size: int, channels: int) -> Split:
    """Images of an out-of-distribution set; ``spec`` is as in ``docs/evaluation.md#sets``.

    Generated images have the data set's ``image_size`` and ``channels``. Raises ValueError if files are missing or
    damaged, or the specification is unknown.
    """
    kind, colon, rest = spec.partition(":")
    if kind == "textures" and colon:
        return _textures(rest)
    if kind == "list" and colon:
        return _listed(rest)
    if kind == "imagenet-o" and colon:
        return _named(kind, rest, [])
    if kind == "svhn" and colon:
        return MemoryImages.unlabelled(_svhn(Path(rest)), channels)
    if kind in cifar.LAYOUTS and colon:
        return MemoryImages.unlabelled(cifar.read(kind, rest, "val")[0], channels)
    if kind == "npy" and colon:
        return MemoryImages.unlabelled(_read_images(Path(rest)), channels)
    if kind == "mnist":
        if not builtin.mnist_available(rest or None):
            raise ValueError("the set 'mnist' needs a folder with MNIST's IDX files: mnist:FOLDER")
        return MemoryImages.unlabelled(builtin.mnist(rest or None), channels)
    if kind == "fashion-mnist":
        return MemoryImages.unlabelled(builtin.fashion_mnist(rest or None)["val"][0], channels)
    if kind in ("patches", "gaussian", "uniform"):
        number = _number(rest, spec) if colon else GENERATED
        make = {"patches": _patches, "gaussian": _gaussian, "uniform": builtin.synthetic_noise}[kind]
        return MemoryImages.unlabelled(make(number, image_size, channels), channels)
    if not Path(spec).is_dir() and not (kind in PACKED and colon):
        raise ValueError(
            f"the set {spec!r} is neither a folder nor one of webdataset:WHERE, huggingface:WHERE, textures:FOLDER, "
            f"list:FOLDER:FILE.txt, imagenet-o:FOLDER, svhn:FILE.mat, mnist[:FOLDER], fashion-mnist[:FOLDER], "
            f"cifar10:FOLDER, cifar100:FOLDER, npy:FILE.npy, patches[:N], gaussian[:N], uniform[:N]"
        )
    return flat_images(spec, spec)


def shift_set(
    spec: str, class_names: Sequence[str], val: Split, channels: int, seed: int = 0
) -> tuple[Split, Corruption | None]:
    """Shifted images of the data set's classes, and the corruption to apply to them.

    ``spec`` is as in ``docs/evaluation.md#sets``; ``seed`` is that of built-in corruptions of the images ``val``.
    Raises ValueError if files are missing or damaged, a class is unknown, or the specification is.
    """
    kind, colon, rest = spec.partition(":")
    if kind == "cifar-c" and colon:
        return _cifar_c(rest, len(class_names), channels), None
    if kind == "cifar10.1" and colon:
        return _cifar_10_1(rest, len(class_names), channels), None
    if kind == "list" and colon:
        return _listed(rest, len(class_names)), None
    if kind in NAMED and colon:
        return _named(kind, rest, class_names), None
    if kind in CORRUPTIONS:
        severity = _number(rest, spec) if colon else 3
        return val, Corruption(kind, severity, seed)
    folder = Path(spec)
    if not folder.is_dir():
        raise ValueError(
            f"the set {spec!r} is neither a folder nor cifar-c:FILE.npy[:SEVERITY], cifar10.1:FOLDER[:v4], "
            f"list:FOLDER:FILE.txt, imagenet-v2, imagenet-a, imagenet-r or imagenet-c (each with :FOLDER) nor one of "
            f"{', '.join(CORRUPTIONS)} (each with :SEVERITY)"
        )
    return image_folder.read_split(folder.parent, folder.name, class_names), None


def _number(text: str, spec: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{spec!r} must end with a whole number of at least 1, not {text!r}")
    return int(text)


def _textures(text: str) -> ImageFiles:
    root, listed = Path(text), None
    if not root.is_dir() and ":" in text:
        start, _, listed = text.rpartition(":")
        root = Path(start)
    if not (root / "images").is_dir():
        raise ValueError(f"{root} has no folder images/; name the folder dtd/ that the Describable Textures unpack to")
    if listed is None:
        return image_folder.read_flat(root / "images", "textures")
    return _listed(f"{root / 'images'}:{root / 'labels' / listed}.txt")


def _listed(text: str, classes: int = 0) -> ImageFiles:
    """Images of ``FOLDER:FILE``, whose lines are ``PATH`` or ``PATH LABEL``; labelled if there are classes."""
    root, _, file = text.partition(":")
    try:
        lines = [line.strip() for line in read_text(Path(file)).splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"{file or text} cannot be read ({error.strerror}); give list:FOLDER:FILE.txt") from None
    rows = [re.fullmatch(r"(.+?)(?:\s+(-?\d+))?", line) for line in lines]
    paths = [os.path.join(root, row[1]) for row in rows if row]
    labels = [int(row[2] or -1) if classes else image_folder.OOD_LABEL for row in rows if row]
    if not paths or (classes and not 0 <= min(labels) <= max(labels) < classes):
        raise ValueError(f"{file} must list images as PATH LABEL, labels in 0..{classes - 1}; it has others, or none")
    return image_folder.listed_files(paths, file, labels)


def _named(kind: str, text: str, class_names: Sequence[str]) -> ImageFiles:
    """Images of a named set, in its folder or the one above; without class names an OOD set."""
    pattern, number = NAMED[kind]
    folders = [f for f in (Path(text), *Path(text).glob(pattern)) if any(p.is_dir() for p in f.glob("[n0-9]*"))]
    if not folders:
        raise ValueError(f"{kind}:{text} has no class folders; name the folder of {pattern}/CLASS/*, {number:,} images")
    # ImageNet-V2's folders are the places of the classes among the sorted names.
    names = [str(i) for i in range(len(class_names))] if kind == "imagenet-v2" else class_names
    folder = folders[0]
    read = image_folder.read_split(folder.parent, folder.name, names) if names else image_folder.read_flat(folder, kind)
    if len(read) != number:
        raise ValueError(f"{folder} holds {len(read):,} images but {kind} has {number:,}; unpack it again")
    return read


def _svhn(path: Path) -> np.ndarray:
    try:
        pixels = read_mat(path, "X")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as SVHN's .mat ({error}); download test_32x32.mat again") from None
    if pixels.ndim != 4 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"X in {path} must be (32, 32, 3, n) uint8, not {pixels.dtype} of shape {pixels.shape}")
    return np.ascontiguousarray(pixels.transpose(3, 0, 1, 2))


def _read_array(path: Path, mapped: bool = False) -> Any:
    refuse_pipe(path)
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except Exception as error:  # NumPy raises many types of errors for damaged files
        raise ValueError(f"{path} cannot be read as .npy ({one_line(error)})") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is an .npz; give one array as .npy")
    return array


def _read_images(path: Path) -> np.ndarray:
    pixels = _read_array(path, mapped=True)
    images = pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[3] in (1, 3))
    if not images or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(f"{path} must hold images (n, H, W, 3) of uint8, not {pixels.dtype} of shape {pixels.shape}")
    return pixels


def _cifar_c(text: str, classes: int, channels: int) -> MemoryImages:
    name, colon, end = text.rpartition(":")
    severity = _number(end, f"cifar-c:{text}") if colon and end.isdecimal() else None
    path = Path(name if severity is not None else text)
    pixels, labels = _with_labels(path, path.with_name("labels.npy"), classes)
    if len(pixels) % len(SEVERITIES):
        raise ValueError(f"{path} must hold five severities of equally many images, not {len(pixels)} images")
    if severity is not None and severity not in SEVERITIES:
        raise ValueError(f"the severity in cifar-c:{text} is 1 to 5, not {severity}")
    each = len(pixels) // len(SEVERITIES)
    rows = slice(None) if severity is None else slice((severity - 1) * each, severity * each)
    return MemoryImages(as_channels(pixels[rows], channels), labels[rows])


def _cifar_10_1(text: str, classes: int, channels: int) -> MemoryImages:
    folder, version = (text[:-3], text[-2:]) if text.endswith((":v4", ":v6")) else (text, "v6")
    paths = [Path(folder) / f"cifar10.1_{version}_{part}.npy" for part in ("data", "labels")]
    pixels, labels = _with_labels(paths[0], paths[1], classes)
    if len(pixels) != CIFAR_10_1[version]:
        raise ValueError(f"{paths[0]} holds {len(pixels)} images but {version} has {CIFAR_10_1[version]}")
    return MemoryImages(as_channels(pixels, channels), labels)


def _with_labels(path: Path, labels_path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of a .npy file, and int64 labels of another."""
    pixels = _read_images(path)
    return pixels, as_classes(_read_array(labels_path), classes, str(labels_path), len(pixels))


def _patches(number: int, size: int, channels: int) -> np.ndarray:
    """Random squares of 4 ``size`` (32 to 256) pixels of the two sample photos in turns, averaged to ``size``."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    side = min(max(4 * size, 32), 256)
    random = np.random.default_rng([3, size])
    pixels = np.empty((number, size, size, 3), np.uint8)
    for i in range(number):
        photo = photos[i % 2]
        left, top = (int(random.integers(limit - side + 1)) for limit in photo.size)
        box = (left, top, left + side, top + side)
        pixels[i] = np.asarray(photo.resize((size, size), Image.Resampling.BOX, box))
    return pixels


def _gaussian(number: int, size: int, channels: int) -> np.ndarray:
    noise = np.random.default_rng([4, size, channels]).standard_normal((number, size, size, channels), np.float32)
    return np.clip(np.round(127.5 + 63.75 * noise), 0, 255).astype(np.uint8)
