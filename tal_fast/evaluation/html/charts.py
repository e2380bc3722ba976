"""Charts of the page as coordinates of an SVG's view box, which the template draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tal_fast.evaluation import plots
from tal_fast.evaluation.evaluation import Evaluation
from tal_fast.evaluation.html.tables import COVERAGES, RISKS
from tal_fast.evaluation.tables import setting_title
from tal_fast.metrics.calibration import BINS
from tal_fast.metrics.curves import ReliabilityBins, histograms, oracle_risk, thinned
from tal_fast.utils.arrays import Floats

WIDTH, HEIGHT = 420, 290
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 44
MAX_CURVE_POINTS = 240
"""Points of a curve, more than a screen shows of a panel."""


@dataclass(frozen=True)
class Line:
    """A curve or outline."""

    name: str  # in the legend
    style: str  # CSS classes of its colour and dashes
    points: str  # x,y x,y ...
    score: int = -1  # position of its score in the report, by which the page shows and hides it; -1: always shown
    markers: list[tuple[float, float, str]] = field(default_factory=list)  # x, y, text


@dataclass(frozen=True)
class Chart:
    """A panel."""

    kind: str  # risk, histogram or reliability
    title: str
    label: str  # text alternative
    x_title: str
    y_title: str
    x_ticks: list[tuple[float, str]]  # position, text
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    y_max: float  # value at the top of the panel, from which the page's script reads values back
    bars: list[tuple[float, float, float, float, str, str]] = field(default_factory=list)  # box, CSS class, text


def style(i: int) -> str:
    """CSS classes of the i-th line; colours and dashes as in ``tal_fast.evaluation.plots``."""
    return f"c{i % len(plots.COLOURS)} d{i % len(plots.LINE_STYLES)}"


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers within [low, high], at most ``count``; ``low`` alone if the range is empty."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    rough = span / (count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _x(share: Any) -> Any:
    """Horizontal position of a share, or an array of shares, of the panel's width."""
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(share: Any) -> Any:
    """Vertical position of a share of the panel's height, from below."""
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _path(x: Floats, y: Floats) -> str:
    # Points far above the panel are clipped anyway; the bound keeps their numbers short.
    return " ".join(f"{a:.1f},{b:.2f}" for a, b in zip(x, np.maximum(y, -4 * HEIGHT), strict=True))


def _ticks(
    values: Sequence[float], low: float, high: float, position: Callable[[float], float]
) -> list[tuple[float, str]]:
    return [(round(position((v - low) / (high - low)), 2), f"{v:.6g}") for v in values]


def risk_coverage(evaluation: Evaluation, key: str, points: int) -> Chart | None:
    """Risk-coverage chart of a setting: a line of at most ``points`` points per score, the floor and a random score.

    The operating points of the primary score are marked. None for a setting without samples.
    """
    success, scores = evaluation.settings[key].setting.success, evaluation.operating_points[key]
    title, n, errors = setting_title(key, evaluation.report), success.size, int(success.size - success.sum())
    if n == 0:
        return None
    coverage = np.arange(1, n + 1) / n
    top = errors / n
    for operating in scores.values():
        top = max(top, float(operating.curve.risk[coverage >= plots.MIN_SCALED_COVERAGE / 100].max()))
    top = 1.05 * top if top else 0.01
    index = thinned(n, points)
    x = _x(coverage[index])
    lines = [
        Line("floor", "bound floor", _path(x, _y(oracle_risk(n, errors)[index] / top))),
        Line("random score", "bound random", _path(x[[0, -1]], _y(np.full(2, errors / n / top)))),
    ]
    half_coverage: list[str] = []
    for i, (name, operating) in enumerate(scores.items()):
        risk = operating.curve.risk[index]
        markers = []
        if name == evaluation.primary_score:
            chosen = [(f"risk at most {r:.0%}", operating.at_risk(r)) for r in RISKS]
            chosen += [(f"coverage at least {c:.0%}", operating.at_coverage(c)) for c in COVERAGES]
            for criterion, p in chosen:
                if p is not None:
                    values = f"coverage {p.coverage:.1%}, risk {p.risk:.2%}, threshold {p.threshold:.5g}"
                    place = round(_x(p.coverage), 1), round(_y(p.risk / top), 2)
                    markers.append((*place, f"{name}, {criterion}: {values}"))
        lines.append(Line(name, style(i), _path(x, _y(risk / top)), i, markers))
        half = operating.at_coverage(0.5)
        if half is not None and len(half_coverage) < 6:
            half_coverage.append(f"{name} {half.risk:.2%}")
    label = (
        f"Risk against coverage, {title}: {n} samples, {errors} errors, {errors / n:.2%} risk when all are kept; risk "
        f"at half the coverage: {', '.join(half_coverage)}. The tables hold the numbers."
    )
    x_ticks, y_ticks = _ticks(range(0, 101, 20), 0, 100, _x), _ticks(nice_ticks(0, 100 * top), 0, 100 * top, _y)
    return Chart("risk", title, label, plots.COVERAGE_TITLE, plots.RISK_TITLE, x_ticks, y_ticks, lines, 100 * top)


