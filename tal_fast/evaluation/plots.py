"""Pictures of a failure-detection report: risk against coverage, and where the confidence of each kind of sample lies.

Matplotlib is imported on first use and draws to files only, so no display is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tal_fast.evaluation.report import setting_title
from tal_fast.metrics.curves import histograms, kinds, oracle_risk
from tal_fast.metrics.failure import Floats, risk_coverage_curve
from tal_fast.metrics.settings import Judged
from tal_fast.utils.io import replacing

# Okabe and Ito's colours, told apart with any colour vision; line styles tell them apart without colour. Of 20
# lines no two blue ones have the same style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
STYLES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
# Coverage (%) from which on the risk sets the height of its panel.
STEADY = 2


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    # Figure and canvas by hand: pyplot would choose the user's backend and keep state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, handles: Mapping[str, Any], title: str, path: str | Path) -> None:
    figure.suptitle(title)
    # Below the panels, where it can cover nothing: as many columns as the longest name allows, room for the rows added.
    width, height = figure.get_size_inches()
    longest = max(map(len, handles), default=0)
    columns = max(1, min(len(handles), int(width / (0.7 + 0.09 * longest))))
    rows = -(-len(handles) // columns)
    figure.set_size_inches(width, height + 0.22 * max(0, rows - 1))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _line(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}


def risk_coverage(path: str | Path, settings: Mapping[str, Judged], title: str = "") -> None:
    """Draw the error rate among the samples kept against the share kept: a panel a setting, a line a score.

    Dashed and dotted grey lines are the floor (every error ranked last) and a random score. The area under a line is
    its AURC in the convention ``tal_fast``. The surest 2% of the samples do not set the height of a panel: the risk of
    a handful of samples jumps between 0 and 100%.

    Args:
        path: of the PNG.
        settings: from ``tal_fast.metrics.settings.judged_settings``. Old FD and, below it, each shifted set have the first
            column; each OOD set has a row of the other two.
        title: of the figure.
    """
    kinds_of = [key.partition("/")[0] for key in settings]
    rows, columns = max(1 + kinds_of.count("shift"), kinds_of.count("ood")), 3 if "ood" in kinds_of else 1
    figure, axes = _figure(rows, columns, 4.2 if columns > 1 else 6, 3.8)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        axis.set_visible(False)
    filled = [0] * columns
    for kind, one in zip(kinds_of, settings.values(), strict=True):
        setting, column = one.setting, {"ood": 1, "new_fd": 2}.get(kind, 0)
        axis = axes[filled[column], column]
        filled[column] += 1
        axis.set_visible(True)
        of_set = setting_title(kind if one.name is None else f"{kind}/{one.name}")
        axis.set(title=of_set, xlabel="coverage (% of samples kept)", ylabel="risk (% errors among those kept)")
        axis.set_xlim(0, 100)
        axis.grid(alpha=0.3)
        n, errors = setting.success.size, int(setting.success.size - setting.success.sum())
        if n == 0:
            continue
        coverage = np.arange(1, n + 1) / n * 100
        top = 100 * errors / n
        for i, (score, values) in enumerate(one.confidences().items()):
            curve = risk_coverage_curve(values, setting.success)
            (handles[score],) = axis.plot(coverage, 100 * curve.risk, linewidth=1.8, **_line(i))
            top = max(top, 100 * float(curve.risk[coverage >= STEADY].max()))
        (handles["floor"],) = axis.plot(coverage, 100 * oracle_risk(n, errors), color="0.45", linestyle="--", lw=1)
        (handles["random score"],) = axis.plot([0, 100], [100 * errors / n] * 2, color="0.45", linestyle=":", lw=1.2)
        axis.set_ylim(0, 1.05 * top if top else 1)
    _save(figure, handles, f"Risk against coverage{title and ': ' + title}", path)


def confidence_histogram(
    path: str | Path,
    right: Any,
    id_scores: Mapping[str, Floats],
    ood_scores: Mapping[str, Mapping[str, Floats]],
    title: str = "",
) -> None:
    """Draw where the scores of right, wrong and OOD samples lie: a panel a score, each kind as shares of its own size.

    All samples are drawn, whatever the mix; shifted sets are not.

    Args:
        path: of the PNG.
        right, id_scores, ood_scores: as for ``tal_fast.evaluation.report.make_report``.
        title: of the figure.
    """
    columns = min(3, len(id_scores))
    rows = -(-len(id_scores) // columns)
    figure, axes = _figure(rows, columns, 5 if columns > 1 else 6.5, 3.8)
    handles: dict[str, Any] = {}
    for axis in axes.flat[len(id_scores) :]:
        axis.set_visible(False)
    for axis, (score, values) in zip(axes.flat, id_scores.items(), strict=False):
        groups = kinds(right, values, ood_scores, score)
        edges, shares = histograms(list(groups.values()))
        axis.set(title=score, xlabel=f"confidence ({score})", ylabel="share of the kind's samples (%)")
        axis.grid(alpha=0.3)
        for i, ((kind, of_kind), share) in enumerate(zip(groups.items(), shares, strict=True)):
            if not share.any():
                continue
            handles[f"{kind} ({len(of_kind)})"] = axis.stairs(100 * share, edges, linewidth=1.8, **_line(i))
        axis.set_ylim(bottom=0)
    _save(figure, handles, f"Confidence of each kind of sample{title and ': ' + title}", path)
