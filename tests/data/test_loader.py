"""Data: plans, loaders, folders, embedded sets, and what is refused."""

from __future__ import annotations

import gzip
import multiprocessing
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tal_fast.config.names import INTERPOLATIONS
from tal_fast.config.schema import DataConfig
from tal_fast.data import build_data
from tal_fast.data import builtin as embedded
from tal_fast.data import dali as dali_loader
from tal_fast.data import image_folder as files
from tal_fast.data.cache import make_folder_once
from tal_fast.data.datasets import MemoryImages
from tal_fast.data.image_folder import UnreadableImage
from tal_fast.data.loader import ImageFormat, Normalizer, prefetch
from tal_fast.data.sampler import Augmentation, Plan, central_boxes, random_boxes

LOADERS = ["torch"] + (["dali"] if dali_loader.available() else [])
needs_dali = pytest.mark.skipif(not dali_loader.available(), reason="DALI is not installed")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAL_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def picture(height: int, width: int, seed: int) -> Image.Image:
    """Smooth with some texture, as photos are: noise alone would test the resampling filters' last digits."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(256, size=(6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray(np.clip(smooth + random.integers(-6, 7, size=smooth.shape), 0, 255).astype(np.uint8))


def make_folder(root: Path, train: int = 13, val: int = 7, classes: tuple[str, ...] = ("cat", "dog", "emu")) -> Path:
    """Pictures of many shapes; PNG and JPEG; grayscale, palette, alpha, CMYK and EXIF-rotated among them."""
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
    (root / "train" / classes[0] / "Thumbs.db").write_bytes(b"no image, passed over")
    (root / "train" / classes[0] / ".hidden.jpg").write_bytes(b"no image, passed over")
    return root


def config(root: Path | None = None, **options: Any) -> DataConfig:
    return DataConfig(root=None if root is None else str(root), **{"image_size": 24, "workers": 0, **options})


def collect(loader: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batches = list(loader)
    return tuple(torch.cat(column) for column in zip(*batches, strict=True))  # type: ignore[return-value]


# ---- Plans ----------------------------------------------------------------------------------------------------


def plan(num_samples: int, batch_size: int, **options: Any) -> Plan:
    return Plan(np.full((num_samples, 2), 32, np.int32), batch_size, **options)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [12, 13, 37])
def test_training_shards_are_one_shuffled_order(world: int, num_samples: int) -> None:
    batch = 12 // world
    whole = [b.indices for b in plan(num_samples, 12, training=True, seed=5).batches(epoch=2)]
    ranks = [plan(num_samples, batch, training=True, seed=5, rank=r, world_size=world) for r in range(world)]
    assert {len(rank) for rank in ranks} == {num_samples // 12} == {len(whole)}
    steps = zip(*(rank.batches(epoch=2) for rank in ranks), strict=True)
    for together, parts in zip(whole, steps, strict=True):
        assert np.concatenate([part.indices for part in parts]).tolist() == together.tolist()
        assert {part.indices.size for part in parts} == {batch}  # never a short or a padded batch
    seen = np.concatenate(whole)
    assert len(set(seen.tolist())) == len(seen)  # no image twice


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("over", [0, 1, 4])
def test_ranks_take_equally_many_full_steps_of_different_images(world: int, over: int) -> None:
    """With ``over`` images too many for all ranks: where padded shards would end in a batch of one repeated image."""
    total, batch = 6 * world + min(over, world - 1), 3
    epochs = []
    for epoch in range(2):
        ranks = [
            [b.indices.tolist() for b in plan(total, batch, training=True, rank=r, world_size=world).batches(epoch)]
            for r in range(world)
        ]
        assert [len(steps) for steps in ranks] == [2] * world
        assert {len(step) for steps in ranks for step in steps} == {batch}
        seen = [i for steps in ranks for step in steps for i in step]
        assert len(set(seen)) == len(seen) == 6 * world
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_each_epoch_is_reshuffled_from_the_seed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate([b.indices for b in plan(60, 20, training=True, seed=seed).batches(epoch)]).tolist()

    assert order(1, 0) == order(1, 0)
    assert sorted(order(1, 0)) == list(range(60))
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6


def test_start_step_gives_the_rest_of_the_epoch() -> None:
    p = plan(40, 8, training=True, seed=3, augmentation=Augmentation(crop_area=(0.2, 1.0), flip=True, shift=2))
    whole = list(p.batches(epoch=4))
    for start in range(6):
        rest = list(p.batches(epoch=4, start_step=start))
        assert len(rest) == 5 - start
        for got, want in zip(rest, whole[start:], strict=True):
            for name in ("indices", "boxes", "mirror", "shift"):
                assert np.array_equal(getattr(got, name), getattr(want, name))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("num_samples", [1, 2, 7, 16])
def test_evaluation_sees_each_image_once(world: int, num_samples: int) -> None:
    ranks = [plan(num_samples, 3, rank=r, world_size=world) for r in range(world)]
    batches = [[b.indices for b in rank.batches()] for rank in ranks]
    assert [len(b) for b in batches] == [len(rank) for rank in ranks]
    seen = [i for rank in batches for batch in rank for i in batch.tolist()]
    assert sorted(seen) == list(range(num_samples))


def test_an_image_gets_the_same_crop_wherever_it_falls() -> None:
    options: dict[str, Any] = {"augmentation": Augmentation(crop_area=(0.1, 1.0), flip=True), "training": True}

    def crops(p: Plan) -> dict[int, list[int]]:
        return {
            int(i): [*box.tolist(), int(m)]
            for b in p.batches(1)
            for i, box, m in zip(b.indices, b.boxes, b.mirror, strict=True)
        }

    one = crops(plan(30, 5, seed=7, **options))
    two = crops(plan(30, 5, seed=7, world_size=2, **options)) | crops(
        plan(30, 5, seed=7, rank=1, world_size=2, **options)
    )
    assert one == two
    assert len({tuple(v) for v in one.values()}) > 20
    assert {v[4] for v in one.values()} == {0, 1}


def test_central_boxes() -> None:
    sizes = np.array([[256, 256], [100, 200], [201, 100], [1, 1]], float)
    assert central_boxes(sizes, 0.875).tolist() == [[16, 16, 224, 224], [6, 56, 88, 88], [56, 6, 88, 88], [0, 0, 1, 1]]
    assert central_boxes(sizes, 1.0).tolist() == [[0, 0, 256, 256], [0, 50, 100, 100], [50, 0, 100, 100], [0, 0, 1, 1]]


def test_random_boxes_lie_within_and_have_the_asked_area_and_shape() -> None:
    random = np.random.default_rng(0).random((4000, 4), dtype=np.float32)
    sizes = np.random.default_rng(1).integers(1, 700, size=(4000, 2)).astype(float)
    top, left, height, width = random_boxes(sizes, (0.08, 1.0), (0.75, 4 / 3), random).T
    assert (np.minimum(top, left) >= 0).all()
    assert (np.minimum(height, width) >= 1).all()
    assert (top + height <= sizes[:, 0]).all()
    assert (left + width <= sizes[:, 1]).all()
    # Where no box needs narrowing, areas are uniform and shapes log-uniform over their ranges.
    square = np.full((4000, 2), 1000.0)
    _, _, height, width = random_boxes(square, (0.1, 0.5), (0.5, 2.0), random).T
    area, shape = height * width / 1e6, np.log2(width / height)
    assert (abs(area.mean() - 0.3) < 0.01, abs(area.min() - 0.1) < 0.01, abs(area.max() - 0.5) < 0.01) == (True,) * 3
    assert (abs(shape.mean()) < 0.05, abs(shape.min() + 1) < 0.02, abs(shape.max() - 1) < 0.02) == (True,) * 3
    whole = random_boxes(square[:1], (1.0, 1.0), (1.0, 1.0), random[:1])
    assert whole.tolist() == [[0, 0, 1000, 1000]]


def test_batch_larger_than_the_images_is_refused() -> None:
    with pytest.raises(ValueError, match="a step takes 14 images .* only 13 training images; lower batch_size"):
        plan(13, 7, training=True, world_size=2)
    with pytest.raises(ValueError, match="batch size is 0"):
        plan(13, 0)


# ---- Loaders --------------------------------------------------------------------------------------------------


@needs_dali
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("split", ["train", "train-eval", "val"])
def test_dali_and_torch_read_the_same(tmp_path: Path, split: str, channels: Any) -> None:
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


@needs_dali
@pytest.mark.parametrize(
    ("mode", "channels", "mean_bound", "max_bound"), [("RGB", 3, 0.25, 16), ("L", 1, 0.25, 16), ("CMYK", 3, 0.25, 16)]
)
def test_photos_differ_by_little_between_the_loaders(
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


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_labels_indices_and_files_belong_together(tmp_path: Path, loader: Any, workers: int) -> None:
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
def test_an_epoch_left_early_leaves_nothing_behind(tmp_path: Path, loader: Any) -> None:
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
def test_reading_leaves_the_global_generator_alone(tmp_path: Path, loader: Any) -> None:
    data = build_data(config(make_folder(tmp_path), loader=loader, workers=1))
    before = torch.get_rng_state()
    collect(data.loader("train", batch_size=2))
    assert torch.equal(torch.get_rng_state(), before)


def cut_short(path: Path, seed: int = 0) -> None:
    """A JPEG of 80 x 80 whose header is whole, so that only decoding fails."""
    picture(80, 80, seed).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_does_not_decode_is_named(tmp_path: Path, loader: Any, workers: int) -> None:
    root = make_folder(tmp_path / "images", train=6)
    cut_short(root / "train" / "emu" / "cut.jpg")
    data = build_data(config(root, loader=loader, workers=workers))
    with pytest.raises(UnreadableImage, match="cut.jpg cannot be decoded .* remove or replace it") as caught:
        collect(data.loader("train-eval", batch_size=2))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_files_that_do_not_decode_are_skipped_and_all_else_is_as_before(
    tmp_path: Path, loader: Any, workers: int, split: str
) -> None:
    root = make_folder(tmp_path / "images", train=26, val=26)
    options: dict[str, Any] = {"mean": [0.0] * 3, "std": [1 / 255] * 3}
    data = build_data(config(root, loader=loader, workers=workers, **options))
    whole_reader = data.loader(split, batch_size=4, seed=3)
    whole = []
    for epoch in range(2):
        whole_reader.set_epoch(epoch)
        whole.append(list(whole_reader))
    bad = []
    for number, path in enumerate(map(Path, data.split(split).paths)):  # type: ignore[union-attr]
        if number == 3:
            path.write_bytes(path.read_bytes()[:90])  # after build_data has seen it whole
        elif number == 4:
            path.unlink()
        elif number == 17:
            picture(7, 9, 0).save(path)  # smaller than the boxes that were to be cut out of it
        else:
            continue
        bad.append(number)
    reader = data.loader(split, batch_size=4, seed=3, skip_unreadable=True)
    assert reader.unreadable == {}
    for epoch in range(2):
        reader.set_epoch(epoch)
        got = list(reader)
        assert len(got) == len(whole[epoch]) == len(reader)
        met = set()
        for (images, labels, indices), (images0, labels0, indices0) in zip(got, whole[epoch], strict=True):
            assert torch.equal(indices, indices0)
            lost = torch.isin(indices, torch.tensor(bad))
            met |= set(indices[lost].tolist())
            assert torch.equal(labels, torch.where(lost, -100, labels0))
            assert torch.equal(images[~lost], images0[~lost])
            assert (images[lost] == 0).all()
        assert met == set(bad) & set(torch.cat([i for _, _, i in whole[epoch]]).tolist())
    paths = data.split(split).paths  # type: ignore[union-attr]
    assert set(reader.unreadable) <= {paths[i] for i in bad}
    assert len(reader.unreadable) >= 2
    for path, reason in reader.unreadable.items():
        assert reason.startswith(path)
    resumed = data.loader(split, batch_size=4, seed=3, skip_unreadable=True)
    resumed.set_epoch(1, start_step=2)
    for (images, labels, _), (images0, labels0, _) in zip(resumed, got[2:], strict=True):
        assert torch.equal(images, images0)
        assert torch.equal(labels, labels0)


@pytest.mark.parametrize("loader", LOADERS)
def test_too_many_files_that_do_not_decode_end_it(tmp_path: Path, loader: Any) -> None:
    root = make_folder(tmp_path / "my images", train=6)
    for i in range(3):
        cut_short(root / "train" / "cat" / f"cut{i}.jpg", i)

    def read(**options: Any) -> Any:
        reader = build_data(config(root, loader=loader, workers=1, **options)).loader(
            "train-eval", batch_size=2, skip_unreadable=True
        )
        collect(reader)
        return reader

    with pytest.raises(UnreadableImage, match="cut2.jpg cannot be decoded") as caught:
        read(max_unreadable=2)
    assert "it is file number 3 that does not decode, and data.max_unreadable is 2" in str(caught.value)
    assert f"python -m tal_fast.check_data '{root}' --out list.txt" in str(caught.value)
    assert "--data.file_list list.txt --resume auto" in str(caught.value)
    assert len(read(max_unreadable=3).unreadable) == 3
    assert len(read().unreadable) == 3  # 10 files are always let pass


@pytest.mark.parametrize("loader", LOADERS)
def test_a_resumed_run_meets_bad_files_as_the_whole_one(tmp_path: Path, loader: Any) -> None:
    """DALI reads a crop out of the whole part of a truncated file; what it did in earlier epochs must not matter."""
    root = make_folder(tmp_path / "images", train=6)
    for i in range(2):
        cut_short(root / "train" / "cat" / f"cut{i}.jpg", i)
    data = build_data(config(root, loader=loader, workers=1, crop_area=(0.05, 0.2)))
    whole = data.loader("train", batch_size=4, seed=2, skip_unreadable=True)
    lost = []
    for epoch in range(8):
        whole.set_epoch(epoch)
        batches = list(whole)
        lost.append(sum(int((labels == -100).sum()) for _, labels, _ in batches))
        resumed = data.loader("train", batch_size=4, seed=2, skip_unreadable=True)
        resumed.set_epoch(epoch, start_step=epoch % 2)
        for one, two in zip(batches[epoch % 2 :], resumed, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert sum(lost) > 0
    assert len(whole.unreadable) <= 2


@needs_dali
def test_what_dali_alone_cannot_decode_is_found(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", train=6)
    victim = root / "train" / "emu" / "bits.tif"
    picture(50, 60, 0).convert("1").save(victim)  # Pillow reads it
    reader = build_data(config(root, loader="dali")).loader("train-eval", batch_size=2, skip_unreadable=True)
    images, labels, _ = collect(reader)
    assert len(images) == 7
    assert (labels == -100).sum() == 1
    assert list(reader.unreadable) == [str(victim)]
    assert "cannot be decoded (by DALI: " in reader.unreadable[str(victim)]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("loader", [*LOADERS, "memory"])
def test_images_are_resized_as_by_pillow(tmp_path: Path, loader: Any, interpolation: str) -> None:
    from sklearn.datasets import load_sample_images

    photo = Image.fromarray(load_sample_images().images[1]).crop((0, 0, 400, 400))
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        photo.save(tmp_path / split / "a" / "0.png")
    options: dict[str, Any] = {"mean": [0.0] * 3, "std": [1 / 255] * 3, "image_size": 96, "crop_fraction": 1.0}
    data = build_data(config(tmp_path, loader="torch" if loader == "memory" else loader, **options))
    data.interpolation = interpolation
    split = MemoryImages(np.asarray(photo)[None], np.zeros(1, np.int64)) if loader == "memory" else "val"
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
    # The same crops, only smaller: averaged 2 x 2 the large ones are close to them.
    halved = torch.nn.functional.avg_pool2d(full[0][0], 2)
    assert (small - halved).abs().mean() < 0.5 * halved.std()
    fresh = data.loader("train", batch_size=4, seed=1)
    fresh.set_epoch(2, start_step=1, image_size=18)
    for one, two in zip(fresh, epochs[2][1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    with pytest.raises(ValueError, match="image_size is 0 but must be at least 1"):
        reader.set_epoch(0, image_size=0)


def test_prefetch_works_a_step_ahead_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
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

    class Made:
        def __init__(self, number: int) -> None:
            done.append(f"make {number}")
            self.number = number

        def record_stream(self, stream: Any) -> None:
            assert stream is current
            done.append(f"record {self.number}")

    current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    for made in prefetch([1, 2, 3], Made, lambda made: [made], torch.device("cuda")):  # type: ignore[list-item, return-value]
        done.append(f"use {made.number}")
    steps = [d for d in done if d not in ("enter", "leave")]
    assert steps == [
        *("make 1", "make 2", "wait for ready 1", "record 1", "use 1"),
        *("make 3", "wait for ready 2", "record 2", "use 2"),
        *("wait for ready 3", "record 3", "use 3"),
    ]
    assert done[:6] == ["enter", "make 1", "leave", "enter", "make 2", "leave"]
    assert list(prefetch([1, 2], str, lambda made: [], torch.device("cpu"))) == ["1", "2"]


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


def test_out_of_distribution_folders_are_flat_and_unlabelled(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "id")
    other = tmp_path / "other"
    (other / "deep" / "deeper").mkdir(parents=True)
    picture(30, 30, 1).save(other / "a.png")
    picture(30, 30, 2).save(other / "deep" / "deeper" / "b.jpg")
    data = build_data(config(root, loader="torch", ood={"things": str(other)}))
    assert data.ood_names == ("things",)
    images, labels, indices = collect(data.loader("things", batch_size=8))
    assert images.shape == (2, 3, 24, 24)
    assert labels.tolist() == [-1, -1]
    assert indices.tolist() == [0, 1]
    with pytest.raises(ValueError, match="no split 'thing'; there are train, train-eval, val, things"):
        data.loader("thing", batch_size=8)


def test_train_limit_keeps_a_fixed_choice(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    kept = [build_data(config(root, loader="torch", train_limit=5)).split("train") for _ in range(2)]
    assert len(kept[0]) == 5
    assert kept[0].paths == kept[1].paths  # type: ignore[union-attr]
    assert len(build_data(config(root, loader="torch", train_limit=500)).split("train")) == 13


def test_a_holdout_is_validated_on_and_not_trained_on(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    whole = build_data(config(root, loader="torch"))
    data = build_data(config(root, loader="torch", holdout=4, train_limit=6))
    train, val, everything = (
        set(part.paths) for part in (data.split("train"), data.split("val"), whole.split("train"))
    )  # type: ignore[union-attr]
    assert (len(train), len(val), len(everything)) == (6, 4, 13)
    assert train | val <= everything
    assert not train & val
    assert data.split("train-eval") is data.split("train")
    again = build_data(config(root, loader="torch", holdout=4))
    assert set(again.split("val").paths) == val  # type: ignore[union-attr]
    assert len(again.split("train")) == 9
    with pytest.raises(ValueError, match="data.holdout is 13 but there are 13 training images; leave some to train on"):
        build_data(config(root, loader="torch", holdout=13))


def test_auto_falls_back_to_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path)
    monkeypatch.setattr(dali_loader, "available", lambda: False)
    assert build_data(config(root)).loader_name == "torch"
    with pytest.raises(ValueError, match="DALI cannot be imported; install nvidia-dali"):
        build_data(config(root, loader="dali"))


# ---- What is refused ------------------------------------------------------------------------------------------


def _refused(root: Path, what: str) -> str:
    make_folder(root)
    if what == "no root":
        return "data.root is not set; name the folder"
    if what == "gone root":
        root.rename(root.with_name("elsewhere"))
        return "is not a folder; name one that holds train/ and val/"
    if what == "no val":
        (root / "val").rename(root / "validation")
        return "has no folder val/; it must hold train/ and val/"
    if what == "no train":
        (root / "train").rename(root / "training")
        return "has no folder train/"
    if what == "no classes":
        (root / "val").rename(root / "old")
        (root / "val").mkdir()
        return "val is empty of class folders"
    if what == "new class":
        (root / "val" / "emu").rename(root / "val" / "yak")
        return "val/yak has no counterpart among the training classes \\(cat, dog, emu\\)"
    if what == "empty class":
        (root / "train" / "fox").mkdir()
        return "train/fox holds no images .*fill or remove it"
    if what == "not an image":
        (root / "val" / "cat" / "notes.jpg").write_text("not an image")
        return "notes.jpg cannot be read as an image \\(no image format fits it\\)"
    (root / "val" / "cat" / "zero.png").touch()
    return "zero.png cannot be read as an image \\(it is empty\\)"


@pytest.mark.parametrize(
    "what",
    [
        *("no root", "gone root", "no val", "no train", "no classes", "new class", "empty class", "not an image"),
        "empty file",
    ],
)
def test_bad_folders_are_refused(tmp_path: Path, what: str) -> None:
    sentence = _refused(tmp_path / "images", what)
    with pytest.raises(ValueError, match=sentence):
        build_data(config(None if what == "no root" else tmp_path / "images", loader="torch"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mean": [0.5] * 3}, "go together"),
        ({"mean": [0.5], "std": [0.5]}, "data.mean has 1 values but data.channels is 3"),
        ({"mean": [0.5] * 3, "std": [0.5, 0.0, 0.5]}, "must be above 0"),
        ({"crop_fraction": 1.5}, "crop_fraction is 1.5 but must be in"),
        ({"crop_area": (0.0, 1.0)}, "smallest <= largest <= 1"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"image_size": 0}, "image_size is 0 but must be at least 1"),
        ({"shift": 2}, "data.shift is for in-memory data sets"),
        ({"ood": {"x": "/nowhere"}}, "data.ood 'x': /nowhere is not a folder"),
        ({"dataset": "synthetic"}, "data.crop_area is for image files, synthetic is in memory"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build_data(config(make_folder(tmp_path), loader="torch", **options))


def test_sizes_are_read_once_and_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "images")
    first = build_data(config(root, loader="torch"))
    read: list[str] = []
    original = files.image_size
    monkeypatch.setattr(files, "image_size", lambda path: read.append(path) or original(path))
    second = build_data(config(root, loader="torch"))
    assert read == []
    assert np.array_equal(first.split("train").sizes, second.split("train").sizes)
    victim = Path(first.split("val").paths[0])  # type: ignore[union-attr]
    picture(33, 44, 9).save(victim)
    os.utime(victim, ns=(1, 1))
    third = build_data(config(root, loader="torch"))
    assert third.split("val").sizes[0].tolist() == [33, 44]
    assert str(victim) in read


# ---- Embedded sets --------------------------------------------------------------------------------------------


def test_digits_are_files_split_by_class() -> None:
    data = build_data(DataConfig(dataset="digits", loader="torch", workers=0, image_size=16, channels=1))
    assert data.class_names == tuple("0123456789")
    assert data.ood_names == ("photos",)
    train, val, photos = (data.split(s) for s in ("train", "val", "photos"))
    assert (len(train), len(val), len(photos)) == (901, 896, 520)
    counts = np.bincount(train.labels) - np.bincount(val.labels)
    assert set(counts.tolist()) <= {0, 1}
    from sklearn.datasets import load_digits

    digits = load_digits()
    for images in (train, val):
        for index in (0, 100, 500):
            path = Path(images.paths[index])  # type: ignore[union-attr]
            want = digits.images[int(path.stem)] * (255 / 16)
            assert np.abs(np.asarray(Image.open(path)) - want).max() <= 0.5
            assert digits.target[int(path.stem)] == images.labels[index]
    images, labels, _ = collect(data.loader("photos", batch_size=520))
    assert images.shape == (520, 1, 16, 16)
    assert set(labels.tolist()) == {-1}
    assert images.std((1, 2, 3)).median() > 0.05  # patches of photos, not blanks


def _make(cache: str, results: Any) -> None:
    os.environ["TAL_FAST_CACHE"] = cache
    folder = embedded.digits_folder()
    results.put(sum(len(names) for _, _, names in os.walk(folder)))


def test_two_processes_make_the_digits_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_make, args=(str(tmp_path), results)) for _ in range(2)]
    for process in processes:
        process.start()
    counts = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert counts == [1797 + 520] * 2
    assert os.listdir(tmp_path) == ["digits-1"]  # nothing half-made is left


def test_a_folder_whose_making_fails_is_not_there(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("made")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_folder_once(tmp_path / "cache" / "set", fail)
    assert list((tmp_path / "cache").iterdir()) == []


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_fashion(folder: Path, train: int = 30, test: int = 20) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        pixels = random.integers(256, size=(count, 28, 28), dtype=np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))


def test_fashion_mnist_in_memory(tmp_path: Path) -> None:
    write_fashion(tmp_path / "fashion")
    write_fashion(tmp_path / "mnist", test=15)
    options: dict[str, Any] = {"dataset": "fashion-mnist", "crop_area": None, "channels": 1, "flip": False}
    data = build_data(DataConfig(root=str(tmp_path / "fashion"), ood={"mnist": str(tmp_path / "mnist")}, **options))
    assert data.loader_name == "memory"
    assert (data.num_classes, data.class_names[9], data.ood_names) == (10, "ankle-boot", ("mnist",))
    images, labels, indices = collect(data.loader("val", batch_size=7))
    assert images.shape == (20, 1, 28, 28)
    assert labels.tolist() == [i % 10 for i in range(20)]
    assert indices.tolist() == list(range(20))
    pixels = embedded.read_idx(tmp_path / "fashion" / "t10k-images-idx3-ubyte.gz", 3)
    mean, std = data.config.normalization()
    torch.testing.assert_close(images[:, 0], (torch.from_numpy(pixels) / 255 - mean[0]) / std[0])
    assert collect(data.loader("mnist", batch_size=7))[1].tolist() == [-1] * 15
    with pytest.raises(ValueError, match="'svhn' is not an out-of-distribution set of fashion-mnist"):
        build_data(DataConfig(root=str(tmp_path / "fashion"), ood={"svhn": "x"}, **options))


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


@pytest.mark.skipif(not Path(embedded.FASHION_MNIST_ROOT).is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist() -> None:
    splits = embedded.fashion_mnist(None)
    assert [splits[s][0].shape for s in ("train", "val")] == [(60000, 28, 28), (10000, 28, 28)]
    assert np.bincount(splits["val"][1]).tolist() == [1000] * 10
    assert splits["train"][0].mean() / 255 == pytest.approx(0.2860, abs=1e-3)  # as widely published


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.gz", b"not gzip", "cannot be unpacked"),
        (
            "a.gz",
            gzip.compress(idx(np.zeros((2, 3, 3), np.uint8)), mtime=0)[:-9],
            "cannot be unpacked",
        ),  # an id for both workers
        ("a", b"", "is not an IDX file of uint8 values in 3 dimensions"),
        ("a", bytes((0, 0, 8, 3)), "is not an IDX file"),
        ("a", idx(np.zeros(5, np.uint8)), "is not an IDX file"),
        ("a", idx(np.zeros((2, 3, 3), np.uint8))[:-1], "holds 17 values but its header says 2 x 3 x 3"),
        ("a", idx(np.zeros((2, 3, 3), np.uint8)) + b"x", "holds 19 values"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        embedded.read_idx(tmp_path / name, 3)


def test_missing_idx_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="apt-get install dataset-fashion-mnist"):
        embedded.fashion_mnist(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="has neither train-images-idx3-ubyte.gz nor"):
        embedded.fashion_mnist(str(tmp_path))
    write_fashion(tmp_path / "f")
    (tmp_path / "f" / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8)))
    with pytest.raises(ValueError, match="20 t10k images but 3 labels"):
        embedded.fashion_mnist(str(tmp_path / "f"))


def write_cifar(folder: Path, dataset: str, records: int = 7) -> np.ndarray:
    """The binary files, small; returns all records of training and then of testing, (N, labels + 3072)."""
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


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("channels", [3, 1])
def test_cifar_from_its_binary_files(tmp_path: Path, dataset: Any, channels: Any) -> None:
    folder = tmp_path / {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[dataset]
    records = write_cifar(folder, dataset)
    for root in (tmp_path, folder):
        data = build_data(
            DataConfig(
                dataset=dataset, root=str(root), channels=channels, crop_area=None, shift=4, ood={"own": str(root)}
            )
        )
        assert data.loader_name == "memory"
        assert data.class_names[3] == "name3"
        assert (len(data.split("train")), len(data.split("val"))) == (len(records) - 7, 7)
        images, labels, _ = collect(data.loader("val", batch_size=4))
        skip = records.shape[1] - 3072
        assert labels.tolist() == records[-7:, skip - 1].tolist()  # the class, not the superclass before it
        rgb = torch.from_numpy(records[-7:, skip:].reshape(7, 3, 32, 32)).float()
        if channels == 1:
            rgb = (rgb * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True).round()
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in data.config.normalization())
        torch.testing.assert_close(images, (rgb / 255 - mean) / std, atol=0.02, rtol=0)
        assert data.loader("train", batch_size=5).num_samples == len(records) - 7
        ood, ood_labels, _ = collect(data.loader("own", batch_size=7))
        assert torch.equal(ood, images)
        assert set(ood_labels.tolist()) == {-1}
    assert DataConfig(dataset="cifar100").normalization()[0] == [0.5071, 0.4865, 0.4409]


def test_cifar_beside_a_folder_of_images(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar", "cifar10")
    (tmp_path / "other").mkdir()
    picture(50, 40, 1).save(tmp_path / "other" / "a.png")
    ood = {"things": str(tmp_path / "other")}
    data = build_data(DataConfig(dataset="cifar10", root=str(tmp_path / "cifar"), crop_area=None, ood=ood, workers=0))
    images, labels, _ = collect(data.loader("things", batch_size=2))
    assert images.shape == (1, 3, 32, 32)
    assert labels.tolist() == [-1]


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("no root", "data.root is not set; name the folder of test.bin, as cifar-100-binary.tar.gz unpacks"),
        ("empty", "has no test.bin; name the folder"),
        ("pickles", "version for Python, pickles, .* get the binary version, cifar-100-binary.tar.gz"),
        ("cut", "train.bin has 21,5.. bytes, which is not a whole number of records of 3,074"),
        ("no train", "has no train.bin; unpack cifar-100-binary.tar.gz anew"),
        ("label", "train.bin has a label 100 but there are 100 classes"),
        ("no names", "has no fine_label_names.txt"),
        ("few names", "has 2 names but must have 100"),
        ("crop", "data.crop_area is for image files, cifar100 is in memory"),
    ],
)
def test_bad_cifar_files_are_refused(tmp_path: Path, what: str, sentence: str) -> None:
    folder = tmp_path / "c"
    if what in ("empty", "pickles"):
        folder.mkdir()
    else:
        write_cifar(folder, "cifar100")
    train = folder / "train.bin"
    if what == "pickles":
        (folder / "meta").write_bytes(b"\x80")
    elif what == "cut":
        train.write_bytes(train.read_bytes()[:-10])
    elif what == "no train":
        train.unlink()
    elif what == "label":
        train.write_bytes(b"\0\x64" + train.read_bytes()[2:])
    elif what == "no names":
        (folder / "fine_label_names.txt").unlink()
    elif what == "few names":
        (folder / "fine_label_names.txt").write_text("a\nb\n")
    root = None if what == "no root" else str(folder)
    crop_area = (0.5, 1.0) if what == "crop" else None
    with pytest.raises(ValueError, match=sentence):
        build_data(DataConfig(dataset="cifar100", root=root, crop_area=crop_area))


def test_large_synthetic_images_take_turns() -> None:
    options: dict[str, Any] = {"dataset": "synthetic", "crop_area": None, "image_size": 224, "flip": False}
    data = build_data(DataConfig(synthetic_images=5000, synthetic_classes=1000, **options))
    assert (data.num_classes, len(data.split("train")), len(data.split("val"))) == (1000, 5000, 2500)
    assert data.split("train").pixels.nbytes <= 32 * 2**20  # type: ignore[union-attr]
    reader = data.loader("train-eval", batch_size=4)
    images = next(iter(reader))[0]
    assert images.shape == (4, 3, 224, 224)
    period = len(data.split("train").pixels)  # type: ignore[union-attr]
    assert np.array_equal(data.split("train").labels[:100], data.split("train").labels[period : period + 100])
    reader.set_epoch(0, start_step=period // 4)
    again = next(iter(reader))
    offset = 4 * (period // 4) - period  # the pool is no multiple of the batch
    assert torch.equal(again[0][-offset:], images[: 4 + offset])
    limited = build_data(DataConfig(synthetic_images=5000, train_limit=300, **options)).split("train")
    assert len(limited) == 300
    assert limited.pixels.nbytes <= 32 * 2**20  # type: ignore[union-attr]


def test_synthetic_is_repeatable_and_resizable() -> None:
    options: dict[str, Any] = {"dataset": "synthetic", "crop_area": None}
    first, second = (build_data(DataConfig(**options)) for _ in range(2))
    a, labels, _ = collect(first.loader("val", batch_size=500))
    b, _, _ = collect(second.loader("val", batch_size=500))
    assert torch.equal(a, b)
    assert a.shape == (1000, 3, 32, 32)
    assert set(labels.tolist()) == set(range(10))
    assert next(iter(build_data(DataConfig(image_size=8, **options)).loader("noise", batch_size=2)))[0].shape[2:] == (
        8,
        8,
    )


def test_workers_are_forked_beside_dead_dali_pipelines(tmp_path: Path) -> None:
    """A pipeline in a reference cycle is garbage that only the collector finds; found in a forked worker it hangs."""
    pytest.importorskip("nvidia.dali")
    make = """
