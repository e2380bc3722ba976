"""Metrics against worked cases, the released code's numbers, scikit-learn, brute force and invariants."""

from __future__ import annotations

import doctest
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import trapezoid
from sklearn import metrics as sk

from tal_fast.metrics import failure
from tal_fast.metrics.failure import (
    CONVENTIONS,
    HIGHER_IS_BETTER,
    METRICS,
    aurc_floor,
    aurc_random,
    failure_metrics,
    undefined_reasons,
)
from tal_fast.metrics.ranking import risk_coverage_curve, tied_share

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "metrics_cases.json").read_text())
pytestmark = pytest.mark.filterwarnings("error")

# scores, correct, AURC as a plain mean, AURC over ties, E-AURC of the plain mean, AUROC, AUGRC, FPR95
WORKED: list[tuple[Any, ...]] = [
    ([0.9, 0.8, 0.8, 0.7], [1, 0, 1, 1], 0.270833, 0.208333, 0.236595, 0.5, 0.125, 1.0),
    ([0.95, 0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1, 0], 0.196667, 0.196667, 0.103162, 0.833333, 0.12, 0.5),
    ([0.9, 0.8, 0.7, 0.6], [1, 1, 1, 0], 0.0625, 0.0625, 0.028262, 1.0, 0.03125, 0.0),
    ([0.9, 0.8, 0.7, 0.6], [0, 1, 1, 1], 0.520833, 0.520833, 0.486595, 0.0, 0.21875, 1.0),
    ([0.5, 0.5, 0.5, 0.5], [1, 0, 1, 1], 0.270833, 0.25, 0.236595, 0.5, 0.125, 1.0),
]


@pytest.mark.parametrize("case", WORKED)
def test_worked_cases(case: tuple[Any, ...]) -> None:
    scores, correct, plain, expected, eaurc_plain, auroc, augrc, fpr95 = case
    released, ours = failure_metrics(scores, correct, "tal"), failure_metrics(scores, correct)
    assert released["aurc"] == pytest.approx(plain, abs=1e-6)
    assert released["eaurc"] == pytest.approx(eaurc_plain, abs=1e-6)
    assert ours["aurc"] == pytest.approx(expected, abs=1e-6)
    assert ours["eaurc"] - released["eaurc"] == pytest.approx(expected - plain, abs=2e-6)
    for key, value in {"auroc": auroc, "augrc": augrc, "fpr95": fpr95, "tnr95": 1 - fpr95}.items():
        assert ours[key] == pytest.approx(value, abs=1e-6), key


def test_worked_eaurc() -> None:
    assert failure_metrics(*WORKED[0][:2])["eaurc"] == pytest.approx(0.174095, abs=1e-6)
    assert failure_metrics(*WORKED[4][:2])["eaurc"] == pytest.approx(0.215762, abs=1e-6)
    assert failure_metrics(*WORKED[2][:2])["eaurc_exact"] == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("i", range(len(GOLDEN)))
def test_released_numbers(i: int) -> None:
    case = GOLDEN[i]
    values = failure_metrics(case["scores"], case["correct"], "tal")
    scale = {"aurc_x1000": 1e3, "eaurc_x1000": 1e3}
    checked = 0
    for key, golden in case["tal"].items():
        ours = values[key.rsplit("_", 1)[0]]
        # scikit-learn calls the AUPR of a class without samples 0; it is undefined.
        if golden is None or (key == "aupr_error_pct" and all(case["correct"])):
            assert np.isnan(ours), key
        else:
            assert ours * scale.get(key, 1e2) == pytest.approx(golden, abs=1e-9), key
            checked += 1
    assert checked >= 3
    default = failure_metrics(case["scores"], case["correct"])
    if case["fpr95_first"] is not None:
        assert default["fpr95"] == pytest.approx(case["fpr95_first"], abs=1e-12)
        assert default["augrc"] == pytest.approx(case["augrc_closed_form"], abs=1e-12)


