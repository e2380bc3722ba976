"""Folders that cannot be written, full disks and what killed processes leave."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tal_fast import calibrate, compare, evaluate
from tal_fast.runs import prediction_store, predictions
from tal_fast.runs.load import load_run
from tal_fast.runs.predictions import Inference, PassOptions, run_model
from tal_fast.utils.locks import unlock
from tests.helpers.compare import write_run
from tests.helpers.evaluation import make_run, record_passes, write_npz


def full(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def record_images(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the images that models are run over from now on."""
    seen: list[int] = []

    def record(*args: Any) -> Any:
        for indices, outputs in run_model(*args):
            seen.extend(indices.tolist())
            yield indices, outputs

    monkeypatch.setattr(predictions, "run_model", record)
    return seen


@pytest.mark.parametrize("command", ["evaluate", "evaluate-npz", "calibrate", "calibrate-npz", "compare"])
def test_an_output_below_a_file_is_one_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    out, passes = str(tmp_path / "file" / "out"), record_passes(monkeypatch)
    if command.endswith("-npz"):
        arguments = ["--npz", str(write_npz(tmp_path / "o.npz")), "--output", out]
    elif command == "compare":
        for i in range(2):
            write_run(tmp_path / f"run-{i}", "ce", i, 1.0)
        arguments = [str(tmp_path / "run-0"), str(tmp_path / "run-1"), "--out", out, "--bootstrap", "0"]
    else:
        arguments = ["--run", str(make_run(tmp_path / "run", "ce")), "--output", out, "--device", "cpu"]
    if command.startswith("calibrate"):
        arguments += ["--risk", "0.9", "--score", "msp"]
    module = {"evaluate": evaluate, "calibrate": calibrate, "compare": compare}[command.partition("-")[0]]
    assert module.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: "), printed.err
    assert printed.err.count("\n") == 1
    assert str(tmp_path / "file") in printed.err
    assert passes == []  # said before any work
    assert ("AURC" in printed.out) == (command == "compare")


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, used = tmp_path / "tal-fast-abcdefgh", tmp_path / "tal-fast-bcdefghi"
    handles = [prediction_store.keep(path) for path in (killed, used)]
    unlock(handles[0])
    run = make_run(tmp_path / "run")
    cache = str(tmp_path / "file" / "cache")
    assert evaluate.main(["--run", str(run), "--cache", cache, "--device", "cpu", "--no-typicalness"]) == 0
    said = capsys.readouterr().err
    assert f"warning: outputs cannot be kept in {cache}" in said
    assert "they go to a temporary folder" in said
    assert said.count("\n") == 1
    assert (run / "report.json").exists()
    assert not killed.exists()
    assert used.exists()
    unlock(handles[1])


@pytest.mark.parametrize("whole", [True, False])
def test_a_disk_that_is_full_in_the_midst_costs_no_more_than_one_shard(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = load_run(make_run(tmp_path / "run", "ce"))
    options = PassOptions(batch_size=50)
    alone = Inference(run.model, run.data, tmp_path / "alone", options).store("val").load()
    monkeypatch.setattr(prediction_store, "SHARD_BYTES", 1)  # a shard per batch
    savez, cache, calls = np.savez, tmp_path / "cache", []

    def save(path: Path, **arrays: Any) -> None:
        calls.append(path)
        if len(calls) > 2 and (not whole or path.is_relative_to(cache)):
            full()
        savez(path, **arrays)

    monkeypatch.setattr(np, "savez", save)
    images = record_images(monkeypatch)
    inference = Inference(run.model, run.data, cache, options)
    if not whole:  # the temporary folder is full too
        with pytest.raises(ValueError, match=r"outputs cannot be kept in .* \(No space left on device\); free space"):
            inference.store("val")
        return
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(inference.store("val").load().logits, alone.logits)
    assert images == [*range(150), *range(100, 200)]
    assert "(No space left on device); free space or name another folder with --cache; they go to" in caplog.text
    monkeypatch.setattr(np, "savez", savez)
    assert Inference(run.model, run.data, cache, options).store("val").missing().size == 0


def test_a_complete_cache_that_can_only_be_read_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(make_run(tmp_path / "run", "ce"))
    cache = tmp_path / "cache"
    before = Inference(run.model, run.data, cache).store("val").load()
    opened = os.open

    def read_only(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_CREAT and Path(path).is_relative_to(cache):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", read_only)
    passes = record_passes(monkeypatch)
    np.testing.assert_array_equal(Inference(run.model, run.data, cache).store("val").load().logits, before.logits)
    assert passes == []


def test_a_report_that_cannot_be_written_at_the_end_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_npz(tmp_path / "outputs.npz")
    monkeypatch.setattr(np, "savez", full)
    assert evaluate.main(["--npz", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "No space left on device" in said
    assert str(tmp_path / "outputs-report" / "samples.npz") in said
    assert said.count("\n") == 1
    assert list((tmp_path / "outputs-report").iterdir()) == []
