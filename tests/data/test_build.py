"""Data sets from their configuration, and the configurations that are rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tal_fast.config.schema import DataConfig
from tal_fast.data import build, builtin, dali
from tal_fast.data.build import build_data
from tests.helpers.images import collect, config, make_folder, picture, write_fashion


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


def test_unseen_classes_are_an_ood_set(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    whole = build_data(config(root, loader="torch"))
    data = build_data(config(root, loader="torch", unseen_classes=["dog"]))
    assert data.class_names == ("cat", "emu")
    for name in ("train", "val"):
        images, labels, _ = collect(data.loader(name, batch_size=16, training=False))
        paths = data.split(name).paths  # type: ignore[union-attr]
        assert [("cat", "emu").index(Path(path).parent.name) for path in paths] == labels.tolist()
        others = [path for path in whole.split(name).paths if "/dog/" not in path]  # type: ignore[union-attr]
        assert list(paths) == others
        assert len(images) == len(others)
    _, labels, _ = collect(data.loader("unseen", batch_size=16))
    assert labels.tolist() == [-1, -1]  # images 1 and 4 of 7
    # Held-out training images take the validation images' part.
    held = build_data(config(root, loader="torch", unseen_classes=["dog"], holdout=6))
    parts = [set(held.split(name).paths) for name in ("train", "val", "unseen")]  # type: ignore[union-attr]
    assert set.union(*parts[1:]) <= set(whole.split("train").paths)  # type: ignore[union-attr]
    assert len(parts[1]) + len(parts[2]) == 6
    assert all("/dog/" in path for path in parts[2])
    assert not any("/dog/" in path for path in parts[0] | parts[1])


def test_unseen_classes_of_images_in_memory() -> None:
    options: dict[str, Any] = {"dataset": "synthetic", "crop_area": None, "synthetic_classes": 5}
    data = build_data(DataConfig(unseen_classes=["bars-0", "bars-3"], **options))
    assert data.class_names == ("bars-1", "bars-2", "bars-4")
    assert data.ood_names == ("noise", "unseen")
    whole = build_data(DataConfig(**options))
    labels = whole.split("val").labels
    assert len(data.split("unseen")) == np.isin(labels, (0, 3)).sum()
    assert data.split("val").labels.tolist() == [(1, 2, 4).index(x) for x in labels if x not in (0, 3)]
    for name, hint in (("bar-3", "did you mean bars-3"), ("trouser", "there are .*bars-0")):
        with pytest.raises(ValueError, match=f"names '{name}', which is no class; {hint}"):
            build_data(DataConfig(unseen_classes=["bars-0", name], **options))
    with pytest.raises(ValueError, match="leaves 1 of 5 classes; leave at least 2"):
        build_data(DataConfig(unseen_classes=[f"bars-{c}" for c in range(4)], **options))


def test_auto_falls_back_to_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path)
    monkeypatch.setattr(dali, "available", lambda: False)
    assert build_data(config(root)).loader_name == "torch"
    with pytest.raises(ValueError, match="DALI cannot be imported; install nvidia-dali"):
        build_data(config(root, loader="dali"))


def damage(root: Path, what: str) -> str:
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
        return "val has no class folders"
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
def test_bad_folders_are_rejected(tmp_path: Path, what: str) -> None:
    sentence = damage(tmp_path / "images", what)
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
def test_bad_options_are_rejected(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build_data(config(make_folder(tmp_path), loader="torch", **options))


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
    pixels = builtin.read_idx(tmp_path / "fashion" / "t10k-images-idx3-ubyte.gz", 3)
    mean, std = data.config.normalization()
    torch.testing.assert_close(images[:, 0], (torch.from_numpy(pixels) / 255 - mean[0]) / std[0])
    assert collect(data.loader("mnist", batch_size=7))[1].tolist() == [-1] * 15
    with pytest.raises(ValueError, match="'svhn' is not an out-of-distribution set of fashion-mnist"):
        build_data(DataConfig(root=str(tmp_path / "fashion"), ood={"svhn": "x"}, **options))


def test_large_synthetic_images_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SYNTHETIC_POOL_BYTES", 2**20)  # 85 images
    options: dict[str, Any] = {"dataset": "synthetic", "crop_area": None, "image_size": 64, "flip": False}
    data = build_data(DataConfig(synthetic_images=500, synthetic_classes=100, **options))
    assert (data.num_classes, len(data.split("train")), len(data.split("val"))) == (100, 500, 250)
    assert data.split("train").pixels.nbytes <= 2**20  # type: ignore[union-attr]
    reader = data.loader("train-eval", batch_size=4)
    images = next(iter(reader))[0]
    assert images.shape == (4, 3, 64, 64)
    period = len(data.split("train").pixels)  # type: ignore[union-attr]
    assert np.array_equal(data.split("train").labels[:100], data.split("train").labels[period : period + 100])
    reader.set_epoch(0, start_step=period // 4)
    again = next(iter(reader))
    offset = 4 * (period // 4) - period  # the period is no multiple of the batch
    assert torch.equal(again[0][-offset:], images[: 4 + offset])
    limited = build_data(DataConfig(synthetic_images=500, train_limit=100, **options)).split("train")
    assert len(limited) == 100
    assert limited.pixels.nbytes <= 2**20  # type: ignore[union-attr]


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
