"""``results.json``: every run's numbers with what they come from, and the differences; all that the tables need.

It stands for itself: from a committed ``results.json`` the tables are made again without the runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tal_fast.evaluation import compare
from tal_fast.evaluation.compare import Column, Difference, Group
from tal_fast.evaluation.differences import add_differences
from tal_fast.evaluation.report import none_to_nan, read_report, write_report
from tal_fast.evaluation.sample_scores import read_samples
from tal_fast.experiments.folder import Folder
from tal_fast.experiments.plan import Experiment, Values

FILE = "results.json"
FORMAT = 1
STAGES = ("train", "evaluate")
# Of a report, what is kept: all but where things lay on the machine, and intervals, which have their own place.
_KEPT = (
    "format", "method", "score", "checkpoint", "epoch", "id_accuracy", "convention", "mix", "seed", "ood_names",
    "shift_names", "counts", "samples", "settings", "aurc_floor", "aurc_random", "calibration", "temperature",
)  # fmt: skip

Results = dict[str, Any]


def collect(experiment: Experiment, folders: Sequence[Folder], name: str) -> Results:
    """What the done jobs amount to.

    Args:
        experiment: whose jobs they are.
        folders: of all jobs.
        name: of the experiment.

    Returns:
        ``runs`` (name, label, method, grid, seed, config, seconds of training and evaluation with the number of
        attempts, places of both in ``environments``, report), ``missing`` (name, why), ``differences`` (label,
        baseline, setting, metric, value, low, high, over), ``compare`` (the options), ``evaluate`` (the words),
        ``environments``.

    Raises:
        ValueError: reports that cannot be read or compared.
    """
    rows = list(dict.fromkeys(job.label for job in experiment.jobs))
    done = [folder for folder in folders if folder.is_done(experiment.evaluate)]
    done.sort(key=lambda folder: rows.index(folder.job.label))
    environments: list[Any] = []
    runs = [_run(folder, environments) for folder in done]
    results: Results = {
        "format": FORMAT,
        "experiment": name,
        "compare": asdict(experiment.compare),
        "evaluate": list(experiment.evaluate),
        "environments": environments,
        "jobs": len(folders),
        "missing": [
            {"name": folder.job.name, "why": folder.record()["failed"] or "not done"}
            for folder in folders
            if folder not in done
        ],
        "runs": runs,
        "differences": [],
    }
    groups = groups_of(results)
    if len(groups) < 2:
        return results
    by_name = {folder.job.name: folder for folder in done}
    for group in groups:
        group.samples = [read_samples(by_name[run].path) for run in group.runs]
    options = experiment.compare
    columns = all_columns(groups, options.metrics)
    of_baseline: dict[str, list[Group]] = {}
    for group in groups:
        baseline = _baseline_of(group, groups, runs, options.baseline or next(iter(experiment.methods)))
        if baseline is not None and baseline is not group:
            of_baseline.setdefault(baseline.name, []).append(group)
    for baseline_name, compared in of_baseline.items():
        baseline = compare.find_group(groups, baseline_name)
        add_differences([baseline, *compared], baseline, columns, options.bootstrap, options.over)
    results["differences"] = [
        {"label": group.name, "baseline": group.baseline, "setting": column[0], "metric": column[1], **found._asdict()}
        for group in groups
        for column, found in group.differences.items()
    ]
    return results


def _run(folder: Folder, environments: list[Any]) -> Values:
    job, record, report = folder.job, folder.record(), read_report(folder.path)
    config = job.config.to_dict()
    for key in ("output", "resume"):
        del config[key]
    attempts = record["attempts"]
    places = {}
    for stage in STAGES:
        # The last attempt's: the one that came to its end.
        found = [attempt["environment"] for attempt in attempts if attempt["stage"] == stage]
        if found and found[-1] not in environments:
            environments.append(found[-1])
        places[stage] = environments.index(found[-1]) if found else None
    return {
        "name": job.name,
        "label": job.label,
        "method": job.method,
        "grid": job.grid,
        "seed": job.seed,
        "config": config,
        "environment": places,
        # Attempts that were killed with their runner have no end; what they took is not in here.
        "seconds": {
            stage: round(sum(a["seconds"] or 0.0 for a in attempts if a["stage"] == stage), 2) for stage in STAGES
        },
        "attempts": len(attempts),
        "report": {key: report[key] for key in _KEPT if key in report},
    }


def _baseline_of(group: Group, groups: Sequence[Group], runs: Sequence[Values], wanted: str) -> Group | None:
    """The row of the baseline that a row is compared with; None where there is none, or no single one."""
    by_label = {run["label"]: run for run in runs}
    if wanted in by_label:
        return compare.find_group(groups, wanted)
    own = by_label[group.name]
    if own["method"] == wanted:
        return None
    candidates = [g for g in groups if by_label[g.name]["method"] == wanted]
    same_point = [
        g
        for g in candidates
        if all(own["grid"].get(key, value) == value for key, value in by_label[g.name]["grid"].items())
    ]
    return same_point[0] if len(same_point) == 1 else None


def groups_of(results: Results) -> list[Group]:
    """A group for each row of the table, with its differences; without samples.

    Raises:
        ValueError: the reports mean different things, see ``tal_fast.compare.check_comparable``.
    """
    runs = results["runs"]
    if not runs:
        return []
    groups = compare.group_runs(
        [run["report"] for run in runs],
        [run["name"] for run in runs],
        [run["label"] for run in runs],
        score=results["compare"]["score"],
        seeds=[run["seed"] for run in runs],
    )
    labels = {run["name"]: run["label"] for run in runs}
    for group in groups:
        group.name = labels[group.runs[0]]
    by_name = {group.name: group for group in groups}
    for found in results["differences"]:
        group = by_name[found["label"]]
        group.baseline = found["baseline"]
        value, low, high = (math.nan if found[key] is None else found[key] for key in ("value", "low", "high"))
        group.differences[found["setting"], found["metric"]] = Difference(value, low, high, found["over"])
    return groups


def all_columns(groups: Sequence[Group], metrics: Sequence[str]) -> list[Column]:
    """Each metric of every setting that the reports have: Old FD, OOD and New FD, their means and each set's."""
    return [(key, metric) for key in groups[0].reports[0]["settings"] for metric in metrics]


