"""Reports side by side: which runs belong together, and what they are judged by.

Runs that differ in nothing but their seed form a group, with mean and standard deviation over them. Each run is judged
by its method's own score (TAL by cosine, CE by the maximum softmax probability) unless one score is chosen for all.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tal_fast.config.parse import read_yaml
from tal_fast.config.schema import Config
from tal_fast.evaluation.report import Report
from tal_fast.evaluation.sample_scores import Samples
from tal_fast.evaluation.tables import SETTING_TITLES, mix_with_seed, nan_if_none
from tal_fast.runs.folder import CONFIG_FILE

logger = logging.getLogger(__name__)

_NOT_PART_OF_METHOD = (
    "seed", "output", "resume", "allow", "extend", "device", "threads", "rank_timeout", "progress", "eval_batch_size",
    "data.timeout",
)  # fmt: skip
"""Options that runs of one group may differ in: apart from the seed they do not change what is trained."""

Column = tuple[str, str]
"""(setting, metric)"""


class Summary(NamedTuple):
    """Mean (NaN if undefined in any run) and standard deviation (NaN for one run) of a metric over a group's runs."""

    mean: float
    std: float
    runs: int


class Difference(NamedTuple):
    """A group's mean minus the baseline's, with its interval."""

    value: float  # the difference
    low: float  # end of the interval; NaN without one
    high: float  # the other end
    over: str  # what the interval is over: ``images``, ``seeds``, ``both``, or empty without one


@dataclass
class Group:
    """Runs that differ in nothing but their seed; the lists have an entry for each of them."""

    name: str
    runs: list[str]
    reports: list[Report]
    samples: list[Samples | None]  # samples of the runs, None where there are none
    score: str  # score the runs are judged by
    seeds: list[int | None]  # seeds of the runs, None where unknown
    baseline: str = ""  # name of the group that the differences are taken to; empty if there are none
    differences: dict[Column, Difference] = field(default_factory=dict)

    def values(self, column: Column) -> list[float]:
        """Value of a metric for each run."""
        setting, metric = column
        return [report["settings"][setting][self.score][metric] for report in self.reports]

    def summary(self, column: Column) -> Summary:
        """Mean and standard deviation of a metric over the runs."""
        return _summarize(self.values(column))

    @property
    def accuracy(self) -> Summary:
        """Mean and standard deviation of the ID accuracy over the runs."""
        return _summarize([nan_if_none(report["id_accuracy"]) for report in self.reports])


def _summarize(values: Sequence[float]) -> Summary:
    return Summary(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan, len(values))


def check_comparable(reports: Sequence[Report], names: Sequence[str]) -> None:
    """Raise a ValueError if reports differ in convention, mix, its seed, OOD or shifted sets, or numbers of samples."""
    first = _conditions(reports[0])
    for report, name in zip(reports[1:], names[1:], strict=True):
        for (what, expected), value in zip(first.items(), _conditions(report).values(), strict=True):
            if value != expected:
                raise ValueError(
                    f"{names[0]} and {name} cannot be compared: {what} is {expected} in one and {value} in the other; "
                    "evaluate them alike"
                )


def _conditions(report: Report) -> dict[str, str]:
    counts = report["counts"]
    sizes = [("ID", counts["id"]), *counts["ood"].items(), *counts.get("shift", {}).items()]
    return {
        "convention": report["convention"],
        "mix": mix_with_seed(report),
        "set of OOD data": ", ".join(report["ood_names"]) or "none",
        "set of shifted data": ", ".join(report.get("shift_names", [])) or "none",
        "number of samples": ", ".join(f"{size} {name}" for name, size in sizes),
    }


def judging_score(report: Report, name: str, score: str | None = None) -> str:
    """Score a report is judged by: the given one, the run's own, or the only one there is."""
    available = list(report["settings"]["old_fd"])
    chosen = score or report.get("score") or (available[0] if len(available) == 1 else None)
    if chosen is None:
        raise ValueError(f"{name} names no score of its own; choose one with --score: {', '.join(available)}")
    if chosen not in available:
        raise ValueError(f"{name} has no score {chosen!r}; it has {', '.join(available)}")
    return chosen


