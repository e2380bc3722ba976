"""Every number that an evaluation reads back belongs to its own model, images and settings."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tal_fast
from tal_fast import compare, html_report
from tal_fast.evaluation import sources
from tal_fast.evaluation.calibrate_command import calibrate_run
from tal_fast.evaluation.compare import read_method
from tal_fast.evaluation.evaluation import read_evaluation
from tal_fast.evaluation.galleries import find_galleries
from tal_fast.evaluation.report import read_report
from tal_fast.evaluation.sources import evaluate_npz
from tal_fast.evaluation.train_typicalness import training_typicalness
from tal_fast.runs import predictions
from tal_fast.runs.load import Run, load_run
from tal_fast.runs.predictions import Inference, PassOptions, model_hash, run_model
from tests.helpers.compare import csv_rows, write_run
from tests.helpers.evaluation import make_run, record_passes, write_npz


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """Two runs on the same images with other weights."""
    folder = tmp_path_factory.mktemp("two")
    first, second = (load_run(make_run(folder / f"seed-{seed}", seed=seed)) for seed in (0, 1))
    return first, second


def inference(run: Run, cache: Path, **options: Any) -> Inference:
    return Inference(run.model, run.data, cache, PassOptions(batch_size=50, **options))


def logits(run: Run, cache: Path, **options: Any) -> Any:
    return inference(run, cache, **options).store("val").load().logits


def in_the_midst(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Call ``action`` in the midst of the next pass of a model, after one of its batches."""
    run = iter([True])

    def interrupted(*args: Any) -> Any:
        for number, batch in enumerate(run_model(*args)):
            if number == 1 and next(run, False):
                action()
            yield batch

    monkeypatch.setattr(predictions, "run_model", interrupted)


