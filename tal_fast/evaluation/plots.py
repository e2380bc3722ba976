"""Plots of an evaluation, and risk-coverage curves of several runs.

Matplotlib is imported on first use and draws to files only, so no display is needed.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tal_fast.evaluation.compare import Column, Group
from tal_fast.evaluation.evaluation import Evaluation
from tal_fast.evaluation.tables import printable, setting_title
from tal_fast.metrics.curves import histograms, oracle_risk, scores_by_kind, thinned
from tal_fast.metrics.ranking import risk_coverage_curve
from tal_fast.utils.arrays import Floats
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
_STYLE: Any = {"text.parse_math": False, "svg.hashsalt": "tal-fast"}
"""Names may have dollar signs; the same curves make the same file."""
_DATES = {"svg": "Date", "pdf": "CreationDate"}
"""Entry of a file's metadata that would change each time."""
POINTS = 300
"""Points of a drawn curve."""
MIN_SCALED_COVERAGE = 2
"""Coverage in percent from which on the risk sets the height of a panel; below, the risk of a few samples jumps."""


def write_plots(evaluation: Evaluation, folder: str | Path) -> None:
    """Write ``risk_coverage.png`` and ``confidence_histogram.png``; without matplotlib, log a warning instead."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("matplotlib is not installed, so no plots are written; pip install matplotlib")
        return
    for draw, name in zip((risk_coverage, confidence_histogram), FILES, strict=True):
        draw(evaluation, Path(folder) / name)


def risk_coverage(evaluation: Evaluation, path: str | Path) -> None:
    """Draw the error rate among the kept samples against the share of samples kept, with a line per score.

    Grey lines are the lower bound (dashed, every error ranked last) and a random score (dotted). The area under a line
    is its AURC in the convention ``tal_fast``.
    """
    curves = {
        key: {score: [points.curve.risk] for score, points in by_score.items()}
        for key, by_score in evaluation.operating_points.items()
    }
    figure, handles = _draw_curves(curves, evaluation.report)
    _save(figure, handles, f"Risk against coverage: {_title(evaluation.report)}", path)


def compare_curves(groups: Sequence[Group], columns: Sequence[Column], paths: Sequence[str | Path]) -> None:
    """Draw risk against coverage of groups of runs in the settings of columns; of a mean, in each of its sets.

    Args:
        groups: a line each, the mean over its runs, with a band of a standard deviation.
        paths: files ending in .pdf, .svg or .png.

    Raises:
        ValueError: matplotlib is not installed, or the samples of a run are missing.
    """
    for path in paths:
        if Path(path).suffix not in (".pdf", ".svg", ".png"):
            raise ValueError(f"--curves {path} must end in .pdf, .svg or .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib, which draws the curves, is not installed; pip install matplotlib")
    curves: dict[str, dict[str, list[Floats]]] = {}
    for group in groups:
        for name, settings in zip(group.runs, group.scored_settings(), strict=True):
            if not settings:
                raise ValueError(f"there are no samples of {name} to draw its curves from; evaluate it again")
            for key, judged in settings.items():
                if any(key == setting or key.startswith(f"{setting}/") for setting, _ in columns):
                    curve = risk_coverage_curve(judged.confidences()[group.score], judged.setting.success)
                    curves.setdefault(key, {}).setdefault(printable(group.name), []).append(curve.risk)
    for path in paths:
        _save(*_draw_curves(curves, groups[0].reports[0]), "", path)


def _draw_curves(curves: Mapping[str, Mapping[str, Sequence[Floats]]], report: Mapping[str, Any]) -> tuple[Any, Any]:
    """Figure and its handles: a panel for each setting, in it lines by name, each of the (n,) risks of some runs."""
    figure, axes = _new_figure(len(curves), 4.2, 6)
    handles: dict[str, Any] = {}
    for axis, (key, by_name) in zip(axes, curves.items(), strict=True):
        axis.set(title=setting_title(key, report), xlabel=COVERAGE_TITLE, ylabel=RISK_TITLE, xlim=(0, 100))
        n = len(next(iter(by_name.values()))[0])
        if n == 0:
            continue
        kept, top = thinned(n, POINTS), 0.0
        coverage = 100 * (kept + 1) / n
        for i, (name, runs) in enumerate(by_name.items()):
            risks = 100 * np.stack(runs)[:, kept]
            mean, style = risks.mean(0), _line_style(i)
            (handles[name],) = axis.plot(coverage, mean, linewidth=1.8, **style)
            if len(runs) > 1:
                spread = risks.std(0, ddof=1)
                axis.fill_between(coverage, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)
            top = max(top, float(risks[:, coverage >= MIN_SCALED_COVERAGE].max()))
        errors = {round(float(risk[-1]) * n) for runs in by_name.values() for risk in runs}
        if len(errors) == 1:  # the bounds are the same for all lines
            oracle, chance = 100 * oracle_risk(n, *errors)[kept], 100 * min(errors) / n
            (handles["floor"],) = axis.plot(coverage, oracle, color="0.45", linestyle="--", lw=1)
            (handles["random score"],) = axis.plot([0, 100], [chance] * 2, color="0.45", linestyle=":", lw=1.2)
        axis.set_ylim(0, 1.05 * top if top else 1)
    return figure, handles


def confidence_histogram(evaluation: Evaluation, path: str | Path) -> None:
    """Draw histograms of the scores of correct, incorrect and OOD samples, each as shares of the kind's own size.

    There is a panel per score. All samples are drawn, whatever the mix; shifted sets are not.
    """
    samples = evaluation.samples
    figure, axes = _new_figure(len(samples.id_scores), 5, 6.5)
    handles: dict[str, Any] = {}
    for axis, (score, values) in zip(axes, samples.id_scores.items(), strict=True):
        groups = scores_by_kind(samples.correct, values, samples.ood_scores, score)
        edges, shares = histograms(list(groups.values()))
        axis.set(title=score, xlabel=f"confidence ({score})", ylabel=SHARE_TITLE)
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


def _new_figure(panels: int, width: float, alone: float) -> tuple[Any, Any]:
    """Figure and its panels, of a width in inches or, in one column, of the width ``alone``."""
    import matplotlib

    # pyplot would choose the user's backend and keep state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, panels)
    rows = -(-panels // columns)
    with matplotlib.rc_context(_STYLE):
        size = (columns * width if columns > 1 else alone, 3.8 * rows)
        figure = Figure(figsize=size, layout="constrained", dpi=120)
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False).flat
    for i, axis in enumerate(axes):
        axis.grid(alpha=0.3)
        axis.set_visible(i < panels)
    return figure, axes[:panels]


def _line_style(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINE_STYLES[i % len(LINE_STYLES)]}


def _save(figure: Any, handles: Mapping[str, Any], title: str, path: str | Path) -> None:
    import matplotlib

    # The legend goes below the panels, in as many columns as the longest name allows; the figure grows by its rows.
    width, height = figure.get_size_inches()
    longest = max(map(len, handles), default=0)
    columns = max(1, min(len(handles), int(width / (0.7 + 0.09 * longest))))
    rows = -(-len(handles) // columns)
    suffix = Path(path).suffix[1:]
    with matplotlib.rc_context(_STYLE), replacing(path) as temporary:
        figure.suptitle(title)
        figure.set_size_inches(width, height + 0.22 * max(0, rows - 1))
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False)
        figure.savefig(temporary, format=suffix, metadata={_DATES[suffix]: None} if suffix in _DATES else None)
