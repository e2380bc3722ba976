"""Command calibrate: from a run or saved outputs to a threshold and an exported module."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tal_fast import calibrate
from tal_fast.evaluation.calibrate_command import main
from tal_fast.evaluation.export import SelectiveClassifier
from tal_fast.evaluation.selective import choose_threshold, split_samples
from tal_fast.runs.load import load_run
from tal_fast.scores.logits import SCORES
from tests.helpers.evaluation import make_run


def fitted_run(folder: Path) -> Path:
    """A run whose last layer is fitted to the validation images, so that many predictions are correct."""
    make_run(folder)
    path = folder / "checkpoints" / "best.pt"
    content = torch.load(path, weights_only=True)
    run = load_run(folder)
    images, labels, _ = next(iter(run.data.loader("val", batch_size=200)))
    with torch.no_grad():
        _, features = run.model(images)
    design = torch.cat((features, torch.ones(len(features), 1)), 1).double()
    solution = torch.linalg.lstsq(design, torch.nn.functional.one_hot(labels, 10).double()).solution.float()
    names = [name for name in content["model"] if content["model"][name].shape in ((10, features.shape[1]), (10,))]
    content["model"][names[-2]], content["model"][names[-1]] = solution[:-1].T.contiguous(), solution[-1].contiguous()
    torch.save(content, path)
    return folder


def test_a_run_from_threshold_to_exported_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fitted_run(tmp_path / "run")
    arguments = ["--run", str(folder), "--risk", "0.7", "--confidence", "0.9", "--device", "cpu", "--seed", "1"]
    assert main([*arguments, "--score", "max-logit", "--calibration_share", "0.6"]) == 0
    printed = capsys.readouterr().out
    about = json.loads((folder / "calibrated" / "threshold.json").read_text())
    assert (about["score"], about["samples"], about["test"]["samples"]) == ("max_logit", 120, 80)
    assert f"accept max_logit > {about['threshold']:.10g}" in printed
    assert "on the other 80: coverage" in printed
    run = load_run(folder)
    images, labels, _ = next(iter(run.data.loader("val", batch_size=200)))
    module = torch.export.load(folder / "calibrated" / "selective.pt2").module()
    prediction, confidence, accept = module(images)
    assert (prediction.dtype, confidence.dtype, accept.dtype) == (torch.int64, torch.float64, torch.bool)
    with torch.no_grad():
        logits, _ = run.model(images)
    torch.testing.assert_close(prediction, logits.argmax(1))
    torch.testing.assert_close(confidence, SCORES["max_logit"](logits), rtol=1e-5, atol=1e-6)
    held_out, rest = split_samples(200, 0.6, 1)
    # The logits of the sample at the threshold may round differently in another batch.
    assert abs(int(accept[held_out].sum()) - about["accepted"]) <= 1
    assert abs(int(accept[rest].sum()) - about["test"]["accepted"]) <= 1
    assert 0 < about["accepted"] < 120
    wrong = (prediction != labels)[held_out][accept[held_out]]
    assert abs(int(wrong.sum()) - about["errors"]) <= 1
    # Any batch size, and the state dict alone.
    torch.testing.assert_close(module(images[:1])[1], confidence[:1], rtol=1e-5, atol=1e-6)
    rebuilt = SelectiveClassifier(load_run(folder).model, "max_logit", 0.0)
    rebuilt.load_state_dict(torch.load(folder / "calibrated" / "selective.pt", weights_only=True))
    assert rebuilt.threshold.item() == about["threshold"]
    torch.testing.assert_close(rebuilt.eval()(images)[1], confidence, rtol=1e-5, atol=1e-6)


def test_saved_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(5, size=2000)
    logits = rng.normal(size=(2000, 5))
    logits[np.arange(2000), labels] += 2.5
    path = tmp_path / "o.npz"
    np.savez(path, logits=logits, labels=labels)
    assert main(["--npz", str(path), "--risk", "0.02", "--score", "msp"]) == 0
    about = json.loads((tmp_path / "o-calibrated" / "threshold.json").read_text())
    held_out, rest = split_samples(2000, 0.5, 0)
    correct, scores = logits.argmax(1) == labels, SCORES["msp"](logits)
    want = choose_threshold(scores[held_out], correct[held_out], risk=0.02)
    assert (about["threshold"], about["accepted"], about["bound"]) == (want.threshold, want.accepted, want.bound)
    accept = scores[rest] > want.threshold
    assert about["test"]["risk"] == pytest.approx(1 - correct[rest][accept].mean())
    low, high = about["test"]["risk_interval"]
    assert low <= about["test"]["risk"] <= high
    assert main(["--npz", str(path), "--risk", "0.9", "--score", "msp", "--calibration-share", "1"]) == 0
    everything = json.loads((tmp_path / "o-calibrated" / "threshold.json").read_text())
    assert everything["threshold"] is None
    assert "test" not in everything
    assert "accept every prediction" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--score", "msp", "--risk", "0.02"], 1, "refused: no threshold keeps the risk within 0.02"),
        (["--score", "msp", "--risk", "0.0001"], 1, "refused: 400 held-out samples are too few"),
        (["--risk", "0.02"], 2, "error: an .npz names no score"),
        (["--score", "knn", "--risk", "0.02"], 2, "error: unknown score 'knn'"),
        (["--score", "msp", "--risk", "2"], 2, "error: risk must lie in (0, 1), not 2"),
    ],
)
def test_refusals_are_one_sentence_and_nothing_is_written(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "o.npz"
    np.savez(path, logits=np.random.default_rng(0).normal(size=(800, 5)), labels=np.zeros(800, int))
    assert main(["--npz", str(path), *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o-calibrated").exists()


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, atexit, tal_fast.calibrate as c; atexit.register(lambda: print('torch' in sys.modules)); c.main()"
    )
    result = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=300)
    assert result.stdout.endswith("False\n"), result.stderr
    assert "--calibration-share SHARE" in result.stdout


def test_the_classifier_is_found_under_its_documented_name() -> None:
    assert calibrate.SelectiveClassifier is SelectiveClassifier
