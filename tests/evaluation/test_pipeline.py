"""From outputs to an evaluation: temperature, scores, metrics."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tal_fast.config.names import FEATURE_SCORES, LOGIT_SCORES, SIRC_SCORES, check_scores
from tal_fast.evaluation.npz import read_npz
from tal_fast.evaluation.pipeline import EvaluationInputs, evaluate_outputs
from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.metrics.calibration import calibration_metrics
from tal_fast.metrics.failure import failure_metrics
from tal_fast.metrics.settings import Mix, new_fd, ood
from tal_fast.runs.prediction_store import Outputs
from tal_fast.scores import logits
from tal_fast.scores.temperature import fit_temperature, held_out
from tal_fast.scores.training_statistics import Training
from tests.helpers.evaluation import write_npz


def test_score_names_and_groups_are_resolved() -> None:
    assert check_scores(["max-logit", "features", "knn"]) == ["max_logit", *FEATURE_SCORES]
    with pytest.raises(ValueError, match="unknown score trust; choose from cosine, msp,"):
        check_scores(["cosine", "trust"])


def test_metrics_are_those_of_the_settings(tmp_path: Path) -> None:
    inputs = read_npz(write_npz(tmp_path / "outputs.npz"))
    report = evaluate_outputs(inputs, EvaluationOptions(scores=["logits"], seed=3)).report
    assert list(report["settings"]["new_fd"]) == list(LOGIT_SCORES)
    correct = inputs.id.correct
    for key, setting in {"ood": ood(correct, 90, seed=3), "new_fd": new_fd(correct, 90, seed=3)}.items():
        for score, function in logits.SCORES.items():
            confidence = setting.confidence(function(inputs.id.logits), function(inputs.ood["noise"].logits))
            assert report["settings"][key][score] == failure_metrics(confidence, setting.success)
    assert report["samples"]["new_fd"]["id"] == report["samples"]["new_fd"]["ood"] == 90
    assert report["aurc_random"]["ood"] == 0.5
    assert report["calibration"] == calibration_metrics(inputs.id.logits, inputs.id.labels)
    aurc = report["settings"]["old_fd"]["msp"]["aurc"]
    assert report["aurc_floor"]["old_fd"] < aurc < report["aurc_random"]["old_fd"]


def test_shifted_sets_are_judged_as_old_fd(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    arrays = {"shift_fog_logits": rng.normal(size=(60, 5)), "shift_fog_labels": rng.integers(5, size=60)}
    arrays |= {"features": rng.normal(size=(200, 4)), "ood_noise_features": rng.normal(size=(90, 4))}
    arrays |= {"shift_fog_features": rng.normal(size=(60, 4))}
    inputs = read_npz(write_npz(tmp_path / "outputs.npz", **arrays))
    report = evaluate_outputs(inputs, EvaluationOptions(scores=["msp", "feature_norm"])).report
    correct = arrays["shift_fog_logits"].argmax(1) == arrays["shift_fog_labels"]
    confidences = {
        "msp": logits.SCORES["msp"](arrays["shift_fog_logits"]),
        "feature_norm": np.abs(arrays["shift_fog_features"]).sum(1),
    }
    assert report["settings"]["shift"] == {name: failure_metrics(c, correct) for name, c in confidences.items()}
    errors = int(60 - correct.sum())
    assert report["samples"]["shift"] == {"n": 60, "id": 60, "ood": 0, "errors": errors}
    assert report["aurc_random"]["shift"] == errors / 60
    assert report["counts"]["shift"] == {"fog": 60}


def test_scores_without_their_inputs_are_left_out_with_the_reason(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    arrays = {
        "features": rng.normal(size=(200, 8)), "ood_noise_features": rng.normal(size=(90, 8)) + 3,
        "train_features": rng.normal(size=(300, 8)), "train_labels": rng.integers(5, size=300),
        "fc_weight": rng.normal(size=(5, 8)), "fc_bias": rng.normal(size=5),
    }  # fmt: skip
    path = tmp_path / "outputs.npz"
    inputs = read_npz(write_npz(path, **arrays))
    settings = evaluate_outputs(inputs, EvaluationOptions(scores=["features", "sirc"])).report["settings"]
    assert list(settings["ood"]) == [*FEATURE_SCORES, *SIRC_SCORES]
    assert settings["ood"]["mahalanobis"]["auroc"] > 0.9
    for missing, score, reason in (
        ("train_features", "knn", "it needs training features, and there are none"),
        ("features", "knn", "it needs the features of every set, and there are no features"),
        ("ood_noise_features", "feature_norm", "of every set, and there are no ood_noise_features"),
        ("train_labels", "mahalanobis", "mahalanobis needs training labels"),
        ("fc_bias", "vim", None),
        ("train_features", "feature_norm", None),
    ):
        inputs = read_npz(write_npz(path, **{**arrays, missing: None}))
        left_out = evaluate_outputs(inputs, EvaluationOptions(scores=[score, "msp"])).report["left_out"]
        assert left_out.keys() == ({score} if reason else set())
        if reason is not None:
            assert reason in left_out[score]
            with pytest.raises(ValueError, match=f"none of the scores can be computed; {score}: .*{reason}"):
                evaluate_outputs(inputs, EvaluationOptions(scores=[score]))


def test_an_ood_set_called_as_the_id_samples_is_refused() -> None:
    outputs = Outputs(np.zeros((3, 5)), None, np.zeros(3, int))
    with pytest.raises(ValueError, match="an OOD set cannot be called 'val'"):
        evaluate_outputs(EvaluationInputs(outputs, {"val": outputs}))


def test_the_order_of_samples_does_not_matter(tmp_path: Path) -> None:
    inputs = read_npz(write_npz(tmp_path / "a.npz"))
    # Rounded logits have many ties.
    rounded = Outputs(np.round(inputs.id.logits), None, inputs.id.labels)
    permuted = rounded.subset(np.random.default_rng(5).permutation(200))
    options = EvaluationOptions(mix=Mix("all"))
    reports = [
        evaluate_outputs(EvaluationInputs(outputs, inputs.ood), options).report for outputs in (rounded, permuted)
    ]
    assert reports[0]["tied_share"]["old_fd"]["cosine"] > 0.5
    assert reports[0]["settings"] == reports[1]["settings"]


def test_conventions_differ_on_tied_scores(tmp_path: Path) -> None:
    inputs = read_npz(write_npz(tmp_path / "outputs.npz"))
    inputs.id = Outputs(np.round(inputs.id.logits), None, inputs.id.labels)
    ours, theirs = (
        evaluate_outputs(inputs, EvaluationOptions(convention=c)).report["settings"]["old_fd"]["msp"]
        for c in ("tal_fast", "tal")
    )
    assert ours["aurc"] != theirs["aurc"]
    assert ours["auroc"] == theirs["auroc"]


def test_held_out_samples_take_part_in_nothing_but_the_temperature() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(6, size=400)
    outputs = Outputs(rng.normal(size=(400, 6)) + 2 * np.eye(6)[labels], None, labels)
    # The same images twice as corrupted ones, once known to be the ID samples.
    inputs = EvaluationInputs(outputs, shifts={"blur": outputs, "folder": outputs}, corrupted=["blur"])
    evaluation = evaluate_outputs(inputs, EvaluationOptions(scores=["msp"], temperature=0.25))
    report = evaluation.report
    fit, rest = held_out(400, 0.25, 0)
    assert report["temperature"]["value"] == fit_temperature(outputs.logits[fit], labels[fit])
    assert report["counts"]["shift"] == {"blur": 300, "folder": 400}
    assert report["settings"]["shift/blur"] == report["settings"]["old_fd"]
    assert report["settings"]["shift/folder"] != report["settings"]["old_fd"]
    np.testing.assert_array_equal(evaluation.samples.predictions["val"].index, rest)
    np.testing.assert_array_equal(evaluation.samples.predictions["val"].label, labels[rest])


def test_a_temperature_equals_logits_divided_beforehand() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(6, size=400)
    outputs = Outputs(3 * (rng.normal(size=(400, 6)) + 2 * np.eye(6)[labels]), rng.normal(size=(400, 8)), labels)
    far = Outputs(rng.normal(size=(100, 6)), rng.normal(size=(100, 8)), np.full(100, -1))
    weight, train = rng.normal(size=(6, 8)), rng.normal(size=(200, 8))
    training = Training(train, weight=weight, logits=train @ weight.T)
    scores = ["msp", "cosine", "vim"]
    options = EvaluationOptions(scores=scores, mix=Mix("all"), temperature=0.25)
    scaled = evaluate_outputs(EvaluationInputs(outputs, {"far": far}, training=training), options).report
    _, rest = held_out(400, 0.25, 0)
    t = scaled["temperature"]["value"]
    kept = outputs.subset(rest)
    assert scaled["calibration"] == calibration_metrics(kept.logits / t, kept.labels)
    assert scaled["temperature"]["calibration_before"] == calibration_metrics(kept.logits, kept.labels)
    assert scaled["calibration"]["ece"] < scaled["temperature"]["calibration_before"]["ece"]
    divided = EvaluationInputs(
        dataclasses.replace(kept, logits=kept.logits / t),
        {"far": dataclasses.replace(far, logits=far.logits / t)},
        training=Training(train, weight=weight / t, logits=train @ weight.T / t),
    )
    expected = evaluate_outputs(divided, EvaluationOptions(scores=scores, mix=Mix("all"))).report
    for key, by_score in expected["settings"].items():
        for score, values in by_score.items():
            assert scaled["settings"][key][score] == pytest.approx(values, abs=1e-12), (key, score)
