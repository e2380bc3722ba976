"""How well a confidence score tells right predictions from wrong ones (Section 5.1 of the TAL paper).

``failure_metrics`` gives every number of the paper's tables from two vectors: the confidence of each sample (higher =
surer) and whether it was a success. All values are fractions in natural units; the papers print AURC and E-AURC times
1000 and the rest in percent. Which samples count and what a success is decides the setting: see
``tal_fast.metrics.settings``. Only NumPy is needed; PyTorch tensors are accepted too.

Six conventions (``docs/metrics.md`` works through an example of each difference):

``tal_fast``
    The default. AURC is the expectation over all orders of tied scores, so the order of the input never matters;
    FPR95 is read at the first threshold whose true-positive rate reaches 0.95; both AUPRs are average precision.
``tal``
    The training monitor of the released TAL code: AURC is a plain mean over a stable sort; FPR95 is read where the
    true-positive rate is *nearest* 0.95 on an ROC curve without its collinear points, and TNR95 at the first point of
    that curve at or above 0.95, so they need not add up to 1; AUPR-success is a trapezoid.
``tal-test``
    The released test script: as ``tal``, but FPR95 is read where the recall is nearest 0.95 on the full
    precision-recall curve, and TNR95 = 1 − FPR95.
``fd-shifts``
    Jaeger et al., 2023: AURC is a trapezoid over the distinct thresholds, with the surest group's risk held down to
    coverage 0; FPR95 is read at the first corner of the ROC curve whose true-positive rate reaches 0.9495.
``openood``
    Zhang et al., 2023: FPR95 has errors (OOD samples) as the positive class: the share of *successes* rejected where
    95% of the errors are; both AUPRs are trapezoids. OpenOOD has no AURC; those here are ``tal_fast``'s.
``torch-uncertainty``
    Its AURC and AUGRC are trapezoids over i = 1..n, scaled by n/(n − 1), of a sort that ties leave to chance (here
    stable); FPR95 has errors as the positive class and is read where their recall is nearest 0.95.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CONVENTIONS = ("tal_fast", "tal", "tal-test", "fd-shifts", "openood", "torch-uncertainty")
METRICS = (
    "aurc", "eaurc", "eaurc_exact", "augrc", "auroc", "fpr95", "tnr95", "aupr_success", "aupr_error",
)  # fmt: skip
# Of each metric, whether a larger value is better.
HIGHER_IS_BETTER = {
    "aurc": False, "eaurc": False, "eaurc_exact": False, "augrc": False, "auroc": True, "fpr95": False, "tnr95": True,
    "aupr_success": True, "aupr_error": True,
}  # fmt: skip

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class RiskCoverage(NamedTuple):
    """The curve under which AURC is the area; entry i − 1 is what happens when the i surest samples are kept.

    Attributes:
        coverage: (n,) float64, i / n.
        risk: (n,) float64, errors among the i surest / i, expected over all orders of tied scores.
        threshold: (n,) float64, the score of the i-th surest sample, falling.
    """

    coverage: Floats
    risk: Floats
    threshold: Floats


class _Sweep(NamedTuple):
    """Samples by falling confidence, and the totals at the end of each run of tied scores."""

    scores: Floats  # (n,) falling
    correct: Ints  # (n,) in the same order; tied samples stay in the input's order
    end: Ints  # (groups,) number of samples down to the end of each group of tied scores
    tp: Ints  # (groups,) successes down to there
    fp: Ints  # (groups,) errors down to there


def _to_numpy(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        # NumPy knows no bfloat16; float64 holds every narrower float exactly.
        values = values.double() if values.is_floating_point() else values
        return values.numpy()
    return np.asarray(values)


def as_scores(confidence: Any, name: str = "confidence") -> Floats:
    """A vector of scores as (n,) float64, whatever it was.

    Raises:
        ValueError: not one-dimensional, not numbers, or NaN among them. Infinite scores are legal: they rank.
    """
    raw = _to_numpy(confidence)
    if raw.ndim != 1:
        raise ValueError(f"{name} must be a vector (n,), one score per sample, not of shape {raw.shape}")
    if raw.size and raw.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be real numbers, not {raw.dtype}")
    scores = raw.astype(np.float64)
    bad = np.flatnonzero(np.isnan(scores))
    if bad.size:
        raise ValueError(
            f"{name} has {bad.size} NaN of {scores.size} scores (the first at index {bad[0]}); NaN has no rank: "
            "leave these samples out or mend the score"
        )
    return scores


def as_correct(correct: Any, name: str = "correct") -> Ints:
    """A vector of outcomes as (n,) int64 of 0 and 1.

    Raises:
        ValueError: not one-dimensional, or anything but 0, 1, False and True in it.
    """
    raw = _to_numpy(correct)
    if raw.ndim != 1:
        raise ValueError(f"{name} must be a vector (n,), one outcome per sample, not of shape {raw.shape}")
    if raw.size and raw.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be booleans or 0 and 1, not {raw.dtype}")
    odd = np.flatnonzero(~((raw == 0) | (raw == 1)))
    if odd.size:
        raise ValueError(f"{name} must hold only 0 and 1, not {raw[odd[0]]} (index {odd[0]})")
    return raw.astype(np.int64)


def _checked(confidence: Any, correct: Any) -> tuple[Floats, Ints]:
    scores, outcomes = as_scores(confidence), as_correct(correct)
    if scores.size != outcomes.size:
        raise ValueError(f"confidence has {scores.size} samples but correct has {outcomes.size}; they must match")
    return scores, outcomes


def check_convention(convention: str) -> str:
    """The convention's name, or a ValueError that lists them."""
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r}; choose from {', '.join(CONVENTIONS)}")
    return convention


