"""DALI's images compared with the PyTorch loader's, and files that only DALI rejects."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tal_fast.data.build import build_data
from tests.helpers.images import collect, config, make_folder, needs_dali, picture


@needs_dali
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("split", ["train", "train-eval", "val"])
def test_dali_and_torch_read_the_same_images(tmp_path: Path, split: str, channels: Any) -> None:
    root = make_folder(tmp_path / "images")
    got = {}
    for loader in ("dali", "torch"):
        data = build_data(
            config(root, loader=loader, channels=channels, mean=[0.0] * channels, std=[1 / 255] * channels)
        )
        assert data.loader_name == loader
        reader = data.loader(split, batch_size=4, seed=2)
        got[loader] = []
        for epoch in range(2):
            reader.set_epoch(epoch)
            got[loader].append(collect(reader))
    for (dali, dali_labels, dali_indices), (torch_, labels, indices) in zip(got["dali"], got["torch"], strict=True):
        assert torch.equal(dali_indices, indices)
        assert torch.equal(dali_labels, labels)
        assert dali.shape == torch_.shape == (len(indices), channels, 24, 24)
        assert dali.dtype == torch_.dtype == torch.float32
        error = (dali - torch_).abs()  # of 255: two JPEG decoders and two roundings between rows and columns
        assert error.mean() < 1.0
        assert error.max() <= 16
    first, second = (epoch[0] for epoch in got["torch"])
    assert torch.equal(first, second) == (split != "train")  # only training varies, and it does


@pytest.mark.slow
@needs_dali
@pytest.mark.parametrize(
    ("mode", "channels", "mean_bound", "max_bound"), [("RGB", 3, 0.25, 16), ("L", 1, 0.25, 16), ("CMYK", 3, 0.25, 16)]
)
def test_photos_differ_little_between_the_loaders(
    tmp_path: Path, mode: str, channels: Any, mean_bound: float, max_bound: float
) -> None:
    from sklearn.datasets import load_sample_images

    for split in ("train", "val"):
        for name, photo in zip("ab", load_sample_images().images, strict=True):
            (tmp_path / split / name).mkdir(parents=True)
            exif = Image.Exif()
            exif[274] = 6  # to be turned by 90 degrees, which neither does
            image = Image.fromarray(photo)
            for number, size in enumerate(((500, 375), (333, 500), (640, 427))):
                image.resize(size).convert(mode).save(tmp_path / split / name / f"{number}.jpg", quality=90, exif=exif)
    for split in ("train", "val"):
        got = {}
        for loader in ("dali", "torch"):
            options: dict[str, Any] = {"mean": [0.0] * channels, "std": [1 / 255] * channels, "image_size": 224}
            data = build_data(config(tmp_path, loader=loader, channels=channels, **options))
            reader = data.loader(split, batch_size=6, seed=5)
            got[loader] = []
            for epoch in range(2):
                reader.set_epoch(epoch)
                got[loader].append(collect(reader)[0])
        error = (torch.cat(got["dali"]) - torch.cat(got["torch"])).abs()  # of 255
        assert error.mean() < mean_bound
        assert error.max() <= max_bound


@needs_dali
def test_a_file_that_only_dali_cannot_decode_is_found(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", train=6)
    victim = root / "train" / "emu" / "bits.tif"
    picture(50, 60, 0).convert("1").save(victim)  # Pillow reads it
    reader = build_data(config(root, loader="dali")).loader("train-eval", batch_size=2, skip_unreadable=True)
    images, labels, _ = collect(reader)
    assert len(images) == 7
    assert (labels == -100).sum() == 1
    assert list(reader.unreadable) == [str(victim)]
    assert "cannot be decoded (by DALI: " in reader.unreadable[str(victim)]


@pytest.mark.slow
def test_workers_start_while_dali_pipelines_are_garbage(tmp_path: Path) -> None:
    """A worker that collects the garbage of a DALI pipeline hangs."""
    pytest.importorskip("nvidia.dali")
    make = """
import gc, os, sys
from pathlib import Path
from tal_fast.config.schema import DataConfig
from tal_fast.data.build import build_data

def first(loader_name):
    config = DataConfig(dataset="folder", root=sys.argv[1], image_size=16, workers=2, loader=loader_name)
    loader = build_data(config).loader("val", batch_size=2)
    return [i for _, _, indices in loader for i in indices.tolist()], loader

gc.disable()
for _ in range(5):
    seen, loader = first("dali")
    cycle = [loader]
    cycle.append(cycle)
del loader, cycle
os.register_at_fork(after_in_child=gc.collect)
print(sorted(seen) == sorted(first("torch")[0]))
"""
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(np.full((20, 20, 3), 40 * i, np.uint8)).save(tmp_path / split / name / f"{i}.png")
    done = subprocess.run([sys.executable, "-c", make, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True", done.stderr
