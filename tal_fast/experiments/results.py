"""Results of an experiment: ``results.json``, which has all that the tables need, without the runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from tal_fast.evaluation import compare
from tal_fast.evaluation.compare import Column, Estimate, Group, metrics_of
from tal_fast.evaluation.differences import Comparison
from tal_fast.evaluation.evaluation import samples_of
from tal_fast.evaluation.report import none_to_nan, read_report
from tal_fast.experiments.folder import Folder
from tal_fast.experiments.plan import Experiment, Values, from_here

FILE = "results.json"
FORMAT = 1
STAGES = ("train", "evaluate")
_REPORT_KEYS = (
    "format", "method", "score", "checkpoint", "epoch", "id_accuracy", "convention", "mix", "seed", "ood_names",
    "shift_names", "counts", "samples", "settings", "further", "aurc_floor", "aurc_random", "calibration",
    "temperature",
)  # fmt: skip
"""Entries copied from the reports: no paths of this machine, and no intervals, which are in the differences."""

Results = dict[str, Any]


def collect(experiment: Experiment, folders: Sequence[Folder], name: str) -> Results:
    """Collect the results of the finished jobs.

    Returns:
        ``runs`` (name, label, method, grid, seed, config, seconds per stage, number of attempts to train, index per
        stage in ``environments``, report), ``missing`` (name, why), ``differences`` (label, baseline, setting, metric,
        value, low, high, over, why_not), ``best`` ([label, setting, metric] significantly ahead of all others),
        ``compare`` and ``evaluate`` (options of the file), ``environments``.

    Raises:
        ValueError: reports cannot be read or compared.
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
        "best": [],
    }
    groups = groups_of(results)
    if len(groups) > 1:
        paths = {folder.job.name: folder.path for folder in done}
        for group in groups:
            group.samples = [samples_of(paths[run], read_report(paths[run])) for run in group.runs]
        results["differences"], results["best"] = _differences(experiment, groups, runs)
    return results


def training_seconds(results: Results) -> dict[str, float]:
    """Row -> mean time of a training in seconds, of its runs with the fewest attempts.

    The time of an attempt that was killed with its scheduler is unknown, so a run that was resumed may seem short.
    """
    by_row: dict[str, list[Values]] = {}
    for run in results["runs"]:
        by_row.setdefault(run["label"], []).append(run)
    fewest = {row: min(run["attempts"] for run in runs) for row, runs in by_row.items()}
    return {
        row: mean(run["seconds"]["train"] for run in runs if run["attempts"] == fewest[row])
        for row, runs in by_row.items()
    }


def _differences(
    experiment: Experiment, groups: Sequence[Group], runs: Sequence[Values]
) -> tuple[list[Any], list[Any]]:
    options = experiment.compare
    comparison, columns = Comparison(options.bootstrap > 0, options.over), all_columns(groups, options.metrics)
    compared: dict[str, list[Group]] = {}  # name of the baseline -> groups compared with it
    for group in groups:
        baseline = _baseline_of(group, groups, runs, options.baseline or next(iter(experiment.methods)))
        if baseline is not None and baseline is not group:
            compared.setdefault(baseline.name, []).append(group)
    for name, others in compared.items():
        baseline = compare.find_group(groups, name)
        comparison.add_differences([baseline, *others], baseline, columns)
    comparison.mark_best(groups, columns)
    differences = [
        {"label": group.name, "baseline": group.baseline, "setting": setting, "metric": metric, **difference._asdict()}
        for group in groups
        for (setting, metric), difference in group.differences.items()
    ]
    return differences, [[group.name, *column] for group in groups for column in columns if column in group.best]


def _run(folder: Folder, environments: list[Any]) -> Values:
    job, record, report = folder.job, folder.record(), read_report(folder.path)
    config = job.config.to_dict()
    for key in ("output", "resume"):
        del config[key]
    config = from_here(config)
    attempts = record["attempts"]
    places = {}
    for stage in STAGES:
        machines = [attempt["environment"] for attempt in attempts if attempt["stage"] == stage]
        if machines and machines[-1] not in environments:  # only the last attempt finished
            environments.append(machines[-1])
        places[stage] = environments.index(machines[-1]) if machines else None
    return {
        "name": job.name,
        "label": job.label,
        "method": job.method,
        "grid": job.grid,
        "seed": job.seed,
        "config": config,
        "environment": places,
        # Without the time of attempts that were killed with their scheduler, which is unknown.
        "seconds": {
            stage: round(sum(a["seconds"] or 0.0 for a in attempts if a["stage"] == stage), 2) for stage in STAGES
        },
        "attempts": sum(a["stage"] == "train" for a in attempts),
        "report": {key: report[key] for key in _REPORT_KEYS if key in report},
    }


