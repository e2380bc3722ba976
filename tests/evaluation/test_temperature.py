"""Evaluations with a temperature fitted on held-out samples."""

from __future__ import annotations

import numpy as np
import pytest

from tal_fast.evaluation.command import main
from tal_fast.evaluation.pipeline import EvaluationInputs, evaluate_outputs
from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.metrics.calibration import calibration_metrics
from tal_fast.metrics.settings import Mix
from tal_fast.runs.prediction_store import Outputs
from tal_fast.scores.features import Training
from tal_fast.scores.temperature import fit_temperature, held_out

SCORES = ("msp", "cosine", "vim")


def test_all_logits_are_divided_by_the_temperature() -> None:
    rng = np.random.default_rng(2)
    logits = 4 * rng.normal(size=(1000, 6))
    labels = (rng.random((1000, 1)) > (np.exp(logits / 5) / np.exp(logits / 5).sum(1, keepdims=True)).cumsum(1)).sum(1)
    features, far_features, train = (rng.normal(size=(n, 8)) for n in (1000, 300, 200))
    weight, far = rng.normal(size=(6, 8)), rng.normal(size=(300, 6))
    nothing = np.full(300, -1)
    inputs = EvaluationInputs(
        Outputs(logits, features, labels),
        {"far": Outputs(far, far_features, nothing)},
        training=Training(train, None, weight, None, train @ weight.T),
    )
    options = EvaluationOptions(scores=SCORES, mix=Mix("all"), temperature=0.25)
    report = evaluate_outputs(inputs, options).report
    fit, rest = held_out(1000, 0.25, 0)
    t = fit_temperature(logits[fit], labels[fit])
    assert report["temperature"]["value"] == t
    assert (report["temperature"]["held_out"], report["counts"]["id"]) == (250, 750)
    assert report["calibration"] == calibration_metrics(logits[rest] / t, labels[rest])
    assert report["temperature"]["calibration_before"] == calibration_metrics(logits[rest], labels[rest])
    assert report["calibration"]["ece"] < report["temperature"]["calibration_before"]["ece"] / 3
    divided = EvaluationInputs(
        Outputs(logits[rest] / t, features[rest], labels[rest]),
        {"far": Outputs(far / t, far_features, nothing)},
        training=Training(train, None, weight / t, None, train @ weight.T / t),
    )
    want = evaluate_outputs(divided, EvaluationOptions(scores=SCORES, mix=Mix("all"))).report["settings"]
    for key, by_score in want.items():
        for score, values in by_score.items():
            assert report["settings"][key][score] == pytest.approx(values, abs=1e-12), (key, score)


@pytest.mark.parametrize("text", ["held-out=1", "val", "held-out=x"])
def test_other_temperatures_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--npz", "outputs.npz", "--temperature", text])
    assert "must be held-out or held-out=SHARE" in capsys.readouterr().err


def test_narrow_logits_are_divided_in_float64() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(6, size=400)
    narrow = (3 * (rng.normal(size=(400, 6)) + 2 * np.eye(6)[labels])).astype(np.float16)
    weight = rng.normal(size=(6, 8)).astype(np.float16)
    options = EvaluationOptions(scores=["msp"], temperature=0.25)
    got, want = (
        evaluate_outputs(EvaluationInputs(Outputs(z, None, labels)), options) for z in (narrow, narrow.astype(float))
    )
    np.testing.assert_array_equal(got.samples.id_scores["msp"], want.samples.id_scores["msp"])
    np.testing.assert_array_equal(Training(weight, None, weight).scaled(3.0).weight, weight.astype(float) / 3)
