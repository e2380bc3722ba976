"""Image files and data sets for tests of the data package."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tal_fast.config.schema import DataConfig
from tal_fast.data import dali

LOADERS = ["torch"] + (["dali"] if dali.available() else [])
needs_dali = pytest.mark.skipif(not dali.available(), reason="DALI is not installed")


def picture(height: int, width: int, seed: int) -> Image.Image:
    """Smooth picture with some texture, like a photo; noise alone would test rounding in the resampling filters."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(256, size=(6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray(np.clip(smooth + random.integers(-6, 7, size=smooth.shape), 0, 255).astype(np.uint8))


def make_folder(root: Path, train: int = 13, val: int = 7, classes: tuple[str, ...] = ("cat", "dog", "emu")) -> Path:
    """Make a folder of pictures of many sizes, formats and modes."""
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            folder = root / split / classes[i % len(classes)]
            folder.mkdir(parents=True, exist_ok=True)
            image = picture(40 + 17 * i % 60, 90 - 13 * i % 50, i)
            kind = i % 7
            if kind == 0:
                image.convert("L").save(folder / f"{i}.png")
            elif kind == 1:
                image.quantize(64).save(folder / f"{i} with spaces.png")
            elif kind == 2:
                image.convert("RGBA").save(folder / f"{i}.PNG")
            elif kind == 3:
                image.convert("CMYK").save(folder / f"{i}.jpg", quality=95)
            elif kind == 4:
                exif = Image.Exif()
                exif[274] = 6  # "rotate by 90 degrees to show"
                image.save(folder / f"é{i}.jpeg", quality=95, exif=exif)
            else:
                image.save(folder / f"{i}.{'jpg' if kind == 5 else 'bmp'}")
    (root / "train" / classes[0] / "Thumbs.db").write_bytes(b"no image, ignored")
    (root / "train" / classes[0] / ".hidden.jpg").write_bytes(b"no image, ignored")
    return root


def config(root: Path | None = None, **options: Any) -> DataConfig:
    return DataConfig(root=None if root is None else str(root), **{"image_size": 24, "workers": 0, **options})


def collect(loader: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batches = list(loader)
    return tuple(torch.cat(column) for column in zip(*batches, strict=True))  # type: ignore[return-value]


def cut_short(path: Path, seed: int = 0) -> None:
    """Write a truncated JPEG of 80 x 80 pixels with an intact header."""
    picture(80, 80, seed).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_fashion(folder: Path, train: int = 30, test: int = 20) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        pixels = random.integers(256, size=(count, 28, 28), dtype=np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))


def write_cifar(folder: Path, dataset: str, records: int = 7) -> np.ndarray:
    """Write small binary files of CIFAR; returns the training and test records (N, labels + 3072)."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    classes, label_bytes = (10, 1) if dataset == "cifar10" else (100, 2)
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    files, names = (files, "batches.meta.txt") if classes == 10 else (["train.bin", "test.bin"], "fine_label_names.txt")
    written = []
    for name in files:
        pixels = random.integers(256, size=(records, 3072), dtype=np.uint8)
        labels = random.integers(classes, size=(records, label_bytes), dtype=np.uint8)
        written.append(np.concatenate([labels, pixels], axis=1))
        written[-1].tofile(folder / name)
    (folder / names).write_text("".join(f"name{i}\n" for i in range(classes)) + "\n")
    return np.concatenate(written)