def _baseline_of(group: Group, groups: Sequence[Group], runs: Sequence[Values], wanted: str) -> Group | None:
    """Group that a group is compared with; None if there is none, or more than one."""
    by_label = {run["label"]: run for run in runs}
    if wanted in by_label:
        return compare.find_group(groups, wanted)
    run = by_label[group.name]
    if run["method"] == wanted:
        return None

    def at_the_same_point(other: Values) -> bool:
        return all(run["grid"].get(key, value) == value for key, value in other["grid"].items())

    baselines = [g for g in groups if by_label[g.name]["method"] == wanted and at_the_same_point(by_label[g.name])]
    return baselines[0] if len(baselines) == 1 else None


def groups_of(results: Results) -> list[Group]:
    """Groups of runs, one for each row of the tables, with differences and without samples.

    Raises ValueError if the reports are not comparable.
    """
    runs = results["runs"]
    if not runs:
        return []
    groups = compare.group_runs(
        [run["report"] for run in runs],
        [run["name"] for run in runs],
        [run["label"] for run in runs],
        scores=results["compare"]["score"],
        seeds=[run["seed"] for run in runs],
    )
    labels = {run["name"]: run["label"] for run in runs}
    for group in groups:
        group.name = labels[group.runs[0]]
    by_name = {group.name: group for group in groups}
    for entry in results["differences"]:
        group = by_name[entry["label"]]
        group.baseline = entry["baseline"]
        value, low, high = (math.nan if entry[key] is None else entry[key] for key in ("value", "low", "high"))
        found = Estimate(value, low, high, entry["over"], entry.get("why_not", ""))
        group.differences[entry["setting"], entry["metric"]] = found
    if "best" not in results:  # not among results of version 0.2
        Comparison(False, "seeds").mark_best(groups, all_columns(groups, results["compare"]["metrics"]))
    for label, setting, metric in results.get("best", []):
        by_name[label].best.add((setting, metric))
    return groups


def all_columns(groups: Sequence[Group], metrics: Sequence[str]) -> list[Column]:
    """Setting and metric of every column: each metric in every setting in which the reports have it."""
    report, score = groups[0].reports[0], groups[0].score
    return [(k, metric) for k in report["settings"] for metric in metrics if metric in metrics_of(report, k, score)]


def check_complete(results: Results, output: Path) -> None:
    """Raise ValueError if the present ``results.json`` has runs that ``results`` lacks."""
    if not (output / FILE).exists():
        return
    missing = {job["name"] for job in results["missing"]}
    lost = [run["name"] for run in read_results(output)["runs"] if run["name"] in missing]
    if lost:
        raise ValueError(
            f"{output / FILE} has {len(lost)} runs that are not done here, such as {lost[0]}, and is kept; "
            "finish them, move the file away, or name another --output"
        )


def read_results(output: Path) -> Results:
    """Read ``results.json``; null among the metrics becomes NaN.

    Raises ValueError if the file is missing, no JSON, or of another format.
    """
    path = output / FILE
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"there is no {path}, and there are no runs to make it from; run the jobs first, without --table-only or "
            "--failed"
        ) from None
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path} cannot be read as JSON ({problem})") from None
    if not isinstance(results, dict) or results.get("format") != FORMAT or "runs" not in results:
        raise ValueError(f"{path} is not of format {FORMAT}; make it again from the runs")
    for run in results["runs"]:
        none_to_nan(run["report"]["settings"])
    return results


def check_options(results: Results, experiment: Experiment) -> None:
    """Raise ValueError if the results were made with other options than those of the file."""
    now = {"compare": asdict(experiment.compare), "evaluate": list(experiment.evaluate)}
    for key, value in now.items():
        if results[key] != value:
            raise ValueError(
                f"{FILE} was made with other {key!r} options ({results[key]}) than the file's ({value}); set them "
                "back, or make it again from the runs"
            )
