"""Failure-detection metrics: AURC, E-AURC, AUGRC, AUROC, FPR95 and AUPR (Section 5.1 of the TAL paper).

``failure_metrics`` computes all of them from two vectors: the confidence of each sample (higher = more confident) and
whether it was a success. All values are fractions in natural units; the papers print AURC and E-AURC times 1000 and the
rest in percent. ``tal_fast.metrics.settings`` defines which samples count and what a success is. Only NumPy is needed;
PyTorch tensors are accepted too.

``docs/metrics.md#conventions`` defines the seven conventions, with an example of each difference.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from tal_fast.config.names import CONVENTIONS, METRICS
from tal_fast.metrics.ranking import Ranking, as_correct, expected_errors, rank
from tal_fast.utils.arrays import Floats, Ints

HIGHER_IS_BETTER = {
    "aurc": False, "eaurc": False, "eaurc_exact": False, "augrc": False, "auroc": True, "fpr95": False, "tnr95": True,
    "aupr_success": True, "aupr_error": True,
}  # fmt: skip
"""Metric -> whether a larger value is better."""
_TORCH_UNCERTAINTY = ("torch-uncertainty", "torch-uncertainty-0.12")


def check_convention(convention: str) -> str:
    """Return the convention's name; raise a ValueError that lists all if it is unknown."""
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r}; choose from {', '.join(CONVENTIONS)}")
    return convention


def check_metrics(names: Collection[str]) -> set[str]:
    """Return the metrics' names; raise a ValueError that lists all if one is unknown."""
    if unknown := set(names).difference(METRICS):
        raise ValueError(f"unknown metric {min(unknown)!r}; choose from {', '.join(METRICS)}")
    return set(names)


def aurc_floor(n: int, errors: int) -> float:
    """Lowest AURC that n samples with this many errors can have: every error ranked last.

    (1/n) Σ_{i=n−k+1..n} (i − n + k)/i for k errors; NaN for n = 0.
    """
    if n == 0:
        return float("nan")
    i = np.arange(n - errors + 1, n + 1)
    return float(np.sum((i - n + errors) / i) / n)


def aurc_random(n: int, errors: int) -> float:
    """Expected AURC of a random score, which is the error rate; NaN for n = 0."""
    return errors / n if n else float("nan")


def _oracle_closed_form(error_rate: float) -> float:
    """Floor of AURC for n → ∞, r + (1 − r) ln(1 − r) (Geifman et al., 2019)."""
    return error_rate + (1 - error_rate) * float(np.log1p(-error_rate)) if error_rate < 1 else 1.0


def _auroc(ranking: Ranking) -> float:
    """P(a success has a higher score than an error), ties half; exact integers up to the last division."""
    errors = np.diff(ranking.fp, prepend=0)
    successes_before = ranking.tp - np.diff(ranking.tp, prepend=0)
    twice = int(np.dot(errors, successes_before + ranking.tp))
    return twice / (2 * int(ranking.tp[-1]) * int(ranking.fp[-1]))


def _average_precision(tp: Ints, end: Ints) -> float:
    """Average precision: Σ (recall step · precision), one step per distinct threshold."""
    return float(np.sum(np.diff(tp, prepend=0) * (tp / end)) / tp[-1])


def _trapezoid_precision(tp: Ints, end: Ints) -> float:
    """Trapezoidal area under the precision-recall curve, from (recall 0, precision 1)."""
    recall = np.concatenate(([0.0], tp / tp[-1]))
    precision = np.concatenate(([1.0], tp / end))
    return float(np.sum(np.diff(recall) * (precision[1:] + precision[:-1])) / 2)


def _error_first(ranking: Ranking) -> tuple[Ints, Ints]:
    """Errors found and samples seen at each distinct threshold, from the least confident sample up."""
    n, errors = ranking.end[-1], ranking.fp[-1]
    found = np.append(errors - ranking.fp[:-1][::-1], errors)
    seen = np.append(n - ranking.end[:-1][::-1], n)
    return found, seen


