"""Tests of the further metrics: normalised, achievable, balanced, by cost, and operating points."""

import itertools
import math

import numpy as np
import pytest

from tal_fast.metrics.failure import aurc_floor, failure_metrics
from tal_fast.metrics.further import further_metrics, operating_point


def random_case(levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and outcomes."""
    rng = np.random.default_rng()
    n = int(rng.integers(2, 40))
    correct = (rng.random(n) < rng.random()).astype(int)
    correct[:2] = 0, 1
    return rng.integers(0, levels, n) / 8, correct


def groups(scores: np.ndarray) -> list[np.ndarray]:
    """Which samples each distinct threshold keeps, from the highest."""
    return [scores >= threshold for threshold in np.unique(scores)[::-1]]


@pytest.mark.parametrize("levels", [3, 1000])
def test_normalised_and_excess(levels: int) -> None:
    scores, correct = random_case(levels)
    values, plain = further_metrics(scores, correct), failure_metrics(scores, correct)
    n, errors = len(scores), int((1 - correct).sum())
    floor = aurc_floor(n, errors)
    assert values["naurc"] == pytest.approx((plain["aurc"] - floor) / (errors / n - floor))
    assert values["eaugrc"] == pytest.approx((1 - plain["auroc"]) * errors / n * (1 - errors / n))


def test_normalised_by_hand() -> None:
    # AURC of the best order of one error in four is 1/16, of the worst 25/48, and of chance 1/4.
    assert further_metrics([4, 3, 2, 1], [1, 1, 1, 0])["naurc"] == 0
    assert further_metrics([4, 3, 2, 1], [0, 1, 1, 1])["naurc"] == pytest.approx((25 / 48 - 1 / 16) / (1 / 4 - 1 / 16))
    assert further_metrics([1, 1, 1, 1], [0, 1, 1, 1])["naurc"] == pytest.approx(1)


@pytest.mark.parametrize("levels", [3, 1000])
def test_achievable_is_the_least_area_of_mixtures_of_thresholds(levels: int) -> None:
    scores, correct = random_case(levels)
    n = len(scores)
    points = [(0, 0), *((int(kept.sum()), int((1 - correct)[kept].sum())) for kept in groups(scores))]
    # Errors of the best mixture of two thresholds at each coverage, on a fine grid.
    coverage = np.linspace(0, n, 40 * n + 1)[1:]
    errors = np.full(coverage.size, np.inf)
    for (c0, e0), (c1, e1) in itertools.combinations(points, 2):
        inside = (coverage >= c0) & (coverage <= c1)
        errors[inside] = np.minimum(errors[inside], (e0 + (e1 - e0) * (coverage - c0) / (c1 - c0))[inside])
    assert further_metrics(scores, correct)["aurc_achievable"] == pytest.approx(np.mean(errors / coverage), abs=0.02)


def test_achievable_by_hand() -> None:
    # Thresholds keep 2, 3 and 4 samples with 0, 1 and 1 errors; 3 is not on the hull. From 2 to 4 errors rise by 1/2
    # per sample: the integral of (c - 2) / 2 / c is 1 - ln 2.
    values = further_metrics([3, 3, 2, 1], [1, 1, 0, 1])
    assert values["aurc_achievable"] == pytest.approx((1 - math.log(2)) / 4)
    assert further_metrics([2, 1], [0, 0])["aurc_achievable"] == 1
    assert further_metrics([2, 1], [1, 1])["aurc_achievable"] == 0


@pytest.mark.parametrize("levels", [3, 1000])
def test_balanced_over_the_classes(levels: int) -> None:
    scores, correct = random_case(levels)
    labels = np.random.default_rng().integers(0, 4, len(scores))
    values = further_metrics(scores, correct, labels=labels)
    n, present = len(scores), np.unique(labels)
    risk, rejected = [], []
    for kept in groups(scores):
        rates = [1 - correct[kept & (labels == c)].mean() if (kept & (labels == c)).any() else 0 for c in present]
        risk.append(np.mean(rates))
        rejected.append(np.mean([(1 - correct)[kept & (labels == c)].sum() / (labels == c).sum() for c in present]))
    ends = np.array([0, *(kept.sum() for kept in groups(scores))]) / n
    for name, heights in (("balanced_aurc", [risk[0], *risk]), ("balanced_augrc", [0, *rejected])):
        area = sum((b - a) * (x + y) / 2 for (a, b), (x, y) in zip(
            itertools.pairwise(ends), itertools.pairwise(heights), strict=True,
        ))  # fmt: skip
        assert values[name] == pytest.approx(area)


def test_losses() -> None:
    scores, correct = random_case(5)
    plain, values = failure_metrics(scores, correct), further_metrics(scores, correct, loss=7 * (1 - correct))
    assert (values["cost_aurc"], values["cost_augrc"]) == pytest.approx((7 * plain["aurc"], 7 * plain["augrc"]))
    # The loss of the first two is 1 + 0 or 1 + 4, by the order of the tied pair.
    values = further_metrics([2, 1, 1], [0, 1, 0], loss=[1, 0, 4])
    assert values["cost_aurc"] == pytest.approx((1 + (1 / 2 + 5 / 2) / 2 + 5 / 3) / 3)
    assert values["cost_augrc"] == pytest.approx(((0 + 1) / 2 + (1 + 5) / 2 * 2) / 9)


def test_without_errors_successes_or_samples() -> None:
    assert np.isnan(further_metrics([1, 2], [1, 1])["naurc"])
    assert np.isnan(further_metrics([1, 2], [0, 0])["naurc"])
    assert all(np.isnan(value) for value in further_metrics([], [], []).values())
    assert np.isnan(operating_point([], [], "coverage@risk", 0.1)).all()


def test_operating_points_by_hand() -> None:
    scores, correct = np.arange(100, 0, -1), np.ones(100, int)
    correct[[49, 89, 99]] = 0
    assert operating_point(scores, correct, "coverage@risk", 0.02)[0] == 0.89
    assert operating_point(scores, correct, "coverage@risk", 0.03)[0] == 1
    assert operating_point(scores, 1 - correct, "coverage@risk", 0.02)[0] == 0
    value, low, high = operating_point(scores, correct, "risk@coverage", 0.6)
    # Clopper and Pearson's interval of 1 of 60: where 1 or more, and 1 or fewer, have a probability of 2.5%.
    assert value == 1 / 60
    assert 1 - (1 - low) ** 60 == pytest.approx(0.025)
    assert (1 - high) ** 60 + 60 * high * (1 - high) ** 59 == pytest.approx(0.025)
    tied = np.repeat([3, 2, 1], [30, 50, 20])
    assert operating_point(tied, correct, "risk@coverage", 0.31)[0] == 1 / 80
    assert operating_point(tied, correct, "coverage@risk", 0.02)[0] == 0.8


def test_intervals_of_operating_points_cover() -> None:
    rng, missed = np.random.default_rng(0), np.zeros((2, 2))
    # P(right) = score, uniform in [0.8, 1]: the risk of the most confident share c is c / 10.
    for _ in range(400):
        scores = rng.uniform(0.8, 1, 1000)
        correct = rng.random(1000) < scores
        for row, (kind, limit, true) in enumerate((("coverage@risk", 0.05, 0.5), ("risk@coverage", 0.5, 0.05))):
            _, low, high = operating_point(scores, correct, kind, limit)
            missed[row] += true < low, true > high
    assert (missed <= 20).all(), missed  # 10 are expected of each; more than 20 in 1 of 1,000
    assert missed.sum() >= 8, missed
