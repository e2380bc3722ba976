"""CIFAR from its binary files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tal_fast.config.schema import DataConfig
from tal_fast.data.build import build_data
from tests.helpers.images import collect, picture, write_cifar


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


def test_cifar_with_a_folder_of_ood_images(tmp_path: Path) -> None:
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
        ("no train", "has no train.bin; unpack cifar-100-binary.tar.gz again"),
        ("label", "train.bin has a label 100 but there are 100 classes"),
        ("no names", "has no fine_label_names.txt"),
        ("few names", "has 2 names but must have 100"),
        ("crop", "data.crop_area is for image files, cifar100 is in memory"),
    ],
)
def test_bad_cifar_files_are_rejected(tmp_path: Path, what: str, sentence: str) -> None:
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