def _corners(tp: Ints, fp: Ints) -> tuple[Ints, Ints]:
    """ROC curve without its collinear points, which scikit-learn drops by default."""
    if len(tp) <= 2:
        return tp, fp
    corner = np.ones(len(tp), dtype=bool)
    corner[1:-1] = (np.diff(fp, 2) != 0) | (np.diff(tp, 2) != 0)
    return tp[corner], fp[corner]


def _fpr_tnr(ranking: Ranking, convention: str) -> tuple[float, float]:
    tp, fp = ranking.tp, ranking.fp
    if convention in ("openood", *_TORCH_UNCERTAINTY):
        # Errors are the positive class: counted from the least confident sample up.
        tp, seen = _error_first(ranking)
        fp = seen - tp
    if convention in ("openood", "fd-shifts"):
        tp, fp = _corners(tp, fp)
    if convention in ("tal_fast", "openood", "torch-uncertainty"):
        # In integers, so that 19 of 20 reaches 0.95 whatever the rounding.
        at = int(np.searchsorted(20 * tp, 19 * tp[-1]))
    elif convention == "fd-shifts":
        at = int(np.argmax(tp / tp[-1] >= 0.9495))
    elif convention in ("tal-test", "torch-uncertainty-0.12"):
        # The larger of two equally near recalls. Among the thresholds of recall 1: the lowest in the released test,
        # which follows the order of its precision-recall curve, and the highest in torch-uncertainty. In the number
        # type of each, whose rounding decides which of two recalls is nearer: 0.9 and 1 tie in float32 only.
        real, last = (
            (np.float64, len(tp)) if convention == "tal-test" else (np.float32, np.searchsorted(tp, tp[-1]) + 1)
        )
        recall = tp[:last].astype(real) / real(tp[-1])
        at = int(last) - 1 - int(np.argmin(np.abs(recall[::-1] - real(0.95))))
    else:
        tp, fp = _corners(tp, fp)
        tpr = np.concatenate(([0.0], tp / tp[-1]))
        fpr = np.concatenate(([0.0], fp / fp[-1]))
        return float(fpr[np.argmin(np.abs(tpr - 0.95))]), float(1 - fpr[np.argmax(tpr >= 0.95)])
    return float(fp[at] / fp[-1]), float((fp[-1] - fp[at]) / fp[-1])


def _aurc(ranking: Ranking, convention: str) -> float:
    n = ranking.scores.size
    if convention == "fd-shifts":
        coverage = np.concatenate(([0.0], ranking.end / n))
        risk = ranking.fp / ranking.end
        risk = np.concatenate((risk[:1], risk))
        return float(np.sum(np.diff(coverage) * (risk[1:] + risk[:-1])) / 2)
    expected = convention in ("tal_fast", "openood")
    wrong = expected_errors(ranking) if expected else np.cumsum(1 - ranking.correct)
    risk = wrong / np.arange(1, n + 1)
    return _open_trapezoid(risk) if convention in _TORCH_UNCERTAINTY else float(np.mean(risk))


def _open_trapezoid(heights: Floats) -> float:
    """Trapezoidal mean over n evenly spaced points; NaN for fewer than two."""
    n = heights.size
    return float((heights.sum() - (heights[0] + heights[-1]) / 2) / (n - 1)) if n > 1 else float("nan")


