"""Choice of each method's best grid point.

The criterion is the geometric mean, over the named metrics, of the metric's mean over seeds; lower is better. A metric
of which more is better counts as its distance to 1, such as 1 - AUROC. Relative changes of all metrics thus weigh
equally, and adding or removing points does not change the order of the others. A point needs all of its seeds, and a
mean accuracy at most ``accuracy_loss`` below the baseline's best. The first of equal points wins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from tal_fast.evaluation.compare import Group
from tal_fast.evaluation.tables import format_table, wrap
from tal_fast.experiments.plan import Experiment, SelectOptions, Values, with_point
from tal_fast.experiments.results import Results, groups_of
from tal_fast.metrics.failure import HIGHER_IS_BETTER
from tal_fast.utils.io import write_text

FILE = "selected.yaml"
_SMALLEST_LOSS = 1e-9
"""Lower bound of a metric, so that a 0 in one does not hide all others."""
_ROUNDING = 1e-9
"""Tolerance of accuracies, for the rounding of their means."""


@dataclass(frozen=True)
class Candidate:
    """Grid point of a method."""

    method: str
    label: str
    grid: Values
    accuracy: float  # NaN without a finished run
    value: float  # of the criterion, likewise
    why_not: str  # reason that the point may not be chosen, empty if it may


def candidates(experiment: Experiment, results: Results, select: SelectOptions) -> list[Candidate]:
    """All grid points, in the order of the file; raises ValueError if the reports lack a setting of the criterion."""
    groups = {group.name: group for group in groups_of(results)}
    points = [job for job in experiment.jobs if job.seed == experiment.seeds[0]]
    baseline = experiment.compare.baseline or next(iter(experiment.methods))
    accuracies = {label: group.accuracy.mean for label, group in groups.items()}
    baseline_labels = {job.label for job in points if baseline in (job.label, job.method)}
    best = max((accuracies[label] for label in baseline_labels if label in accuracies), default=math.nan)
    found = []
    for job in points:
        accuracy, value, reason = math.nan, math.nan, "no run is done"
        if job.label in groups:
            group = groups[job.label]
            accuracy, value = accuracies[job.label], _criterion(group, select.metrics)
            reason = _exclusion(len(group.runs), len(experiment.seeds), accuracy, best, value, select)
        found.append(Candidate(job.method, job.label, job.grid, accuracy, value, reason))
    return found


def _criterion(group: Group, metrics: Sequence[str]) -> float:
    losses = []
    for name in metrics:
        setting, _, metric = name.rpartition(".")
        kind, _, wanted = setting.partition("/")
        if setting not in group.reports[0]["settings"] and group.set_of(kind) == wanted:
            setting = kind  # where there is but one set
        if setting not in group.reports[0]["settings"]:
            raise ValueError(
                f"select.metrics: no setting {setting!r}; the reports have {', '.join(group.reports[0]['settings'])}"
            )
        mean = group.summary((setting, metric)).mean
        losses.append(1 - mean if HIGHER_IS_BETTER[metric] else mean)
    return float(np.exp(np.mean(np.log(np.maximum(losses, _SMALLEST_LOSS)))))


def _exclusion(runs: int, seeds: int, accuracy: float, best: float, value: float, select: SelectOptions) -> str:
    """Reason to exclude a point; empty if there is none."""
    if runs < seeds:
        return f"{runs} of {seeds} seeds"
    if math.isnan(value):
        return "a metric is undefined"
    if math.isnan(best):
        return "no run of the baseline is done"
    if accuracy < best - select.accuracy_loss - _ROUNDING:
        return f"accuracy below {best - select.accuracy_loss:.2%}"
    return ""


def chosen(found: Sequence[Candidate]) -> dict[str, Candidate]:
    """Best candidate of each method that has one."""
    best: dict[str, Candidate] = {}
    for candidate in found:
        if not candidate.why_not and (candidate.method not in best or candidate.value < best[candidate.method].value):
            best[candidate.method] = candidate
    return best


def format_selection(found: Sequence[Candidate], experiment: Experiment, select: SelectOptions) -> str:
    """Table of the candidates with the chosen ones marked."""
    best = chosen(found)
    lines = [wrap(f"chosen (*) by the geometric mean of {', '.join(select.metrics)}, lower is better")]
    if any(job.config.data.holdout is None for job in experiment.jobs):
        lines.append(
            wrap("note: the tables report on these images; set data.holdout to choose on held-out training images")
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
    lines += [f"no run of {method} may be chosen" for method in experiment.methods if method not in best]
    return "\n".join(lines)


def write_selection(found: Sequence[Candidate], experiment: Experiment, select: SelectOptions, output: Path) -> bool:
    """Write ``selected.yaml``, usable as the ``methods`` of another experiment.

    If no point may be chosen, an earlier choice is removed; returns whether there is one.
    """
    values = {
        method: with_point(experiment.methods[method], candidate.grid) for method, candidate in chosen(found).items()
    }
    if not values:
        (output / FILE).unlink(missing_ok=True)
        return False
    head = f"# Chosen by the geometric mean of {', '.join(select.metrics)} over seeds {list(experiment.seeds)}.\n"
    write_text(output / FILE, head + yaml.safe_dump({"methods": values}, sort_keys=False))
    return True
