"""Intervals: what they cover, errors that are few or none, and pairs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from bench.intervals import CELLS, POPULATIONS, RESULTS, SHOWN, simulate, table
from tal_fast.metrics.failure import METRICS, failure_metrics
from tal_fast.metrics.influence import influence
from tal_fast.metrics.intervals import evidence, interval
from tal_fast.metrics.settings import Mix, scored_settings

pytestmark = pytest.mark.filterwarnings("error")


def intervals(scores: np.ndarray, correct: np.ndarray) -> dict[str, tuple[float, float]]:
    rows, errors = influence(scores, correct), int(np.sum(1 - np.asarray(correct)))
    values = failure_metrics(scores, correct)
    return {m: interval(m, values[m], rows[:, j], len(rows), errors) for j, m in enumerate(METRICS)}


def test_intervals_cover_the_truth_where_errors_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 errors of 200 on average; percentile intervals of a bootstrap cover 83 to 87% here."""
    monkeypatch.setattr("bench.intervals.LEAST_TRUTH", 200_000)
    row = simulate("saturated", *CELLS[0], draws=200)
    for kind in ("value", "difference"):
        for metric in SHOWN:
            assert row[kind][metric]["covered"] >= 0.9, (kind, metric)
        assert 0.01 < row[kind]["auroc"]["width"] < 0.6


def test_the_documented_coverage_is_that_of_the_results() -> None:
    result = json.loads(RESULTS.read_text())
    assert table(result) in (RESULTS.parents[2] / "docs" / "metrics.md").read_text()
    kinds = [row[kind] for row in result["results"] for kind in ("value", "difference")]
    covered = [cell["covered"] for kind in kinds for cell in kind.values()]
    assert min(covered) > 0.935 - 2 * np.sqrt(0.05 * 0.95 / 4000)
    assert (len(covered), len(result["results"])) == (420, len(POPULATIONS) * len(CELLS))


@pytest.mark.parametrize("population", POPULATIONS)
def test_populations_have_their_error_rate(population: str) -> None:
    success, *scores = POPULATIONS[population](np.random.default_rng(0), 100_000, 0.02)
    assert 1 - success.mean() == pytest.approx(0.02, abs=0.002)
    for score in scores:
        assert failure_metrics(score, success)["auroc"] > 0.7


def test_the_error_rate_has_nearly_its_binomial_interval() -> None:
    # The AURC of a constant score is the error rate, twice its AUGRC.
    found = intervals(np.zeros(400), np.arange(400) >= 80)
    assert found["aurc"] == pytest.approx((0.164, 0.243), abs=0.002)
    assert found["augrc"] == pytest.approx((0.082, 0.122), abs=0.002)
    assert found["auroc"] == (0.5, 0.5)


@pytest.mark.parametrize("n", [1, 2, 100])
def test_no_errors_bound_the_error_rate(n: int) -> None:
    found = intervals(np.arange(float(n)), np.ones(n))
    most = 1 - 0.025 ** (1 / n)  # of the error rate, at 97.5%: 3.6% of 100
    assert found["aurc"] == pytest.approx((0, most))
    assert found["augrc"] == pytest.approx((0, most / 2))
    assert 0 == found["eaurc"][0] < found["eaurc"][1] < most
    assert found["aupr_success"] == pytest.approx((1 - most, 1))
    assert all(math.isnan(end) for m in ("auroc", "fpr95", "tnr95", "aupr_error") for end in found[m])
    for metric in ("aurc", "aupr_success"):
        assert interval(metric, 0.0, np.zeros(n), n, 0, difference=True) == pytest.approx((-most, most))


@pytest.mark.parametrize("n", [1, 2, 100])
def test_nothing_but_errors_bounds_the_success_rate(n: int) -> None:
    found = intervals(np.arange(float(n)), np.zeros(n))
    least = 0.025 ** (1 / n)
    assert found["aurc"] == pytest.approx((least, 1))
    assert found["augrc"] == pytest.approx((least / 2, 0.5))
    assert found["aupr_error"] == pytest.approx((least, 1))


