"""Calibration: parts of the samples, thresholds by class and for OOD sets, and the choice of a score."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tal_fast.evaluation.calibration import calibrate, limits_of, parts, score_table, split_samples, with_table
from tal_fast.evaluation.selective import NoThreshold, choose_ood_threshold, choose_threshold


def outcomes(n: int, seed: int, rate: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Scores on (0, 1), and outcomes whose errors grow rarer with the score."""
    rng = np.random.default_rng(seed)
    scores = rng.random(n)
    return scores, rng.random(n) >= rate * (1 - scores) ** 2


def test_the_split_is_a_partition_that_depends_on_the_seed() -> None:
    held_out, rest = split_samples(101, 0.4, 3)
    assert (held_out.size, rest.size) == (40, 61)
    assert sorted([*held_out, *rest]) == list(range(101))
    assert split_samples(101, 0.4, 3)[0].tolist() == held_out.tolist()
    assert split_samples(101, 0.4, 4)[0].tolist() != held_out.tolist()
    assert split_samples(5, 1, 0)[1].size == 0
    for share in (0, 1.1, -0.5):
        with pytest.raises(ValueError, match="calibration share must lie in"):
            split_samples(5, share, 0)


def test_the_samples_that_choose_the_score_take_part_in_neither_bound_nor_test() -> None:
    held_out, pick, test = parts(101, 0.4, 3, selection=True)
    assert held_out.tolist() == split_samples(101, 0.4, 3)[0].tolist()
    assert sorted([*held_out, *pick, *test]) == list(range(101))
    assert (pick.size, test.size) == (30, 31)
    with pytest.raises(ValueError, match="leaves no samples for --score auto"):
        parts(101, 1.0, 3, selection=True)
    scores, correct = outcomes(2000, 0)
    _, about = calibrate(scores, correct, risk=0.05, selection=True)
    assert (about["samples"], about["test"]["samples"]) == (1000, 500)


def test_the_threshold_is_that_of_the_public_function_and_the_test_counts_the_rest() -> None:
    scores, correct = outcomes(3000, 1)
    limit, about = calibrate(scores, correct, risk=0.05, share=0.7, seed=5)
    held_out, rest = split_samples(3000, 0.7, 5)
    want = choose_threshold(scores[held_out], correct[held_out], risk=0.05)
    assert limit == about["threshold"] == want.threshold
    assert (about["accepted"], about["errors"], about["bound"]) == (want.accepted, want.errors, want.bound)
    accept = scores[rest] > limit
    assert about["test"]["accepted"] == accept.sum()
    assert about["test"]["errors"] == (~correct[rest][accept]).sum()


def test_each_class_has_a_threshold_of_its_own_or_accepts_nothing() -> None:
    scores, correct = outcomes(12_000, 2)
    of = np.repeat([0, 1, 2], [6000, 5900, 100])
    correct[of == 1] |= True
    limits, about = calibrate(scores, correct, risk=0.05, share=0.5, predictions=of, classes=4)
    assert about["class_thresholds"] == [limits[0], "all", "none", "none"]
    assert (about["format"], about["threshold"]) == (2, None)
    np.testing.assert_array_equal(limits_of(about), limits)
    held_out, rest = split_samples(12_000, 0.5, 0)
    mine = held_out[of[held_out] == 0]
    # Each of the four classes has a quarter of δ.
    want = choose_threshold(scores[mine], correct[mine], risk=0.05, confidence=1 - 0.05 / 4)
    assert limits[0] == want.threshold
    assert about["accepted"] == (scores[held_out] > np.array(limits)[of[held_out]]).sum()
    assert about["test"]["accepted"] == (scores[rest] > np.array(limits)[of[rest]]).sum()
    assert 0 < about["errors"] < about["accepted"]
    with pytest.raises(NoThreshold, match="no class has a threshold .* needs at least 86 held-out"):
        calibrate(scores[:400], correct[:400], risk=0.05, predictions=np.arange(400) % 20, classes=4)


