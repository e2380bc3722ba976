"""Reports side by side: groups of runs, and the scores that they are judged by.

Runs that differ in nothing but their seed form a group, with mean and standard deviation over them. Each run is judged
by its method's own score (TAL by cosine, CE by the maximum softmax probability) unless one score is chosen for all.
"""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import json
import logging
import math
import os
import re
from collections import Counter
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
from tal_fast.metrics.settings import Mix, ScoredSetting
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


class Estimate(NamedTuple):
    """A group's mean, or its difference to another's, with its interval."""

    value: float
    low: float = math.nan  # end of the interval; NaN without one
    high: float = math.nan  # the other end
    over: str = ""  # what the interval is over: ``images``, ``seeds``, ``both``, or empty without one
    why_not: str = ""  # why there is no interval, or none over the test images

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


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
    differences: dict[Column, Estimate] = field(default_factory=dict)
    intervals: dict[Column, Estimate] = field(default_factory=dict)  # of the group's own means
    best: set[Column] = field(default_factory=set)  # see ``differences.Comparison.mark_best``

    def values(self, column: Column) -> list[float]:
        """Value of a metric for each run."""
        setting, metric = column
        return [metrics_of(report, setting, self.score)[metric] for report in self.reports]

    def summary(self, column: Column) -> Summary:
        """Mean and standard deviation of a metric over the runs."""
        return _summarize(self.values(column))

    def scored_settings(self) -> list[dict[str, ScoredSetting]]:
        """For each run its settings with the group's score alone; empty without samples."""
        runs = zip(self.reports, self.samples, strict=True)
        return [s.with_score(self.score).settings(Mix.parse(r["mix"]), r["seed"]) if s else {} for r, s in runs]

    def single_runs(self) -> list[Group]:
        """A group of each run."""
        parts = zip(self.runs, self.reports, self.samples, self.seeds, strict=True)
        return [Group(self.name, [run], [report], [found], self.score, [seed]) for run, report, found, seed in parts]

    def set_of(self, setting: str) -> str:
        """OOD or shifted set of a setting; ``mean`` over several, empty in Old FD."""
        kind, _, name = setting.partition("/")
        sets = self.reports[0].get("shift_names" if kind == "shift" else "ood_names", [])
        return "" if kind == "old_fd" else name or (sets[0] if len(sets) == 1 else "mean")

    def counts(self, setting: str) -> tuple[float, float]:
        """Samples and errors in a setting, means over the runs; NaN of a mean over sets."""
        counts = [report.get("samples", {}).get(setting, {}) for report in self.reports]
        n, errors = (float(np.mean([count.get(key, math.nan) for count in counts])) for key in ("n", "errors"))
        return n, errors

    @property
    def accuracy(self) -> Summary:
        """Mean and standard deviation of the ID accuracy over the runs."""
        return _summarize([nan_if_none(report["id_accuracy"]) for report in self.reports])


def metrics_of(report: Report, setting: str, score: str) -> dict[str, float]:
    """Metrics of a score in a setting, those on request too; of a point on the risk-coverage curve without its ends."""
    further = report.get("further", {}).get(setting, {}).get(score, {})
    values = {metric: value[0] if isinstance(value, list) else value for metric, value in further.items()}
    return {**report["settings"][setting][score], **{metric: nan_if_none(value) for metric, value in values.items()}}


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
                "the report of %s has another method or seed than its %s, and the report's count; evaluate the run "
                "again to have those of the file", run, CONFIG_FILE,
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
    scores: Sequence[str | None] | str | None = None,
    seeds: Sequence[int | None] | None = None,
    rows: Sequence[str | None] | None = None,
) -> list[Group]:
    """Group runs of the same method and score, in the order of their first runs; a run of unknown method is a group.

    Args:
        reports, names, samples: of the runs.
        methods, seeds: from ``read_method``.
        scores: score to judge each run by, or one for all; default each run's own.
        rows: names of groups that runs belong to whatever their method.
    """
    check_comparable(reports, names)
    unknown = [None] * len(reports)
    seeds, methods, samples, rows = seeds or unknown, methods or unknown, samples or unknown, rows or unknown
    wanted = [scores] * len(reports) if scores is None or isinstance(scores, str) else scores
    members_by_key: dict[tuple[str, str], list[int]] = {}
    for i, (report, name, score) in enumerate(zip(reports, names, wanted, strict=True)):
        key = f"row {rows[i]}" if rows[i] else methods[i] or f"\0{i}"
        members_by_key.setdefault((key, judging_score(report, name, score)), []).append(i)
    groups = []
    for (_, chosen), members in members_by_key.items():
        given, own = rows[members[0]], [names[i] for i in members]
        if given and len({methods[i] for i in members}) > 1:
            logger.warning("the runs of %s differ in more than their seed", given)
        of_runs = [reports[i] for i in members], [samples[i] for i in members]
        groups.append(Group(given or common_name(own), own, *of_runs, chosen, [seeds[i] for i in members]))
    taken = Counter(group.name for group in groups)
    by_score = Counter((group.name, group.score) for group in groups)
    for group in groups:
        if taken[group.name] > 1:
            alone = by_score[group.name, group.score] == 1
            group.name = f"{group.name}, {group.score}" if alone else ", ".join(group.runs)
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
    """Columns of a comparison, those of a setting together.

    Args:
        groups: of the same settings.
        metrics: each ``METRIC``, of Old FD, OOD, New FD and Old FD under shift as far as available, or
            ``SETTING:METRIC``: ``old-fd``, ``new-fd`` (the mean, with several OOD sets), ``new-fd/SET``, ``ood/*``.
    """
    report = groups[0].reports[0]
    keys = {key: key for key in report["settings"]}
    keys |= {
        f"{key}/{groups[0].set_of(key)}": key
        for key in keys
        if "/" not in key and groups[0].set_of(key) not in ("", "mean")
    }
    columns: dict[Column, None] = {}
    for text in metrics:
        setting, _, metric = re.sub(r"[^:]*\.py:", "", text).rpartition(":")  # FILE.py:NAME is NAME in the reports
        kind, slash, name = setting.partition("/")
        pattern, metric = kind.replace("-", "_") + slash + name, metric.replace("-", "_")
        found = [keys[key] for key in (fnmatch.filter(keys, pattern) if setting else SETTING_TITLES) if key in keys]
        runs = [
            (name, group, report) for group in groups for name, report in zip(group.runs, group.reports, strict=True)
        ]
        tables = [(name, metrics_of(report, key, group.score)) for key in found for name, group, report in runs]
        lacking = [(name, table) for name, table in tables if metric not in table]
        if found and 0 < len(lacking) < len(tables):
            name, table = lacking[0]
            raise ValueError(f"--metrics {text}: the report of {name} has no {metric!r}; it has {', '.join(table)}")
        if lacking or not found:
            known = ", ".join(lacking[0][1] if found else keys)
            raise ValueError(
                f"--metrics {text}: the reports have no {metric if found else setting!r}; they have {known}"
            )
        columns |= dict.fromkeys((key, metric) for key in found)
    settings = list(dict.fromkeys(key for key, _ in columns))
    return sorted(columns, key=lambda column: settings.index(column[0]))