@pytest.mark.parametrize("killed", [True, False])
def test_two_evaluations_with_one_cache_keep_their_own_outputs(
    runs: tuple[Run, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    alone = [logits(run, tmp_path / f"alone-{i}") for i, run in enumerate(runs)]
    shared = tmp_path / "shared"
    second = inference(runs[1], shared)

    def start_second() -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) if killed else nullcontext():
            if killed:
                patch.setattr(predictions, "run_model", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
            second.store("val")

    in_the_midst(monkeypatch, start_second)
    first = inference(runs[0], shared).store("val")
    np.testing.assert_array_equal(first.load().logits, alone[0])
    np.testing.assert_array_equal(logits(runs[1], shared), alone[1])


def test_a_shard_copied_from_another_cache_is_not_read(runs: tuple[Run, Run], tmp_path: Path) -> None:
    theirs, ours = (inference(run, tmp_path / str(i)).store("val") for i, run in enumerate(runs))
    before = ours.load().logits
    (copied,) = theirs.folder.glob("*.npz")
    (replaced,) = ours.folder.glob("*.npz")
    shutil.copy(copied, replaced)
    np.testing.assert_array_equal(logits(runs[1], tmp_path / "1"), before)


class Scaled(nn.Module):
    """Network with another forward pass and the same state."""

    def __init__(self, model: nn.Module, padding: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, padding)
        self.model = model

    def forward(self, images: torch.Tensor) -> Any:
        return self.model(self.pool(images))


def test_whatever_the_outputs_depend_on_is_part_of_the_key(
    runs: tuple[Run, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs[0]
    passes = record_passes(monkeypatch)

    def outputs(model: nn.Module = run.model, **options: Any) -> Any:
        count = len(passes)
        found = Inference(model, run.data, tmp_path / "cache", PassOptions(**options)).store("val").load().logits
        return len(passes) > count, found

    narrow, wide = Scaled(run.model, 0), Scaled(run.model, 1)
    assert model_hash(narrow) != model_hash(wide)
    assert outputs(narrow)[0]
    computed, found = outputs(wide)
    assert computed
    assert np.abs(found - outputs(narrow)[1]).max() > 0
    assert outputs()[0]
    assert not outputs()[0]
    assert outputs(amp="bfloat16")[0]
    outputs()
    for module, version in ((tal_fast, "__version__"), (torch, "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(module, version, "another")
            assert outputs()[0]
    outputs()
    reversed_images = run.data.split("val").subset(np.arange(200)[::-1])
    store = Inference(run.model, run.data, tmp_path / "cache").store("val", reversed_images)
    np.testing.assert_allclose(store.load().logits, outputs()[1][::-1], rtol=1e-4, atol=1e-5)


def test_weights_that_change_after_a_pass_get_a_pass_of_their_own(runs: tuple[Run, Run], tmp_path: Path) -> None:
    run = load_run(runs[0].checkpoint.parents[1])
    passes = inference(run, tmp_path)
    before = passes.store("val").load().logits
    with torch.no_grad():
        next(run.model.parameters()).mul_(2)
    assert np.abs(passes.store("val").load().logits - before).max() > 0


def test_the_typicalness_of_another_model_is_not_read(runs: tuple[Run, Run], tmp_path: Path) -> None:
    (first, second), cache = runs, tmp_path / "cache"
    before = training_typicalness(second, tmp_path / "alone").distance
    training_typicalness(first, cache)
    np.testing.assert_array_equal(training_typicalness(second, cache).distance, before)
    # Other networks with one state and queue.
    second = load_run(second.checkpoint.parents[1])
    model, distances = second.model, []
    for padding in (0, 1):
        second.model = Scaled(model, padding)
        distances.append(training_typicalness(second, cache).distance)
    assert np.abs(distances[0] - distances[1]).max() > 0


def test_a_queue_that_is_not_of_the_loaded_weights_is_refused(runs: tuple[Run, Run], tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run"))
    content = torch.load(run.checkpoint, weights_only=True)
    torch.save({**content, "epoch": 8}, run.checkpoint)  # training went on
    with pytest.raises(ValueError, match=r"best\.pt has changed since the evaluation began"):
        training_typicalness(run, tmp_path)


def test_samples_of_another_evaluation_with_the_same_counts_are_refused(
    evaluated_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(evaluated_run / "report.json", tmp_path)
    with np.load(evaluated_run / "samples.npz") as samples:
        np.savez(tmp_path / "samples.npz", **{**samples, "id/msp": samples["id/msp"][::-1]})
    with pytest.raises(ValueError, match="are of different evaluations; evaluate again"):
        read_evaluation(tmp_path)
    assert html_report.main([str(tmp_path)]) == 2
    # In a comparison they give no intervals.
    for method, seed in (("ce", 0), ("tal", 1), ("fmfp", 2)):
        write_run(tmp_path / method, method, seed, 1.0)
    arguments = [str(tmp_path / "ce"), str(tmp_path / "tal"), "--bootstrap", "10"]
    assert csv_rows(arguments, capsys)["tal", "old_fd", "aurc"]["over"] == "images"
    shutil.copy(tmp_path / "fmfp" / "samples.npz", tmp_path / "tal")
    capsys.readouterr()
    assert csv_rows(arguments, capsys)["tal", "old_fd", "aurc"]["over"] == ""
    assert compare.main(arguments) == 0
    assert f"samples.npz beside the report of {tmp_path / 'tal'} is of another evaluation" in capsys.readouterr().err


def test_a_report_names_what_it_was_made_of(evaluated_run: Path, tmp_path: Path) -> None:
    """A report stays its own when the checkpoint, the images or the configuration beside it change."""
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    assert find_galleries(read_evaluation(run), run).notes == ()
    load_run(run).config.save(run / "config.yaml")
    assert read_method(run, read_report(run)) == read_method(run)  # config.yaml and the report agree
    (run / "config.yaml").write_text("seed: 7")
    assert read_method(run, read_report(run))[1] == 0
    evaluation = read_evaluation(run)
    identity = {**evaluation.samples.identity, "val": "0" * 64 + " without 3, seed 0"}
    other = replace(evaluation, samples=replace(evaluation.samples, identity=identity))
    assert find_galleries(other, run).notes == ("No images: the images of val have changed since the evaluation.",)
    make_run(run, seed=5)
    (note,) = find_galleries(evaluation, run).notes
    assert note == f"No images: {run / 'checkpoints' / 'best.pt'} has changed since the evaluation; evaluate it again."


def test_pages_of_an_earlier_evaluation_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    path, folder = write_npz(tmp_path / "outputs.npz"), tmp_path / "outputs-report"
    evaluate_npz(path)
    assert (folder / "report.html").exists()
    monkeypatch.setattr(sources, "add_galleries", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_npz(path)
    assert {path.name for path in folder.iterdir()} == {"report.json", "samples.npz"}


def test_calibrated_files_are_of_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def calibrated(seed: int) -> dict[str, Any]:
        about = calibrate_run(make_run(tmp_path / str(seed), "ce", seed=seed), tmp_path / "out", risk=0.99, share=1.0)
        assert about["sha256"] == {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "out").glob("selective.*")
        }
        return about

    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("unsupported")

    def killed(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    first = calibrated(0)
    assert list(first["sha256"]) == ["selective.pt", "selective.pt2"]
    monkeypatch.setattr(torch.export, "export", refuse)
    with pytest.raises(ValueError, match=r"torch\.export cannot take the model"):
        calibrated(1)
    # The program of the first model does not stay beside the second model's threshold.
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"selective.pt", "threshold.json"}
    about = json.loads((tmp_path / "out" / "threshold.json").read_text())
    assert about["weights_sha256"] != first["weights_sha256"]
    monkeypatch.undo()
    monkeypatch.setattr(torch.export, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrated(0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"selective.pt"}


@pytest.mark.slow
def test_processes_that_share_a_cache_report_their_own_numbers(tmp_path: Path) -> None:
    """Two models at the same time, one of them twice, in processes of their own."""
    runs = [make_run(tmp_path / f"run-{i}", "ce", seed=i) for i in range(2)]

    def start(run: Path, output: str) -> subprocess.Popen[str]:
        command = [
            "-m", "tal_fast.evaluate", "--run", str(run), "--output", str(tmp_path / output), "--device", "cpu",
            "--cache", str(tmp_path / "cache"), "--batch-size", "3", "--scores", "msp", "--seed", "0",
        ]  # fmt: skip
        return subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    jobs = [(run, f"out-{run.name}-{i}") for i in range(2) for run in runs]
    for process in [start(*job) for job in jobs]:
        _, error = process.communicate(timeout=250)
        assert process.returncode == 0, error
    for run, output in jobs:
        alone = sources.evaluate_run(run, tmp_path / "alone", cache=tmp_path / "alone-cache")
        assert alone is not None
        found = read_report(tmp_path / output)
        assert found["id_accuracy"] == alone.report["id_accuracy"]
        assert found["weights_sha256"] == alone.report["weights_sha256"]
        assert found["settings"]["old_fd"]["msp"] == pytest.approx(alone.report["settings"]["old_fd"]["msp"], abs=1e-4)
