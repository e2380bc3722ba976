"""How well a confidence score tells right predictions from wrong ones (Section 5.1 of the TAL paper).

``failure_metrics`` gives every number of the paper's tables from two vectors: the confidence of each sample (higher =
surer) and whether it was a success. All values are fractions in natural units; the papers print AURC and E-AURC times
1000 and the rest in percent. Which samples count and what a success is decides the setting: see
``tal_fast.settings``. Only NumPy is needed; PyTorch tensors are accepted too.

Three conventions (``docs/metrics.md`` works through an example of each difference):

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
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CONVENTIONS = ("tal_fast", "tal", "tal-test")
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


def _trapezoid_precision(sweep: _Sweep) -> float:
    """The area under the precision-recall curve by straight lines, from (recall 0, precision 1)."""
    recall = np.concatenate(([0.0], sweep.tp / sweep.tp[-1]))
    precision = np.concatenate(([1.0], sweep.tp / sweep.end))
    return float(np.sum(np.diff(recall) * (precision[1:] + precision[:-1])) / 2)


def _error_first(sweep: _Sweep) -> tuple[Ints, Ints]:
    """The sweep from the least sure sample up: errors found and samples seen at each distinct threshold."""
    n, errors = sweep.end[-1], sweep.fp[-1]
    found = np.append(errors - sweep.fp[:-1][::-1], errors)
    seen = np.append(n - sweep.end[:-1][::-1], n)
    return found, seen


def _fpr_tnr(sweep: _Sweep, convention: str) -> tuple[float, float]:
    tp, fp = sweep.tp, sweep.fp
    if convention == "tal_fast":
        # In integers, so that 19 of 20 reaches 0.95 whatever the rounding.
        first = int(np.argmax(20 * tp >= 19 * tp[-1]))
        return float(fp[first] / fp[-1]), float((fp[-1] - fp[first]) / fp[-1])
    if convention == "tal-test":
        # From the lowest threshold up, as the precision-recall curve is listed: of two equally near recalls the
        # larger wins.
        nearest = len(tp) - 1 - int(np.argmin(np.abs((tp / tp[-1])[::-1] - 0.95)))
        return float(fp[nearest] / fp[-1]), float((fp[-1] - fp[nearest]) / fp[-1])
    if len(tp) > 2:
        # scikit-learn's roc_curve drops the points inside straight runs unless told not to.
        corner = np.ones(len(tp), dtype=bool)
        corner[1:-1] = (np.diff(fp, 2) != 0) | (np.diff(tp, 2) != 0)
        tp, fp = tp[corner], fp[corner]
    tpr = np.concatenate(([0.0], tp / tp[-1]))
    fpr = np.concatenate(([0.0], fp / fp[-1]))
    return float(fpr[np.argmin(np.abs(tpr - 0.95))]), float(1 - fpr[np.argmax(tpr >= 0.95)])


def failure_metrics(confidence: Any, correct: Any, convention: str = "tal_fast") -> dict[str, float]:
    """All failure-detection metrics of one score.

    Args:
        confidence: (n,) scores, higher = surer; any float or integer type, array, tensor or list. They go through
            float64.
        correct: (n,) 0/1 or bool; 1 = success.
        convention: ``tal_fast``, ``tal`` or ``tal-test``, see the module's docstring.

    Returns:
        A float in natural units (a fraction) for each name in ``METRICS``:

        - ``aurc``: mean over i of R_i, the error rate among the i surest.
        - ``eaurc``: AURC − (r + (1 − r) ln(1 − r)), r the error rate. ``eaurc_exact``: AURC − ``aurc_floor``.
        - ``augrc``: r(1 − r)(1 − AUROC) + r²/2, the area under the generalised risk (Traub et al., 2024); the
          released code has none, so it is the same in every convention.
        - ``auroc``: successes positive, ties half.
        - ``fpr95``, ``tnr95``: errors accepted, or rejected, where 95% of the successes are accepted.
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
    wrong = _expected_errors(sweep) if convention == "tal_fast" else np.cumsum(1 - sweep.correct)
    aurc = float(np.mean(wrong / np.arange(1, n + 1)))
    values.update(aurc=aurc, eaurc=aurc - _oracle_closed_form(r), eaurc_exact=aurc - aurc_floor(n, errors))
    values["augrc"] = r * r / 2
    if successes and errors:
        values["auroc"] = _auroc(sweep)
        values["augrc"] += r * (1 - r) * (1 - values["auroc"])
        values["fpr95"], values["tnr95"] = _fpr_tnr(sweep, convention)
    if successes:
        plain = convention == "tal_fast"
        values["aupr_success"] = _average_precision(sweep.tp, sweep.end) if plain else _trapezoid_precision(sweep)
    if errors:
        values["aupr_error"] = _average_precision(*_error_first(sweep))
    return values


def undefined_reasons(correct: Any) -> dict[str, str]:
    """For each metric that ``failure_metrics`` gives as NaN for these outcomes, why; empty when all are defined.

    Args:
        correct: (n,) 0/1 or bool.

    Raises:
        ValueError: as ``failure_metrics``.
    """
    outcomes = as_correct(correct)
    if outcomes.size == 0:
        return dict.fromkeys(METRICS, "there are no samples")
    if outcomes.all():
        return dict.fromkeys(
            ("auroc", "fpr95", "tnr95", "aupr_error"), f"there are no errors among the {outcomes.size} samples"
        )
    if not outcomes.any():
        return dict.fromkeys(
            ("auroc", "fpr95", "tnr95", "aupr_success"), f"there are no successes among the {outcomes.size} samples"
        )
    return {}


def tied_share(confidence: Any) -> float:
    """The share of samples whose score equals that of another; NaN for no samples.

    Where it is not small, the order of the input moves AURC in the conventions ``tal`` and ``tal-test``.
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
