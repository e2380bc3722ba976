"""Each method's best grid point.

The criterion is one number: the geometric mean, over the metrics named, of the metric's mean over seeds, where a metric
of which more is better counts as its distance to 1 (1 − AUROC). Lower is better. A ratio in one metric weighs as much
as the same ratio in another, whatever their scales, and points that are added or left out do not change the order of
the others. A point has to have all its seeds, and a mean accuracy no further below the baseline's best point than
``accuracy_loss``. Of points that are equal, the first in the file's order is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from tal_fast.config.methods import option_path
from tal_fast.config.parse import merged
from tal_fast.evaluation.compare import Group
from tal_fast.evaluation.tables import format_table
from tal_fast.experiments.plan import Experiment, SelectOptions, Values, nest
from tal_fast.experiments.results import Results, groups_of
from tal_fast.metrics.failure import HIGHER_IS_BETTER
from tal_fast.utils.io import replacing

FILE = "selected.yaml"
# A criterion of 0 in one metric (no error at all) must not make all others worth nothing.
_FLOOR = 1e-9


@dataclass(frozen=True)
class Candidate:
    """A grid point with what it is judged by.

    Attributes:
        method, label, grid: as of its jobs.
        accuracy: mean over seeds; NaN where no run is done.
        value: the criterion; NaN where a run is missing or a metric undefined.
        why_not: empty for one that may be chosen.
    """

    method: str
    label: str
    grid: Values
    accuracy: float
    value: float
    why_not: str


def candidates(experiment: Experiment, results: Results, select: SelectOptions) -> list[Candidate]:
    """All grid points, in the file's order.

    Raises:
        ValueError: the reports lack a setting that a metric is of.
    """
    groups = {group.name: group for group in groups_of(results)}
    of_method: dict[str, list[str]] = {}
    grids: dict[str, Values] = {}
    for job in experiment.jobs:
        if job.label not in grids:
            of_method.setdefault(job.method, []).append(job.label)
            grids[job.label] = job.grid
    wanted = experiment.compare.baseline or next(iter(experiment.methods))
    of_baseline = [wanted] if wanted in grids else of_method[wanted]
    accuracies = {label: group.accuracy.mean for label, group in groups.items()}
    best = max((accuracies[label] for label in of_baseline if label in groups), default=math.nan)
    found = []
    for method, labels in of_method.items():
        for label in labels:
            accuracy, value, why = math.nan, math.nan, "no run is done"
            if label in groups:
                accuracy, value = accuracies[label], _criterion(groups[label], select.metrics)
                why = _why_not(len(groups[label].runs), len(experiment.seeds), accuracy, best, value, select)
            found.append(Candidate(method, label, grids[label], accuracy, value, why))
    return found


def _criterion(group: Group, metrics: Sequence[str]) -> float:
    losses = []
    for name in metrics:
        setting, _, metric = name.rpartition(".")
        if setting not in group.reports[0]["settings"]:
            raise ValueError(
                f"select.metrics: no setting {setting!r}; the reports have {', '.join(group.reports[0]['settings'])}"
            )
        mean = group.summary((setting, metric)).mean
        losses.append(1 - mean if HIGHER_IS_BETTER[metric] else mean)
    return float(np.exp(np.mean(np.log(np.maximum(losses, _FLOOR)))))


def _why_not(runs: int, seeds: int, accuracy: float, best: float, value: float, select: SelectOptions) -> str:
    if runs < seeds:
        return f"{runs} of {seeds} seeds"
    if math.isnan(value):
        return "a metric is undefined"
    if math.isnan(best):
        return "no run of the baseline is done"
    # A rounding of the mean must not decide.
    if accuracy < best - select.accuracy_loss - 1e-9:
        return f"accuracy more than {select.accuracy_loss:.2%} below {best:.2%}"
    return ""


def chosen(found: Sequence[Candidate]) -> dict[str, Candidate]:
    """Method -> its best; methods of which none may be chosen are left out."""
    best: dict[str, Candidate] = {}
    for candidate in found:
        if not candidate.why_not and (candidate.method not in best or candidate.value < best[candidate.method].value):
            best[candidate.method] = candidate
    return best


def format_selection(found: Sequence[Candidate], experiment: Experiment, select: SelectOptions) -> str:
    """A table of the candidates, the chosen ones marked, and what they were chosen by."""
    best = chosen(found)
    lines = [f"chosen (*) by the geometric mean of {', '.join(select.metrics)}, lower is better"]
    if any(job.config.data.holdout is None for job in experiment.jobs):
        lines.append(
            "note: these are the images the table reports on; set data.holdout to choose on held-out training images"
        )
    rows = [
        [
            c.label + ("*" if best.get(c.method) is c else ""),
            "-" if math.isnan(c.value) else f"{c.value:.5f}",
            "-" if math.isnan(c.accuracy) else f"{c.accuracy:.2%}",
            c.why_not,
        ]
        for c in found
    ]
    lines.append(format_table(["run", "criterion", "accuracy", "left out"], rows))
    lines += [f"of {method} none may be chosen" for method in experiment.methods if method not in best]
    return "\n".join(lines)


def write_selection(found: Sequence[Candidate], experiment: Experiment, select: SelectOptions, output: Path) -> None:
    """Write ``selected.yaml``, which another experiment's ``methods`` may name; nothing if nothing is chosen."""
    values = {}
    for method, candidate in chosen(found).items():
        overrides = experiment.methods[method]
        for key, value in candidate.grid.items():
            overrides = merged(overrides, nest({option_path(key): value}))
        values[method] = overrides
    if not values:
        return
    head = f"# Chosen by the geometric mean of {', '.join(select.metrics)} over seeds {list(experiment.seeds)}.\n"
    with replacing(output / FILE) as temporary:
        temporary.write_text(head + yaml.safe_dump({"methods": values}, sort_keys=False), encoding="utf-8")
