"""Tests of DS-AURC and DS-F1."""

import itertools

import numpy as np
import pytest

from tal_fast.metrics import joint
from tal_fast.metrics.failure import failure_metrics
from tal_fast.metrics.joint import binned_joint_metrics, joint_metrics


def brute_force(s_id, s_ood, success, n_ood: int) -> tuple[float, float]:
    """DS-AURC and DS-F1 by every pair of thresholds."""
    n_id = len(success) - n_ood
    least, f1 = np.ones(n_id), 0.0
    for a in np.unique(s_id):
        for b in np.unique(s_ood):
            kept = (s_id >= a) & (s_ood >= b)
            right, total = int(success[kept].sum()), int(kept.sum())
            if total:
                ids = int(kept[:n_id].sum())
                least[:ids] = np.minimum(least[:ids], 1 - right / total)
                f1 = max(f1, 2 * right / (total + n_id))
    return float(least.mean()), f1


def random_case(seed: int, n_id: int, n_ood: int, levels: int) -> tuple:
    rng = np.random.default_rng(seed)
    success = np.append(rng.random(n_id) < rng.random(), np.zeros(n_ood)).astype(int)
    s_id, s_ood = rng.integers(0, levels, (2, n_id + n_ood)) / levels
    if seed % 2:  # scores that tell something
        s_id, s_ood = (s_id + success) / 2, s_ood + (np.arange(n_id + n_ood) < n_id) / 2
    return s_id, s_ood, success, n_ood


@pytest.mark.parametrize("levels", [2, 7, 1000])
@pytest.mark.parametrize("whole", [2, 3, 16])
def test_every_pair_of_thresholds_is_searched(levels: int, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "_WHOLE", whole)
    rng = np.random.default_rng()
    for _ in range(10):
        case = random_case(int(rng.integers(1 << 30)), int(rng.integers(1, 30)), int(rng.integers(0, 30)), levels)
        assert tuple(joint_metrics(*case).values()) == pytest.approx(brute_force(*case), abs=1e-12), case


def test_larger_samples_are_halved_to_the_same_values() -> None:
    case = random_case(3, 150, 120, 1000)
    assert tuple(joint_metrics(*case).values()) == pytest.approx(brute_force(*case), abs=1e-12)


def test_by_hand() -> None:
    # Right, wrong, right, OOD. The first score leaves the wrong one last, the second the OOD sample.
    success, s_id, s_ood = [1, 0, 1, 0], [4, 1, 3, 2], [4, 3, 2, 1]
    # Two of three ID samples without an error; three keep the wrong one: (0 + 0 + 1/3) / 3.
    assert tuple(joint_metrics(s_id, s_ood, success, 1).values()) == pytest.approx((1 / 9, 2 * 2 / (2 + 3)))
    # The first score alone keeps the OOD sample before the wrong one: (0 + 0 + 2/4) / 3.
    assert joint_metrics(s_id, [0, 0, 0, 0], success, 1)["ds_aurc"] == pytest.approx(1 / 6)
    assert joint_metrics(s_id, [-np.inf, np.inf, 0, -np.inf], success, 1)["ds_aurc"] == pytest.approx(1 / 6)


def test_never_above_the_aurc_of_the_first_score() -> None:
    rng = np.random.default_rng(0)
    success = (rng.random(300) < 0.8).astype(int)
    s_id = rng.random(300) + success
    found = joint_metrics(s_id, rng.random(300), success)
    assert found["ds_aurc"] <= failure_metrics(s_id, success)["aurc"]


def authors(s_id, s_ood, success, n_ood: int) -> tuple[float, float]:
    """The authors' convention, by each pair of 1,001 thresholds."""
    n_id = len(success) - n_ood
    s_id, s_ood = s_id.astype(np.float32), s_ood.astype(np.float32)
    s_ood = (s_ood - s_ood.min()) / (s_ood.max() - s_ood.min())
    points, f1 = {}, 0.0
    grid = np.linspace(0, 1, 1001, dtype=np.float32)
    for a in grid:
        kept = (s_id >= a) & (s_ood >= grid[:, None])
        total, right, ids = kept.sum(1), (kept & (success == 1)).sum(1), kept[:, :n_id].sum(1)
        f1 = max(f1, float((2 * right / (total + n_id)).max()))
        for i, r in zip(ids, 1 - right / np.maximum(total, 1), strict=True):
            points[int(i)] = min(points.get(int(i), 1.0), float(r))
    heights = []
    for b in range(100):
        risks = [[r for i, r in points.items() if 100 * i // n_id == k] for k in range(b, 100)]
        heights.append(next((min(r) for r in risks if r), 1.0))
    return sum((x + y) / 2 for x, y in itertools.pairwise(heights)) / 100, f1


@pytest.mark.parametrize(("n_id", "n_ood", "levels"), [(37, 12, 11), (230, 40, 997), (5, 0, 3)])
def test_convention_of_the_authors(n_id: int, n_ood: int, levels: int) -> None:
    case = random_case(n_id, n_id, n_ood, levels)
    assert tuple(binned_joint_metrics(*case).values()) == pytest.approx(authors(*case), abs=1e-12)


def test_what_has_no_value_or_is_refused() -> None:
    for metrics in (joint_metrics, binned_joint_metrics):
        assert np.isnan([*metrics([], [], []).values()]).all()
        assert np.isnan([*metrics([1], [1], [0], 1).values()]).all()
        with pytest.raises(ValueError, match=r"have \(2, 1, 2\) samples; they must match"):
            metrics([1, 2], [1], [0, 1])
        with pytest.raises(ValueError, match="must be OOD, which are no successes"):
            metrics([1, 2], [1, 2], [0, 1], 1)
        with pytest.raises(ValueError, match="NaN has no rank"):
            metrics([1, np.nan], [1, 2], [0, 1])
    assert joint_metrics([1, 2], [3, 4], [0, 0]) == {"ds_aurc": 1, "ds_f1": 0}
    with pytest.raises(ValueError, match=r"needs s_id in \[0, 1\].*choose msp"):
        binned_joint_metrics([1, 2], [1, 2], [0, 1])
