"""Operations on pixels: RandAugment, TrivialAugment, colour jitter, random erasing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data.auto_augment as timm_augment
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from tal_fast.config.schema import DataConfig
from tal_fast.data import augment, dali
from tal_fast.data.augment import RANDAUGMENT, TRIVIALAUGMENT, PixelAugmentation, apply
from tal_fast.data.build import build_data
from tests.helpers.images import LOADERS, collect, config, make_folder, needs_dali, picture, write_fashion

FILL = [1, 2, 3]
TITLES = {"saturation": "Color", "autocontrast": "AutoContrast", "solarize_add": "SolarizeAdd"}
TITLES |= {f"{kind.lower()}_{axis.lower()}": kind + axis for kind in ("Shear", "Translate") for axis in "XY"}


def value(policy: Any, name: str, strength: float, sign: int, side: int) -> float:
    return policy[name](strength, side) * (sign if name in augment._SIGNED else 1)


def error(one: Image.Image, other: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(one).astype(int) - np.asarray(other))


@pytest.mark.parametrize("name", TRIVIALAUGMENT)
def test_trivialaugment_is_torchvisions(name: str) -> None:
    image = picture(33, 33, 1)
    theirs = v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR, fill=FILL)
    title = TITLES.get(name, name.capitalize())
    magnitudes, signed = theirs._AUGMENTATION_SPACE[title]
    for step in (0, 7, 12, 23, 30):
        for sign in (1, -1):
            size = 0.0 if magnitudes(31, 33, 33) is None else float(magnitudes(31, 33, 33)[step])
            expected = theirs._apply_image_or_video_transform(
                image, title, sign * size if signed else size, interpolation=theirs.interpolation, fill=theirs._fill
            )
            ours = apply(name, image, value(TRIVIALAUGMENT, name, step / 30, sign, 33), FILL)
            assert error(ours, expected).max() <= 1  # their magnitudes are float32: a factor may round another way
    assert {TITLES.get(n, n.capitalize()) for n in TRIVIALAUGMENT} == set(theirs._AUGMENTATION_SPACE)


@pytest.mark.parametrize("name", RANDAUGMENT)
def test_randaugment_is_timms(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    image, endings = picture(33, 33, 2), {"translate": "Rel", "color": "Increasing"}
    kind = "color" if name in (*augment._COLORS, "posterize", "solarize") else name.split("_")[0]
    title = TITLES.get(name, name.capitalize()) + endings.get(kind, "")
    assert title in timm_augment._RAND_INCREASING_TRANSFORMS
    assert len(RANDAUGMENT) == len(timm_augment._RAND_INCREASING_TRANSFORMS)
    for magnitude in (0.0, 3.0, 5.7, 9.0, 9.9):
        for sign in (1, -1):
            # Their translation goes the other way.
            side = -sign if name.startswith("translate") else sign
            monkeypatch.setattr(timm_augment, "_randomly_negate", lambda v, sign=side: sign * v)
            hparams = {"img_mean": tuple(FILL), "interpolation": Image.Resampling.BILINEAR, "translate_pct": 0.45}
            expected = timm_augment.AugmentOp(title, prob=1.0, magnitude=magnitude, hparams=hparams)(image)
            wrong = error(apply(name, image, value(RANDAUGMENT, name, magnitude / 10, sign, 33), FILL), expected)
            assert wrong.mean() < 0.01  # positions between two pixels may round another way
            assert wrong.max() <= 1
    assert np.asarray(apply("posterize", image, RANDAUGMENT["posterize"](1.0, 33), FILL)).any()


def test_operations_and_strengths_are_drawn_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, float]] = []
    monkeypatch.setattr(augment, "apply", lambda name, image, value, fill: calls.append((name, value)) or image)
    random, image = np.random.default_rng(3).random((6000, 8), dtype=np.float32), picture(20, 20, 0)
    rand = PixelAugmentation(DataConfig(augment="randaugment", augment_magnitude=8, augment_std=0.5))
    for row in random:
        rand(image, row)
    assert len(calls) == pytest.approx(6000, rel=0.03)  # two, each with probability 1/2
    counts = Counter(name for name, _ in calls)
    assert set(counts) == set(RANDAUGMENT)
    assert max(counts.values()) < 1.25 * min(counts.values())
    angles = np.array([value for name, value in calls if name == "rotate"])
    assert np.abs(angles).mean() == pytest.approx(24, abs=0.3)
    assert np.abs(angles).std() == pytest.approx(1.5, abs=0.2)
    assert (angles > 0).mean() == pytest.approx(0.5, abs=0.08)
    calls.clear()
    trivial = PixelAugmentation(DataConfig(augment="trivialaugment"))
    for row in random:
        trivial(image, row[:3])
    counts = Counter(name for name, _ in calls)
    assert len(calls) == 6000
    assert set(counts) == set(TRIVIALAUGMENT)
    angles = np.array([abs(value) for name, value in calls if name == "rotate"])
    assert len(np.unique(angles.round(6))) == 31
    assert angles.mean() == pytest.approx(67.5, abs=6)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_color_jitter_follows_its_numbers(mode: str) -> None:
    image = picture(20, 20, 4).convert(mode)
    mean = {"mean": [0.5], "std": [0.5]} if mode == "L" else {}
    jitter = PixelAugmentation(
        DataConfig(channels=1 if mode == "L" else 3, color_jitter=(0.4, 0.3, 0.0, 0.1), **mean)  # type: ignore[arg-type]
    )
    draws = np.array([0.75, 0.0, 0.9, 1.0, 0.5, 0.2, 0.3, 0.1], np.float32)  # order: hue, contrast, brightness
    expected = v2.functional.adjust_contrast(v2.functional.adjust_hue(image, 0.1), 0.7)
    assert error(jitter(image, draws), v2.functional.adjust_brightness(expected, 1.2)).max() == 0
    assert jitter.draws == 8


def test_augmented_images_do_not_depend_on_workers_or_the_step_read_from(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    options: dict[str, Any] = {"loader": "torch", "augment": "randaugment", "color_jitter": (0.4, 0.4, 0.4, 0.1)}
    readings = {}
    for workers in (0, 2):
        reader = build_data(config(root, **options, erase=0.5, workers=workers)).loader("train", batch_size=3, seed=6)
        reader.set_epoch(1)
        readings[workers] = list(reader)
        reader.set_epoch(1, start_step=2)
        for one, two in zip(reader, readings[workers][2:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        reader.close()
    for one, two in zip(readings[0], readings[2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    plain = build_data(config(root, loader="torch", workers=0)).loader("train", batch_size=3, seed=6)
    plain.set_epoch(1)
    images, _, indices = collect(plain)
    assert torch.equal(indices, torch.cat([step[2] for step in readings[0]]))  # the same order
    assert not torch.equal(images, torch.cat([step[0] for step in readings[0]]))
    plain_options = {"loader": "torch"}
    validation = (build_data(config(root, **extra)).loader("val", batch_size=3) for extra in (options, plain_options))
    assert torch.equal(*(collect(loader)[0] for loader in validation))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_memory_are_augmented(tmp_path: Path, channels: Any) -> None:
    write_fashion(tmp_path / "fashion")
    options: dict[str, Any] = {"dataset": "fashion-mnist", "crop_area": None, "channels": channels, "flip": False}
    options |= {"root": str(tmp_path / "fashion"), "mean": [0.0] * channels, "std": [1 / 255] * channels}
    data = build_data(DataConfig(**options, augment="trivialaugment"))
    images, _, indices = collect(data.loader("train", batch_size=10, seed=4))
    pixels = data.split("train").pixels  # type: ignore[union-attr]
    trivial, draws = PixelAugmentation(data.config), np.random.default_rng([4, 0, 2]).random((30, 3), dtype=np.float32)
    for image, index in zip(images, indices.tolist(), strict=True):
        original = Image.fromarray(pixels[index] if channels == 3 else pixels[index, ..., 0])
        expected = np.asarray(trivial(original, draws[index])).reshape(28, 28, channels)
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() < 1e-3


@pytest.mark.parametrize("loader", LOADERS)
def test_erasing_replaces_rectangles_by_noise_in_every_loader(tmp_path: Path, loader: Any) -> None:
    root = make_folder(tmp_path / "images", train=20)
    options: dict[str, Any] = {"loader": loader, "image_size": 32}
    erased, plain = (
        build_data(config(root, **options, erase=share)).loader("train", batch_size=10, seed=1) for share in (0.5, 0.0)
    )
    shares = []
    for epoch in range(4):
        for reader in (erased, plain):
            reader.set_epoch(epoch)
        for (images, _, _), (originals, _, _) in zip(erased, plain, strict=True):
            changed = (images != originals).any(1)
            for mask in changed:
                height, width = mask.any(1).sum(), mask.any(0).sum()
                assert mask.sum() == height * width  # a rectangle
                shares.append(float(mask.float().mean()))
            noise = images.permute(0, 2, 3, 1)[changed]
            assert noise.mean() == pytest.approx(0, abs=0.1)
            assert noise.std() == pytest.approx(1, abs=0.1)
    found = np.array(shares)[np.array(shares) > 0]
    assert len(found) / len(shares) == pytest.approx(0.5, abs=0.2)
    assert 0.01 < found.min() <= found.max() < 0.36  # 2 to 33%, rounded to pixels


@needs_dali
def test_augmented_folders_take_the_torch_loader(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    root = make_folder(tmp_path / "images")
    for options in ({"augment": "randaugment"}, {"color_jitter": (0.1, 0.1, 0.1, 0.1)}):
        assert build_data(config(root, **options)).loader_name == "torch"
        assert (
            "data.color_jitter and data.exif_rotation work in the torch loader only, which is used"
            in caplog.messages.pop()
        )
        with pytest.raises(
            ValueError, match="data.loader is 'dali' but data.augment, data.color_jitter and .* work in"
        ):
            build_data(config(root, loader="dali", **options))
    assert build_data(config(root, erase=0.3)).loader_name == ("dali" if dali.available() else "torch")
