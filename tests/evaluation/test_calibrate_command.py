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
from tal_fast.evaluation.calibration import limits_of, split_samples
from tal_fast.evaluation.classifier import Classifier
from tal_fast.evaluation.export import SelectiveClassifier
from tal_fast.evaluation.export_command import main as export
from tal_fast.evaluation.selective import choose_threshold
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


def test_thresholds_by_class_of_a_run_are_those_of_its_predictions(tmp_path: Path) -> None:
    folder = fitted_run(tmp_path / "run")
    arguments = ["--run", str(folder), "--risk", "0.7", "--confidence", "0.5", "--device", "cpu", "--per-class"]
    assert main([*arguments, "--calibration-share", "1"]) == 0
    about = json.loads((folder / "calibrated" / "threshold.json").read_text())
    limits = limits_of(about)
    assert limits.shape == (10,)
    assert np.isfinite(limits).any()
    run, classifier = load_run(folder), Classifier(folder, device="cpu")
    images, _, _ = next(iter(run.data.loader("val", batch_size=200)))
    prediction, confidence, accept = torch.export.load(folder / "calibrated" / "selective.pt2").module()(images)
    torch.testing.assert_close(accept, confidence > torch.from_numpy(limits)[prediction])
    assert abs(int(accept.sum()) - about["accepted"]) <= 2
    np.testing.assert_array_equal(classifier.threshold, limits)
    found = classifier(images)
    assert [p.accepted for p in found] == [p.confidence > limits[run.class_names.index(p.class_name)] for p in found]
    rebuilt = SelectiveClassifier(load_run(folder).model, run.score, torch.zeros(10))
    rebuilt.load_state_dict(torch.load(folder / "calibrated" / "selective.pt", weights_only=True))
    np.testing.assert_array_equal(rebuilt.threshold, limits)
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    assert export(["--run", str(folder), "--format", "onnx", "--device", "cpu"]) == 0
    onnx = Classifier(folder / "exported" / "onnx-fp32")
    assert [p.accepted for p in onnx(images)] == [
        p.confidence > np.asarray(onnx.threshold)[run.class_names.index(p.class_name)] for p in onnx(images)
    ]


def test_the_share_of_an_ood_set_that_a_run_accepts_is_bounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fitted_run(tmp_path / "run")
    arguments = ["--run", str(folder), "--risk", "0.3", "--device", "cpu", "--metric", "false-accept-ood"]
    assert main([*arguments, "--ood", "noise=gaussian:80"]) == 0
    about = json.loads((folder / "calibrated" / "threshold.json").read_text())
    assert (about["ood_set"], about["ood"]["samples"]) == ("noise=gaussian:80", 40)
    assert about["ood"]["accepted"] <= 0.3 * 40
    assert "share of noise=gaussian:80 accepted at most 30.00%" in capsys.readouterr().out
    assert main([*arguments, "--ood", "nothing"]) == 2
    assert "has no OOD set 'nothing'" in capsys.readouterr().err


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


def saved_outputs(path: Path, samples: int = 4000, classes: int = 4) -> np.ndarray:
    """An .npz of logits of which most are right, with an OOD set ``far``; returns the logits."""
    rng = np.random.default_rng(1)
    labels = rng.integers(classes, size=samples)
    logits = rng.normal(size=(samples, classes))
    logits[np.arange(samples), labels] += 3
    np.savez(path, logits=logits, labels=labels, ood_far_logits=rng.normal(size=(600, classes)))
    return logits


def test_the_score_is_chosen_on_samples_that_neither_bound_nor_test_uses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logits = saved_outputs(tmp_path / "o.npz")
    assert main(["--npz", str(tmp_path / "o.npz"), "--risk", "0.03", "--score", "auto"]) == 0
    about = json.loads((tmp_path / "o-calibrated" / "threshold.json").read_text())
    sizes = about["samples"], about["score_selection"]["samples"], about["test"]["samples"]
    assert sizes == (2000, 1000, 1000)
    rows = about["score_selection"]["scores"]
    assert {row["score"] for row in rows} == set(SCORES)
    assert about["score"] == rows[0]["score"]
    assert rows[0]["coverage"] == max(row["coverage"] for row in rows)
    assert (
        f"{about['score']} has the largest coverage on 1000 other samples, left out of the bound"
        in capsys.readouterr().out
    )
    assert len(logits) == 4000


def test_thresholds_by_class_and_for_an_ood_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "o.npz"
    logits = saved_outputs(path)
    values, held_out = SCORES["msp"](logits), split_samples(4000, 0.5, 0)[0]
    assert main(["--npz", str(path), "--risk", "0.05", "--score", "msp", "--per-class"]) == 0
    about = json.loads((tmp_path / "o-calibrated" / "threshold.json").read_text())
    limits = np.array(about["class_thresholds"])
    assert about["accepted"] == (values > limits[logits.argmax(1)])[held_out].sum()
    printed = capsys.readouterr().out
    assert "risk of every class at most 5.00% with confidence 0.95" in printed
    assert f"  2: {limits[2]:.10g}" in printed
    metric = ["--metric", "false-accept-ood", "--ood", "far"]
    assert main(["--npz", str(path), "--risk", "0.1", "--score", "msp", *metric]) == 0
    about = json.loads((tmp_path / "o-calibrated" / "threshold.json").read_text())
    assert (about["metric"], about["ood_set"], about["ood"]["samples"]) == ("false-accept-ood", "far", 300)
    assert about["accepted"] == (values > about["threshold"])[held_out].sum()
    printed = capsys.readouterr().out
    assert "share of far accepted at most 10.00% with confidence 0.95" in printed
    assert f"far: {about['ood']['accepted']} of 300 accepted" in printed


def test_a_refusal_has_a_table_of_what_each_score_achieves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_outputs(tmp_path / "o.npz", 400)
    assert main(["--npz", str(tmp_path / "o.npz"), "--risk", "0.001", "--score", "msp"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("refused: with msp, 200 held-out samples are too few")
    assert lines[1] == "with confidence 0.95 on 200 samples that the bound does not use:"
    table = {line.split()[0]: line.split()[1:] for line in lines[3:-1]}
    assert set(table) == set(SCORES)
    assert lines[-1].startswith("recommended: --score ")
    score, risk = lines[-1].split()[2::2]
    assert f"{float(risk):.2%}" == table[score][1]
    assert main(["--npz", str(tmp_path / "o.npz"), "--risk", risk, "--score", score]) in (0, 1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--score", "msp", "--risk", "0.02", "--ood", "x"], 2, "--metric false-accept-ood and --ood NAME go together"),
        (["--score", "msp", "--risk", "0.02", "--ood", "x", "--metric", "false-accept-ood"], 2, "has no OOD set 'x'"),
        (["--score", "auto", "--risk", "0.02", "--calibration-share", "1"], 2, "leaves no samples for --score auto"),
        (["--score", "msp", "--risk", "0.02", "--per-class"], 1, "refused: with msp, no class has a threshold"),
        (["--risk", "0.02"], 2, "error: an .npz names no score"),
        (["--score", "knn", "--risk", "0.02"], 2, "error: unknown score 'knn'"),
        (["--score", "msp", "--risk", "2"], 2, "error: risk must lie in (0, 1), not 2"),
    ],
)
def test_after_a_refusal_nothing_is_written(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "o.npz"
    np.savez(path, logits=np.random.default_rng(0).normal(size=(800, 5)), labels=np.zeros(800, int))
    assert main(["--npz", str(path), *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1 or code == 1
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
