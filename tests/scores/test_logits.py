"""Logit scores against independent formulas in float64, and where floating point is at its limits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from tal_fast.config.names import LOGIT_SCORES
from tal_fast.loss import reference
from tal_fast.scores import logits as scores
from tal_fast.scores.logits import LOG_GAPS, SCORES

pytestmark = pytest.mark.filterwarnings("error")

FORMULAS: dict[str, Callable[[np.ndarray], Any]] = {
    "cosine": lambda z: (z @ np.eye(z.shape[1])[z.argmax(1)].T).diagonal() / (np.linalg.norm(z, axis=1) + 1e-7),
    "msp": lambda z: scipy.special.softmax(z, axis=1).max(1),
    "max_logit": lambda z: np.sort(z, axis=1)[:, -1],
    "energy": lambda z: scipy.special.logsumexp(z, axis=1),
    "neg_entropy": lambda z: -scipy.stats.entropy(scipy.special.softmax(z, axis=1), axis=1),
    "doctor": lambda z: (scipy.special.softmax(z, axis=1) ** 2).sum(1),
    "margin": lambda z: z.max(1) - second(z),
    "log_gap": lambda z: (
        z.max(1) - scipy.special.logsumexp(np.where(predicted(z), -np.inf, z), axis=1) if z.shape[1] > 1 else np.inf
    ),
    "gen": lambda z: (
        -np.sort((lambda p: p * (p @ (1 - np.eye(p.shape[1]))))(scipy.special.softmax(z, axis=1)))[:, -100:]
        .__pow__(0.1)
        .sum(1)
    ),
}


def predicted(z: np.ndarray) -> np.ndarray:
    """(n, C) bool, True at the predicted class."""
    return np.eye(z.shape[1], dtype=bool)[z.argmax(1)]


def second(z: np.ndarray) -> np.ndarray:
    """(n,) second largest logit, -inf for a single class."""
    return np.sort(z, axis=1)[:, -2] if z.shape[1] > 1 else np.full(len(z), -np.inf)


def logits(rows: int = 50, classes: int = 7, scale: float = 4.0) -> np.ndarray:
    return np.random.default_rng(rows + classes).normal(size=(rows, classes)) * scale


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("classes", [1, 2, 7, 1003])
def test_formula(name: str, classes: int) -> None:
    z = logits(classes=classes)
    np.testing.assert_allclose(SCORES[name](z), FORMULAS[name](z), rtol=1e-12, atol=1e-12)


def test_every_score_has_a_name_for_options_and_a_formula_here() -> None:
    assert tuple(SCORES) == LOGIT_SCORES
    assert set(SCORES) == set(FORMULAS)


def test_cosine_is_that_of_the_loss() -> None:
    z = torch.randn(20, 5, dtype=torch.float64)
    z[0] = 0
    want = z.amax(1) / (z.norm(dim=1) + reference.NORM_EPS)
    torch.testing.assert_close(scores.cosine(z), want, rtol=1e-14, atol=0)
    assert scores.NORM_EPS == reference.NORM_EPS


@pytest.mark.parametrize("name", SCORES)
def test_arrays_lists_and_tensors_have_the_same_scores(name: str) -> None:
    z32 = logits().astype(np.float32)
    want = SCORES[name](z32.astype(np.float64))
    for form in (z32, np.asfortranarray(z32), z32.tolist()):
        got = SCORES[name](form)
        assert got.dtype == np.float64
        np.testing.assert_array_equal(got, want)
    tensor = torch.tensor(z32)
    for form in (tensor, tensor.t().contiguous().t(), tensor.double()):
        got = SCORES[name](form)
        assert (got.dtype, got.device) == (torch.float64, form.device)
        np.testing.assert_array_equal(got.numpy(), want)
    low = tensor.bfloat16()
    assert SCORES[name](low).equal(SCORES[name](low.double()))
    assert SCORES[name](np.zeros((0, 3))).shape == SCORES[name](torch.zeros(0, 3)).shape == (0,)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("classes", [1, 10, 1003, 40_000])
@pytest.mark.parametrize("name", SCORES)
def test_a_rows_score_has_the_same_bits_in_every_batch(name: str, classes: int) -> None:
    z = torch.from_numpy(logits(18, classes, 6.0))
    whole = SCORES[name](z)
    for size in (1, 3, 16):
        assert torch.cat([SCORES[name](part) for part in z.split(size)]).equal(whole), size


@pytest.mark.parametrize("name", SCORES)
def test_blocks_do_not_change_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    z = logits(rows=23)
    whole = SCORES[name](z)
    monkeypatch.setattr(scores, "_BLOCK", 30)
    np.testing.assert_array_equal(SCORES[name](z), whole)


@pytest.mark.parametrize("kind", [np.array, torch.from_numpy])
@pytest.mark.parametrize("shape", [(0, 4), (23, 1), (23, 9), (40, 3001)])
def test_several_scores_in_one_pass_have_the_bits_of_each(kind: Any, shape: tuple[int, int]) -> None:
    z = kind(np.random.default_rng(shape[0] + shape[1]).normal(size=shape) * 9)
    together = scores.logit_scores(z)
    assert list(together) == list(SCORES)
    assert all(np.array_equal(together[name], SCORES[name](z)) for name in SCORES)
    assert all(type(values) is type(z) for values in together.values())
    two = scores.logit_scores(z, ("doctor", "cosine"))
    assert list(two) == ["doctor", "cosine"]
    assert all(np.array_equal(two[name], together[name]) for name in two)
    assert scores.logit_scores(z, ()) == {}


def test_one_pass_takes_each_maximum_and_exponential_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)
        return lambda *args, **options: calls.append(name) or original(*args, **options)  # type: ignore[func-returns-value]

    for name in ("exp", "amax", "log_softmax", "softmax"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    scores.logit_scores(logits(), ("cosine", "msp", "max_logit", "energy", "neg_entropy", "doctor"))
    assert sorted(calls) == ["amax", "exp"]


@pytest.mark.parametrize("name", SCORES)
def test_gradients_are_those_of_the_formula(name: str) -> None:
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SCORES[name], (z,))


@pytest.mark.parametrize("name", SCORES)
def test_large_logits_stay_finite_and_nan_stays_nan(name: str) -> None:
    z = np.array([[1000.0, -1000.0, 0.0], [-5000.0, -5000.0, -5000.0], [1.0, np.nan, 0.0]])
    got = SCORES[name](z)
    assert np.all(np.isfinite(got[:2]))
    assert np.isnan(got[2])
    assert got[0] > got[1]


@pytest.mark.parametrize("name", ["cosine", "log_gap_cosine"])
def test_scores_by_squares_ignore_the_scale_up_to_the_largest_number(name: str) -> None:
    score = {**SCORES, "log_gap_cosine": LOG_GAPS["cosine"]}[name]
    z = np.random.default_rng().normal(size=(5, 7)) * 2.0**100  # beyond where the denominator's constant counts
    want = score(z)
    for exponent in (395, 420, 600, 920):
        np.testing.assert_allclose(score(z * 2.0**exponent), want, rtol=1e-13)
    np.testing.assert_array_equal(score(np.concatenate([z, z * 2.0**900]))[:5], want)  # each row by itself


def test_scores_of_the_softmax_ignore_a_shift() -> None:
    z = logits()
    for name in ("msp", "neg_entropy", "doctor", "margin", "log_gap", "gen"):
        np.testing.assert_allclose(SCORES[name](z + 300), SCORES[name](z), rtol=1e-9)


def test_minus_infinity_masks_a_class() -> None:
    z = np.array([[2.0, 1.0, -np.inf]])
    for name in set(SCORES) - {"cosine"}:
        np.testing.assert_allclose(SCORES[name](z), SCORES[name](z[:, :2]))


@pytest.mark.parametrize("row", [[2.0, 1.0, -np.inf], [np.inf, 1.0, 0.0]])
def test_the_cosine_of_an_infinite_logit_is_nan(row: list[float]) -> None:
    z = np.array([row, [2.0, 1.0, 0.0]])
    for function in (scores.cosine, LOG_GAPS["cosine"]):
        assert np.isnan(function(z)).tolist() == [True, False]
    assert scores.cosine(np.array([[1e200, 0.0, -1e200]]))[0] == pytest.approx(np.sqrt(0.5))


def test_float64_distinguishes_what_bfloat16_ties() -> None:
    z = torch.tensor([[12.0, 0.0], [12.5, 0.0], [13.0, 0.0]])
    assert len(set(scores.msp(z).tolist())) == 3
    assert len(set(torch.softmax(z.bfloat16(), 1).amax(1).tolist())) == 1


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((2, 3, 4)), np.zeros((4, 0))])
def test_other_shapes_are_refused(bad: np.ndarray) -> None:
    for score in SCORES.values():
        for form in (bad, torch.from_numpy(bad)):
            with pytest.raises(ValueError, match=r"logits must be \(n, C\)"):
                score(form)


def exact_log_gap(first: str, row: np.ndarray) -> float:
    """log(s1_max − s1) with 2,000 digits."""
    with mpmath.workdps(2000):
        z = [mpmath.mpf(float(x)) for x in row]
        total = mpmath.fsum(mpmath.exp(x) for x in z)
        p = [mpmath.exp(x) / total for x in z]
        gap = {
            "msp": lambda: 1 - max(p),
            "doctor": lambda: 1 - mpmath.fsum(x**2 for x in p),
            "cosine": lambda: 1 - max(z) / (mpmath.sqrt(mpmath.fsum(x**2 for x in z)) + mpmath.mpf("1e-7")),
            "neg_entropy": lambda: -mpmath.fsum(x * mpmath.log(x) for x in p),
        }[first]()
        return float(mpmath.log(gap))


@pytest.mark.parametrize("name", LOG_GAPS)
def test_log_gaps_keep_their_digits_where_scores_saturate(name: str) -> None:
    rng = np.random.default_rng(1)
    rows = [rng.normal(size=4) * scale for scale in (1e-3, 1, 10, 100, 1000)]
    rows += [np.array([gap, 0.0, 0.0, 0.0]) for gap in (5.0, 15.0, 19.9, 20.1, 25.0, 36.0, 40.0, 800.0, 1500.0)]
    rows += [np.array([-3.0, -4.0, -5.0, -6.0]), np.array([2.0, 2.0, 2.0, 2.0]), np.array([1.0, 1e-9, 0.0, 0.0])]
    got = LOG_GAPS[name](np.array(rows))
    np.testing.assert_allclose(got, [exact_log_gap(name, row) for row in rows], rtol=1e-12, atol=1e-12)


def test_scores_and_metrics_are_imported_without_torch() -> None:
    modules = ("tal_fast.metrics", "tal_fast.scores.features", "tal_fast.scores.temperature", "tal_fast.calibrate")
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
