"""Folders of class folders split into training and validation images, HEIC files, and EXIF rotation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tal_fast.config.schema import DataConfig
from tal_fast.data import dali
from tal_fast.data.build import build_data
from tal_fast.data.image_folder import ImageFiles
from tal_fast.data.preprocessing import Preprocessing
from tests.helpers.images import picture


def class_folders(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(20, 30, i).save(root / name / f"{i}.png")
    return root


def options(root: Path, **values: object) -> DataConfig:
    return DataConfig(root=str(root), image_size=16, workers=0, **{"loader": "torch", **values})  # type: ignore[arg-type]


def test_each_class_gives_its_share_to_validation(tmp_path: Path) -> None:
    root = class_folders(tmp_path, {"a": 10, "b": 21, "c": 2, "d": 1})
    made = options(root, split=0.3)
    data = build_data(made)
    train, val = data.split("train"), data.split("val")
    assert isinstance(train, ImageFiles)
    assert isinstance(val, ImageFiles)
    assert np.bincount(val.labels, minlength=4).tolist() == [3, 6, 1, 0]
    assert np.bincount(train.labels, minlength=4).tolist() == [7, 15, 1, 1]
    assert not set(train.paths) & set(val.paths)
    again = build_data(DataConfig(**vars(made))).split("val")
    assert isinstance(again, ImageFiles)
    assert again.paths == val.paths
    other = build_data(options(root, split=0.3, split_seed=1)).split("val")
    assert isinstance(other, ImageFiles)
    assert other.paths != val.paths


@pytest.mark.parametrize(
    ("counts", "values", "message"),
    [
        ({"train": 2, "val": 2, "x": 1}, {"split": 0.2}, "holds train and val and x, which data.split would take for"),
        ({"train": 2}, {"split": 0.2}, "holds train, which data.split would take for classes"),
        ({"a": 1, "b": 1}, {"split": 0.2}, "no class of .* has two images"),
        ({"a": 2}, {"split": 1.0}, r"data.split is 1.0 but must be in \(0, 1\), such as 0.2"),
        ({"a": 2}, {}, "has no folder train/; .* class folders alone are split by --data.split 0.2"),
        ({"a": 2}, {"split": 0.2, "dataset": "digits"}, "data.split is for data.dataset folder, not digits"),
    ],
)
def test_what_cannot_be_split_is_refused(
    tmp_path: Path, counts: dict[str, int], values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_data(options(class_folders(tmp_path, counts), **values))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(tmp_path: Path, orientation: int) -> None:
    root = class_folders(tmp_path, {"a": 2})
    shown = picture(24, 40, orientation)
    # The stored pixels of each orientation, by the inverse of the operation that shows them.
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = shown.transpose(inverse[orientation]) if orientation > 1 else shown
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(root / "a" / "0.png", exif=exif)
    shown.save(root / "a" / "1.png")
    data = build_data(options(root, split=0.5, exif_rotation=True, crop_fraction=1.0))
    images = torch.cat([next(iter(data.loader(name, batch_size=1)))[0] for name in ("train-eval", "val")])
    assert torch.equal(images[0], images[1])
    single = Preprocessing.of(data.config, 16)
    pixels = torch.from_numpy(np.stack([single.read(str(root / "a" / f"{i}.png")) for i in (0, 1)]))
    assert torch.equal(single.normalizer()(pixels), images)
    plain = build_data(options(root, split=0.5, crop_fraction=1.0))
    images = torch.cat([next(iter(plain.loader(name, batch_size=1)))[0] for name in ("train-eval", "val")])
    assert torch.equal(images[0], images[1]) == (orientation == 1)


def test_heic_files_are_read_by_the_torch_loader(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    root = class_folders(tmp_path, {"a": 3, "b": 3})
    shown = picture(64, 64, 1)
    shown.save(root / "a" / "0.HEIC", format="HEIF", quality=95)
    shown.save(root / "b" / "0.png")
    (root / "a" / "0.png").unlink()
    data = build_data(options(root, split=0.4, loader="auto", crop_fraction=1.0))
    assert data.loader_name == "torch"
    found = {}
    for name in ("train-eval", "val"):
        split = data.split(name)
        assert isinstance(split, ImageFiles)
        for images, _, indices in data.loader(name, batch_size=1):
            found[split.paths[int(indices)]] = images
    one, other = (found[str(root / path)] for path in ("a/0.HEIC", "b/0.png"))
    assert float((one - other).abs().mean()) < 0.1  # HEIC is lossy
    if dali.available():
        with pytest.raises(ValueError, match="data.loader is 'dali', which reads neither HEIC files"):
            build_data(options(root, split=0.4, loader="dali"))


def test_dali_does_not_turn_images(tmp_path: Path) -> None:
    if not dali.available():
        pytest.skip("DALI is not installed")
    with pytest.raises(ValueError, match=r"data\.exif_rotation work in the torch loader alone; set data\.loader"):
        build_data(options(class_folders(tmp_path, {"a": 4}), split=0.5, loader="dali", exif_rotation=True))
