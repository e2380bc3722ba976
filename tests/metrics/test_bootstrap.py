"""Bootstrap intervals against the metrics of resampled arrays, known distributions, and what must always hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tal_fast.metrics import bootstrap as module
from tal_fast.metrics.bootstrap import BLOCK, bootstrap, interval
from tal_fast.metrics.failure import CONVENTIONS, METRICS, failure_metrics

pytestmark = pytest.mark.filterwarnings("error")


def case(n: int = 200, decimals: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = np.round(rng.beta(4, 2, n), decimals)
    return scores, (rng.random(n) < 0.2 + 0.7 * scores).astype(int)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans(), st.integers(0, 3)), min_size=1, max_size=40))
def test_weighted_metrics_are_the_metrics_of_the_copies(samples: list[tuple[int, bool, int]]) -> None:
    scores, correct, counts = (np.array(column) for column in zip(*samples, strict=True))
    # As many drawn as there are, as in every resample.
    counts[0] += len(counts) - min(counts.sum(), len(counts))
    while counts.sum() > len(counts):
        counts[counts.argmax()] -= 1
    ranked = module._Ranked(scores.astype(float), correct.astype(int))
    got = ranked.metrics(counts[None].astype(np.int32))[0]
    want = failure_metrics(np.repeat(scores, counts), np.repeat(correct, counts))
    np.testing.assert_allclose(got, [want[m] for m in METRICS], rtol=0, atol=1e-12)


@pytest.mark.parametrize("decimals", [0, 1, 2, 9])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_resamples_against_explicit_arrays(decimals: int, convention: str) -> None:
    scores, correct = case(151, decimals)
    found = bootstrap({"s": scores}, correct, 40, resamples=BLOCK + 3, seed=5, convention=convention)["s"]
    assert found.shape == (BLOCK + 3, len(METRICS))
    for block in range(2):
        draws = module._Draws(111, 40, (5, block), 0)
        for row in range(BLOCK * block, min(BLOCK * (block + 1), BLOCK + 3)):
            counts = draws.counts(1)[0]
            assert (counts[:111].sum(), counts[111:].sum()) == (111, 40)
            want = failure_metrics(np.repeat(scores, counts), np.repeat(correct, counts), convention)
            np.testing.assert_allclose(found[row], [want[m] for m in METRICS], rtol=0, atol=1e-12)


def test_resamples_depend_on_nothing_but_the_seed_and_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, correct = case()
    first = bootstrap({"a": scores}, correct, 50, resamples=200, seed=1)["a"]
    monkeypatch.setattr(module, "_THREADS", 1)
    both = bootstrap({"b": -scores, "a": scores}, correct, 50, resamples=300, seed=1)
    np.testing.assert_array_equal(both["a"][:192], first[:192])
    # The batch changes only the order in which NumPy sums.
    monkeypatch.setattr(module, "_BATCH", 1)
    np.testing.assert_allclose(bootstrap({"a": scores}, correct, 50, resamples=200, seed=1)["a"], first, atol=1e-14)
    other = bootstrap({"a": scores}, correct, 50, resamples=200, seed=2)["a"]
    assert not np.array_equal(other, first)
    # The ID draws of another stream are the same, the OOD draws are not.
    streams = [module._Draws(150, 50, (1, 0), stream).counts(9) for stream in (0, 1)]
    np.testing.assert_array_equal(streams[0][:, :150], streams[1][:, :150])
    assert not np.array_equal(streams[0][:, 150:], streams[1][:, 150:])


def test_constant_metrics_have_no_width() -> None:
    scores, correct = case()
    values = bootstrap({"s": scores}, np.ones_like(correct), resamples=20)["s"]
    assert (values[:, METRICS.index("aurc")] == 0).all()
    assert np.isnan(values[:, METRICS.index("auroc")]).all()
    assert interval(values[:, METRICS.index("aurc")])[:2] == (0, 0)
    assert np.isnan(interval(values[:, METRICS.index("auroc")]).low)
    # ID samples are successes and OOD samples errors, each resampled among themselves: the error rate is constant.
    chance = bootstrap({"s": np.zeros(200)}, np.arange(200) < 120, 80, resamples=20)["s"]
    np.testing.assert_allclose(chance[:, METRICS.index("aurc")], 0.4, atol=1e-12)
    assert np.isnan(bootstrap({"s": []}, [], resamples=3)["s"]).all()


def test_the_error_rate_has_its_binomial_interval() -> None:
    # The AURC of a constant score is the error rate.
    correct = np.arange(400) >= 80
    values = bootstrap({"s": np.zeros(400)}, correct, resamples=4000)["s"][:, METRICS.index("aurc")]
    width = np.sqrt(0.2 * 0.8 / 400)
    assert values.mean() == pytest.approx(0.2, abs=4 * width / np.sqrt(4000))
    assert values.std() == pytest.approx(width, rel=0.05)
    low, high, undefined = interval(values)
    assert (low, high) == pytest.approx((0.2 - 1.96 * width, 0.2 + 1.96 * width), abs=0.004)
    assert undefined == 0


def test_intervals_cover_the_truth() -> None:
    # AUROC of N(1, 1) against N(0, 1) is 0.7602; the percentile interval is a little narrow at n = 150.
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        correct = rng.random(150) < 0.5
        scores = rng.normal(size=150) + correct
        values = bootstrap({"s": scores}, correct, resamples=300, seed=int(rng.integers(1000)))["s"]
        low, high, _ = interval(values[:, METRICS.index("auroc")], 0.9)
        inside += low <= 0.76025 <= high
    assert 80 <= inside <= 98


def test_scores_share_their_resamples() -> None:
    scores, correct = case(500)
    near = scores + 1e-3 * np.random.default_rng(1).normal(size=500)
    values = bootstrap({"a": scores, "b": near, "twin": 2 * scores}, correct, resamples=400)
    np.testing.assert_array_equal(values["twin"], values["a"])
    j = METRICS.index("auroc")
    difference = values["b"][:, j] - values["a"][:, j]
    single, paired = interval(values["b"][:, j]), interval(difference)
    assert paired.high - paired.low < 0.2 * (single.high - single.low)
    low, high = np.quantile(difference, [0.025, 0.975])
    assert paired == (pytest.approx(low), pytest.approx(high), 0)


def test_undefined_resamples_are_left_out_and_counted() -> None:
    values = bootstrap({"s": np.arange(20.0)}, np.arange(20) > 0, resamples=2000)["s"]
    found = interval(values[:, METRICS.index("auroc")])
    # The one error is not drawn with probability (19/20)^20.
    assert found.undefined == pytest.approx(0.95**20, abs=0.05)
    assert 0 <= found.low <= found.high <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": {"s": [0.1]}}, "the score s has 1 samples but success has 3"),
        ({"scores": {"s": [0.1, float("nan"), 0.3]}}, "the score s has 1 NaN"),
        ({"resamples": 0}, "resamples must be at least 1, not 0"),
        ({"n_ood": 4}, "n_ood must lie in 0..3"),
        ({"convention": "x"}, "unknown convention 'x'"),
    ],
)
def test_invalid_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"scores": {"s": [0.1, 0.2, 0.3]}, "success": [1, 0, 1], **change}
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        bootstrap(**arguments)
    assert message in str(refusal.value)


@pytest.mark.parametrize("level", [0, 1, 95])
def test_levels_outside_0_and_1_are_refused(level: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        interval([1.0, 2.0], level)
