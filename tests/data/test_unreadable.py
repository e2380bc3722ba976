"""Files that do not decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tal_fast.data.build import build_data
from tal_fast.data.headers import UnreadableImage
from tests.helpers.images import LOADERS, collect, config, cut_short, make_folder, picture


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
def test_files_that_do_not_decode_are_skipped_and_the_others_are_unchanged(
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
def test_too_many_files_that_do_not_decode_end_the_iteration(tmp_path: Path, loader: Any) -> None:
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
def test_a_resumed_run_skips_the_same_files(tmp_path: Path, loader: Any) -> None:
    """DALI can read a crop in the intact part of a truncated file, whatever happened in earlier epochs."""
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