def test_the_bound_holds_for_all_classes_at_once() -> None:
    # Two classes whose risk is just above the promised one at every threshold: what is accepted violates.
    rng = np.random.default_rng(3)
    of = np.arange(400) % 2
    accepted = 0
    for _ in range(400):
        try:
            calibrate(
                rng.random(400),
                rng.random(400) >= 0.1,
                risk=0.0999999,
                confidence=0.8,
                share=1,
                predictions=of,
                classes=2,
            )
            accepted += 1
        except NoThreshold:
            pass
    assert 10 <= accepted <= 400 * 0.2 + 3.7 * math.sqrt(400 * 0.2 * 0.8)


def test_at_most_the_promised_share_of_an_ood_set_is_accepted() -> None:
    rng = np.random.default_rng(4)
    violations = 0
    for _ in range(1000):
        found = choose_ood_threshold(rng.random(150), risk=0.05, confidence=0.9)
        violations += 1 - found.threshold > 0.05
    # Above: the level of the exact test for 150 samples; below: it is not idle.
    assert 40 <= violations <= 100 + 3.7 * math.sqrt(1000 * 0.1 * 0.9)
    # Three of 150 may be accepted; of four that are tied none is.
    for top, want in ((3, (2.0, 3)), (4, (3.0, 0))):
        tied = choose_ood_threshold(np.repeat([3.0, 2.0, 1.0], [top, 60, 90 - top]), risk=0.05, confidence=0.9)
        assert (tied.threshold, tied.accepted) == want
    scores, correct = outcomes(1000, 5)
    limit, about = calibrate(scores, correct, risk=0.1, ood=rng.random(600))
    assert (about["metric"], about["ood"]["samples"], about["ood_test"]["samples"]) == ("false-accept-ood", 300, 300)
    assert about["accepted"] == (scores[split_samples(1000, 0.5, 0)[0]] > limit).sum()
    assert about["ood"]["accepted"] / 300 < 0.1
    with pytest.raises(NoThreshold, match="20 held-out OOD samples are too few .* hold out about 59"):
        calibrate(scores, correct, risk=0.05, ood=rng.random(40))
    with pytest.raises(ValueError, match="OOD scores has 1 NaN"):
        calibrate(scores, correct, risk=0.05, ood=[1.0, math.nan])
    with pytest.raises(ValueError, match="leave out --per-class or"):
        calibrate(scores, correct, risk=0.05, ood=rng.random(40), predictions=np.zeros(1000, int), classes=1)


def test_the_table_of_scores_has_what_each_achieves_and_the_best_first() -> None:
    good, correct = outcomes(1500, 6)
    scores = {"noise": np.random.default_rng(7).random(1500), "good": good, "reversed": -good}
    rows = score_table(scores, correct, risk=0.03, confidence=0.95)
    assert [row["score"] for row in rows] == ["good", "noise", "reversed"]
    assert rows[0]["coverage"] == choose_threshold(good, correct, risk=0.03).coverage
    assert rows[0]["least_risk"] <= 0.03
    for row in rows:
        at = choose_threshold(scores[row["score"]], correct, risk=row["least_risk"])
        assert at.coverage == row["least_coverage"]


@pytest.mark.parametrize(
    ("share", "risk", "used", "advice"),
    [
        (0.5, 0.03, "on 750 samples that the bound does not use", "recommended: --score good"),
        (1.0, 0.001, "on 1500 samples that the bound does use", "recommended: --score good --risk 0.0"),
    ],
)
def test_a_refusal_recommends_a_score(share: float, risk: float, used: str, advice: str) -> None:
    good, correct = outcomes(1500, 6)
    scores: dict[str, Any] = {"noise": np.random.default_rng(7).random(1500), "good": good}
    text = str(with_table(NoThreshold("no"), scores, correct, risk=risk, confidence=0.95, share=share, seed=0))
    assert text.startswith("no\n")
    assert used in text
    assert advice in text.splitlines()[-1]
    hopeless = with_table(NoThreshold("no"), scores, np.zeros(1500), risk=risk, confidence=0.95, share=share, seed=0)
    assert "recommended: hold out more samples" in str(hopeless)
