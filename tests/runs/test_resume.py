"""Finding the checkpoint a run resumes from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tal_fast.config.schema import Config
from tal_fast.runs import checkpoint, resume
from tal_fast.runs.resume import changed_conditions, differences, find_checkpoint
from tal_fast.training.trainer import Trainer, TrainingFailed
from tal_fast.utils.locks import FolderLock
from tests.helpers.locks import holder
from tests.helpers.training import config, one_thread  # noqa: F401

CONTENT = dict.fromkeys(
    ("step", "world_size", "model", "average", "shape", "optimizer", "scaler", "ranks", "best", "history")
)


def save(saved: Config, name: str = "last.pt", epoch: int = 1) -> Path:
    path = Path(saved.output) / "checkpoints" / name
    checkpoint.save(path, {**CONTENT, "config": saved.to_dict(), "epoch": epoch})
    return path


def test_auto_takes_the_newest_checkpoint_that_can_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    auto = config(tmp_path / "run", resume="auto")
    assert find_checkpoint(auto) is None
    last, previous = save(auto, epoch=2), save(auto, "previous.pt")
    content, path = find_checkpoint(auto) or ({}, None)
    assert (content["epoch"], path) == (2, last)
    last.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        content, path = find_checkpoint(auto) or ({}, None)
    assert (content["epoch"], path) == (1, previous)
    assert f"last.pt cannot be read (BadZipFile); it is damaged or not one; going on from {previous}" in caplog.text


def test_a_path_resumes_into_the_same_or_an_empty_folder(tmp_path: Path) -> None:
    path = str(save(config(tmp_path / "a")))
    for folder in ("a", "b"):
        content, found = find_checkpoint(config(tmp_path / folder, resume=path)) or ({}, None)
        assert (content["epoch"], str(found)) == (1, path)
    save(config(tmp_path / "b"))
    with pytest.raises(ValueError, match=r"b holds a run already, which resuming from .* would overwrite"):
        find_checkpoint(config(tmp_path / "b", resume=path))
    with pytest.raises(ValueError, match="there is no checkpoint /nowhere"):
        find_checkpoint(config(tmp_path / "c", resume="/nowhere"))


@pytest.mark.parametrize("name", ["metrics.csv", "checkpoints/last.pt"])
def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path, name: str) -> None:
    assert find_checkpoint(config(tmp_path / "run")) is None
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).touch()
    with pytest.raises(ValueError, match="holds a run already; continue it with --resume auto, or name another"):
        find_checkpoint(config(tmp_path / "run"))


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; name a folder"):
        find_checkpoint(config(tmp_path / "file"))


def test_a_process_that_torchrun_restarts_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(config(tmp_path))
    with pytest.raises(ValueError, match="holds a run already"):
        find_checkpoint(config(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    content, _ = find_checkpoint(config(tmp_path)) or ({}, None)
    assert content["epoch"] == 1


def test_a_folder_in_use_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = config(tmp_path / "run", resume="auto")
    save(auto)
    monkeypatch.setattr(resume, "REQUEUE_WAIT_S", 0.1)
    process = holder(tmp_path / "run")
    for options in (auto, config(tmp_path / "run")):
        with pytest.raises(ValueError, match=rf"run is in use by process {process.pid} on .*; wait until it ends, or"):
            find_checkpoint(options, FolderLock(tmp_path / "run"))
    process.communicate("end\n")
    lock = FolderLock(tmp_path / "run")
    assert find_checkpoint(auto, lock) is not None
    assert lock.held
    lock.release()


def test_of_two_runs_that_create_a_folder_one_is_refused(tmp_path: Path) -> None:
    trainer, late = (Trainer(config(tmp_path / "run", epochs=1)) for _ in range(2))
    assert not (tmp_path / "run").exists()
    process = holder(tmp_path / "run")
    with pytest.raises(TrainingFailed, match=f"run is in use by process {process.pid}"):
        trainer.fit()
    process.communicate("end\n")
    trainer.fit()
    with pytest.raises(TrainingFailed, match="holds a run already"):
        late.fit()
    assert not (tmp_path / "run" / ".lock").exists()


def test_another_configuration_is_refused_by_the_options_that_differ(tmp_path: Path) -> None:
    save(config(tmp_path, epochs=2))
    with pytest.raises(ValueError, match=r"another configuration \(.*epochs was 2 and is 3.*\); set it back, or"):
        find_checkpoint(config(tmp_path, epochs=3, seed=4, resume="auto"))
    with pytest.raises(ValueError, match="seed was 3 and is 4"):
        find_checkpoint(config(tmp_path, epochs=3, seed=4, resume="auto"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"eval_batch_size": 7, "progress": "lines", "data_options": {"workers": 3}}, []),
        ({"method": "logitnorm", "method_options": {"tau": 0.04}}, []),  # the default, written out
        ({"method_options": {"confidence_threshold": -1.0}}, []),  # likewise
        (
            {"method_options": {"confidence_threshold": 0.0}},
            ["method.options.confidence_threshold was -1.0 and is 0.0"],
        ),
        (
            {"method": "logitnorm", "method_options": {"tau": 0.5}},
            ["method.options.tau was 0.04 and is 0.5"],
        ),
        ({"data_options": {"crop_area": (0.2, 1.0)}}, ["data.crop_area was [0.5, 1.0] and is [0.2, 1.0]"]),
    ],
)
def test_differences_are_options_that_change_the_result(
    tmp_path: Path, options: dict[str, Any], expected: list[str]
) -> None:
    saved = config(tmp_path / "a", options.get("method", "tal"))
    assert differences(saved.to_dict(), config(tmp_path / "b", **options)) == expected


def test_changed_conditions_are_named() -> None:
    saved = {"world_size": 2, "shape": {"train_images": 100}}
    assert changed_conditions(saved, 2, 100) == []
    assert changed_conditions(saved, 1, 99) == ["ranks 2 -> 1", "training images 100 -> 99"]
