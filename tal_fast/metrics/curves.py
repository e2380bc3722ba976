"""Curves of a failure-detection report as numbers, in fractions: operating points, histograms, reliability diagrams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tal_fast.metrics.calibration import BINS
from tal_fast.metrics.ranking import RiskCoverage, as_correct, risk_coverage_curve
from tal_fast.utils.arrays import Floats, Ints, to_numpy

HISTOGRAM_BINS = 40
"""Default number of histogram bins."""


class OperatingPoint(NamedTuple):
    """Operating point: samples whose score is at least the threshold are kept."""

    coverage: float  # share of the samples kept
    risk: float  # error rate among these
    threshold: float  # lowest score kept


class OperatingPoints:
    """Coverage and risk at each threshold of a score.

    Tied samples are kept or left out together. A point is chosen on the samples that it is measured on, so that its
    risk on new samples is a little higher on average.
    """

    def __init__(self, confidence: Any, success: Any) -> None:
        self.curve: RiskCoverage = risk_coverage_curve(confidence, success)
        threshold = self.curve.threshold
        # The last sample of each group of tied scores.
        last = np.append(threshold[1:] != threshold[:-1], True) if threshold.size else np.zeros(0, dtype=bool)
        ends = np.flatnonzero(last)
        self._points = RiskCoverage(*(values[ends] for values in self.curve))

    def at_risk(self, limit: float) -> OperatingPoint | None:
        """Operating point of highest coverage whose risk is at most ``limit``; None if there is none."""
        fit = np.flatnonzero(self._points.risk <= limit)
        return self._point(fit[-1]) if fit.size else None

    def at_coverage(self, least: float) -> OperatingPoint | None:
        """Operating point of highest threshold that keeps at least the share ``least``; None without samples."""
        # In floating point 0.95 can be larger than 19 / 20.
        fit = np.flatnonzero(self._points.coverage >= least - 1e-12)
        return self._point(fit[0]) if fit.size else None

    def _point(self, i: int) -> OperatingPoint:
        return OperatingPoint(*(float(values[i]) for values in self._points))


def oracle_risk(n: int, errors: int) -> Floats:
    """(n,) risk of keeping the i most confident samples when every error is ranked last: the floor of any curve."""
    i = np.arange(1, n + 1)
    return np.maximum(0, i - n + errors) / i


def thinned(n: int, points: int) -> Ints:
    """Ascending indices that thin a curve of n points to at most ``points`` + 16.

    Both ends are among them; they are dense at the start, where the risk jumps.
    """
    if n <= points:
        return np.arange(n)
    even = np.linspace(0, n - 1, points).round().astype(np.int64)
    return np.unique(np.concatenate((even, np.geomspace(1, n / points, 16).astype(np.int64) - 1)))


def scores_by_kind(
    correct: Any, values: Floats, ood_scores: Mapping[str, Mapping[str, Floats]], score: str
) -> dict[str, Floats]:
    """Values of a score by kind of sample: ``ID, correct``, ``ID, wrong`` and ``OOD: NAME`` for each OOD set."""
    outcomes = as_correct(correct)
    found = {"ID, correct": values[outcomes == 1], "ID, wrong": values[outcomes == 0]}
    return found | {f"OOD: {name}": scores[score] for name, scores in ood_scores.items()}


def histograms(groups: Sequence[Floats], bins: int = HISTOGRAM_BINS) -> tuple[Floats, list[Floats]]:
    """Histograms of the finite values of each group over common bins.

    Returns:
        (bins + 1,) edges, and for each group (bins,) shares of its size; no edges if no value is finite.
    """
    finite = [group[np.isfinite(group)] for group in groups]
    everything = np.concatenate([*finite, np.zeros(0)])
    if not everything.size:
        return np.zeros(0), [np.zeros(0) for _ in groups]
    low, high = float(everything.min()), float(everything.max())
    # Scores that are equal, or nearly, would give bins without a width.
    room = max(0.0, 1e-6 * max(abs(low), abs(high), 1e-6) - (high - low))
    edges = np.linspace(low - room, high + room, bins + 1)
    return edges, [
        np.histogram(inside, edges)[0] / max(len(group), 1) for inside, group in zip(finite, groups, strict=True)
    ]


class ReliabilityBins(NamedTuple):
    """Bins of a reliability diagram, of equal width over [0, 1] and closed on the right."""

    samples: Ints  # (bins,) int64, number of samples
    confidence: Floats  # (bins,) their mean probability; NaN for empty bins
    accuracy: Floats  # (bins,) share of correct predictions; NaN for empty bins


def reliability(probability: Any, correct: Any, bins: int = BINS) -> ReliabilityBins:
    """Bin probabilities of the predicted classes; Σ samples/n · |accuracy − confidence| over the bins is the ECE."""
    p, outcomes = to_numpy(probability).astype(np.float64), as_correct(correct)
    place = np.digitize(p, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    samples = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, weights=weights, minlength=bins) / samples for weights in (p, outcomes)]
    return ReliabilityBins(samples, *means)
