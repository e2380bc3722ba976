"""Confidence intervals of failure-detection metrics and of paired differences, for few errors too.

An interval is value ± t · SD, on the scale of the logarithm for AURC, E-AURC and AUGRC and of the logit for AUROC and
AUPR. SD² is the sum of squares V of the samples' influences (``tal_fast.metrics.influence``), and t Student's quantile
with ν degrees of freedom, 1/ν = Σ influence⁴ / 2V² + c/(k − 1), k the smaller of the numbers of errors and successes:
the first term, Satterthwaite's, is large where few samples carry the variance. The interval of FPR95 is the central
one of Beta(xm + ½, (1 − x)m + ½), x the value and m = x(1 − x)/V the effective number of errors (Jeffreys' interval).
``python -m bench.intervals`` simulates what the intervals cover.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from scipy import special

from tal_fast.config.names import METRICS
from tal_fast.metrics.influence import influence
from tal_fast.metrics.settings import ScoredSetting, means_of
from tal_fast.utils.arrays import Floats

LEVEL = 0.95
"""Default level of the intervals."""
FEW = 8
"""Number of errors, or of successes, below which intervals are not backed by the simulation."""
_LOG = ("aurc", "eaurc", "eaurc_exact", "augrc")
_RATIOS = ("auroc", "aupr_error")
_ROUNDING = 1e-12  # of a metric


class Evidence(NamedTuple):
    """Numbers of samples and errors of a setting, and a score's influences, from which intervals are computed."""

    n: int  # number of samples
    errors: int  # number of errors among them; over several sets, of the one with the fewest errors or successes
    influence: Floats  # (samples, len(METRICS)), samples in the same order for all scores and runs


def interval(
    metric: str,
    value: float,
    influences: Floats,
    n: int,
    errors: int,
    *,
    difference: bool = False,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Confidence interval of a metric, or of a difference of it between two scores or runs on the same samples.

    Without errors, without successes, or where every error is ranked last, the influences say nothing; the interval
    then reaches as far towards a random score as n samples allow, assuming that the score is no worse than random.

    Args:
        metric: one of ``METRICS``.
        value: the metric, or the difference.
        influences: (samples,) of the metric, or their difference.
        n, errors: number of samples and of errors among them.
        difference: whether it is a difference.
        level: share of intervals that hold the true value.

    Returns:
        Ends of the interval, (NaN, NaN) where the metric is undefined.
    """
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval must lie in (0, 1), not {level}; 0.95 is usual")
    variance = float(influences @ influences)
    if math.isnan(value) or math.isnan(variance):
        return math.nan, math.nan
    tail, few = (1 - level) / 2, min(errors, n - errors)
    if metric == "tnr95" and not difference:
        low, high = interval("fpr95", 1 - value, influences, n, errors, level=level)
        return 1 - high, 1 - low
    if metric in ("fpr95", "tnr95"):
        if (
            difference
        ):  # one more pair of errors, accepted by one score each, so that few errors that agree have a width
            half = -special.ndtri(tail) * math.sqrt(variance * few**2 + 1) / (few + 1)
            return max(value - half, -1.0), min(value + half, 1.0)
        effective = value * (1 - value) / variance if variance > 0 and 0 < value < 1 else few
        shape = value * effective + 0.5, (1 - value) * effective + 0.5
        low, high = (float(special.betaincinv(*shape, share)) for share in (tail, 1 - tail))
        return (low if value > 0 else 0.0), (high if value < 1 else 1.0)

    edge = value < _ROUNDING or (metric not in _LOG and value > 1 - _ROUNDING)
    if not few or (not difference and (edge or variance == 0)):
        reach = _towards_random(metric, _random(metric, errors / n) if difference else value, n, errors, tail)
        other = value - reach if difference else value
        return min(other, value + reach), max(other, value + reach)
    if variance == 0:
        return value, value
    weight = 1.0 if metric in _RATIOS else 0.5 if difference else 0.0
    inverse = float(np.sum(influences**2 * influences**2)) / (2 * variance**2)
    inverse += (weight / (few - 1) if few > 1 else math.inf) if weight else 0.0
    half = math.sqrt(variance) * float(-special.stdtrit(1 / inverse, tail) if inverse < 10 else math.inf)
    if difference:
        return max(value - half, -1.0), min(value + half, 1.0)
    if metric in _LOG:
        factor = math.exp(min(half / value, 700))
        return value / factor, min(value * factor, 1.0)
    half, centre = half / (value * (1 - value)), special.logit(value)
    return float(special.expit(centre - half)), float(special.expit(centre + half))


def _towards_random(metric: str, value: float, n: int, errors: int, tail: float) -> float:
    """Signed distance from a value to its interval's end if there are no errors, or only errors behind all successes.

    If a share q of k errors were at random ranks, none is seen there with probability (1 - q)^k = tail. Without errors
    (or successes) the error (success) rate could be q of n in the same way, all of them at random ranks.
    """
    few = min(errors, n - errors)
    unseen = 1 - tail ** (1 / (few or n))
    rate = errors / n if few else unseen if errors == 0 else 1 - unseen
    return (_random(metric, rate) - value) * (unseen if few else 1.0)


def _random(metric: str, rate: float) -> float:
    """Value of a metric for a random score at this error rate."""
    gap = -(1 - rate) * math.log1p(-rate) if rate < 1 else 0.0
    return {
        "aurc": rate, "eaurc": gap, "eaurc_exact": gap, "augrc": rate / 2, "auroc": 0.5, "aupr_success": 1 - rate,
        "aupr_error": rate,
    }[metric]  # fmt: skip


def evidence(settings: Mapping[str, ScoredSetting], score: str, convention: str = "tal_fast") -> dict[str, Evidence]:
    """Evidence for the intervals of a score, by setting.

    Returns:
        By key, as in ``settings``, and of ``means_of``: the influences on the plain mean over the sets, which share the
        ID samples. Shifted sets of equal size are taken to show the same images.
    """
    found = {}
    sets: dict[str, list[Evidence]] = {}
    totals: dict[str, dict[str, Floats]] = {}
    for key, judged in settings.items():
        setting = judged.setting
        n, n_id, errors = setting.success.size, setting.id_index.size, int(np.sum(setting.success == 0))
        confidence = setting.confidence(judged.id_scores[score], judged.ood_scores.get(score))
        rows = influence(confidence, setting.success, n - n_id, convention)
        samples = np.zeros((len(judged.id_scores[score]), len(METRICS)))
        samples[setting.id_index] = rows[:n_id]
        found[key] = Evidence(n, errors, np.concatenate((samples, rows[n_id:])))
        for kind in means_of(key):
            sets.setdefault(kind, []).append(found[key])
            total = totals.setdefault(kind, {})
            for part, values in ((f"{len(samples)} samples", samples), (f"set {judged.name}", rows[n_id:])):
                total[part] = total.get(part, 0.0) + values
    for kind, total in totals.items():
        n, errors, _ = fewest(sets[kind])
        found[kind] = Evidence(n, errors, np.concatenate(list(total.values())) / len(sets[kind]))
    return found


def fewest(found: Iterable[Evidence]) -> Evidence:
    """Evidence with the fewest errors or successes."""
    return min(found, key=lambda entry: min(entry.errors, entry.n - entry.errors))
