"""Pictures of a failure-detection report: risk against coverage, and where the confidence of each kind of sample lies.

Matplotlib is imported on first use and draws to files only, so no display is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tal_fast.curves import histograms, kinds, oracle_risk
from tal_fast.files import replacing
from tal_fast.metrics import Floats, as_correct, risk_coverage_curve
from tal_fast.report import setting_title
from tal_fast.settings import Mix, all_settings

# Okabe and Ito's colours, told apart with any colour vision; line styles tell them apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
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


def risk_coverage(
    path: str | Path,
    right: Any,
    id_scores: Mapping[str, Floats],
    ood_scores: Mapping[str, Mapping[str, Floats]],
    mix: Mix | None = None,
    seed: int = 0,
    title: str = "",
) -> None:
    """Draw the error rate among the samples kept against the share kept: a panel a setting, a line a score.

    Dashed and dotted grey lines are the floor (every error ranked last) and a random score. The area under a line is
    its AURC in the convention ``tal_fast``. The surest 2% of the samples do not set the height of a panel: the risk of
    a handful of samples jumps between 0 and 100%.

    Args:
        path: of the PNG.
        right, id_scores, ood_scores, mix, seed: as for ``tal_fast.report.make_report``.
        title: of the figure.
    """
    right = as_correct(right, "right")
    sizes = {name: len(next(iter(scores.values()))) for name, scores in ood_scores.items()}
    settings = all_settings(right, sizes, mix, seed)
    columns = 3 if sizes else 1
    figure, axes = _figure(max(1, len(sizes)), columns, 4.2 if sizes else 6, 3.8)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        axis.set_visible(False)
    for key, (setting, name) in settings.items():
        row = list(sizes).index(name) if name is not None else 0
        axis = axes[row, ("old_fd", "ood", "new_fd").index(key.partition("/")[0])]
        axis.set_visible(True)
        against = f"{setting_title(key.partition('/')[0])} against {name}" if name is not None else "Old FD"
        axis.set(title=against, xlabel="coverage (% of samples kept)", ylabel="risk (% errors among those kept)")
        axis.set_xlim(0, 100)
        axis.grid(alpha=0.3)
        n, errors = setting.success.size, int(setting.success.size - setting.success.sum())
        if n == 0:
            continue
        coverage = np.arange(1, n + 1) / n * 100
        top = 100 * errors / n
        for i, (score, values) in enumerate(id_scores.items()):
            of_ood = ood_scores[name][score] if name is not None else None
            curve = risk_coverage_curve(setting.confidence(values, of_ood), setting.success)
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

    Arguments as for ``risk_coverage``; all samples are drawn, whatever the mix.
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
