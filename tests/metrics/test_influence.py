"""Influences against derivatives by leaving samples out, and against a bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from tal_fast.metrics.failure import CONVENTIONS, METRICS, failure_metrics
from tal_fast.metrics.influence import influence

pytestmark = pytest.mark.filterwarnings("error")
SMOOTH = [j for j, metric in enumerate(METRICS) if metric not in ("fpr95", "tnr95")]


def case(n: int, decimals: int, seed: int = 0, errors: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    correct = rng.random(n) >= errors
    return np.round(rng.normal(size=n) + 1.5 * correct, decimals), correct.astype(int)


def values(scores: np.ndarray, correct: np.ndarray, convention: str = "tal_fast") -> np.ndarray:
    found = failure_metrics(scores, correct, convention)
    return np.array([found[metric] for metric in METRICS])


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_influences_are_the_changes_without_a_sample(decimals: int) -> None:
    scores, correct = case(301, decimals)
    n, k = correct.size, int((1 - correct).sum())
    got = influence(scores, correct)
    got = got / np.sqrt(np.where(correct, (n - k) / (n - k - 1), k / (k - 1)))[:, None]
    without = np.stack([values(np.delete(scores, i), np.delete(correct, i)) for i in range(n)])
    changes = (values(scores, correct) - without) * (n - 1) / n
    for j in SMOOTH:
        assert np.corrcoef(got[:, j], changes[:, j])[0, 1] > 0.998, METRICS[j]
        assert np.linalg.norm(got[:, j]) == pytest.approx(np.linalg.norm(changes[:, j]), rel=0.06), METRICS[j]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_variances_are_those_of_a_bootstrap(convention: str) -> None:
    """Errors and OOD samples included, which are resampled among themselves."""
    scores, correct = case(600, 9, errors=0.1)
    correct[-200:] = 0
    scores[-200:] -= 0.5
    rng = np.random.default_rng(1)
    drawn = [np.r_[rng.integers(400, size=400), rng.integers(400, 600, size=200)] for _ in range(600)]
    spread = np.std([values(scores[i], correct[i], convention) for i in drawn], axis=0)
    got = np.sqrt((influence(scores, correct, 200, convention) ** 2).sum(0))
    for j, metric in enumerate(METRICS):
        slack = 0.25 if metric in ("fpr95", "tnr95") else 0.15
        assert got[j] == pytest.approx(spread[j], rel=slack), metric


def test_each_kind_of_sample_sums_to_zero() -> None:
    scores, correct = case(100, 1)
    correct[-30:] = 0
    got = influence(scores, correct, 30)
    np.testing.assert_allclose(got[-30:].sum(0), 0, atol=1e-12)
    # An increasing map of the scores, and another order of the samples, change nothing.
    order = np.random.default_rng(0).permutation(70)
    order = np.r_[order, np.arange(70, 100)]
    np.testing.assert_allclose(influence(np.exp(scores)[order], correct[order], 30), got[order], atol=1e-12)


def test_undefined_metrics_and_tiny_sets() -> None:
    assert influence([], []).shape == (0, len(METRICS))
    right, wrong = influence([1.0, 2.0], [1, 1]), influence([1.0], [0])
    undefined = np.isnan(right).all(0), np.isnan(wrong).all(0)
    assert [m for m, gone in zip(METRICS, undefined[0], strict=True) if gone] == [
        "auroc",
        "fpr95",
        "tnr95",
        "aupr_error",
    ]
    assert [m for m, gone in zip(METRICS, undefined[1], strict=True) if gone] == [
        "auroc", "fpr95", "tnr95", "aupr_success"
    ]  # fmt: skip
    assert not np.nan_to_num(right).any()
    with pytest.raises(ValueError, match=r"n_ood must lie in 0\.\.2"):
        influence([1.0, 2.0], [1, 0], 3)
    with pytest.raises(ValueError, match="unknown convention 'x'"):
        influence([1.0, 2.0], [1, 0], convention="x")
