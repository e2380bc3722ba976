"""What the pictures of a failure-detection report show, as numbers: curves, operating points, histograms, bins.

``tal_fast.evaluation.plots`` draws them as PNG and ``tal_fast.html_report`` as SVG. Everything is in natural units (fractions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tal_fast.metrics.calibration import BINS
from tal_fast.metrics.failure import Floats, Ints, RiskCoverage, as_correct, risk_coverage_curve

HISTOGRAM_BINS = 40


class Operating(NamedTuple):
    """What one threshold does: samples whose score is at least it are kept.

    Attributes:
        coverage: share of the samples kept.
        risk: share of errors among those.
        threshold: the score.
    """

    coverage: float
    risk: float
    threshold: float


class OperatingPoints:
    """What each threshold of a score does to a setting's samples.

    Only thresholds count, so tied samples are kept or left together; a point read off here was chosen on these very
    samples, so that new ones will on average do a little worse.

    Args:
        confidence: (n,) scores, higher = surer.
        success: (n,) 0/1 or bool.

    Raises:
        ValueError: as ``tal_fast.metrics.risk_coverage_curve``.
    """

    def __init__(self, confidence: Any, success: Any) -> None:
        self.curve: RiskCoverage = risk_coverage_curve(confidence, success)
        threshold = self.curve.threshold
        # The last sample of each run of tied scores.
        last = np.append(threshold[1:] != threshold[:-1], True) if threshold.size else np.zeros(0, dtype=bool)
        ends = np.flatnonzero(last)
        self._points = RiskCoverage(*(values[ends] for values in self.curve))

    def at_risk(self, limit: float) -> Operating | None:
        """The threshold of most coverage among those whose risk is at most ``limit``; None when there is none."""
        fit = np.flatnonzero(self._points.risk <= limit)
        return self._point(fit[-1]) if fit.size else None

    def at_coverage(self, least: float) -> Operating | None:
        """The highest threshold that keeps at least the share ``least`` of the samples; None without samples."""
        # 0.95 may lie a rounding above 19 / 20.
        fit = np.flatnonzero(self._points.coverage >= least - 1e-12)
        return self._point(fit[0]) if fit.size else None

    def _point(self, i: int) -> Operating:
        return Operating(*(float(values[i]) for values in self._points))


def oracle_risk(n: int, errors: int) -> Floats:
    """(n,) risk of keeping the i surest samples when every error is ranked last: the floor of any curve."""
    i = np.arange(1, n + 1)
    return np.maximum(0, i - n + errors) / i


def thinned(n: int, points: int) -> Ints:
    """At most ``points`` + 16 rising indices of n, both ends among them, dense at the start, where risk jumps."""
    if n <= points:
        return np.arange(n)
    even = np.linspace(0, n - 1, points).round().astype(np.int64)
    return np.unique(np.concatenate((even, np.geomspace(1, n / points, 16).astype(np.int64) - 1)))


def kinds(
    correct: Any, values: Floats, ood_scores: Mapping[str, Mapping[str, Floats]], score: str
) -> dict[str, Floats]:
    """A score's values by kind of sample: ``ID, right``, ``ID, wrong`` and ``OOD: NAME`` for each OOD set."""
    right = as_correct(correct, "right")
    found = {"ID, right": values[right == 1], "ID, wrong": values[right == 0]}
    return found | {f"OOD: {name}": scores[score] for name, scores in ood_scores.items()}


def histograms(groups: Sequence[Floats], bins: int = HISTOGRAM_BINS) -> tuple[Floats, list[Floats]]:
    """Where the finite values of each group lie, as shares of the group's own size.

    Returns:
        (bins + 1,) edges that all groups share, and (bins,) shares of each group; no edges when nothing is finite.
    """
    finite = [group[np.isfinite(group)] for group in groups]
    everything = np.concatenate([*finite, np.zeros(0)])
    if not everything.size:
        return np.zeros(0), [np.zeros(0) for _ in groups]
    low, high = float(everything.min()), float(everything.max())
    # Scores that differ by a few roundings, or not at all, would leave bins without a width.
    room = max(0.0, 1e-6 * max(abs(low), abs(high), 1e-6) - (high - low))
    edges = np.linspace(low - room, high + room, bins + 1)
    return edges, [
        np.histogram(inside, edges)[0] / max(len(group), 1) for inside, group in zip(finite, groups, strict=True)
    ]


class ReliabilityBins(NamedTuple):
    """Samples by the largest softmax probability, in bins of equal width over [0, 1], closed on the right.

    Attributes:
        samples: (bins,) int64, how many.
        confidence: (bins,) their mean probability; NaN where there are none.
        accuracy: (bins,) the share classified right; NaN where there are none.
    """

    samples: Ints
    confidence: Floats
    accuracy: Floats


def reliability(probability: Any, right: Any, bins: int = BINS) -> ReliabilityBins:
    """The bins of a reliability diagram; Σ samples/n · |accuracy − confidence| is the ECE of ``tal_fast.metrics.calibration``.

    Args:
        probability: (n,) of the predicted class, in [0, 1].
        right: (n,) 0/1 or bool.
        bins: their number.
    """
    p, correct = np.asarray(probability, dtype=np.float64), as_correct(right, "right")
    place = np.digitize(p, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    samples = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, weights=weights, minlength=bins) / samples for weights in (p, correct)]
    return ReliabilityBins(samples, *means)
