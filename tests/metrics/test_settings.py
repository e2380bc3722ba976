"""Samples of Old FD, OOD and New FD, and which of them are successes."""

from __future__ import annotations

import numpy as np
import pytest

from tal_fast.metrics.failure import failure_metrics
from tal_fast.metrics.settings import Mix, new_fd, old_fd, ood, scored_settings

ID_SCORES, CORRECT, OOD_SCORES = [0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1], [0.75, 0.2]
ALL = Mix("all")


def test_worked_example() -> None:
    old, out, new = old_fd(CORRECT), ood(CORRECT, 2, ALL), new_fd(CORRECT, 2, ALL)
    values = {
        name: failure_metrics(setting.confidence(ID_SCORES, OOD_SCORES), setting.success)
        for name, setting in {"old": old, "ood": out, "new": new}.items()
    }
    assert values["old"]["aurc"] == pytest.approx(0.145833, abs=1e-6)
    assert values["ood"]["aurc"] == pytest.approx(0.186111, abs=1e-6)
    want = {"aurc": 0.288889, "auroc": 0.777778, "augrc": 0.180556, "fpr95": 0.666667}
    assert {key: values["new"][key] for key in want} == pytest.approx(want, abs=1e-6)


def test_successes_of_each_setting() -> None:
    assert old_fd(CORRECT).success.tolist() == [1, 1, 0, 1]
    assert ood(CORRECT, 2, ALL).success.tolist() == [1, 1, 1, 1, 0, 0]
    assert new_fd(CORRECT, 2, ALL).success.tolist() == [1, 1, 0, 1, 0, 0]
    assert old_fd(CORRECT).confidence(ID_SCORES).tolist() == ID_SCORES
    assert new_fd(CORRECT, 2, ALL).confidence(ID_SCORES, OOD_SCORES).tolist() == ID_SCORES + OOD_SCORES


@pytest.mark.parametrize(("n_id", "n_ood"), [(100, 30), (30, 100), (50, 50), (7, 0), (0, 7)])
def test_balanced_random(n_id: int, n_ood: int) -> None:
    ids, oods = Mix().choose(n_id, n_ood, seed=3)
    few = min(n_id, n_ood)
    assert len(ids) == len(oods) == few
    for chosen, n in ((ids, n_id), (oods, n_ood)):
        assert np.all(np.diff(chosen) > 0)
        assert set(chosen) <= set(range(n))
    again = Mix().choose(n_id, n_ood, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip((ids, oods), again, strict=True))
    if few and n_id != n_ood:
        larger = 0 if n_id > n_ood else 1
        assert not np.array_equal(again[larger], Mix().choose(n_id, n_ood, seed=4)[larger])


def test_balanced_random_draws_evenly() -> None:
    counts = np.zeros(20)
    for seed in range(2000):
        counts[Mix().choose(20, 5, seed)[0]] += 1
    # 500 expected each, standard deviation 19.4.
    assert np.all(np.abs(counts - 500) < 5 * 19.4)


def test_ood_sets_of_one_size_get_the_same_id_samples() -> None:
    ids, oods = Mix().choose(100, 40, seed=1)
    assert len(oods) == 40
    assert np.array_equal(ids, Mix().choose(100, 40, seed=1)[0])
    scores = {"a": {"msp": np.zeros(40)}, "b": {"msp": np.zeros(40)}}
    found = scored_settings(np.ones(100, dtype=int), {"msp": np.zeros(100)}, scores, seed=1)
    assert np.array_equal(found["ood/a"].setting.id_index, found["new_fd/b"].setting.id_index)


def test_first_n_and_all() -> None:
    assert [x.tolist() for x in Mix("first-n").choose(5, 2)] == [[0, 1], [0, 1]]
    assert [x.tolist() for x in Mix("first-n").choose(2, 5)] == [[0, 1], [0, 1]]
    assert [x.tolist() for x in ALL.choose(3, 1)] == [[0, 1, 2], [0]]


@pytest.mark.parametrize(("n_id", "n_ood", "prior"), [(1000, 1000, 0.2), (1000, 50, 0.2), (60, 1000, 0.9), (9, 9, 0.5)])
def test_prior(n_id: int, n_ood: int, prior: float) -> None:
    ids, oods = Mix.parse(f"prior={prior}").choose(n_id, n_ood)
    share = len(oods) / (len(ids) + len(oods))
    assert share == pytest.approx(prior, abs=0.5 / min(len(ids), len(oods)))
    # The largest subset: one of the two sets is used as a whole.
    assert len(ids) == n_id or len(oods) == n_ood
    assert len(ids) <= n_id
    assert len(oods) <= n_ood


def test_keys_of_the_settings() -> None:
    id_scores, svhn = {"msp": np.array(ID_SCORES)}, {"svhn": {"msp": np.array(OOD_SCORES)}}
    assert list(scored_settings(CORRECT, id_scores, {})) == ["old_fd"]
    one = scored_settings(CORRECT, id_scores, svhn)
    assert list(one) == ["old_fd", "ood", "new_fd"]
    assert [judged.name for judged in one.values()] == [None, "svhn", "svhn"]
    several = scored_settings(CORRECT, id_scores, svhn | {"textures": {"msp": np.zeros(3)}})
    assert list(several) == ["old_fd", "ood/svhn", "new_fd/svhn", "ood/textures", "new_fd/textures"]


def test_names_of_mixes_are_parsed_as_printed() -> None:
    for text in ("balanced-random", "all", "first-n", "prior=0.2"):
        assert str(Mix.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("half", "unknown mix 'half'; choose from balanced-random, all, first-n, or prior=P"),
        ("prior", "needs the share of OOD samples"),
        ("prior=1.5", "must lie in (0, 1), not 1.5"),
        ("prior=0", "must lie in (0, 1), not 0.0"),
        ("prior=nan", "must lie in (0, 1), not nan"),
        ("prior=x", "unknown mix 'prior=x'"),
        ("all=0.2", "unknown mix 'all=0.2'"),
    ],
)
def test_invalid_mixes_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        Mix.parse(text)
    assert message in str(refusal.value)


def test_a_prior_needs_the_mix_prior() -> None:
    with pytest.raises(ValueError, match="goes with the mix 'prior'"):
        Mix("all", 0.5)