def failure_metrics(
    confidence: Any, correct: Any, convention: str = "tal_fast", metrics: Collection[str] = METRICS
) -> dict[str, float]:
    """Compute failure-detection metrics of one score.

    Args:
        confidence: (n,) scores, higher = more confident; an array, tensor or list of any real type, converted to
            float64.
        correct: (n,) 0/1 or bool; 1 = success.
        convention: one of ``CONVENTIONS``, see the module's docstring.
        metrics: names from ``METRICS``; only these are computed.

    Returns:
        A float in natural units (a fraction) for each of ``metrics``:

        - ``aurc``: mean over i of R_i, the error rate among the i most confident.
        - ``eaurc``: AURC − (r + (1 − r) ln(1 − r)), r the error rate. ``eaurc_exact``: AURC − ``aurc_floor``.
        - ``augrc``: r(1 − r)(1 − AUROC) + r²/2, the area under the generalised risk (Traub et al., 2024); the same
          in every convention but torch-uncertainty's.
        - ``auroc``: successes positive, ties half; errors as positives would give the same.
        - ``fpr95``, ``tnr95``: errors accepted, or rejected, where 95% of the successes are accepted; with errors
          positive, successes rejected, or accepted, where 95% of the errors are rejected.
        - ``aupr_success``, ``aupr_error``: average precision with successes, or errors, as the positive class.

        NaN where a metric is undefined; ``undefined_reasons`` says why.

    Raises:
        ValueError: NaN scores, vectors that differ in length or are not vectors, outcomes other than 0 and 1, or an
            unknown convention or metric.
    """
    check_convention(convention)
    wanted = check_metrics(metrics)
    areas = not wanted.isdisjoint(("aurc", "eaurc", "eaurc_exact"))
    trapezoid = convention in _TORCH_UNCERTAINTY and "augrc" in wanted
    ranking = rank(
        confidence, correct, stable=trapezoid or (areas and convention in ("tal", "tal-test", *_TORCH_UNCERTAINTY))
    )
    values = dict.fromkeys(METRICS, float("nan"))
    n = ranking.scores.size
    successes, errors = (int(counts[-1]) if n else 0 for counts in (ranking.tp, ranking.fp))
    r = errors / max(n, 1)
    if n and areas:
        aurc = _aurc(ranking, convention)
        values.update(aurc=aurc, eaurc=aurc - _oracle_closed_form(r), eaurc_exact=aurc - aurc_floor(n, errors))
    if successes and errors and not wanted.isdisjoint(("auroc", "augrc")):
        values["auroc"] = _auroc(ranking)
    if n:
        values["augrc"] = r * r / 2 + (r * (1 - r) * (1 - values["auroc"]) if successes and errors else 0.0)
    if n and trapezoid:
        values["augrc"] = _open_trapezoid(np.cumsum(1 - ranking.correct) / n)
    if successes and errors and not wanted.isdisjoint(("fpr95", "tnr95")):
        values["fpr95"], values["tnr95"] = _fpr_tnr(ranking, convention)
    if successes and "aupr_success" in wanted:
        plain = convention in ("tal_fast", "fd-shifts", *_TORCH_UNCERTAINTY)
        values["aupr_success"] = (_average_precision if plain else _trapezoid_precision)(ranking.tp, ranking.end)
    if errors and "aupr_error" in wanted:
        plain = convention != "openood"
        values["aupr_error"] = (_average_precision if plain else _trapezoid_precision)(*_error_first(ranking))
    return {name: values[name] for name in METRICS if name in wanted}


def undefined_reasons(correct: Any, convention: str = "tal_fast") -> dict[str, str]:
    """Reason for each metric that ``failure_metrics`` gives as NaN for these outcomes; empty when all are defined.

    Arguments and errors as for ``failure_metrics``.
    """
    check_convention(convention)
    outcomes = as_correct(correct)
    n = outcomes.size
    if n == 0:
        return dict.fromkeys(METRICS, "there are no samples")
    reasons: dict[str, str] = {}
    if convention in _TORCH_UNCERTAINTY and n == 1:
        reasons |= dict.fromkeys(
            ("aurc", "eaurc", "eaurc_exact", "augrc"), "the areas of torch-uncertainty need two samples; there is one"
        )
    if outcomes.all() or not outcomes.any():
        missing, aupr = ("errors", "aupr_error") if outcomes.all() else ("successes", "aupr_success")
        reasons |= dict.fromkeys(("auroc", "fpr95", "tnr95", aupr), f"there are no {missing} among the {n} samples")
    return reasons