def test_a_perfect_ranking_is_not_certain() -> None:
    found = intervals(np.arange(100.0), np.arange(100) >= 8)
    share = 1 - 0.025 ** (1 / 8)  # of errors at random ranks that eight errors need not show
    assert found["auroc"] == pytest.approx((1 - share / 2, 1))
    assert found["aupr_success"][1] == pytest.approx(found["aupr_error"][1]) == pytest.approx(1)
    assert found["fpr95"][0] < 0.01 < 0.2 < found["fpr95"][1]
    assert found["tnr95"] == pytest.approx((1 - found["fpr95"][1], 1 - found["fpr95"][0]))
    assert found["eaurc"][0] <= failure_metrics(np.arange(100.0), np.arange(100) >= 8)["eaurc"] < found["eaurc"][1]


@pytest.mark.parametrize("errors", [1, 2, 99, 100])
def test_ends_are_ordered_and_possible(errors: int) -> None:
    rng = np.random.default_rng(errors)
    for decimals in (0, 9):
        correct = np.arange(101) >= errors
        scores = np.round(rng.normal(size=101), decimals)
        values = failure_metrics(scores, correct)
        for metric, (low, high) in intervals(scores, correct).items():
            assert low <= values[metric] <= high, metric
            assert metric.startswith("eaurc") or 0 <= low <= high <= 1, metric
    # One error says nothing about the AUROC of others.
    if errors == 1:
        assert intervals(rng.normal(size=101), correct)["auroc"] == pytest.approx((0, 1), abs=1e-9)


def test_pairs_are_narrower_than_each() -> None:
    rng = np.random.default_rng(0)
    correct = rng.random(500) < 0.8
    scores = rng.normal(size=500) + correct
    near = scores + 0.1 * rng.normal(size=500)
    one, two = influence(scores, correct), influence(near, correct)
    j, errors = METRICS.index("auroc"), int(500 - correct.sum())
    low, high = interval("auroc", 0.0, one[:, j] - two[:, j], 500, errors, difference=True)
    single = interval("auroc", 0.75, one[:, j], 500, errors)
    assert high - low < 0.3 * (single[1] - single[0])
    assert interval("auroc", 0.0, one[:, j] - one[:, j], 500, errors, difference=True) == (0, 0)
    narrow = interval("auroc", 0.0, one[:, j] - two[:, j], 500, errors, difference=True, level=0.5)
    assert low < narrow[0] < narrow[1] < high


@pytest.mark.parametrize("level", [0, 1, 95])
def test_levels_outside_0_and_1_are_refused(level: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        interval("aurc", 0.1, np.ones(3), 3, 1, level=level)


def test_the_mean_over_sets_shares_the_id_samples() -> None:
    rng = np.random.default_rng(0)
    correct = rng.random(80) < 0.8
    one = {"s": rng.normal(size=80)}
    far, near = {"s": rng.normal(size=50)}, {"s": rng.normal(size=30)}
    fog, snow = ((rng.random(40) < 0.5, {"s": rng.normal(size=40)}) for _ in range(2))
    settings = scored_settings(correct, one, {"far": far, "near": near}, {"fog": fog, "snow": snow}, Mix())
    found = evidence(settings, "s")
    assert set(found) == {*settings, "ood", "new_fd", "shift"}
    new = found["new_fd"]
    assert (new.n, new.influence.shape) == (60, (160, len(METRICS)))  # the set with the fewest successes
    halves = [found[f"new_fd/{name}"].influence / 2 for name in ("far", "near")]
    np.testing.assert_allclose(new.influence[:80], halves[0][:80] + halves[1][:80])
    np.testing.assert_allclose(new.influence[80:], np.concatenate((halves[0][80:], halves[1][80:])))
    # Shifted sets of equal size are the same images.
    sets = [found[f"shift/{name}"].influence for name in ("fog", "snow")]
    np.testing.assert_allclose(found["shift"].influence, (sets[0] + sets[1]) / 2)