def _sweep(scores: Floats, correct: Ints) -> _Sweep:
    order = np.argsort(-scores, kind="stable")
    scores, correct = scores[order], correct[order]
    # Compared, not subtracted: inf − inf is NaN.
    last = np.append(scores[1:] != scores[:-1], True) if scores.size else np.zeros(0, dtype=bool)
    end = np.flatnonzero(last) + 1
    tp = np.cumsum(correct)[last]
    return _Sweep(scores, correct, end, tp, end - tp)


def _expected_errors(sweep: _Sweep) -> Floats:
    """(n,) errors among the i surest, expected over all orders of tied scores.

    Within a group of m tied samples with e errors, the j first of a random order hold j·e/m errors on average, so the
    expectation runs straight from the total before the group to the total after it.
    """
    size = np.diff(sweep.end, prepend=0)
    errors = np.diff(sweep.fp, prepend=0)
    before_samples, before_errors = sweep.end - size, sweep.fp - errors
    i = np.arange(1, sweep.scores.size + 1)
    into = i - np.repeat(before_samples, size)
    return np.repeat(before_errors, size) + into * np.repeat(errors, size) / np.repeat(size, size)


def aurc_floor(n: int, errors: int) -> float:
    """The least AURC that n samples with this many errors can have: every error ranked last.

    (1/n) Σ_{i=n−k+1..n} (i − n + k)/i for k errors; NaN for n = 0.
    """
    if n == 0:
        return float("nan")
    i = np.arange(n - errors + 1, n + 1)
    return float(np.sum((i - n + errors) / i) / n)


def aurc_random(n: int, errors: int) -> float:
    """The expected AURC of a score that knows nothing, which is the error rate; NaN for n = 0."""
    return errors / n if n else float("nan")


def _oracle_closed_form(error_rate: float) -> float:
    """r + (1 − r) ln(1 − r): the floor of AURC for n → ∞ (Geifman et al., 2019)."""
    return error_rate + (1 - error_rate) * float(np.log1p(-error_rate)) if error_rate < 1 else 1.0


def _auroc(sweep: _Sweep) -> float:
    """P(a success is surer than an error), ties half; exact integers up to the last division."""
    errors = np.diff(sweep.fp, prepend=0)
    successes_before = sweep.tp - np.diff(sweep.tp, prepend=0)
    twice = int(np.sum(errors * (successes_before + sweep.tp)))
    return twice / (2 * int(sweep.tp[-1]) * int(sweep.fp[-1]))


def _average_precision(tp: Ints, end: Ints) -> float:
    """Σ (recall step · precision), one step per distinct threshold."""
    return float(np.sum(np.diff(tp, prepend=0) / tp[-1] * (tp / end)))


def _trapezoid_precision(tp: Ints, end: Ints) -> float:
    """The area under the precision-recall curve by straight lines, from (recall 0, precision 1)."""
    recall = np.concatenate(([0.0], tp / tp[-1]))
    precision = np.concatenate(([1.0], tp / end))
    return float(np.sum(np.diff(recall) * (precision[1:] + precision[:-1])) / 2)


