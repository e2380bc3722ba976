"""PNG plots of an evaluation: risk against coverage, and confidence histograms.

Matplotlib is imported on first use and draws to files only, so no display is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tal_fast.evaluation.evaluation import Evaluation
from tal_fast.evaluation.tables import printable, setting_title
from tal_fast.metrics.curves import histograms, oracle_risk, scores_by_kind
from tal_fast.utils.io import replacing

logger = logging.getLogger(__name__)

FILES = ("risk_coverage.png", "confidence_histogram.png")

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
"""Okabe and Ito's colours, distinguishable with any colour vision."""
LINE_STYLES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
"""Line styles, which distinguish lines without colour; their number is coprime to that of the colours."""
COVERAGE_TITLE = "coverage (% of samples kept)"
RISK_TITLE = "risk (% errors among those kept)"
SHARE_TITLE = "share of the kind's samples (%)"
MIN_SCALED_COVERAGE = 2
"""Coverage in percent from which on the risk sets the height of a panel; below, the risk of a few samples jumps."""


def write_plots(evaluation: Evaluation, folder: str | Path) -> None:
    """Write ``risk_coverage.png`` and ``confidence_histogram.png``; without matplotlib, log a warning instead."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        logger.warning("matplotlib is not installed, so no plots are written; pip install matplotlib")
        return
    for draw, name in zip((risk_coverage, confidence_histogram), FILES, strict=True):
        draw(evaluation, Path(folder) / name)


def risk_coverage(evaluation: Evaluation, path: str | Path) -> None:
    """Draw the error rate among the kept samples against the share of samples kept.

    Old FD and, below it, each shifted set have the first column; each OOD set has a row of the other two. There is a
    line per score. Grey lines are the lower bound (dashed, every error ranked last) and a random score (dotted). The
    area under a line is its AURC in the convention ``tal_fast``.
    """
    kinds_of_settings = [key.partition("/")[0] for key in evaluation.settings]
    rows = max(1 + kinds_of_settings.count("shift"), kinds_of_settings.count("ood"))
    columns = 3 if "ood" in kinds_of_settings else 1
    figure, axes = _new_figure(rows, columns, 4.2 if columns > 1 else 6, 3.8)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        axis.set_visible(False)
    filled = [0] * columns
    for kind, (key, curves) in zip(kinds_of_settings, evaluation.operating_points.items(), strict=True):
        success, column = evaluation.settings[key].setting.success, {"ood": 1, "new_fd": 2}.get(kind, 0)
        axis = axes[filled[column], column]
        filled[column] += 1
        axis.set_visible(True)
        axis.set(title=setting_title(key, evaluation.report), xlabel=COVERAGE_TITLE, ylabel=RISK_TITLE)
        axis.set_xlim(0, 100)
        axis.grid(alpha=0.3)
        n, errors = success.size, int(success.size - success.sum())
        if n == 0:
            continue
        coverage = np.arange(1, n + 1) / n * 100
        top = 100 * errors / n
        for i, (score, points) in enumerate(curves.items()):
            risk = points.curve.risk
            (handles[score],) = axis.plot(coverage, 100 * risk, linewidth=1.8, **_line_style(i))
            top = max(top, 100 * float(risk[coverage >= MIN_SCALED_COVERAGE].max()))
        (handles["floor"],) = axis.plot(coverage, 100 * oracle_risk(n, errors), color="0.45", linestyle="--", lw=1)
        (handles["random score"],) = axis.plot([0, 100], [100 * errors / n] * 2, color="0.45", linestyle=":", lw=1.2)
        axis.set_ylim(0, 1.05 * top if top else 1)
    _save(figure, handles, f"Risk against coverage: {_title(evaluation.report)}", path)


def confidence_histogram(evaluation: Evaluation, path: str | Path) -> None:
    """Draw histograms of the scores of correct, incorrect and OOD samples, each as shares of the kind's own size.

    There is a panel per score. All samples are drawn, whatever the mix; shifted sets are not.
    """
    samples = evaluation.samples
    columns = min(3, len(samples.id_scores))
    rows = -(-len(samples.id_scores) // columns)
    figure, axes = _new_figure(rows, columns, 5 if columns > 1 else 6.5, 3.8)
    handles: dict[str, Any] = {}
    for axis in axes.flat[len(samples.id_scores) :]:
        axis.set_visible(False)
    for axis, (score, values) in zip(axes.flat, samples.id_scores.items(), strict=False):
        groups = scores_by_kind(samples.correct, values, samples.ood_scores, score)
        edges, shares = histograms(list(groups.values()))
        axis.set(title=score, xlabel=f"confidence ({score})", ylabel=SHARE_TITLE)
        axis.grid(alpha=0.3)
        for i, ((kind, group), share) in enumerate(zip(groups.items(), shares, strict=True)):
            if not share.any():
                continue
            label = f"{printable(kind)} ({len(group)})"
            handles[label] = axis.stairs(100 * share, edges, linewidth=1.8, **_line_style(i))
        axis.set_ylim(bottom=0)
    _save(figure, handles, f"Confidence of each kind of sample: {_title(evaluation.report)}", path)


def _title(report: Mapping[str, Any]) -> str:
    if "run" in report:
        return f"{report['method']} ({Path(report['run']).name})"
    if "weights" in report:
        return f"{report['model']} ({Path(report['weights']).name})"
    return Path(report.get("npz", "")).name


def _new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    # pyplot would choose the user's backend and keep state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _line_style(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINE_STYLES[i % len(LINE_STYLES)]}


def _save(figure: Any, handles: Mapping[str, Any], title: str, path: str | Path) -> None:
    figure.suptitle(title)
    # The legend goes below the panels, in as many columns as the longest name allows; the figure grows by its rows.
    width, height = figure.get_size_inches()
    longest = max(map(len, handles), default=0)
    columns = max(1, min(len(handles), int(width / (0.7 + 0.09 * longest))))
    rows = -(-len(handles) // columns)
    figure.set_size_inches(width, height + 0.22 * max(0, rows - 1))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
