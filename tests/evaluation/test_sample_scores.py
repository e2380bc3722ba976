"""Scores and predictions of every sample, and their file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tal_fast.evaluation.sample_scores import Predictions, Samples, read_samples, write_samples
from tal_fast.runs.prediction_store import Outputs


def test_samples_are_read_as_they_were_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    splits = {
        name: Predictions(*rng.integers(3, size=(2, n)), rng.random(n), rng.permutation(n))
        for name, n in (("val", 7), ("a/b", 2), ("é", 3))
    }
    samples = Samples(
        splits["val"].correct,
        {"msp": rng.random(7)},
        {name: {"msp": rng.random(len(splits[name]))} for name in ("a/b", "é")},
        {"val": "h"},
        splits,
        {"c/d": (np.array([True]), {"msp": np.array([0.5])})},
    )
    write_samples(samples, tmp_path / "samples.npz")
    found = read_samples(tmp_path / "report.json")
    assert found is not None
    assert found.identity == samples.identity
    np.testing.assert_array_equal(found.correct, samples.correct)
    np.testing.assert_array_equal(found.id_scores["msp"], samples.id_scores["msp"])
    np.testing.assert_array_equal(found.ood_scores["a/b"]["msp"], samples.ood_scores["a/b"]["msp"])
    assert list(found.predictions) == list(splits)
    for name, split in splits.items():
        for array in ("label", "prediction", "probability", "index", "correct"):
            np.testing.assert_array_equal(getattr(split, array), getattr(found.predictions[name], array))
    ((name, (correct, scores)),) = found.shifts.items()
    assert (name, correct.tolist(), scores["msp"].tolist()) == ("c/d", [True], [0.5])


def test_no_file_is_none_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert read_samples(tmp_path / "elsewhere" / "report.json") is None
    (tmp_path / "samples.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"samples\.npz cannot be read"):
        read_samples(tmp_path)


def test_predictions_of_a_part_of_a_split_know_their_positions() -> None:
    outputs = Outputs(np.array([[0.0, 1.0], [3.0, 1.0]]), None, np.array([1, 1]))
    predictions = Predictions.from_outputs(outputs, np.array([4, 9]))
    assert predictions.index.tolist() == [4, 9]
    assert predictions.prediction.tolist() == [1, 0]
    assert predictions.correct.tolist() == [True, False]
    np.testing.assert_allclose(predictions.probability, 1 / (1 + np.exp([-1.0, -2.0])))


def test_one_score_can_be_taken_out() -> None:
    scores = {"msp": np.array([1.0, 2.0]), "energy": np.array([3.0, 4.0])}
    samples = Samples(
        np.array([True, False]), scores, {"a": scores}, {}, shifts={"b": (np.array([True, True]), scores)}
    )
    single = samples.with_score("energy")
    assert list(single.id_scores) == list(single.ood_scores["a"]) == list(single.shifts["b"][1]) == ["energy"]
    np.testing.assert_array_equal(single.id_scores["energy"], [3, 4])