def _error_first(sweep: _Sweep) -> tuple[Ints, Ints]:
    """The sweep from the least sure sample up: errors found and samples seen at each distinct threshold."""
    n, errors = sweep.end[-1], sweep.fp[-1]
    found = np.append(errors - sweep.fp[:-1][::-1], errors)
    seen = np.append(n - sweep.end[:-1][::-1], n)
    return found, seen


def _corners(tp: Ints, fp: Ints) -> tuple[Ints, Ints]:
    """An ROC curve without the points inside straight runs, which scikit-learn's drops unless told not to."""
    if len(tp) <= 2:
        return tp, fp
    corner = np.ones(len(tp), dtype=bool)
    corner[1:-1] = (np.diff(fp, 2) != 0) | (np.diff(tp, 2) != 0)
    return tp[corner], fp[corner]


def _fpr_tnr(sweep: _Sweep, convention: str) -> tuple[float, float]:
    tp, fp = sweep.tp, sweep.fp
    if convention in ("openood", "torch-uncertainty"):
        # Errors are positive: found from the least sure up, while successes are flagged by mistake.
        tp, seen = _error_first(sweep)
        fp = seen - tp
    if convention in ("openood", "fd-shifts"):
        tp, fp = _corners(tp, fp)
    if convention in ("tal_fast", "openood"):
        # In integers, so that 19 of 20 reaches 0.95 whatever the rounding.
        at = int(np.argmax(20 * tp >= 19 * tp[-1]))
    elif convention == "fd-shifts":
        at = int(np.argmax(tp / tp[-1] >= 0.9495))
    elif convention in ("tal-test", "torch-uncertainty"):
        # Of two equally near recalls the larger wins; of the thresholds that find all, the lowest in the released
        # test, as its precision-recall curve is listed, and the highest in torch-uncertainty.
        last = len(tp) if convention == "tal-test" else int(np.searchsorted(tp, tp[-1])) + 1
        at = last - 1 - int(np.argmin(np.abs((tp[:last] / tp[-1])[::-1] - 0.95)))
    else:
        tp, fp = _corners(tp, fp)
        tpr = np.concatenate(([0.0], tp / tp[-1]))
        fpr = np.concatenate(([0.0], fp / fp[-1]))
        return float(fpr[np.argmin(np.abs(tpr - 0.95))]), float(1 - fpr[np.argmax(tpr >= 0.95)])
    return float(fp[at] / fp[-1]), float((fp[-1] - fp[at]) / fp[-1])


def _aurc(sweep: _Sweep, convention: str) -> float:
    n = sweep.scores.size
    if convention == "fd-shifts":
        coverage = np.concatenate(([0.0], sweep.end / n))
        risk = sweep.fp / sweep.end
        risk = np.concatenate((risk[:1], risk))
        return float(np.sum(np.diff(coverage) * (risk[1:] + risk[:-1])) / 2)
    expected = convention in ("tal_fast", "openood")
    wrong = _expected_errors(sweep) if expected else np.cumsum(1 - sweep.correct)
    risk = wrong / np.arange(1, n + 1)
    return _open_trapezoid(risk) if convention == "torch-uncertainty" else float(np.mean(risk))


def _open_trapezoid(heights: Floats) -> float:
    """The mean height of straight lines through n evenly spaced points; NaN for fewer than two."""
    n = heights.size
    return float((heights.sum() - (heights[0] + heights[-1]) / 2) / (n - 1)) if n > 1 else float("nan")


