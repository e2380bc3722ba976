"""The threshold's guarantee by simulation, its bound against SciPy, and the exported module."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tal_fast.evaluation import selective as calibrate
from tal_fast.evaluation.selective import NoThreshold, SelectiveClassifier, choose_threshold, lower_limit, upper_limit
from tal_fast.runs.load import load_run
from tal_fast.scores.logits import SCORES
from tests.helpers.evaluation import make_run

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
    # At most delta, but for what 1,000 draws can show: one in 10,000 correct methods would fail.
    assert violations <= scipy.stats.binom.ppf(0.9999, 1000, delta)
    # And it is no empty promise: the lowest thresholds within the risk cover 0.84, 0.84 and 0.43.
    assert len(coverage) > 800
    assert np.mean(coverage) > {400: 0.5, 3000: 0.24}[n]


def test_all_candidates_hold_at_once_where_the_risk_sits_on_the_edge() -> None:
    # Every threshold has the same risk, exactly the one that must be rejected: the hardest case for the union bound.
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
def test_limits_are_clopper_and_pearsons(errors: int, more: int, delta: float) -> None:
    n = errors + more
    want = scipy.stats.binomtest(errors, n).proportion_ci(1 - 2 * delta, "exact")
    assert float(upper_limit(errors, n, delta)) == pytest.approx(want.high, abs=1e-9)
    assert lower_limit(errors, n, delta) == pytest.approx(want.low, abs=1e-9)
    # By the definition: at the limit, so few errors have probability delta.
    assert scipy.stats.binom.cdf(errors, n, float(upper_limit(errors, n, delta))) == pytest.approx(delta, rel=1e-6)


def test_limits_at_the_ends() -> None:
    assert upper_limit([3, 0], [3, 0], 0.05).tolist() == [1, 1]
    assert lower_limit(0, 10, 0.05) == 0
    assert float(upper_limit(0, 59, 0.05)) == pytest.approx(1 - 0.05 ** (1 / 59))


def test_chosen_by_the_binomial_tail() -> None:
    # 100 right, surest first, then 20 wrong, so that the first r accepted have max(0, r - 100) errors.
    scores, correct = np.arange(120, 0, -1), np.arange(120) < 100
    found = choose_threshold(scores, correct, risk=0.2, confidence=0.9)
    ranks = calibrate.candidate_ranks(120, 0.2, 0.1)
    assert (len(ranks), ranks[-1], found.candidates) == (13, 120, 13)
    # The fewest that could qualify: 0.8^22 is the first power below 0.1 / 13.
    assert ranks[0] == 22
    tail = scipy.stats.binom.cdf(np.maximum(ranks - 100, 0), ranks, 0.2)
    assert found.accepted == ranks[tail <= 0.1 / 13].max()
    assert 100 <= found.accepted < 120
    assert found.errors == found.accepted - 100
    assert (scores > found.threshold).sum() == found.accepted
    assert scipy.stats.binom.cdf(found.errors, found.accepted, found.bound) == pytest.approx(0.1 / 13)
    assert found.coverage == found.accepted / 120
    everything = choose_threshold(scores, np.ones(120), risk=0.2)
    assert (everything.threshold, everything.coverage) == (-math.inf, 1)


def test_ties_are_all_in_or_all_out() -> None:
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
def test_order_and_monotone_maps_do_not_matter(random: Any, n: int) -> None:
    rng = np.random.default_rng(random.randrange(2**32))
    scores = rng.integers(0, 30, n).astype(float)
    correct = rng.random(n) < 0.6 + scores / 75
    order = rng.permutation(n)
    results = []
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
        (np.arange(900), np.arange(900) % 2, {"risk": 0.02}, NoThreshold, "the lowest bound is"),
        ([], [], {"risk": 0.02}, NoThreshold, "0 held-out samples are too few"),
        ([1, 2], [1, 0], {"risk": 0}, ValueError, "risk must lie in (0, 1), not 0"),
        ([1, 2], [1, 0], {"risk": 0.1, "confidence": 1}, ValueError, "confidence must lie in (0, 1), not 1"),
        ([1, 2, 3], [1, 0], {"risk": 0.1}, ValueError, "they must match"),
        ([1, float("nan")], [1, 0], {"risk": 0.1}, ValueError, "1 NaN of 2"),
    ],
)
def test_refusals(scores: Any, correct: Any, options: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind) as refusal:
        choose_threshold(scores, correct, **options)
    assert message in str(refusal.value)
    assert (type(refusal.value) is NoThreshold) == (kind is NoThreshold)


def test_so_many_samples_as_the_refusal_says_do() -> None:
    with pytest.raises(NoThreshold, match="hold out about") as refusal:
        choose_threshold(np.arange(50), np.ones(50), risk=0.02)
    needed = int(str(refusal.value).split("hold out about ")[1].split(",")[0])
    assert choose_threshold(np.arange(needed), np.ones(needed), risk=0.02).coverage == 1
    assert needed < 300


def test_split_is_a_partition_that_the_seed_decides() -> None:
    held_out, rest = calibrate.split_samples(101, 0.4, 3)
    assert (held_out.size, rest.size) == (40, 61)
    assert sorted([*held_out, *rest]) == list(range(101))
    assert calibrate.split_samples(101, 0.4, 3)[0].tolist() == held_out.tolist()
    assert calibrate.split_samples(101, 0.4, 4)[0].tolist() != held_out.tolist()
    assert calibrate.split_samples(5, 1, 0)[1].size == 0
    for share in (0, 1.1, -0.5):
        with pytest.raises(ValueError, match="calibration share must lie in"):
            calibrate.split_samples(5, share, 0)


@pytest.mark.parametrize("score", SCORES)
def test_torch_scores_are_the_scores(score: str) -> None:
    z = 5 * torch.randn(40, 7, dtype=torch.float64)
    z[0] = 0
    z[1] = torch.tensor([900.0, -900, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(calibrate.TORCH_SCORES[score](z).numpy(), SCORES[score](z), rtol=1e-12, atol=1e-12)
    assert set(calibrate.TORCH_SCORES) == set(SCORES)


def sure_run(folder: Path) -> Path:
    """A run whose model is right on many images: its last layer is fitted to the validation features."""
    make_run(folder)
    path = folder / "checkpoints" / "best.pt"
    content = torch.load(path, weights_only=True)
    run = load_run(folder)
    images, labels, _ = next(iter(run.data.loader("val", batch_size=1000)))
    with torch.no_grad():
        _, features = run.model(images)
    design = torch.cat((features, torch.ones(len(features), 1)), 1).double()
    solution = torch.linalg.lstsq(design, torch.nn.functional.one_hot(labels, 10).double()).solution.float()
    names = [name for name in content["model"] if content["model"][name].shape in ((10, features.shape[1]), (10,))]
    content["model"][names[-2]], content["model"][names[-1]] = solution[:-1].T.contiguous(), solution[-1].contiguous()
    torch.save(content, path)
    return folder


def test_a_run_from_threshold_to_exported_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sure_run(tmp_path / "run")
    arguments = ["--run", str(folder), "--risk", "0.7", "--confidence", "0.9", "--device", "cpu", "--seed", "1"]
    assert calibrate.main([*arguments, "--score", "max-logit", "--calibration-share", "0.6"]) == 0
    printed = capsys.readouterr().out
    about = json.loads((folder / "calibrated" / "threshold.json").read_text())
    assert (about["score"], about["samples"], about["test"]["samples"]) == ("max_logit", 600, 400)
    assert f"accept max_logit > {about['threshold']:.10g}" in printed
    assert "on the other 400: coverage" in printed
    run = load_run(folder)
    images, labels, _ = next(iter(run.data.loader("val", batch_size=1000)))
    module = torch.export.load(folder / "calibrated" / "selective.pt2").module()
    prediction, confidence, accept = module(images)
    assert (prediction.dtype, confidence.dtype, accept.dtype) == (torch.int64, torch.float64, torch.bool)
    with torch.no_grad():
        logits, _ = run.model(images)
    torch.testing.assert_close(prediction, logits.argmax(1))
    np.testing.assert_allclose(confidence.numpy(), SCORES["max_logit"](logits), rtol=1e-5)
    held_out, rest = calibrate.split_samples(1000, 0.6, 1)
    # The sample at the threshold itself may round to either side in another batch.
    assert abs(int(accept[held_out].sum()) - about["accepted"]) <= 1
    assert abs(int(accept[rest].sum()) - about["test"]["accepted"]) <= 1
    assert 0 < about["accepted"] < 600
    wrong = (prediction != labels)[held_out][accept[held_out]]
    assert abs(int(wrong.sum()) - about["errors"]) <= 1
    # Any batch size, and the state dict alone.
    torch.testing.assert_close(module(images[:1])[1], confidence[:1], rtol=1e-5, atol=1e-6)
    rebuilt = SelectiveClassifier(load_run(folder).model, "max_logit", 0.0)
    rebuilt.load_state_dict(torch.load(folder / "calibrated" / "selective.pt", weights_only=True))
    assert rebuilt.threshold.item() == about["threshold"]
    torch.testing.assert_close(rebuilt.eval()(images)[1], confidence, rtol=1e-5, atol=1e-6)


def test_npz(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(5, size=2000)
    logits = rng.normal(size=(2000, 5))
    logits[np.arange(2000), labels] += 2.5
    path = tmp_path / "o.npz"
    np.savez(path, logits=logits, labels=labels)
    assert calibrate.main(["--npz", str(path), "--risk", "0.02", "--score", "msp"]) == 0
    about = json.loads((tmp_path / "o-calibrated" / "threshold.json").read_text())
    held_out, rest = calibrate.split_samples(2000, 0.5, 0)
    right, scores = logits.argmax(1) == labels, SCORES["msp"](logits)
    want = choose_threshold(scores[held_out], right[held_out], risk=0.02)
    assert (about["threshold"], about["accepted"], about["bound"]) == (want.threshold, want.accepted, want.bound)
    accept = scores[rest] > want.threshold
    assert about["test"]["risk"] == pytest.approx(1 - right[rest][accept].mean())
    low, high = about["test"]["risk_interval"]
    assert low <= about["test"]["risk"] <= high
    assert calibrate.main(["--npz", str(path), "--risk", "0.9", "--score", "msp", "--calibration-share", "1"]) == 0
    everything = json.loads((tmp_path / "o-calibrated" / "threshold.json").read_text())
    assert everything["threshold"] is None
    assert "test" not in everything
    assert "accept every prediction" in capsys.readouterr().out


def test_refusals_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "o.npz"
    np.savez(path, logits=np.random.default_rng(0).normal(size=(800, 5)), labels=np.zeros(800, int))
    out = tmp_path / "o-calibrated"
    for arguments, code, message in (
        (["--score", "msp", "--risk", "0.02"], 1, "refused: no threshold keeps the risk within 0.02"),
        (["--score", "msp", "--risk", "0.0001"], 1, "refused: 400 held-out samples are too few"),
        (["--risk", "0.02"], 2, "error: an .npz names no score of its own"),
        (["--score", "knn", "--risk", "0.02"], 2, "error: unknown score 'knn'"),
        (["--score", "msp", "--risk", "2"], 2, "error: risk must lie in (0, 1), not 2"),
        (["--score", "msp", "--risk", "0.02", "--seed", "-1"], 2, "--seed at least 0"),
    ):
        assert calibrate.main(["--npz", str(path), *arguments]) == code
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
        assert not out.exists()


class Branching(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) if images.sum().item() > 0 else -images.flatten(1)


def test_a_model_that_cannot_be_exported_keeps_its_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torch.export cannot take the model"):
        calibrate.export(SelectiveClassifier(Branching(), "msp", 0.5), torch.ones(2, 1, 2, 2), tmp_path)
    assert torch.load(tmp_path / "selective.pt", weights_only=True)["threshold"].item() == 0.5
    with pytest.raises(ValueError, match="unknown score 'knn'"):
        SelectiveClassifier(Branching(), "knn", 0.5)
