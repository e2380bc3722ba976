"""Temperature scaling: the minimum of cross-entropy, and the split into held-out samples."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import scipy.special

from tal_fast.scores.temperature import fit_temperature, held_out


def sampled(temperature: float, samples: int = 4000, classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from their softmax at a temperature."""
    rng = np.random.default_rng(1)
    logits = 4 * rng.normal(size=(samples, classes))
    p = scipy.special.softmax(logits / temperature, axis=1)
    return logits, (rng.random((samples, 1)) > p.cumsum(axis=1)).sum(axis=1)


def cross_entropy(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    log_p = scipy.special.log_softmax(logits / temperature, axis=1)
    return float(-log_p[np.arange(len(labels)), labels].mean())


@pytest.mark.parametrize("true", [0.2, 1.0, 7.0])
def test_the_temperature_minimises_cross_entropy(true: float) -> None:
    logits, labels = sampled(true)
    found = fit_temperature(logits, labels)
    want = scipy.optimize.minimize_scalar(
        lambda t: cross_entropy(logits, labels, np.exp(t)), bracket=(-3, 3), tol=1e-12
    )
    assert found == pytest.approx(np.exp(want.x), rel=1e-6)
    assert found == pytest.approx(true, rel=0.1)
    assert all(cross_entropy(logits, labels, found) <= cross_entropy(logits, labels, found * k) for k in (0.99, 1.01))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_temperature_scales_with_logits_of_any_type(scale: float) -> None:
    logits, labels = sampled(2.0)
    want = fit_temperature(logits, labels)
    assert fit_temperature(scale * logits, labels) == pytest.approx(scale * want, rel=1e-8)
    assert fit_temperature(logits.astype(np.float32), labels) == pytest.approx(want, rel=1e-5)


def test_logits_without_a_minimum_are_refused() -> None:
    labels = np.arange(20) % 5
    with pytest.raises(ValueError, match="all 20 held-out samples are classified correctly"):
        fit_temperature(np.eye(5)[labels], labels)
    with pytest.raises(ValueError, match="no more than chance"):
        fit_temperature(-np.eye(5)[labels], labels)
    with pytest.raises(ValueError, match="no more than chance"):
        fit_temperature(np.zeros((20, 5)), labels)
    with pytest.raises(ValueError, match="a temperature needs samples"):
        fit_temperature(np.zeros((0, 5)), np.zeros(0, int))


def test_held_out_samples_and_the_rest_are_a_partition() -> None:
    fit, rest = held_out(100, 0.3, seed=4)
    assert (len(fit), len(rest)) == (30, 70)
    assert sorted([*fit, *rest]) == list(range(100))
    assert held_out(100, 0.3, seed=5)[0].tolist() != fit.tolist()
    with pytest.raises(ValueError, match=r"a share of 0\.1 of 3 samples leaves 0 to fit a temperature on"):
        held_out(3, 0.1)
