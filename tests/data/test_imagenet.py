"""ImageNet's validation images without class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tal_fast.config.schema import DataConfig
from tal_fast.data import image_folder
from tal_fast.data.build import build_data


def unpack_imagenet(root: Path) -> dict[int, str]:
    """Make ImageNet's folders as its archives unpack; returns number of each validation image -> class."""
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
    of = unpack_imagenet(root)
    with pytest.raises(ValueError, match=r"images without class folders; put ImageNet's ILSVRC2012_devkit"):
        build_data(DataConfig(root=str(root)))
    if source == "kit":
        write_kit(root / "ILSVRC2012_devkit_t12" / "data", of)
    else:
        lines = [f"ILSVRC2012_val_{i:08d},{name} 85 1 499 272 {name} 1 2 3 4" for i, name in of.items()]
        (tmp_path / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]) + "\n")
    data = build_data(DataConfig(root=str(root), image_size=16, loader="torch", workers=0))
    split = data.split("val")
    assert isinstance(split, image_folder.ImageFiles)
    got = {int(Path(p).stem[-8:]): data.class_names[label] for p, label in zip(split.paths, split.labels, strict=True)}
    assert got == of
    Image.new("RGB", (9, 9)).save(root / "val" / "mine.jpg")
    with pytest.raises(ValueError, match=r"mine.jpg is none of ImageNet's validation images"):
        build_data(DataConfig(root=str(root)))


def test_damaged_files_of_classes_are_rejected(tmp_path: Path) -> None:
    of = unpack_imagenet(tmp_path)
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
