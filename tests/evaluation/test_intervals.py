"""Intervals and paired differences in a report."""

from __future__ import annotations

import numpy as np
import pytest

from tal_fast.evaluation.evaluation import evaluate_samples
from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.evaluation.sample_scores import Samples
from tal_fast.metrics.settings import Mix


def two_scores(rng: np.random.Generator, n: int, correct: np.ndarray | float = 0) -> dict[str, np.ndarray]:
    return {score: rng.normal(size=n) + correct for score in ("msp", "energy")}


@pytest.fixture(scope="module")
def samples() -> Samples:
    rng = np.random.default_rng(0)
    correct = rng.random(200) < 0.8
    sets = {name: two_scores(rng, n, -1) for name, n in (("far", 90), ("near", 60))}
    shifts = {name: (rng.random(n) < 0.5, two_scores(rng, n)) for name, n in (("fog", 80), ("snow", 50))}
    return Samples(correct, two_scores(rng, 200, correct), sets, {}, shifts=shifts)


def test_every_score_and_difference_has_an_interval_in_every_setting(samples: Samples) -> None:
    report = evaluate_samples(samples, EvaluationOptions(mix=Mix("all"), seed=3, intervals=True)).report
    assert report["bootstrap"]["baseline"] == "msp"
    keys = {"old_fd", "shift/fog", "shift/snow", "shift"}
    keys |= {f"{kind}{name}" for kind in ("ood", "new_fd") for name in ("", "/far", "/near")}
    assert set(report["intervals"]) == set(report["differences"]) == set(report["settings"]) == keys
    for key, by_score in report["settings"].items():
        for score, values in by_score.items():
            for metric, value in values.items():
                low, high = report["intervals"][key][score][metric]
                assert low <= value <= high, (key, score, metric)
        assert set(report["differences"][key]) == {"energy"}
        value, low, high = report["differences"][key]["energy"]["aurc"]
        assert value == by_score["energy"]["aurc"] - by_score["msp"]["aurc"]
        assert low < high


def test_means_over_sets_are_narrower_than_the_sets(samples: Samples) -> None:
    report = evaluate_samples(samples, EvaluationOptions(mix=Mix("all"), intervals=True)).report
    widths = {key: np.ptp(report["intervals"][key]["msp"]["auroc"]) for key in report["intervals"]}
    for kind, sets in (("ood", ("far", "near")), ("new_fd", ("far", "near")), ("shift", ("fog", "snow"))):
        assert 0 < widths[kind] < max(widths[f"{kind}/{name}"] for name in sets)