def read_method(run: str | Path, report: Report | None = None) -> tuple[str | None, int | None]:
    """Method and seed of a run, from its report, else from its ``config.yaml``; both None without either.

    The method is the configuration as text, without the seed and options that do not change what is trained. Warns if
    the report is of another method or seed than the ``config.yaml`` beside it.
    """
    path = Path(run) / CONFIG_FILE
    if report is None or "config" not in report:
        return _method_of(read_yaml(path)) if path.is_file() else (None, None)
    found = _method_of(report["config"])
    with contextlib.suppress(ValueError, OSError):  # the file is not needed
        if path.is_file() and _method_of(read_yaml(path)) != found:
            logger.warning(
                "the report of %s is of another method or seed than its %s, and counts as what it is of; evaluate the "
                "run again if that is what you mean", run, CONFIG_FILE,
            )  # fmt: skip
    return found


def _method_of(config: dict[str, Any]) -> tuple[str, int]:
    options = Config.from_dict(config).flat()  # with the defaults of options that are newer than the run
    method = {name: value for name, value in options.items() if name not in _NOT_PART_OF_METHOD}
    return json.dumps(method, sort_keys=True), options["seed"]


def check_distinct(
    reports: Sequence[Report], names: Sequence[str], methods: Sequence[str | None], seeds: Sequence[int | None]
) -> None:
    """Raise a ValueError if two reports of a method are of the same weights; warn if they are of the same seed."""
    for i, j in itertools.combinations(range(len(reports)), 2):
        if methods[i] != methods[j]:
            continue
        one, other = reports[i], reports[j]
        same = [key for key in ("sha256", "weights_sha256") if one.get(key) is not None and one[key] == other.get(key)]
        known, same_seed = methods[i] is not None, seeds[i] == seeds[j]
        equal = same_seed and json.dumps(one["settings"]) == json.dumps(other["settings"])
        # Weights of unknown method may be compared with themselves under another preprocessing.
        if "sha256" in same or (known and (same or equal)):
            raise ValueError(
                f"{names[i]} and {names[j]} are evaluations of the same weights, one run; name one of them"
            )
        if known and same_seed:
            logger.warning("%s and %s have the same seed %s, and count as two runs", names[i], names[j], seeds[i])


def group_runs(
    reports: Sequence[Report],
    names: Sequence[str],
    methods: Sequence[str | None] | None = None,
    samples: Sequence[Samples | None] | None = None,
    score: str | None = None,
    seeds: Sequence[int | None] | None = None,
) -> list[Group]:
    """Group runs of the same method, in the order of their first runs; a run of unknown method is a group of its own.

    Args:
        reports, names, samples: of the runs.
        methods, seeds: from ``read_method``.
        score: score to judge all runs by; default each run's own.
    """
    check_comparable(reports, names)
    seeds = seeds or [None] * len(reports)
    methods = methods or [None] * len(reports)
    samples = samples or [None] * len(reports)
    members_by_method: dict[tuple[str, str], list[int]] = {}
    for i, (report, name, method) in enumerate(zip(reports, names, methods, strict=True)):
        members_by_method.setdefault((method or f"\0{i}", judging_score(report, name, score)), []).append(i)
    groups = [
        Group(
            common_name([names[i] for i in members]),
            [names[i] for i in members],
            [reports[i] for i in members],
            [samples[i] for i in members],
            chosen,
            [seeds[i] for i in members],
        )
        for (_, chosen), members in members_by_method.items()
    ]
    for group in groups:
        if sum(other.name == group.name for other in groups) > 1:
            group.name = ", ".join(group.runs)
    return groups


def common_name(names: Sequence[str]) -> str:
    """Name of a group: the common beginning of its runs' names, without separators and words for the seed."""
    if len(names) == 1:
        return names[0]
    # By characters: runs/ce-1 and runs/ce-2 are runs/ce.
    common = os.path.commonprefix(list(names)).rstrip("-_. /")  # noqa: RUF071
    for ending in ("seed", "-s", "_s"):
        if common.endswith(ending):
            common = common.removesuffix(ending).rstrip("-_. /")
    return common or names[0]


def find_group(groups: Sequence[Group], name: str) -> Group:
    """Find the group of this name, or with a run of this name."""
    for group in groups:
        if name == group.name or name in group.runs or Path(name).name in group.runs:
            return group
    raise ValueError(f"there is no row {name!r} to be the baseline; there are {', '.join(g.name for g in groups)}")


def columns_of(groups: Sequence[Group], metrics: Sequence[str]) -> list[Column]:
    """Columns of a comparison: each metric of Old FD, OOD, New FD and Old FD under shift, as far as available."""
    settings = groups[0].reports[0]["settings"]
    return [(key, metric) for key in SETTING_TITLES if key in settings for metric in metrics]
