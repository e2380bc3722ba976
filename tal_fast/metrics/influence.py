"""Influence of each sample on each failure-detection metric, from which variances and intervals follow.

The influence of a sample is the derivative of the metric by the sample's weight (the infinitesimal jackknife: Efron,
*The Jackknife, the Bootstrap and Other Resampling Plans*, 1982, chapter 6; for AUROC DeLong's components). The sum of
squares is the variance of the metric over test samples. Influences of two scores or runs on the same samples are
subtracted sample by sample: the variance of the difference is then that of the paired difference.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tal_fast.config.names import METRICS
from tal_fast.metrics.failure import check_convention
from tal_fast.metrics.ranking import as_correct, as_scores
from tal_fast.utils.arrays import Floats

# The slope of the ROC curve at FPR95 is read over so many standard deviations of the true-positive rate to either side.
_SLOPE = 2.0


def influence(confidence: Any, correct: Any, n_ood: int = 0, convention: str = "tal_fast") -> Floats:
    """Influence of each sample on each metric.

    Metrics are those of the convention ``tal_fast``, with tied samples at one rank, except that FPR95 and TNR95 have
    errors as the positive class where the convention has. FPR95 moves with the errors and with its threshold
    (Woodruff, 1952).

    Args:
        confidence, correct: as for ``failure_metrics``.
        n_ood: number of OOD samples, which are the last ones. Their number and that of ID samples count as fixed.
        convention: convention of the metrics.

    Returns:
        (n, len(METRICS)) float64, NaN where a metric is undefined. Errors are scaled by √(k/(k − 1)) for k errors, so
        that the sum of their squares is unbiased; successes likewise.
    """
    check_convention(convention)
    scores, outcomes = as_scores(confidence), as_correct(correct)
    n, successes = scores.size, int(outcomes.sum())
    errors = n - successes
    if not 0 <= n_ood <= n:
        raise ValueError(f"n_ood must lie in 0..{n}, the number of samples, not {n_ood}")
    if n == 0:
        return np.full((0, len(METRICS)), np.nan)
    _, group = np.unique(-scores, return_inverse=True)
    size = np.bincount(group).astype(np.float64)
    wrong = np.bincount(group, weights=1 - outcomes).astype(np.float64)
    right = size - wrong
    end, fp = np.cumsum(size), np.cumsum(wrong)
    tp = end - fp
    rate = errors / n
    of_rate = np.outer((1 - rate, -rate), np.ones(len(size))) / n  # on the error rate: of an error, and of a success
    aurc = _aurc(size, wrong, end, fp)
    # Minus the derivative of the floor, r + (1 - r) ln(1 - r).
    slope = np.log1p(-rate) if rate < 1 else 0.0
    found = {"aurc": aurc, "eaurc": aurc + slope * of_rate, "augrc": rate * of_rate}
    if errors and successes:
        above, below = (tp - right / 2) / successes, (errors - fp + wrong / 2) / errors
        auroc = float(wrong @ above / errors)
        found["auroc"] = np.stack(((above - auroc) / errors, (below - auroc) / successes))
        found["augrc"] = ((1 - 2 * rate) * (1 - auroc) + rate) * of_rate - rate * (1 - rate) * found["auroc"]
        if convention in ("openood", "torch-uncertainty"):
            found["fpr95"] = _fpr95(_from_below(wrong)[::-1], _from_below(right)[::-1])[::-1, ::-1]
        else:
            found["fpr95"] = _fpr95(tp, fp)
        found["tnr95"] = -found["fpr95"]
    if successes:
        found["aupr_success"] = _precision(right, size)[::-1]
    if errors:
        found["aupr_error"] = _precision(wrong[::-1], size[::-1])[:, ::-1]
    found["eaurc_exact"] = found["eaurc"]
    undefined = np.full_like(aurc, np.nan)
    by_group = np.stack([found.get(metric, undefined) for metric in METRICS], axis=-1)
    values: Floats = by_group[outcomes, group]
    for stratum in (slice(0, n - n_ood), slice(n - n_ood, n)):
        if values[stratum].size:
            values[stratum] -= values[stratum].mean(0)
    scale = [np.sqrt(count / max(count - 1, 1)) for count in (errors, successes)]
    return values * np.array(scale)[outcomes, None]


def _from_below(values: Floats) -> Floats:
    """Sum over each group and all less confident ones."""
    total: Floats = np.cumsum(values[::-1])[::-1]
    return total


def _aurc(size: Floats, wrong: Floats, end: Floats, fp: Floats) -> Floats:
    """(2, groups) influence of an error and of a success on AURC.

    A group of m samples, e of them errors, after B samples with b errors adds e + (b - B e/m)(H(B + m) - H(B)) to
    n AURC, H the harmonic numbers. Its derivatives by B and b act on the samples above it, by m and e on its own.
    """
    n = int(end[-1])
    before, ends, starts = end - size, end.astype(np.int64), (end - size).astype(np.int64)
    i = np.arange(1, n + 1, dtype=np.float64)
    harmonic, squares = (np.concatenate(([0.0], np.cumsum(terms))) for terms in (1 / i, 1 / (i * i)))
    step = harmonic[ends] - harmonic[starts]
    share = wrong / size
    excess = fp - wrong - before * share
    by_before = -share * step - excess * (squares[ends] - squares[starts])
    # π²/6 - Σ_{j <= i} 1/j² is the derivative of H(i).
    by_size = before * share / size * step + excess * (np.pi**2 / 6 - squares[ends])
    by_error = 1 - before / size * step + _from_below(step) - step
    success = by_size + _from_below(by_before) - by_before
    return np.stack((success + by_error, success)) / n


def _precision(hits: Floats, size: Floats) -> Floats:
    """(2, groups) influence of a hit and of another sample on average precision.

    ``hits`` of the ``size`` samples of each group are of the positive class, in the order in which they are found.
    """
    total, seen = hits.sum(), np.cumsum(size)
    precision = np.cumsum(hits) / seen
    other = -_from_below(hits * precision / seen)
    return np.stack((other + _from_below(hits / seen) + precision - hits @ precision / total, other)) / total


def _fpr95(tp: Floats, fp: Floats) -> Floats:
    """(2, groups) influence of an error and of a success on FPR95."""
    successes, errors = tp[-1], fp[-1]

    def group_at(count: float) -> int:
        return int(np.searchsorted(tp, min(max(count, 1), successes)))

    at = group_at(-(-19 * successes // 20))
    room = max(_SLOPE * np.sqrt(0.95 * 0.05 * successes), 1.0)
    high, low = group_at(np.ceil(0.95 * successes + room)), group_at(np.floor(0.95 * successes - room))
    slope = (fp[high] - fp[low]) / errors / max(tp[high] - tp[low], 1) * successes
    accepted = (np.arange(len(tp)) <= at).astype(np.float64)
    return np.stack(((accepted - fp[at] / errors) / errors, -slope * (accepted - tp[at] / successes) / successes))
