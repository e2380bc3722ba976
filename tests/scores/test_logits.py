"""Scores over logits against independent formulas in float64, and where floating point is at its limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from tal_fast.loss import reference
from tal_fast.scores import logits as scores
from tal_fast.scores.logits import SCORES

FORMULAS: dict[str, Callable[[np.ndarray], Any]] = {
    "cosine": lambda z: (z @ np.eye(z.shape[1])[z.argmax(1)].T).diagonal() / (np.linalg.norm(z, axis=1) + 1e-7),
    "msp": lambda z: scipy.special.softmax(z, axis=1).max(1),
    "max_logit": lambda z: np.sort(z, axis=1)[:, -1],
    "energy": lambda z: scipy.special.logsumexp(z, axis=1),
    "neg_entropy": lambda z: -scipy.stats.entropy(scipy.special.softmax(z, axis=1), axis=1),
    "doctor": lambda z: (scipy.special.softmax(z, axis=1) ** 2).sum(1),
}
pytestmark = pytest.mark.filterwarnings("error")


def logits(rows: int = 50, classes: int = 7, scale: float = 4.0) -> np.ndarray:
    return np.random.default_rng(rows + classes).normal(size=(rows, classes)) * scale


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("classes", [1, 2, 7, 1003])
def test_formula(name: str, classes: int) -> None:
    z = logits(classes=classes)
    np.testing.assert_allclose(SCORES[name](z), FORMULAS[name](z), rtol=1e-12, atol=1e-12)


def test_every_score_has_a_formula_here() -> None:
    assert set(SCORES) == set(FORMULAS)


def test_cosine_is_the_losses() -> None:
    z = torch.randn(20, 5, dtype=torch.float64)
    z[0] = 0
    want = z.amax(1) / (z.norm(dim=1) + reference.NORM_EPS)
    np.testing.assert_allclose(scores.cosine(z), want.numpy(), rtol=1e-14)
    assert scores.NORM_EPS == reference.NORM_EPS


@pytest.mark.parametrize("name", SCORES)
def test_types_and_layouts(name: str) -> None:
    z32 = logits().astype(np.float32)
    want = SCORES[name](z32.astype(np.float64))
    for form in (z32, torch.tensor(z32, requires_grad=True), np.asfortranarray(z32), z32.tolist()):
        got = SCORES[name](form)
        assert got.dtype == np.float64
        np.testing.assert_array_equal(got, want)
    low = torch.tensor(z32).bfloat16()
    np.testing.assert_array_equal(SCORES[name](low), SCORES[name](low.double()))
    assert SCORES[name](np.zeros((0, 3))).shape == (0,)


@pytest.mark.parametrize("name", SCORES)
def test_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    z = logits(rows=23)
    whole = SCORES[name](z)
    monkeypatch.setattr(scores, "_BLOCK", 30)
    np.testing.assert_array_equal(SCORES[name](z), whole)


@pytest.mark.parametrize("name", SCORES)
def test_large_logits_stay_finite_and_nan_stays_nan(name: str) -> None:
    z = np.array([[1000.0, -1000.0, 0.0], [-5000.0, -5000.0, -5000.0], [1.0, np.nan, 0.0]])
    got = SCORES[name](z)
    assert np.all(np.isfinite(got[:2]))
    assert np.isnan(got[2])
    assert got[0] > got[1]


def test_scores_that_softmax_decides_ignore_a_shift() -> None:
    z = logits()
    for name in ("msp", "neg_entropy", "doctor"):
        np.testing.assert_allclose(SCORES[name](z + 300), SCORES[name](z), rtol=1e-9)


def test_minus_infinity_masks_a_class() -> None:
    z = np.array([[2.0, 1.0, -np.inf]])
    for name in ("msp", "max_logit", "energy", "neg_entropy", "doctor"):
        np.testing.assert_allclose(SCORES[name](z), SCORES[name](z[:, :2]))


def test_float64_keeps_apart_what_bfloat16_ties() -> None:
    z = torch.tensor([[12.0, 0.0], [12.5, 0.0], [13.0, 0.0]])
    assert len(set(scores.msp(z))) == 3
    assert len(set(torch.softmax(z.bfloat16(), 1).amax(1).tolist())) == 1


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((2, 3, 4)), np.zeros((4, 0))])
def test_refuses_shapes(bad: np.ndarray) -> None:
    for score in SCORES.values():
        with pytest.raises(ValueError, match=r"logits must be \(n, C\)"):
            score(bad)