def random_case(seed: int, n: int = 300, decimals: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties, better than chance."""
    rng = np.random.default_rng(seed)
    scores = np.round(rng.beta(4, 2, n), decimals)
    return scores, (rng.random(n) < 0.2 + 0.7 * scores).astype(int)


@pytest.mark.parametrize("seed", range(8))
def test_against_scikit_learn(seed: int) -> None:
    scores, correct = random_case(seed, n=20 + 60 * seed)
    wrong = 1 - correct
    ours, tal, test = (failure_metrics(scores, correct, c) for c in ("tal_fast", "tal", "tal-test"))
    for values in (ours, tal, test):
        assert values["auroc"] == pytest.approx(sk.roc_auc_score(correct, scores), abs=1e-12)
        assert values["aupr_error"] == pytest.approx(sk.average_precision_score(wrong, -scores), abs=1e-12)
    assert ours["aupr_success"] == pytest.approx(sk.average_precision_score(correct, scores), abs=1e-12)
    precision, recall, thresholds = sk.precision_recall_curve(correct, scores)
    for values in (tal, test):
        assert values["aupr_success"] == pytest.approx(sk.auc(recall, precision), abs=1e-12)
    fpr, tpr, _ = sk.roc_curve(correct, scores, drop_intermediate=False)
    assert ours["fpr95"] == pytest.approx(fpr[np.argmax(tpr >= 0.95)], abs=1e-12)
    assert ours["tnr95"] == pytest.approx(1 - ours["fpr95"], abs=1e-12)
    fpr, tpr, _ = sk.roc_curve(correct, scores)
    assert tal["fpr95"] == pytest.approx(fpr[np.argmin(np.abs(tpr - 0.95))], abs=1e-12)
    assert tal["tnr95"] == pytest.approx(1 - fpr[np.argmax(tpr >= 0.95)], abs=1e-12)
    threshold = thresholds[np.argmin(np.abs(recall - 0.95))]
    assert test["fpr95"] == pytest.approx(np.mean(scores[wrong == 1] >= threshold), abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_convention_of_fd_shifts(seed: int) -> None:
    scores, correct = random_case(seed, n=7 + 40 * seed)
    values = failure_metrics(scores, correct, "fd-shifts")
    coverage, risk, general = [1.0], [np.mean(correct == 0)], [np.mean(correct == 0)]
    for threshold in np.unique(scores)[1:]:
        kept = scores >= threshold
        coverage.append(np.mean(kept))
        risk.append(np.mean(correct[kept] == 0))
        general.append(np.sum(correct[kept] == 0) / len(correct))
    aurc = -trapezoid([*risk, risk[-1]], [*coverage, 0])
    assert values["aurc"] == pytest.approx(aurc, abs=1e-12)
    r = risk[0]
    assert values["eaurc"] == pytest.approx(aurc - (r + (1 - r) * np.log(1 - r)), abs=1e-12)
    assert values["augrc"] == pytest.approx(-trapezoid([*general, 0], [*coverage, 0]), abs=1e-12)
    fpr, tpr, _ = sk.roc_curve(correct, scores)
    assert values["fpr95"] == pytest.approx(fpr[tpr >= 0.9495].min(), abs=1e-12)
    assert values["aupr_success"] == pytest.approx(sk.average_precision_score(correct, scores), abs=1e-12)
    assert values["aupr_error"] == pytest.approx(sk.average_precision_score(correct, -scores, pos_label=0), abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_convention_of_openood(seed: int) -> None:
    scores, correct = random_case(seed, n=7 + 40 * seed)
    values, ours = failure_metrics(scores, correct, "openood"), failure_metrics(scores, correct)
    fpr, tpr, _ = sk.roc_curve(1 - correct, -scores)
    assert values["fpr95"] == pytest.approx(fpr[np.argmax(tpr >= 0.95)], abs=1e-12)
    assert values["tnr95"] == pytest.approx(1 - values["fpr95"], abs=1e-12)
    assert values["auroc"] == pytest.approx(sk.auc(fpr, tpr), abs=1e-12)
    for key, positive, ranking in (("aupr_success", correct, scores), ("aupr_error", 1 - correct, -scores)):
        precision, recall, _ = sk.precision_recall_curve(positive, ranking)
        assert values[key] == pytest.approx(sk.auc(recall, precision), abs=1e-12)
    for key in ("aurc", "eaurc", "eaurc_exact", "augrc"):
        assert values[key] == ours[key]


@pytest.mark.parametrize("seed", range(8))
def test_convention_of_torch_uncertainty(seed: int) -> None:
    # Ties are left to chance there, so none for the areas.
    scores, correct = random_case(seed, n=7 + 40 * seed, decimals=12)
    values = failure_metrics(scores, correct, "torch-uncertainty")
    n, wrong = len(correct), 1 - correct[np.argsort(-scores)]
    coverage, risk = np.arange(1, n + 1) / n, np.cumsum(wrong) / np.arange(1, n + 1)
    assert values["aurc"] == pytest.approx(trapezoid(risk, coverage) / (1 - 1 / n), abs=1e-12)
    assert values["augrc"] == pytest.approx(trapezoid(risk * coverage, coverage) / (1 - 1 / n), abs=1e-12)
    scores = np.round(scores, 2)
    values = failure_metrics(scores, correct, "torch-uncertainty")
    flagged = [scores <= threshold for threshold in np.unique(scores)]
    first = next(part for part in flagged if 20 * (1 - correct)[part].sum() >= 19 * (1 - correct).sum())
    assert values["fpr95"] == np.mean(first[correct == 1])
    # Before 0.13 the nearest recall, the larger of two. Where several thresholds have it the lowest is read, so that
    # the most successes are flagged; but the highest of those that find all errors.
    best = (np.inf, 0.0, 0.0, 0.0)
    for part in flagged:
        found, share = (np.mean(part[correct == c]) for c in (0, 1))
        best = min(best, (round(abs(found - 0.95), 12), -found, share if found == 1 else -share, share))
    before = failure_metrics(scores, correct, "torch-uncertainty-0.12")
    assert before["fpr95"] == pytest.approx(best[3], abs=1e-12)
    assert all(before[metric] == value for metric, value in values.items() if metric not in ("fpr95", "tnr95"))
    assert values["aupr_error"] == pytest.approx(sk.average_precision_score(1 - correct, -scores), abs=1e-12)
    assert np.isnan(failure_metrics([1], [1], "torch-uncertainty")["aurc"])
    assert "need two samples" in undefined_reasons([1], "torch-uncertainty")["augrc"]


def test_recalls_equally_near_in_torch_uncertainty() -> None:
    # Nine of ten errors and all ten are equally near 0.95, which float64 rounds towards nine; the version before 0.13
    # took the larger, and so the two successes.
    scores, correct = [*range(-10, -1), 0.5, 1, 1], [0] * 9 + [1, 0, 1]
    assert failure_metrics(scores, correct, "torch-uncertainty-0.12")["fpr95"] == 1
    assert failure_metrics(scores, correct, "torch-uncertainty")["fpr95"] == 1
    # 18 of 19 errors are nearer than all, and less than 0.95.
    scores, correct = [*range(-19, -1), 1, 1], [0] * 18 + [1, 0]
    assert failure_metrics(scores, correct, "torch-uncertainty-0.12")["fpr95"] == 0
    assert failure_metrics(scores, correct, "torch-uncertainty")["fpr95"] == 1


@pytest.mark.parametrize("outcomes", list(itertools.product((0, 1), repeat=5)))
def test_aurc_is_the_mean_over_all_orders_of_ties(outcomes: tuple[int, ...]) -> None:
    scores = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
    plain = [
        failure_metrics(scores[list(p)], np.array(outcomes)[list(p)], "tal")["aurc"]
        for p in itertools.permutations(range(5))
    ]
    assert failure_metrics(scores, outcomes)["aurc"] == pytest.approx(np.mean(plain), abs=1e-12)


def test_tal_breaks_ties_by_input_order_and_the_default_does_not() -> None:
    first = failure_metrics([0.5, 0.5], [1, 0], "tal")["aurc"], failure_metrics([0.5, 0.5], [1, 0])["aurc"]
    second = failure_metrics([0.5, 0.5], [0, 1], "tal")["aurc"], failure_metrics([0.5, 0.5], [0, 1])["aurc"]
    assert first == (0.25, 0.5)
    assert second == (0.75, 0.5)


def test_tal_sorts_as_the_released_code_does() -> None:
    scores, correct = random_case(1, n=500, decimals=1)
    ranked = [c for _, c in sorted(zip(scores, correct, strict=True), key=lambda pair: pair[0], reverse=True)]
    risks = [(i - sum(ranked[:i])) / i for i in range(1, 501)]
    assert failure_metrics(scores, correct, "tal")["aurc"] == pytest.approx(np.mean(risks), abs=1e-12)


cases = st.lists(st.tuples(st.integers(-6, 6), st.booleans()), min_size=1, max_size=60)


def split(case: list[tuple[int, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([c[0] for c in case], dtype=float), np.array([c[1] for c in case])


@settings(deadline=None)
@given(cases, st.randoms())
def test_input_order_never_matters(case: list[tuple[int, bool]], random: Any) -> None:
    shuffled = case.copy()
    random.shuffle(shuffled)
    # Not approximately: the same bits.
    np.testing.assert_equal(failure_metrics(*split(shuffled)), failure_metrics(*split(case)))


@settings(deadline=None)
@given(cases, st.sampled_from(CONVENTIONS))
def test_strictly_increasing_maps_change_nothing(case: list[tuple[int, bool]], convention: str) -> None:
    scores, correct = split(case)
    want = failure_metrics(scores, correct, convention)
    for mapped in (np.exp(scores), 3 * scores - 100, np.arctan(scores), scores**3, scores.astype(np.int8)):
        np.testing.assert_equal(failure_metrics(mapped, correct, convention), want)


@settings(deadline=None)
@given(cases)
def test_augrc_is_the_area_under_the_generalised_risk(case: list[tuple[int, bool]]) -> None:
    scores, correct = split(case)
    n = len(scores)
    # Coverage and errors / n at each distinct threshold, joined by straight lines from (0, 0).
    thresholds = sorted(set(scores), reverse=True)
    coverage = [0.0] + [float(np.mean(scores >= t)) for t in thresholds]
    risk = [0.0] + [float(np.sum(~correct[scores >= t]) / n) for t in thresholds]
    assert failure_metrics(scores, correct)["augrc"] == pytest.approx(sk.auc(coverage, risk), abs=1e-12)


@settings(deadline=None)
@given(cases)
def test_aurc_lies_between_its_floor_and_one(case: list[tuple[int, bool]]) -> None:
    scores, correct = split(case)
    n, errors = len(correct), int(np.sum(~correct))
    values = failure_metrics(scores, correct)
    assert aurc_floor(n, errors) - 1e-12 <= values["aurc"] <= 1
    assert values["eaurc_exact"] >= -1e-12
    oracle = failure_metrics(correct.astype(float), correct)["aurc"] if 0 in correct and 1 in correct else None
    # Successes first, then errors one after the other (not tied).
    ranked = failure_metrics(np.arange(n)[::-1], np.sort(correct)[::-1])["aurc"]
    assert ranked == pytest.approx(aurc_floor(n, errors), abs=1e-12)
    assert oracle is None or oracle >= ranked - 1e-12


@settings(deadline=None)
@given(cases)
def test_defined_metrics_are_fractions_and_the_rest_have_reasons(case: list[tuple[int, bool]]) -> None:
    scores, correct = split(case)
    for convention in CONVENTIONS:
        values = failure_metrics(scores, correct, convention)
        assert tuple(values) == METRICS == tuple(HIGHER_IS_BETTER)
        assert {k for k, v in values.items() if np.isnan(v)} == set(undefined_reasons(correct, convention))
        for key, value in values.items():
            if not key.startswith("eaurc"):
                assert np.isnan(value) or 0 <= value <= 1, key


def test_a_random_score_has_the_error_rate_as_aurc() -> None:
    correct = np.arange(12) % 3 > 0
    rng = np.random.default_rng(0)
    drawn = [failure_metrics(rng.random(12), correct)["aurc"] for _ in range(2000)]
    assert aurc_random(12, 4) == pytest.approx(1 / 3)
    assert np.mean(drawn) == pytest.approx(1 / 3, abs=0.01)
    assert failure_metrics(np.zeros(12), correct)["aurc"] == pytest.approx(1 / 3, abs=1e-12)


def test_risk_coverage_curve() -> None:
    curve = risk_coverage_curve([0.7, 0.9, 0.8, 0.8], [1, 1, 0, 1])
    np.testing.assert_allclose(curve.coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(curve.risk, [0, 0.25, 1 / 3, 0.25])
    np.testing.assert_array_equal(curve.threshold, [0.9, 0.8, 0.8, 0.7])
    assert curve.risk.mean() == pytest.approx(0.208333, abs=1e-6)
    assert [len(part) for part in risk_coverage_curve([], [])] == [0, 0, 0]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_all_correct_all_wrong_and_no_samples(convention: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        correct = failure_metrics([0.1, 0.2, 0.3], [1, 1, 1], convention)
        wrong = failure_metrics([0.1, 0.2, 0.3], [0, 0, 0], convention)
        nothing = failure_metrics([], [], convention)
    assert [correct[k] for k in ("aurc", "eaurc", "eaurc_exact", "augrc")] == [0, 0, 0, 0]
    assert correct["aupr_success"] == 1
    assert {k for k, v in correct.items() if np.isnan(v)} == {"auroc", "fpr95", "tnr95", "aupr_error"}
    # torch-uncertainty's trapezoid over (1/3, 2/3, 1) is spread over the whole range.
    augrc = 2 / 3 if convention.startswith("torch-uncertainty") else 0.5
    assert [wrong[k] for k in ("aurc", "eaurc", "eaurc_exact", "augrc")] == [1, 0, 0, pytest.approx(augrc)]
    assert wrong["aupr_error"] == 1
    assert {k for k, v in wrong.items() if np.isnan(v)} == {"auroc", "fpr95", "tnr95", "aupr_success"}
    assert all(np.isnan(v) for v in nothing.values())
    assert "no errors among the 3" in undefined_reasons([1, 1, 1])["auroc"]
    assert "no successes among the 3" in undefined_reasons([0, 0, 0])["fpr95"]
    assert set(undefined_reasons([])) == set(METRICS)
    assert undefined_reasons([0, 1]) == {}
    assert np.isnan(aurc_floor(0, 0))
    assert np.isnan(aurc_random(0, 0))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("convention", ["tal_fast", "tal", "tal-test", "openood"])
def test_tiny_sets(n: int, convention: str) -> None:
    for outcomes in itertools.product((0, 1), repeat=n):
        values = failure_metrics(list(range(n)), outcomes, convention)
        assert values["aurc"] == pytest.approx(
            np.mean([np.mean(1 - np.array(outcomes[n - i :])) for i in range(1, n + 1)])
        )


def test_95_percent_is_counted_in_whole_samples() -> None:
    # 19 of 20 successes are exactly 95%: the 20th, ranked below the error, is not needed.
    scores = [*range(40, 21, -1), 10, 5]
    assert failure_metrics(scores, [1] * 19 + [0, 1])["fpr95"] == 0
    assert failure_metrics(scores, [1] * 18 + [0, 1, 1])["fpr95"] == 1


def test_arrays_tensors_and_lists_agree() -> None:
    scores, correct = random_case(3, decimals=1)
    want = failure_metrics(scores, correct)
    for form in (list(scores), torch.tensor(scores, requires_grad=True), scores[::-1][::-1]):
        assert failure_metrics(form, torch.tensor(correct)) == want
    for outcome in (correct.astype(bool), correct.astype(np.float32), correct.tolist(), torch.tensor(correct).bool()):
        assert failure_metrics(scores, outcome) == want
    low = torch.tensor(scores).bfloat16()
    assert failure_metrics(low, correct) == failure_metrics(low.double().numpy(), correct)


def test_infinite_scores_rank() -> None:
    inf = float("inf")
    want = failure_metrics([3, 2, 2, 1], [1, 0, 1, 0])
    assert failure_metrics([inf, 0, 0, -inf], [1, 0, 1, 0]) == want
    assert (
        failure_metrics([3, inf, inf, 1], [1, 0, 1, 0])["aurc"] == failure_metrics([2, 3, 3, 1], [1, 0, 1, 0])["aurc"]
    )


def test_tied_share() -> None:
    assert tied_share([1, 2, 3]) == 0
    assert tied_share([1, 2, 2, 3, 3, 3, 4, 5]) == 5 / 8
    assert np.isnan(tied_share([]))


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([0.5, float("nan"), 0.1], [1, 0, 1], "1 NaN of 3 scores (the first at index 1)"),
        ([0.5, 0.1], [1, 0, 1], "confidence has 2 samples but correct has 3"),
        ([[0.5], [0.1]], [1, 0], "not of shape (2, 1)"),
        ([0.5, 0.1], [[1, 0]], "not of shape (1, 2)"),
        ([0.5, 0.1], [1, 2], "not 2 (index 1)"),
        ([0.5, 0.1], [1, float("nan")], "not nan (index 1)"),
        (["a", "b"], [1, 0], "must be real numbers"),
        ([0.5, 0.1], ["x", "y"], "must be booleans or 0 and 1"),
    ],
)
def test_invalid_samples_are_refused(confidence: Any, correct: Any, message: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        failure_metrics(confidence, correct)
    assert message in str(refusal.value)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("digits", [1, 9])
def test_a_metric_alone_has_the_value_it_has_among_all(convention: str, digits: int) -> None:
    scores, correct = np.round(np.random.default_rng().random(201), digits), np.random.default_rng().random(201) < 0.7
    everything = failure_metrics(scores, correct, convention)
    assert list(everything) == list(METRICS)
    for name in METRICS:
        assert failure_metrics(scores, correct, convention, [name]) == {name: everything[name]}
    assert list(failure_metrics(scores, correct, convention, {"fpr95", "aurc"})) == ["aurc", "fpr95"]
    with pytest.raises(ValueError, match="unknown metric 'f1'; choose from aurc"):
        failure_metrics(scores, correct, convention, ["aurc", "f1"])


def test_only_what_a_metric_needs_is_computed_and_only_order_needs_a_stable_sort(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    for name in ("_aurc", "_auroc", "_fpr_tnr", "_average_precision", "_trapezoid_precision"):
        original = getattr(failure, name)
        monkeypatch.setattr(failure, name, lambda *a, f=original, n=name: (calls.append(n), f(*a))[1])
    sort = np.argsort
    monkeypatch.setattr(
        np, "argsort", lambda x, **options: (calls.append(options.get("kind", "any")), sort(x, **options))[1]
    )
    samples = np.random.default_rng().random(20), np.arange(20) % 2

    def used(convention: str, metric: str) -> list[str]:
        calls.clear()
        failure_metrics(*samples, convention, [metric])
        return calls.copy()

    assert used("tal_fast", "eaurc") == ["any", "_aurc"]
    assert used("tal_fast", "augrc") == ["any", "_auroc"]
    assert used("tal_fast", "tnr95") == ["any", "_fpr_tnr"]
    assert used("tal_fast", "aupr_error") == ["any", "_average_precision"]
    assert used("tal", "aurc") == ["stable", "_aurc"]
    assert used("tal", "fpr95") == ["any", "_fpr_tnr"]
    assert used("torch-uncertainty", "augrc")[0] == "stable"


def test_an_unknown_convention_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown convention 'fd'; choose from tal_fast, tal, tal-test, fd-shifts"):
        failure_metrics([0.5], [1], "fd")


def test_examples_of_the_documentation() -> None:
    path = Path(__file__).parents[2] / "docs" / "metrics.md"
    failed, tried = doctest.testfile(str(path), module_relative=False)
    assert failed == 0
    assert tried >= 9