def refuse_to_lose(results: Results, output: Path) -> None:
    """Raise ValueError if ``results.json`` has runs of this experiment that would no longer be in it."""
    if not (output / FILE).exists():
        return
    missing = {job["name"] for job in results["missing"]}
    lost = [run["name"] for run in read_results(output)["runs"] if run["name"] in missing]
    if lost:
        raise ValueError(
            f"{output / FILE} has {len(lost)} runs that are not done here, such as {lost[0]}, and is kept; "
            "finish them, move the file away, or name another --output"
        )


def write_results(results: Results, output: Path) -> None:
    """Write ``results.json``: whole or not at all, NaN as null."""
    write_report(results, output / FILE)


def read_results(output: Path) -> Results:
    """Read it; nulls among the metrics come back as NaN.

    Raises:
        ValueError: not there, not JSON, or not of this format.
    """
    path = output / FILE
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {path}, and no runs to make it from; leave --table-only out") from None
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path} cannot be read as JSON ({problem})") from None
    if not isinstance(results, dict) or results.get("format") != FORMAT or "runs" not in results:
        raise ValueError(f"{path} is not of format {FORMAT}; make it anew from the runs")
    for run in results["runs"]:
        none_to_nan(run["report"]["settings"])
    return results


def check_options(results: Results, experiment: Experiment) -> None:
    """Raise ValueError if results that were made elsewhere are not those that the file asks for now."""
    now = {"compare": asdict(experiment.compare), "evaluate": list(experiment.evaluate)}
    for key, value in now.items():
        if results[key] != value:
            raise ValueError(
                f"{FILE} was made with other {key!r} options ({results[key]}) than the file's ({value}); set them "
                "back, or make it anew from the runs"
            )
