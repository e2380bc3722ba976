"""Charts of the page: Matplotlib's SVG, coloured by the page's style sheet."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tal_fast.evaluation import plots
from tal_fast.evaluation.evaluation import Evaluation
from tal_fast.evaluation.tables import setting_title
from tal_fast.metrics.calibration import BINS
from tal_fast.metrics.curves import ReliabilityBins, histograms, oracle_risk, thinned
from tal_fast.utils.arrays import Floats

WIDTH, HEIGHT = 400, 265
"""Size of a chart in points."""
MAX_CURVE_POINTS = 240
"""Points of a curve, more than a screen shows of a panel."""


@dataclass(frozen=True)
class Chart:
    """A panel."""

    kind: str  # risk, histogram, reliability or training
    title: str
    label: str  # text alternative
    svg: str  # inside of its <svg>, without any text from outside
    legend: tuple[tuple[str, str], ...] = ()  # CSS class and name of each line, where the page has no common legend


def style(i: int) -> str:
    """CSS classes of the i-th line; colours and dashes as in ``tal_fast.evaluation.plots``."""
    return f"c{i % len(plots.COLOURS)} d{i % len(plots.LINE_STYLES)}"


def _svg(salt: str, x_title: str, y_title: str, draw: Callable[[Any], None], y_top: float | None = None) -> str:
    """Inside of the SVG of a chart; the group of an artist whose gid is ``css:NAMES`` has these classes.

    Charts of one page need different ``salt``, from which the ids within them follow.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0.13, 0.17, 0.83, 0.79))
    axes.set(xlabel=x_title, ylabel=y_title)
    axes.grid(gid="css:grid")
    axes.tick_params(length=0)
    for part in (figure.patch, axes.patch, *axes.spines.values()):
        part.set_visible(False)
    draw(axes)
    axes.set_ylim(0 if y_top is not None else None, y_top)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = re.search(r"<svg[^>]*>(.*)</svg>", buffer.getvalue(), re.DOTALL)
    assert svg is not None
    text = re.sub(r"<!--.*?-->|<style.*?</style>|<metadata>.*?</metadata>", "", svg[1], flags=re.DOTALL)
    # The page's security policy forbids style attributes, and its style sheet has the colours, light and dark.
    text = re.sub(r'style="([^"]*)"', lambda found: _attributes(found[1]), text)
    text = re.sub(r'id="css:([^"]*)"', r'class="\1"', text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return re.sub(r"(\.\d\d)\d+|\s*\n\s*", lambda found: found[1] or "\n", text)


def _attributes(css: str) -> str:
    """Attributes for the declarations of an artist's style, without its colours and fonts."""
    pairs = [declaration.strip().partition(": ") for declaration in css.split(";")]
    return " ".join(f'{name}="{value}"' for name, _, value in pairs if not (name.startswith("font") or "#" in value))


def risk_coverage(evaluation: Evaluation, key: str, scores: Sequence[str]) -> Chart:
    """Risk-coverage chart of a setting: a line per score, the floor and a random score."""
    success = evaluation.settings[key].setting.success
    risks = [evaluation.operating_points[key][score].curve.risk for score in scores]
    title, n, errors = setting_title(key, evaluation.report), success.size, int(success.size - success.sum())
    coverage = np.arange(1, n + 1) / n
    top = max(errors / n, *(float(risk[coverage >= plots.MIN_SCALED_COVERAGE / 100].max()) for risk in risks))
    index = thinned(n, MAX_CURVE_POINTS)

    def draw(axes: Any) -> None:
        x = 100 * coverage[index]
        axes.plot(x, 100 * oracle_risk(n, errors)[index], gid="css:bound floor")
        axes.plot([0, 100], [100 * errors / n] * 2, gid="css:bound random")
        for i, risk in enumerate(risks):
            axes.plot(x, 100 * risk[index], gid=f"css:line {style(i)}")
        axes.set_xlim(0, 100)

    label = f"Risk against coverage, {title}: {n} samples, {errors} wrong. The tables hold the numbers."
    return Chart("risk", title, label, _svg(label, plots.COVERAGE_TITLE, plots.RISK_TITLE, draw, 105 * top or 1))


def confidence_histogram(score: str, groups: Mapping[str, Floats]) -> Chart | None:
    """Histogram of a score for each kind of sample, as shares of the kind's own size; None if no score is finite."""
    edges, shares = histograms(list(groups.values()))
    if not edges.size:
        return None

    def draw(axes: Any) -> None:
        for i, share in enumerate(shares):
            axes.stairs(100 * share, edges, gid=f"css:line {style(i)}")
        axes.set_xlim(edges[0], edges[-1])

    label = f"Histogram of {score} of each kind of sample: {', '.join(groups)}."
    legend = tuple((style(i), f"{kind} ({len(values):,})") for i, (kind, values) in enumerate(groups.items()))
    top = 105 * max(share.max() for share in shares) or 1
    return Chart("histogram", score, label, _svg(label, "confidence", plots.SHARE_TITLE, draw, top), legend)


def reliability_diagram(bins: ReliabilityBins, ece: float) -> Chart:
    """Reliability diagram: accuracy and share of samples by softmax probability."""
    n = int(bins.samples.sum())
    filled = bins.samples > 0
    centre = 100 * (np.flatnonzero(filled) + 0.5) / BINS

    def draw(axes: Any) -> None:
        axes.bar(centre, 100 * bins.accuracy[filled], 96 / BINS, gid="css:accuracy")
        axes.bar(centre, 100 * bins.samples[filled] / n, 25 / BINS, gid="css:share")
        axes.plot([0, 100], [0, 100], gid="css:bound random")
        means = 100 * bins.confidence[filled], 100 * bins.accuracy[filled]
        axes.plot(*means, "o", markersize=5, gid="css:line marks c1")
        axes.set_xlim(0, 100)

    label = f"Accuracy against softmax probability of {n} samples in {BINS} bins; ECE {ece:.4f}."
    titles = "softmax probability of the prediction (%)", "accuracy, and share of the samples (%)"
    return Chart("reliability", "Reliability diagram", label, _svg(label, *titles, draw, 103))


TRAINING = {
    "Loss": ("loss", 1, {"training": "train_loss", "validation, cross-entropy": "val_loss"}),
    "Accuracy": ("accuracy (%)", 100, {"training": "train_accuracy", "validation": "val_accuracy"}),
    "Failure detection in validation": ("AURC, times 1000", 1000, {"AURC": "aurc"}),
}
"""Title of each chart of the training -> title of its axis, factor, and name -> column of metrics.csv."""


def training_curves(rows: Sequence[Mapping[str, float]]) -> list[Chart]:
    """Charts of the training by epoch, from the rows of metrics.csv."""
    charts = []
    for title, (y_title, factor, columns) in TRAINING.items():
        series = {name: [(row["epoch"], factor * row.get(column, np.nan)) for row in rows]
                  for name, column in columns.items()}  # fmt: skip
        found = {name: np.array([pair for pair in pairs if np.isfinite(pair[1])]) for name, pairs in series.items()}
        found = {name: pairs for name, pairs in found.items() if len(pairs)}
        if not found:
            continue

        def draw(axes: Any, found: Mapping[str, Floats] = found) -> None:
            for i, pairs in enumerate(found.values()):
                axes.plot(*pairs.T, "-" if len(pairs) > 1 else "o", gid=f"css:line {style(i)}")
            axes.xaxis.get_major_locator().set_params(integer=True)

        ends = ", ".join(f"{name} {pairs[-1, 1]:.4g}" for name, pairs in found.items())
        label = f"{title} over {len(rows)} epochs; in the last: {ends}."
        legend = tuple((style(i), name) for i, name in enumerate(found))
        charts.append(Chart("training", title, label, _svg(label, "epoch", y_title, draw), legend))
    return charts
