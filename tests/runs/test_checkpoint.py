"""Checkpoint files: complete or absent, readable without running code, the last two kept."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from tal_fast.config.parse import load_config
from tal_fast.config.schema import Config
from tal_fast.runs import checkpoint
from tal_fast.runs.checkpoint import Damaged
from tal_fast.utils.rng import rng_state
from tests.helpers import checkpoints
from tests.helpers.disks import fail_replacing
from tests.helpers.fuzz import FUZZ, mutations, reads_or_refuses


def content(epoch: int = 1) -> dict[str, Any]:
    return checkpoints.content(epoch=epoch, model={"weight": torch.arange(5000.0)}, ranks=[{"rng": rng_state()}])


def test_a_saved_checkpoint_loads(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.pt"
    checkpoint.save(path, content())
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["model"]["weight"], torch.arange(5000.0))
    assert loaded["history"] == [{"epoch": 1, "train_loss": 0.5}]
    assert os.listdir(path.parent) == ["last.pt"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_cut_file_is_refused_and_the_previous_one_used(tmp_path: Path, share: float) -> None:
    last, previous = tmp_path / checkpoint.LAST, tmp_path / checkpoint.PREVIOUS
    for epoch in (1, 2, 3):
        checkpoint.save(last, content(epoch), previous=previous)
    assert checkpoint.load_newest(tmp_path)[0]["epoch"] == 3
    data = last.read_bytes()
    last.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(Damaged, match=r"last.pt cannot be read .* it is damaged or not one"):
        checkpoint.load(last)
    loaded, path, problems = checkpoint.load_newest(tmp_path)
    assert (loaded["epoch"], path) == (2, previous)
    assert len(problems) == 1
    previous.unlink()
    with pytest.raises(Damaged, match=r"last.pt cannot be read"):
        checkpoint.load_newest(tmp_path)


def test_a_flipped_byte_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, content())
    data = bytearray(path.read_bytes())
    at = data.index(np.arange(5000, dtype=np.float32)[1000:1010].tobytes())
    data[at] ^= 255
    path.write_bytes(data)
    with pytest.raises(Damaged, match="it is damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("file_system", ["this one", "without copy_file_range"])
@pytest.mark.parametrize("damaged", [checkpoint.LAST, checkpoint.BEST, "epoch-0002.pt"])
def test_damage_to_one_file_is_not_damage_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str, file_system: str
) -> None:
    if file_system != "this one":
        monkeypatch.delattr(os, "copy_file_range")
    names = {checkpoint.LAST: 2, checkpoint.BEST: 2, checkpoint.epoch_name(2): 2}
    names |= {checkpoint.PREVIOUS: 1, checkpoint.epoch_name(1): 1}
    writer = checkpoint.Writer(tmp_path)
    for epoch in (1, 2):
        writer.start(content(epoch), [checkpoint.BEST, checkpoint.epoch_name(epoch)])
    assert writer.finish() is None
    os.truncate(tmp_path / damaged, 100)
    for name, epoch in names.items():
        if name == damaged:
            with pytest.raises(Damaged):
                checkpoint.load(tmp_path / name)
        else:
            assert checkpoint.load(tmp_path / name)["epoch"] == epoch
    assert len({(tmp_path / name).stat().st_ino for name in names}) == len(names)


@pytest.mark.parametrize("killed_at", range(6))
def test_a_best_checkpoint_is_never_behind_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """Killed at any rename: a run that goes on from last.pt would not write best.pt of that epoch again."""
    for epoch in (1, 2):
        writer = checkpoint.Writer(tmp_path)
        writer.start(content(epoch), [checkpoint.BEST, checkpoint.epoch_name(epoch)])
        assert writer.finish() is None
    fail_replacing(monkeypatch, killed_at, KeyboardInterrupt())  # not an OSError: nothing may catch it
    writer = checkpoint.Writer(tmp_path)
    names = [checkpoint.BEST, checkpoint.epoch_name(3)]
    if killed_at < 4:
        with pytest.raises(KeyboardInterrupt):
            writer._write(content(3), names)
    else:
        writer._write(content(3), names)
    newest = checkpoint.load_newest(tmp_path)[0]["epoch"]
    best = checkpoint.load(tmp_path / checkpoint.BEST)["epoch"]
    assert (newest, best) == (2 if killed_at < 4 else 3, 2 if killed_at == 0 else 3)


@pytest.mark.parametrize("fails_after", [0, 1])
def test_a_failing_write_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_after: int) -> None:
    last, previous = tmp_path / checkpoint.LAST, tmp_path / checkpoint.PREVIOUS
    checkpoint.save(last, content(1), previous=previous)
    checkpoint.save(last, content(2), previous=previous)
    fail_replacing(monkeypatch, fails_after, OSError("no space left on device"))
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(last, content(3), previous=previous)
    loaded, _, _ = checkpoint.load_newest(tmp_path)
    assert loaded["epoch"] == 2  # whether or not it had been moved aside already
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_failed_write_says_what_is_saved_and_what_helps(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    writer = checkpoint.Writer(folder)
    folder.touch()
    writer.start(content())
    assert "File exists; a part of the path is a file; name another); nothing is saved yet" in (writer.finish() or "")
    folder.unlink()
    writer.start(content())
    assert writer.finish() is None
    (folder / checkpoint.BEST).mkdir()
    writer.start(content(), [checkpoint.BEST])
    assert "best.pt: Is a directory; a folder has this name; remove it or name another); the one before is whole" in (
        writer.finish() or ""
    )


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(Damaged, match=r"there is no checkpoint .*x.pt"):
        checkpoint.load(path)
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(Damaged, match="is not a checkpoint of tal-fast"):
        checkpoint.load(path)
    for other, name in ((99, "99"), (torch.ones(2), r"tensor\(\[1., 1.\]\)")):
        torch.save({"format": other}, path)
        with pytest.raises(Damaged, match=f"has format {name} but this version reads 1"):
            checkpoint.load(path)
    torch.save({"format": 1, **{k: v for k, v in content().items() if k != "ranks"}}, path)
    with pytest.raises(Damaged, match="lacks ranks"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {}}, "model"),
        ({"optimizer": None}, "optimizer"),
        ({"ranks": []}, "ranks"),
        ({"ranks": [{}, {}]}, "ranks"),
        ({"epoch": "1"}, "epoch"),
        ({"config": {}}, "config"),
        ({"config": {"seed": torch.zeros(2)}}, "plain values"),
        ({"model": torch.zeros(2)}, "model"),
        ({"shape": {"class_names": ["a"], "channels": 1, "train_images": 9}}, "shape.image_size"),
    ],
)
def test_an_emptied_file_is_refused_and_the_previous_one_used(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    """The zip is whole, and so are its checksums."""
    checkpoint.save(tmp_path / checkpoint.PREVIOUS, content(1))
    checkpoint.save(tmp_path / checkpoint.LAST, content(2) | changes)
    loaded, path, problems = checkpoint.load_newest(tmp_path)
    assert (loaded["epoch"], path.name) == (1, checkpoint.PREVIOUS)
    assert problems == [f"checkpoint {tmp_path / checkpoint.LAST} lacks {named}; it is damaged"]


def checkpoint_bytes() -> bytes:
    file = io.BytesIO()
    torch.save({"format": 1, **checkpoints.content()}, file)
    return file.getvalue()


@FUZZ
@given(mutations(checkpoint_bytes()))
def test_damaged_files_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "last.pt").write_bytes(data)
    reads_or_refuses(checkpoint.load, tmp_path / "last.pt")


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil-was-here",)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "model": Evil()}, tmp_path / "torch.pt")
    torch.save({"format": 1, "model": Evil()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("torch.pt", "old.pt", "pickle.pt"):
        with pytest.raises(Damaged, match="cannot be read"):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "evil-was-here").exists()


def test_a_snapshot_does_not_change_with_the_original() -> None:
    tensor = torch.zeros(2)
    value = {"a": [tensor, 1], "b": (tensor,), "c": "text"}
    copied = checkpoint.snapshot(value)
    tensor.add_(1)
    assert copied["a"][0].tolist() == copied["b"][0].tolist() == [0, 0]
    assert (copied["a"][1], copied["c"]) == (1, "text")


def test_a_deleted_folder_gets_its_configuration_again(tmp_path: Path) -> None:
    config = Config(output=str(tmp_path / "run"), seed=7)
    writer = checkpoint.Writer(tmp_path / "run" / checkpoint.FOLDER)
    for epoch in (1, 2):
        writer.start({**content(epoch), "config": config.to_dict()})
        assert writer.finish() is None
        assert load_config(str(tmp_path / "run" / "config.yaml")) == config
        (tmp_path / "run").rename(tmp_path / f"moved{epoch}")