def confidence_histogram(score: str, groups: Mapping[str, Floats]) -> Chart | None:
    """Histogram of a score for each kind of sample, as shares of the kind's own size; None if no score is finite."""
    edges, shares = histograms(list(groups.values()))
    if not edges.size:
        return None
    top = 1.05 * max(share.max() for share in shares) or 0.01
    low, high = float(edges[0]), float(edges[-1])
    x = np.repeat(_x((edges - low) / (high - low)), 2)
    lines = []
    for i, (kind, share) in enumerate(zip(groups, shares, strict=True)):
        outline = np.concatenate(([0.0], np.repeat(share, 2), [0.0]))
        lines.append(Line(f"{kind} ({len(groups[kind]):,})", style(i), _path(x, _y(outline / top))))
    medians = [
        f"{kind}: {np.median(values[np.isfinite(values)]):.4g}"
        for kind, values in groups.items()
        if np.isfinite(values).any()
    ]
    label = f"Histogram of {score}; medians: {'; '.join(medians)}."
    x_ticks = _ticks(nice_ticks(low, high), low, high, _x)
    y_ticks = _ticks(nice_ticks(0, 100 * top), 0, 100 * top, _y)
    return Chart(
        "histogram", score, label, f"confidence ({score})", plots.SHARE_TITLE, x_ticks, y_ticks, lines, 100 * top
    )


def reliability_diagram(bins: ReliabilityBins, ece: float) -> Chart | None:
    """Reliability diagram: accuracy and share of samples by softmax probability; None without samples."""
    n = int(bins.samples.sum())
    if n == 0:
        return None
    bars = []
    for k, (count, confidence, accuracy) in enumerate(zip(*bins, strict=True)):
        if count == 0:
            continue
        left, right = _x(k / BINS), _x((k + 1) / BINS)
        text = f"{count:,} samples, mean probability {confidence:.2%}, accuracy {accuracy:.2%}"
        bars.append((round(left + 1, 2), round(_y(accuracy), 2), round(right - left - 2, 2),
                     round(_y(0) - _y(accuracy), 2), "accuracy", text))  # fmt: skip
        share = count / n
        bars.append((round((left + right) / 2 - 3, 2), round(_y(share), 2), 6.0,
                     round(_y(0) - _y(share), 2), "share", text))  # fmt: skip
    corner = np.array([0.0, 1.0])
    diagonal = Line("perfectly calibrated", "bound random", _path(_x(corner), _y(corner)))
    means = Line("bin means", "means", "", -1, [
        (round(_x(confidence), 1), round(_y(accuracy), 2),
         f"mean probability {confidence:.2%}, accuracy {accuracy:.2%}, {count:,} samples")
        for count, confidence, accuracy in zip(*bins, strict=True) if count
    ])  # fmt: skip
    label = (
        f"Accuracy against softmax probability of {n} samples in {BINS} bins; ECE {ece:.4f}. The table holds the bins."
    )
    x_ticks, y_ticks = (_ticks(range(0, 101, 20), 0, 100, position) for position in (_x, _y))
    return Chart(
        "reliability", "Reliability diagram", label, "softmax probability of the prediction (%)",
        "accuracy, and share of the samples (%)", x_ticks, y_ticks, [diagonal, means], 100.0, bars,
    )  # fmt: skip
