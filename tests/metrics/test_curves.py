"""Operating points, histograms and reliability bins."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tal_fast.metrics.calibration import expected_calibration_error
from tal_fast.metrics.curves import OperatingPoints, histograms, oracle_risk, reliability, thinned
from tal_fast.metrics.ranking import risk_coverage_curve


@pytest.mark.parametrize("levels", [3, 7, 10_000])
def test_operating_points_against_every_threshold(levels: int) -> None:
    rng = np.random.default_rng(levels)
    scores = rng.integers(levels, size=301) / levels
    success = rng.random(301) < 0.3 + 0.6 * scores
    found = OperatingPoints(scores, success)
    kept = [(t, scores >= t) for t in np.unique(scores)]
    every = [(k.mean(), 1 - success[k].mean(), t) for t, k in kept]
    for limit in (0.0, 0.01, 0.1, 0.2, 0.3, 1.0):
        fit = [point for point in every if point[1] <= limit + 1e-12]
        point = found.at_risk(limit)
        assert (point is None) == (not fit)
        if point is not None:
            assert point == pytest.approx(max(fit))
    for least in (0.0, 0.5, 0.8, 0.95, 1.0):
        want = max((p for p in every if p[0] >= least - 1e-12), key=lambda p: p[2])
        assert found.at_coverage(least) == pytest.approx(want)


def test_operating_points_without_samples_or_threshold() -> None:
    empty = OperatingPoints([], [])
    assert empty.at_risk(0.5) is None
    assert empty.at_coverage(0.5) is None
    assert OperatingPoints([0.9, 0.1], [0, 0]).at_risk(0.99) is None
    nineteen = OperatingPoints(np.arange(20.0), np.ones(20)).at_coverage(0.95)
    assert nineteen is not None
    assert (nineteen.coverage, nineteen.threshold) == (0.95, 1.0)


def test_oracle_risk_is_the_curve_of_a_perfect_score() -> None:
    success = np.arange(17) % 3 > 0
    np.testing.assert_allclose(oracle_risk(17, 6), risk_coverage_curve(success * 20.0 + np.arange(17), success).risk)


@pytest.mark.parametrize(("n", "points"), [(1, 5), (5, 5), (6, 5), (1000, 40), (123_457, 240)])
def test_thinned_curves_keep_their_ends(n: int, points: int) -> None:
    index = thinned(n, points)
    assert index[0] == 0
    assert index[-1] == n - 1
    assert (np.diff(index) > 0).all()
    assert len(index) <= points + 16


def test_reliability_bins_add_up_to_the_ece() -> None:
    rng = np.random.default_rng(0)
    p = np.append(rng.random(500), [0.0, 1.0, 1 / 15])
    correct = rng.random(503) < p
    bins = reliability(p, correct)
    filled = bins.samples > 0
    gap = np.abs(bins.accuracy - bins.confidence)[filled] * bins.samples[filled]
    assert gap.sum() / 503 == pytest.approx(expected_calibration_error(p, correct))
    assert bins.samples.sum() == 503
    assert math.isnan(reliability([0.5], [1]).accuracy[0])


def test_histograms_share_edges_and_leave_infinity_out() -> None:
    edges, shares = histograms([np.array([0.0, 1.0, np.inf, np.inf]), np.zeros(0), np.full(3, 0.5)], bins=4)
    assert edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert [share.tolist() for share in shares] == [[0.25, 0, 0, 0.25], [0] * 4, [0, 0, 1, 0]]
    assert histograms([np.array([np.inf])])[0].size == 0
