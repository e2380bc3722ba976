"""Further failure-detection metrics, on request; formulas and sources are in ``docs/metrics.md#further-metrics``."""

from __future__ import annotations

from typing import Any

import numpy as np

from tal_fast.config.names import FURTHER_METRICS
from tal_fast.metrics.failure import aurc_floor, failure_metrics
from tal_fast.metrics.ranking import Ranking, as_correct, as_scores, rank
from tal_fast.utils.arrays import Floats, Ints

LEVEL = 0.95  # of the intervals of operating points


def further_metrics(confidence: Any, success: Any, loss: Any = None, labels: Any = None) -> dict[str, float]:
    """NAURC, achievable AURC, e-AUGRC, the areas of a loss, and those balanced over classes.

    Args:
        confidence, success: (n,) as for ``failure_metrics``.
        loss: (n,) finite losses, such as ``costs[labels, predictions]`` for a cost matrix.
        labels: (n,) true classes.

    Returns:
        ``naurc``, ``aurc_achievable``, ``eaugrc``; with a loss also ``cost_aurc`` and ``cost_augrc``, in its units;
        with labels ``balanced_aurc`` and ``balanced_augrc``. NaN where undefined.
    """
    from sklearn.isotonic import isotonic_regression

    ranking, values = rank(confidence, success), failure_metrics(confidence, success)
    n = ranking.scores.size
    if not n:
        return dict.fromkeys(FURTHER_METRICS, np.nan)
    errors, size = int(ranking.fp[-1]), np.diff(ranking.end, prepend=0)
    rate = errors / n
    # The lower convex hull of errors over samples: its slopes are the isotonic regression of the groups' error rates.
    slope = isotonic_regression(np.diff(ranking.fp, prepend=0) / size, sample_weight=size)
    corner = np.append(np.diff(slope) != 0, True)
    c, e = ranking.end[corner].astype(float), ranking.fp[corner]
    # Below the first corner the risk stays; between two, errors rise in a straight line over coverage.
    areas = np.diff(e) + (e[:-1] * c[1:] - e[1:] * c[:-1]) * np.log(c[1:] / c[:-1]) / np.diff(c)
    found = {
        "naurc": values["eaurc_exact"] / (rate - aurc_floor(n, errors)) if 0 < rate < 1 else np.nan,
        "aurc_achievable": float(e[0] + areas.sum()) / n,
        "eaugrc": values["augrc"] - rate**2 / 2,
    }
    order = np.argsort(-as_scores(confidence), kind="stable")
    if loss is not None:
        found["cost_aurc"], found["cost_augrc"] = _loss_areas(ranking, as_scores(loss, "loss")[order])
    if labels is not None:
        _, classes, sizes = np.unique(np.asarray(labels)[order], return_inverse=True, return_counts=True)
        wrong = 1 - as_correct(success)[order]  # the ranking has its own order within ties
        found["balanced_aurc"] = _balanced_aurc(ranking, wrong, classes, sizes)
        found["balanced_augrc"] = _loss_areas(ranking, wrong * n / (sizes.size * sizes[classes]))[1]
    return found


def _loss_areas(ranking: Ranking, losses: Floats) -> tuple[float, float]:
    """AURC and AUGRC of losses in the order of the ranking."""
    i, end = np.arange(1, losses.size + 1), ranking.end
    # Losses of tied samples in any order: a straight line between the ends of their group.
    total = np.interp(i, np.append(0, end), np.append(0, np.cumsum(losses)[end - 1]))
    return float(np.mean(total / i)), float((total.sum() - total[-1] / 2) / losses.size**2)


def _balanced_aurc(ranking: Ranking, wrong: Any, classes: Ints, sizes: Ints) -> float:
    """Trapezoidal area under the mean over the classes of the error rate among those kept, 0 where none is."""
    risk = np.zeros(ranking.end.size)
    for c in range(sizes.size):
        kept, errors = (np.cumsum(part * (classes == c))[ranking.end - 1] for part in (np.ones(classes.size), wrong))
        risk += errors / np.maximum(kept, 1) / sizes.size
    heights = risk + np.append(risk[0], risk[:-1])
    return float(np.sum(np.diff(ranking.end, prepend=0) * heights) / (2 * classes.size))


def operating_point(confidence: Any, success: Any, kind: str, limit: float) -> list[float]:
    """Value, low and high end at ``limit``: the largest ``coverage@risk`` of at most it, or the ``risk@coverage``.

    The coverage is 0 if no threshold has that little risk; the risk is that of the fewest samples of that coverage.
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