def failure_metrics(confidence: Any, correct: Any, convention: str = "tal_fast") -> dict[str, float]:
    """All failure-detection metrics of one score.

    Args:
        confidence: (n,) scores, higher = surer; any float or integer type, array, tensor or list. They go through
            float64.
        correct: (n,) 0/1 or bool; 1 = success.
        convention: one of ``CONVENTIONS``, see the module's docstring.

    Returns:
        A float in natural units (a fraction) for each name in ``METRICS``:

        - ``aurc``: mean over i of R_i, the error rate among the i surest.
        - ``eaurc``: AURC − (r + (1 − r) ln(1 − r)), r the error rate. ``eaurc_exact``: AURC − ``aurc_floor``.
        - ``augrc``: r(1 − r)(1 − AUROC) + r²/2, the area under the generalised risk (Traub et al., 2024); the same
          in every convention but ``torch-uncertainty``.
        - ``auroc``: successes positive, ties half; errors as positives would give the same.
        - ``fpr95``, ``tnr95``: errors accepted, or rejected, where 95% of the successes are accepted; with errors
          positive, successes rejected, or accepted, where 95% of the errors are rejected.
        - ``aupr_success``, ``aupr_error``: average precision with successes, or errors, as the positive class.

        NaN where a metric is undefined; ``undefined_reasons`` says why.

    Raises:
        ValueError: NaN scores, vectors that differ in length or are not vectors, outcomes other than 0 and 1, or an
            unknown convention.
    """
    check_convention(convention)
    scores, outcomes = _checked(confidence, correct)
    values = dict.fromkeys(METRICS, float("nan"))
    n = scores.size
    if n == 0:
        return values
    sweep = _sweep(scores, outcomes)
    successes, errors = int(sweep.tp[-1]), int(sweep.fp[-1])
    r = errors / n
    aurc = _aurc(sweep, convention)
    values.update(aurc=aurc, eaurc=aurc - _oracle_closed_form(r), eaurc_exact=aurc - aurc_floor(n, errors))
    values["augrc"] = r * r / 2
    if successes and errors:
        values["auroc"] = _auroc(sweep)
        values["augrc"] += r * (1 - r) * (1 - values["auroc"])
        values["fpr95"], values["tnr95"] = _fpr_tnr(sweep, convention)
    if convention == "torch-uncertainty":
        values["augrc"] = _open_trapezoid(np.cumsum(1 - sweep.correct) / n)
    if successes:
        plain = convention in ("tal_fast", "fd-shifts", "torch-uncertainty")
        values["aupr_success"] = (_average_precision if plain else _trapezoid_precision)(sweep.tp, sweep.end)
    if errors:
        plain = convention != "openood"
        values["aupr_error"] = (_average_precision if plain else _trapezoid_precision)(*_error_first(sweep))
    return values


def undefined_reasons(correct: Any, convention: str = "tal_fast") -> dict[str, str]:
    """For each metric that ``failure_metrics`` gives as NaN for these outcomes, why; empty when all are defined.

    Args:
        correct: (n,) 0/1 or bool.
        convention: as for ``failure_metrics``.

    Raises:
        ValueError: as ``failure_metrics``.
    """
    check_convention(convention)
    outcomes = as_correct(correct)
    n = outcomes.size
    if n == 0:
        return dict.fromkeys(METRICS, "there are no samples")
    reasons: dict[str, str] = {}
    if convention == "torch-uncertainty" and n == 1:
        reasons |= dict.fromkeys(
            ("aurc", "eaurc", "eaurc_exact", "augrc"), "the areas of torch-uncertainty need two samples; there is one"
        )
    if outcomes.all():
        reasons |= dict.fromkeys(
            ("auroc", "fpr95", "tnr95", "aupr_error"), f"there are no errors among the {n} samples"
        )
    elif not outcomes.any():
        reasons |= dict.fromkeys(
            ("auroc", "fpr95", "tnr95", "aupr_success"), f"there are no successes among the {n} samples"
        )
    return reasons


def tied_share(confidence: Any) -> float:
    """The share of samples whose score equals that of another; NaN for no samples.

    Where it is not small, the order of the input moves AURC in ``tal``, ``tal-test`` and ``torch-uncertainty``.
    """
    scores = as_scores(confidence)
    if scores.size == 0:
        return float("nan")
    _, counts = np.unique(scores, return_counts=True)
    return float(np.sum(counts[counts > 1]) / scores.size)


def risk_coverage_curve(confidence: Any, correct: Any) -> RiskCoverage:
    """The error rate among the i surest samples for i = 1..n, expected over all orders of tied scores.

    Its mean risk is the AURC of the convention ``tal_fast``. Empty arrays for no samples.

    Raises:
        ValueError: as ``failure_metrics``.
    """
    sweep = _sweep(*_checked(confidence, correct))
    i = np.arange(1, sweep.scores.size + 1)
    return RiskCoverage(i / max(i.size, 1), _expected_errors(sweep) / i, sweep.scores)
