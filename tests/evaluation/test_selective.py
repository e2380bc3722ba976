"""Confidence thresholds: their guarantee by simulation, and their bound against SciPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from tal_fast.evaluation.selective import (
    NoThreshold,
    candidate_ranks,
    choose_threshold,
    lower_limit,
    upper_limit,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

# Scores on (0, 1], and the error rate at each; discrete ones make ties.
LEVELS = np.linspace(0.02, 1, 50)


def error_rate(score: Any) -> Any:
    return 0.4 * (1 - score) ** 2 + 0.005


def true_risk(threshold: float, discrete: bool) -> float:
    grid = LEVELS if discrete else np.linspace(0, 1, 100_001)[1:]
    above = grid[grid > threshold]
    return float(error_rate(above).mean()) if above.size else 0.0


@pytest.mark.parametrize(("n", "risk", "discrete"), [(400, 0.1, False), (400, 0.1, True), (3000, 0.03, False)])
def test_the_risk_holds_over_1000_draws(n: int, risk: float, discrete: bool) -> None:
    rng = np.random.default_rng(n)
    violations, coverage, delta = 0, [], 0.1
    for _ in range(1000):
        scores = rng.choice(LEVELS, n) if discrete else rng.random(n)
        correct = rng.random(n) >= error_rate(scores)
        try:
            found = choose_threshold(scores, correct, risk=risk, confidence=1 - delta)
        except NoThreshold:
            continue
        violations += true_risk(found.threshold, discrete) > risk
        coverage.append(found.coverage)
    # More than delta only by the chance of 1,000 draws: a valid method fails once in 10,000 times.
    assert violations <= scipy.stats.binom.ppf(0.9999, 1000, delta)
    # Thresholds are found, and cover much: the lowest thresholds within the risk cover 0.84, 0.84 and 0.43.
    assert len(coverage) > 800
    assert np.mean(coverage) > {400: 0.5, 3000: 0.24}[n]


def test_the_bound_holds_where_every_threshold_is_just_above_the_risk() -> None:
    # Every threshold has the same risk, just above the limit: whatever is accepted violates it.
    rng = np.random.default_rng(0)
    accepted = 0
    for _ in range(1000):
        try:
            choose_threshold(rng.random(500), rng.random(500) >= 0.1, risk=0.0999999, confidence=0.8)
            accepted += 1
        except NoThreshold:
            pass
    assert 20 <= accepted <= scipy.stats.binom.ppf(0.9999, 1000, 0.2)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 60), st.floats(0.001, 0.5))
def test_limits_are_those_of_clopper_and_pearson(errors: int, more: int, delta: float) -> None:
    n = errors + more
    want = scipy.stats.binomtest(errors, n).proportion_ci(1 - 2 * delta, "exact")
    assert float(upper_limit(errors, n, delta)) == pytest.approx(want.high, abs=1e-9)
    assert lower_limit(errors, n, delta) == pytest.approx(want.low, abs=1e-9)
    # By definition: at the limit, at most so many errors have probability delta.
    assert scipy.stats.binom.cdf(errors, n, float(upper_limit(errors, n, delta))) == pytest.approx(delta, rel=1e-6)


def test_limits_at_the_ends() -> None:
    assert upper_limit([3, 0], [3, 0], 0.05).tolist() == [1, 1]
    assert lower_limit(0, 10, 0.05) == 0
    assert float(upper_limit(0, 59, 0.05)) == pytest.approx(1 - 0.05 ** (1 / 59))


def test_the_threshold_is_chosen_by_the_binomial_tail() -> None:
    # 100 correct samples with the highest scores, then 20 wrong: the first r have max(0, r - 100) errors.
    scores, correct = np.arange(120, 0, -1), np.arange(120) < 100
    found = choose_threshold(scores, correct, risk=0.2, confidence=0.9)
    # As far as the tests at the level reached reject, and one sample further none does, even at all of δ.
    tail = scipy.stats.binom.cdf([found.errors, found.errors + 1], [found.accepted, found.accepted + 1], 0.2)
    assert tail[0] <= found.level <= 0.1 + 1e-12
    assert tail[1] > found.level > 0.05
    assert found.errors == found.accepted - 100
    assert (scores > found.threshold).sum() == found.accepted
    assert scipy.stats.binom.cdf(found.errors, found.accepted, found.bound) == pytest.approx(found.level)
    assert found.bound <= 0.2
    assert found.coverage == found.accepted / 120
    everything = choose_threshold(scores, np.ones(120), risk=0.2)
    assert (everything.threshold, everything.coverage) == (-math.inf, 1)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 700), st.sampled_from([0, 3, 12, 50]))
def test_whatever_a_union_bound_over_the_starts_accepts_is_accepted(seed: int, n: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(levels, size=n).astype(float) if levels else rng.random(n)
    risk, delta = float(rng.choice([0.05, 0.1, 0.3])), 1 - 0.9
    correct = rng.random(n) >= rng.choice([0.0, 0.5, 1.5, 3]) * risk * rng.random(n) * 2
    falling = -np.sort(-scores)
    ranks = candidate_ranks(n, risk, delta)
    thresholds = np.append(falling, -np.inf)[ranks]
    accepted = np.array([(scores > t).sum() for t in thresholds], dtype=int)
    errors = np.array([(~correct[scores > t]).sum() for t in thresholds], dtype=int)
    within = accepted[upper_limit(errors, accepted, delta / max(ranks.size, 1)) <= risk * (1 - 1e-9)]
    if within.size:
        assert choose_threshold(scores, correct, risk=risk, confidence=0.9).accepted >= within.max()


@pytest.mark.parametrize("n", [1, 3, 59])
def test_few_samples_are_accepted_only_where_they_suffice(n: int) -> None:
    scores = np.arange(n, 0, -1)
    if n < 59:  # 0.95^59 is the first power below 0.05
        with pytest.raises(NoThreshold, match=f"{n} held-out samples are too few .* hold out about 59"):
            choose_threshold(scores, np.ones(n), risk=0.05)
    else:
        assert choose_threshold(scores, np.ones(n), risk=0.05).accepted == 59
    with pytest.raises(NoThreshold):
        choose_threshold(scores, np.zeros(n), risk=0.05)


def test_the_risk_holds_at_the_boundary_of_saturated_scores() -> None:
    # Half of the samples share the top score, with a risk just above the promised one, and the rest errs more often.
    rng = np.random.default_rng(5)
    accepted = 0
    for _ in range(1000):
        tied = rng.random(120) < 0.5
        correct = rng.random(120) >= np.where(tied, 0.1, 0.2)
        try:
            choose_threshold(np.where(tied, 1.0, rng.random(120)), correct, risk=0.0999999, confidence=0.8)
            accepted += 1
        except NoThreshold:
            pass
    assert 20 <= accepted <= scipy.stats.binom.ppf(0.9999, 1000, 0.2)


def test_tied_samples_are_accepted_or_rejected_together() -> None:
    scores = np.repeat([3.0, 2.0, 1.0], 100)
    correct = np.repeat([1, 1, 0], 100)
    found = choose_threshold(scores, correct, risk=0.05)
    assert found.accepted in (100, 200)
    assert found.accepted == (scores > found.threshold).sum()
    assert found.errors == 0
    with pytest.raises(NoThreshold):
        choose_threshold(np.ones(300), correct, risk=0.05)


@settings(deadline=None, max_examples=50)
@given(st.randoms(use_true_random=False), st.integers(1, 400))
def test_the_order_of_samples_and_monotone_maps_do_not_matter(random: Any, n: int) -> None:
    rng = np.random.default_rng(random.randrange(2**32))
    scores = rng.integers(0, 30, n).astype(float)
    correct = rng.random(n) < 0.6 + scores / 75
    order = rng.permutation(n)
    results: list[Any] = []
    for s, c in ((scores, correct), (scores[order], correct[order]), (np.exp(scores), correct)):
        try:
            found = choose_threshold(s, c, risk=0.2, confidence=0.9)
            results.append((found.accepted, found.errors, found.bound, int((s > found.threshold).sum())))
        except NoThreshold as refusal:
            results.append(str(refusal))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    ("scores", "correct", "options", "kind", "message"),
    [
        (np.arange(50), np.ones(50), {"risk": 0.02}, NoThreshold, "50 held-out samples are too few"),
        (np.arange(900), np.arange(900) % 2, {"risk": 0.02}, NoThreshold, "the lowest bound tried is"),
        ([], [], {"risk": 0.02}, NoThreshold, "0 held-out samples are too few"),
        ([1, 2], [1, 0], {"risk": 0}, ValueError, "risk must lie in (0, 1), not 0"),
        ([1, 2], [1, 0], {"risk": 0.1, "confidence": 1}, ValueError, "confidence must lie in (0, 1), not 1"),
        ([1, 2, 3], [1, 0], {"risk": 0.1}, ValueError, "they must match"),
        ([1, float("nan")], [1, 0], {"risk": 0.1}, ValueError, "1 NaN of 2"),
    ],
)
def test_the_reason_for_a_refusal_is_given(
    scores: Any, correct: Any, options: dict[str, Any], kind: type, message: str
) -> None:
    with pytest.raises(kind) as refusal:
        choose_threshold(scores, correct, **options)
    assert message in str(refusal.value)
    assert (type(refusal.value) is NoThreshold) == (kind is NoThreshold)


def test_the_number_of_samples_that_a_refusal_asks_for_is_enough() -> None:
    with pytest.raises(NoThreshold, match="hold out about") as refusal:
        choose_threshold(np.arange(50), np.ones(50), risk=0.02)
    needed = int(str(refusal.value).split("hold out about ")[1].split(",")[0])
    assert choose_threshold(np.arange(needed), np.ones(needed), risk=0.02).coverage == 1
    assert needed == 149
    with pytest.raises(NoThreshold):
        choose_threshold(np.arange(needed - 1), np.ones(needed - 1), risk=0.02)
