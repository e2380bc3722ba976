"""Further failure-detection metrics, on request; formulas and sources are in ``docs/metrics.md#further-metrics``."""

from __future__ import annotations

from typing import Any

import numpy as np

from tal_fast.metrics.failure import aurc_floor, failure_metrics
from tal_fast.metrics.ranking import Ranking, as_scores, rank
from tal_fast.utils.arrays import Floats

LEVEL = 0.95
"""Level of the intervals of operating points."""


def further_metrics(confidence: Any, success: Any, labels: Any = None, loss: Any = None) -> dict[str, Any]:
    """NAURC, achievable AURC and e-AUGRC; balanced AURC and AUGRC; AURC and AUGRC of a loss.

    Args:
        confidence, success: (n,) as for ``failure_metrics``.
        labels: (n,) classes; without them nothing is balanced.
        loss: (n,) finite losses of the predictions, such as entries of a cost matrix; without them none has an area.

    Returns:
        ``naurc``, ``aurc_achievable``, ``eaugrc``, ``balanced_aurc``, ``balanced_augrc``, ``cost_aurc`` and
        ``cost_augrc``, the last two in units of the loss, the others fractions; NaN where undefined.
    """
    ranking, values = rank(confidence, success), failure_metrics(confidence, success)
    n, order = ranking.scores.size, np.argsort(-as_scores(confidence), kind="stable")
    rate = int(ranking.fp[-1]) / n if n else np.nan
    spread = rate - aurc_floor(n, int(ranking.fp[-1])) if n else np.nan
    found = {
        "naurc": values["eaurc_exact"] / spread if 0 < rate < 1 else np.nan,
        "aurc_achievable": _achievable(ranking) if n else np.nan,
        "eaugrc": values["augrc"] - rate**2 / 2,
    }
    for vector, name in ((labels, "labels"), (loss, "loss")):
        if vector is not None and np.shape(vector) != (n,):
            raise ValueError(f"{name} must be a vector of {n}, the number of scores, not of shape {np.shape(vector)}")
    if labels is not None and n:
        _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        weight = n / (sizes.size * sizes[classes[order]])
        found["balanced_aurc"] = _balanced(ranking, classes[order], sizes)
        found["balanced_augrc"] = _loss_areas(ranking, weight * (1 - ranking.correct))[1]
    if loss is not None and n:
        found["cost_aurc"], found["cost_augrc"] = _loss_areas(ranking, as_scores(loss, "loss")[order])
    return found


def _achievable(ranking: Ranking) -> float:
    from sklearn.isotonic import isotonic_regression

    # The lower convex hull of errors over samples: its slopes are the isotonic regression of the groups' error rates.
    size = np.diff(ranking.end, prepend=0)
    slope = isotonic_regression(np.diff(ranking.fp, prepend=0) / size, sample_weight=size)
    corner = np.append(np.diff(slope) != 0, True)
    c, e = ranking.end[corner].astype(float), ranking.fp[corner]
    # Below the first corner the risk stays; between two, errors rise in a straight line over coverage.
    areas = np.diff(e) + (e[:-1] * c[1:] - e[1:] * c[:-1]) * np.log(c[1:] / c[:-1]) / np.diff(c)
    return float(e[0] + areas.sum()) / ranking.scores.size


def _loss_areas(ranking: Ranking, loss: Floats) -> tuple[float, float]:
    """AURC and AUGRC of losses in the order of the ranking, expected over all orders of tied scores."""
    i, end = np.arange(1, loss.size + 1), ranking.end
    total = np.interp(i, np.append(0, end), np.append(0, np.cumsum(loss)[end - 1]))
    return float(np.mean(total / i)), float((total.sum() - total[-1] / 2) / loss.size**2)


def _balanced(ranking: Ranking, classes: Any, sizes: Any) -> float:
    n, by_class = classes.size, np.argsort(classes, kind="stable")
    start = np.repeat(np.cumsum(sizes) - sizes, sizes)
    errors = np.append(0, np.cumsum(1 - ranking.correct[by_class]))
    share = (errors[1:] - errors[start]) / (np.arange(n) + 1 - start)  # of errors among the class's samples so far
    change = np.empty(n)
    change[by_class] = np.where(np.arange(n) == start, share, np.diff(share, prepend=0))
    risk = np.cumsum(change)[ranking.end - 1] / sizes.size
    heights = risk + np.append(risk[0], risk[:-1])
    return float(np.sum(np.diff(ranking.end, prepend=0) * heights) / (2 * n))


def operating_point(confidence: Any, success: Any, kind: str, limit: float) -> list[float]:
    """Value, low and high end of an operating point: the largest coverage of a risk, or the risk of a coverage.

    Args:
        kind: ``coverage@risk``: the largest coverage whose risk is at most ``limit``, 0 if none. ``risk@coverage``: the
            risk of the fewest most confident samples that are at least this share.
    """
    from scipy.stats import binom, binomtest

    ranking = rank(confidence, success)
    m, k, n, tail = ranking.end, ranking.fp, ranking.scores.size, (1 - LEVEL) / 2
    if not n:
        return [np.nan] * 3
    if kind == "risk@coverage":
        at = int(np.flatnonzero(m >= limit * n - 1e-9)[0])
        low, high = binomtest(int(k[at]), int(m[at])).proportion_ci(LEVEL)
        return [float(k[at] / m[at]), float(low), float(high)]
    fits = (k <= limit * m, binom.cdf(k, m, limit) <= tail, binom.sf(k - 1, m, limit) > tail)
    value, low, high = (float(np.append(0, m)[np.append(True, fit)][-1] / n) for fit in fits)
    # The coverage of a threshold varies too. Both ends together cover at least LEVEL, mostly 97 to 99%.
    return [value, float(binom.ppf(tail, n, low)) / n, float(binom.ppf(1 - tail, n, high)) / n]
