"""Bootstrap intervals and paired differences in a report."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from tal_fast.evaluation.evaluation import evaluate_samples
from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.evaluation.sample_scores import Samples
from tal_fast.metrics.bootstrap import bootstrap, interval
from tal_fast.metrics.failure import METRICS
from tal_fast.metrics.settings import Mix

AUGRC = METRICS.index("augrc")


def two_scores(rng: np.random.Generator, n: int, correct: np.ndarray | float = 0) -> dict[str, np.ndarray]:
    return {score: rng.normal(size=n) + correct for score in ("msp", "energy")}


@pytest.fixture(scope="module")
def samples() -> Samples:
    rng = np.random.default_rng(0)
    correct = rng.random(200) < 0.8
    sets = {name: two_scores(rng, n, -1) for name, n in (("far", 90), ("near", 60))}
    shifts = {name: (rng.random(n) < 0.5, two_scores(rng, n)) for name, n in (("fog", 80), ("snow", 50))}
    return Samples(correct, two_scores(rng, 200, correct), sets, {}, shifts=shifts)


def mean_interval(values: Mapping[str, np.ndarray]) -> list[float]:
    """Interval of the mean over sets."""
    return list(interval(np.mean(list(values.values()), axis=0)[:, AUGRC])[:2])


def test_every_score_and_difference_has_an_interval_in_every_setting(samples: Samples) -> None:
    report = evaluate_samples(samples, EvaluationOptions(mix=Mix("all"), seed=3, resamples=150)).report
    assert (report["bootstrap"]["resamples"], report["bootstrap"]["baseline"]) == (150, "msp")
    keys = {"old_fd", "shift/fog", "shift/snow", "shift"}
    keys |= {f"{kind}{name}" for kind in ("ood", "new_fd") for name in ("", "/far", "/near")}
    assert set(report["intervals"]) == set(report["differences"]) == set(report["settings"]) == keys
    for key, by_score in report["settings"].items():
        for score, values in by_score.items():
            for metric, value in values.items():
                low, high = report["intervals"][key][score][metric]
                # Percentile intervals hold the value itself except by a bias of resampling.
                slack = 0.5 * (high - low) + 1e-12
                assert low - slack <= value <= high + slack, (key, score, metric)
        assert set(report["differences"][key]) == {"energy"}
        value, low, high = report["differences"][key]["energy"]["aurc"]
        assert value == by_score["energy"]["aurc"] - by_score["msp"]["aurc"]
        assert low < high


def test_the_mean_over_sets_is_that_of_each_resample(samples: Samples) -> None:
    report = evaluate_samples(samples, EvaluationOptions(mix=Mix("all"), seed=3, resamples=150)).report
    of_sets = {}
    for stream, (name, scores) in enumerate(samples.ood_scores.items()):
        both = np.concatenate((samples.id_scores["msp"], scores["msp"]))
        success = np.concatenate((samples.correct, np.zeros(len(scores["msp"]))))
        n_ood = len(scores["msp"])
        of_sets[name] = bootstrap({"s": both}, success, n_ood, resamples=150, seed=3, stream=stream)["s"]
    assert report["intervals"]["new_fd"]["msp"]["augrc"] == pytest.approx(mean_interval(of_sets))
    shifts = {
        name: bootstrap(scores, correct, resamples=150, seed=3) for name, (correct, scores) in samples.shifts.items()
    }
    for name, values in shifts.items():
        want = list(interval(values["msp"][:, AUGRC])[:2])
        assert report["intervals"][f"shift/{name}"]["msp"]["augrc"] == pytest.approx(want)
    differences = {name: values["energy"] - values["msp"] for name, values in shifts.items()}
    assert report["differences"]["shift"]["energy"]["augrc"][1:] == pytest.approx(mean_interval(differences))


def test_metrics_that_no_resample_defines_have_no_interval() -> None:
    samples = Samples(np.ones(30, bool), {"msp": np.ones(30)}, {}, {})
    report = evaluate_samples(samples, EvaluationOptions(resamples=20)).report
    assert report["tied_share"]["old_fd"]["msp"] == 1
    assert report["intervals"]["old_fd"]["msp"]["aurc"] == [0, 0]
    assert np.isnan(report["intervals"]["old_fd"]["msp"]["auroc"]).all()
    assert report["bootstrap"]["undefined_share"]["old_fd"]["auroc"] == 1
