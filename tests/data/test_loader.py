"""Loaders of image files and of images in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tal_fast.config.names import INTERPOLATIONS
from tal_fast.config.schema import DataConfig
from tal_fast.data.build import build_data
from tal_fast.data.datasets import MemoryImages
from tal_fast.data.loader import ImageFormat, Normalizer, prefetch
from tests.helpers.images import LOADERS, collect, config, make_folder, write_fashion


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_labels_and_indices_match_the_files(tmp_path: Path, loader: Any, workers: int) -> None:
    for name, value in (("black", 0), ("white", 255)):
        for split, count in (("train", 5), ("val", 3)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 20), (value,) * 3).save(tmp_path / split / name / f"{i}.png")
    data = build_data(config(tmp_path, loader=loader, workers=workers, mean=[0.5] * 3, std=[0.5] * 3))
    assert data.class_names == ("black", "white")
    for split, batch, total in (("train", 3, 9), ("train-eval", 4, 10), ("val", 4, 6)):
        reader = data.loader(split, batch_size=batch)
        images, labels, indices = collect(reader)
        assert len(images) == total
        assert len(reader) == -(-total // batch)
        assert labels.dtype == indices.dtype == torch.int64
        assert torch.equal(images.mean((1, 2, 3)).round(decimals=4), labels * 2.0 - 1)
        paths = data.split(split).paths  # type: ignore[union-attr]
        assert [("white" in paths[i]) for i in indices] == [bool(label) for label in labels]
    assert reader.num_samples == 6


@pytest.mark.parametrize("loader", LOADERS)
def test_ranks_share_the_validation_images(tmp_path: Path, loader: Any) -> None:
    data = build_data(config(make_folder(tmp_path, val=7), loader=loader))
    for world in (1, 2, 3, 5, 9):
        seen: list[int] = []
        for rank in range(world):
            reader = data.loader("val", batch_size=2, rank=rank, world_size=world)
            batches = list(reader)
            assert len(batches) == len(reader)
            assert reader.num_samples == 7
            seen += [int(i) for _, _, indices in batches for i in indices]
        assert sorted(seen) == list(range(7))


@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_can_be_left_early_and_read_again(tmp_path: Path, loader: Any) -> None:
    data = build_data(config(make_folder(tmp_path), loader=loader))
    reader = data.loader("train", batch_size=2, seed=1)
    whole = collect(reader)
    next(iter(reader))
    again = collect(reader)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    reader.set_epoch(0, start_step=4)
    rest = collect(reader)
    assert all(torch.equal(a[8:], b) for a, b in zip(whole, rest, strict=True))
    reader.set_epoch(0, start_step=len(reader))
    assert list(reader) == []


@pytest.mark.parametrize("loader", LOADERS)
def test_reading_does_not_change_the_global_generator(tmp_path: Path, loader: Any) -> None:
    data = build_data(config(make_folder(tmp_path), loader=loader, workers=1))
    before = torch.get_rng_state()
    collect(data.loader("train", batch_size=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("loader", [*LOADERS, "memory"])
def test_images_are_resized_as_by_pillow(tmp_path: Path, loader: Any, interpolation: str) -> None:
    from sklearn.datasets import load_sample_images

    photo = Image.fromarray(load_sample_images().images[1]).crop((0, 0, 400, 400))
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        photo.save(tmp_path / split / "a" / "0.png")
    options: dict[str, Any] = {"mean": [0.0] * 3, "std": [1 / 255] * 3, "image_size": 96, "crop_fraction": 1.0}
    options["interpolation"] = interpolation
    data = build_data(config(tmp_path, loader="torch" if loader == "memory" else loader, **options))
    split = MemoryImages(np.array(photo)[None], np.zeros(1, np.int64)) if loader == "memory" else "val"
    ((images, _, _),) = data.loader(split, batch_size=1)
    error = {}
    for other in INTERPOLATIONS:
        want = np.asarray(photo.resize((96, 96), Image.Resampling[other.upper()])).astype(np.float32)
        error[other] = float(np.abs(images[0].permute(1, 2, 0).numpy() - want).mean())  # of 255
    assert images.min() >= -1e-4
    assert images.max() <= 255 + 1e-4
    assert error.pop(interpolation) < 0.5
    assert min(error.values()) > 1


@pytest.mark.parametrize("loader", [*LOADERS, "memory"])
def test_progressive_resizing(tmp_path: Path, loader: Any) -> None:
    if loader == "memory":
        data = build_data(DataConfig(dataset="synthetic", crop_area=None, image_size=24, synthetic_images=20))
    else:
        data = build_data(config(make_folder(tmp_path), loader=loader, workers=1))
    reader = data.loader("train", batch_size=4, seed=1)
    full = list(reader)
    epochs = []
    for epoch, size in enumerate((12, 12, 18, None)):
        reader.set_epoch(epoch, image_size=size)
        epochs.append(list(reader))
        assert {images.shape[2:] for images, _, _ in epochs[-1]} == {(size or 24, size or 24)}
    reader.set_epoch(0)
    assert all(torch.equal(a, b) for one, two in zip(full, reader, strict=True) for a, b in zip(one, two, strict=True))
    small, _, indices = epochs[0][0]
    assert torch.equal(indices, full[0][2])
    # Smaller versions of the same crops: close to the 2 x 2 averages of the large ones.
    halved = torch.nn.functional.avg_pool2d(full[0][0], 2)
    assert (small - halved).abs().mean() < 0.5 * halved.std()
    fresh = data.loader("train", batch_size=4, seed=1)
    fresh.set_epoch(2, start_step=1, image_size=18)
    for one, two in zip(fresh, epochs[2][1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    with pytest.raises(ValueError, match="image_size is 0 but must be at least 1"):
        reader.set_epoch(0, image_size=0)


def test_shift_and_mirror_in_memory(tmp_path: Path) -> None:
    write_fashion(tmp_path / "fashion")
    options: dict[str, Any] = {"dataset": "fashion-mnist", "crop_area": None, "channels": 1}
    data = build_data(
        DataConfig(root=str(tmp_path / "fashion"), mean=[0.0], std=[1 / 255], shift=3, flip=True, **options)
    )
    loader = data.loader("train", batch_size=30, seed=4)
    images, _, indices = collect(loader)
    original = torch.from_numpy(data.split("train").pixels)[..., 0].float()  # type: ignore[union-attr]
    moves = []
    for image, index in zip(images[:, 0], indices, strict=True):
        found = []
        for mirrored in (False, True):
            padded = torch.nn.functional.pad(original[index].flip(1) if mirrored else original[index], (3, 3, 3, 3))
            found += [
                (mirrored, 3 - y, 3 - x)
                for y in range(7)
                for x in range(7)
                if torch.allclose(padded[y : y + 28, x : x + 28], image, atol=1e-2)
            ]
        assert len(found) == 1  # every image is its original, mirrored or not, moved by at most 3 pixels each way
        moves += found
    assert len(set(moves)) > 10
    assert {mirrored for mirrored, _, _ in moves} == {False, True}


def test_prefetch_works_one_step_ahead_on_a_separate_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Stream:
        def __init__(self, *_: Any) -> None:
            self.count = 0

        def __enter__(self) -> None:
            done.append("enter")

        def __exit__(self, *_: Any) -> None:
            done.append("leave")

        def record_event(self) -> str:
            self.count += 1
            return f"ready {self.count}"

        def wait_event(self, event: str) -> None:
            done.append(f"wait for {event}")

    class Result:
        def __init__(self, number: int) -> None:
            done.append(f"make {number}")
            self.number, self.images = number, self

        def record_stream(self, stream: Any) -> None:
            assert stream is current
            done.append(f"record {self.number}")

    current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    for result in prefetch([1, 2, 3], Result, torch.device("cuda")):  # type: ignore[arg-type]
        done.append(f"use {result.number}")
    steps = [d for d in done if d not in ("enter", "leave")]
    assert steps == [
        *("make 1", "make 2", "wait for ready 1", "record 1", "use 1"),
        *("make 3", "wait for ready 2", "record 2", "use 2"),
        *("wait for ready 3", "record 3", "use 3"),
    ]
    assert done[:6] == ["enter", "make 1", "leave", "enter", "make 2", "leave"]
    assert list(prefetch([1, 2], str, torch.device("cpu"))) == ["1", "2"]


@pytest.mark.gpu
@pytest.mark.parametrize("loader", ["memory", "torch"])
def test_no_step_waits_for_the_gpu(tmp_path: Path, loader: Any) -> None:
    if loader == "memory":
        data = build_data(DataConfig(dataset="synthetic", crop_area=None, shift=2, synthetic_images=64))
    else:
        data = build_data(config(make_folder(tmp_path), loader="torch", workers=2))
    want = list(data.loader("train", batch_size=4, seed=1))
    reader = data.loader("train", batch_size=4, seed=1, device="cuda")
    torch.cuda.synchronize()
    got = []
    try:
        torch.cuda.set_sync_debug_mode("error")
        for batch in reader:
            got.append(batch)
            torch.randn(500, 500, device="cuda") @ torch.randn(500, 500, device="cuda")  # memory in use meanwhile
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch, expected in zip(got, want, strict=True):
        for one, two in zip(batch, expected, strict=True):
            assert one.device.type == "cuda"
            torch.testing.assert_close(one.cpu(), two, atol=1e-5, rtol=1e-5)


def test_normalize() -> None:
    pixels = torch.tensor([[[[0, 51, 255], [255, 102, 0]]]], dtype=torch.uint8)  # (1, 1, 2, 3)
    images = Normalizer(ImageFormat(3, [0.5, 0.2, 0.0], [0.5, 0.1, 1.0], torch.device("cpu")))(pixels)
    torch.testing.assert_close(images, torch.tensor([[[[-1.0, 1.0]], [[0.0, 2.0]], [[1.0, 0.0]]]]))
    assert images.is_contiguous()
    gray = Normalizer(ImageFormat(1, [0.5], [0.5], torch.device("cpu")))(torch.zeros(2, 3, 5, 1, dtype=torch.uint8))
    assert gray.stride() == (15, 15, 5, 1)  # not channels-last's, which for one channel are as good


def test_memory_of_large_batches_returns_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    normalize = Normalizer(ImageFormat(3, [0.5, 0.2, 0.0], [0.5, 0.1, 1.0], torch.device("cpu")))
    pixels = torch.randint(256, (29, 224, 224, 3), dtype=torch.uint8)
    normalize(pixels)  # glibc's malloc keeps such blocks after the first one
    before, kept = resident(), []
    for _ in range(5):
        batches = [normalize(pixels) for _ in range(2)]
        kept.append(torch.ones(10_000))  # stays in the heap, above them
    batch = 4 * pixels.numel()
    assert resident() - before < 3 * batch
    del batches
    assert resident() - before < batch