import gc, os, sys
from pathlib import Path
from tal_fast.config.schema import DataConfig
from tal_fast.data import build_data

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


# ---- ImageNet as it unpacks -----------------------------------------------------------------------------------------


def imagenet_as_unpacked(root: Path) -> dict[int, str]:
    """train/WNID/..., val/ILSVRC2012_val_XXXXXXXX.JPEG; returns number of each validation image -> class."""
    names = ["n01440764", "n01443537", "n01484850"]
    rng = np.random.default_rng(0)
    for name in names:
        (root / "train" / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(
            root / "train" / name / f"{name}_1.JPEG"
        )
    (root / "val").mkdir()
    of = {i: names[i % 3] for i in range(1, 8)}
    for i in of:
        image = Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8))
        image.save(root / "val" / f"ILSVRC2012_val_{i:08d}.JPEG")
    return of


def write_kit(folder: Path, of: dict[int, str]) -> None:
    from scipy.io import savemat

    folder.mkdir(parents=True)
    numbers = {"n01484850": 1, "n01440764": 2, "n01443537": 3}  # not in the order of the names
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    synsets = np.zeros((len(numbers), 1), dtype=fields)
    for row, (name, number) in enumerate(numbers.items()):
        synsets[row, 0] = (float(number), name, "a fish")
    savemat(folder / "meta.mat", {"synsets": synsets})
    lines = [str(numbers[of[i]]) for i in sorted(of)]
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("source", ["kit", "kaggle"])
def test_imagenets_validation_images_need_no_class_folders(tmp_path: Path, source: str) -> None:
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    of = imagenet_as_unpacked(root)
    with pytest.raises(ValueError, match=r"images without class folders; put ImageNet's ILSVRC2012_devkit"):
        build_data(DataConfig(root=str(root)))
    if source == "kit":
        write_kit(root / "ILSVRC2012_devkit_t12" / "data", of)
    else:
        lines = [f"ILSVRC2012_val_{i:08d},{name} 85 1 499 272 {name} 1 2 3 4" for i, name in of.items()]
        (tmp_path / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]) + "\n")
    data = build_data(DataConfig(root=str(root), image_size=16, loader="torch", workers=0))
    split = data.split("val")
    assert isinstance(split, files.ImageFiles)
    got = {int(Path(p).stem[-8:]): data.class_names[label] for p, label in zip(split.paths, split.labels, strict=True)}
    assert got == of
    Image.new("RGB", (9, 9)).save(root / "val" / "mine.jpg")
    with pytest.raises(ValueError, match=r"mine.jpg is none of ImageNet's validation images"):
        build_data(DataConfig(root=str(root)))


def test_a_development_kit_that_is_none_is_said(tmp_path: Path) -> None:
    of = imagenet_as_unpacked(tmp_path)
    write_kit(tmp_path / "data", of)
    (tmp_path / "data" / "meta.mat").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="are not those of ImageNet's development kit"):
        build_data(DataConfig(root=str(tmp_path)))
    (tmp_path / "data" / "meta.mat").unlink()
    with pytest.raises(ValueError, match=r"meta.mat, which names them, is not beside it"):
        build_data(DataConfig(root=str(tmp_path)))
    (tmp_path / "LOC_val_solution.csv").write_text("something,else\n")
    with pytest.raises(ValueError, match=r"has no columns ImageId,PredictionString"):
        build_data(DataConfig(root=str(tmp_path)))
