"""Tables of an experiment, as text, Markdown and CSV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tal_fast.evaluation.compare import Column, Group
from tal_fast.evaluation.compare_tables import conclusions, describe, format_comparison, format_summary
from tal_fast.evaluation.tables import escape, wrap
from tal_fast.experiments.results import Results, all_columns, groups_of, training_seconds
from tal_fast.utils.logs import duration

FILES = {"table": "table.txt", "markdown": "table.md", "csv": "table.csv"}
"""Style of the table -> file name."""


def format_results(results: Results, style: str) -> str:
    """Text of all tables in a style of ``FILES``; ``csv`` has one line per row and column, in natural units.

    The style ``summary`` is the beginning of ``table``: a row per method, and a sentence on each.
    """
    groups = groups_of(results)
    options, markdown = results["compare"], style == "markdown"
    if style == "csv":
        return format_comparison(groups, all_columns(groups, options["metrics"]), style) if groups else ""
    blocks = [_head(results, groups, style)]
    if groups and not markdown:
        seconds = training_seconds(results)
        metric = "aurc" if "aurc" in options["metrics"] else options["metrics"][0]
        blocks.append(format_summary(groups, [duration(seconds[group.name]) for group in groups], metric))
        blocks.append(conclusions(groups, metric))
    parts = _parts(groups, options["metrics"]) if style != "summary" else []
    if markdown:
        for title, columns in parts:
            blocks.append(f"### {title}\n\n{format_comparison(groups, columns, style, options['units'])}")
    elif groups and parts:
        all_parts = [column for _, columns in parts for column in columns]
        blocks.append(format_comparison(groups, all_parts, style, options["units"]))
    return "\n\n".join(filter(None, blocks))


def _head(results: Results, groups: Sequence[Group], style: str) -> str:
    markdown = style == "markdown"
    lines = [f"{results['experiment']}: {len(results['runs'])} of {results['jobs']} runs"]
    if groups:
        about = describe(groups, "paper" if style == "summary" else results["compare"]["units"])
        lines += [line.replace("* significantly", "bold: significantly") for line in about] if markdown else about
    lines += machines(results["environments"])
    lines += [f"missing: {missing['name']} ({missing['why']})" for missing in results["missing"]]
    return "\n".join(f"{escape(line, style)}  " if markdown else wrap(line) for line in lines)


def machines(environments: Iterable[dict[str, Any]]) -> list[str]:
    """Hardware, versions and commits: a line for each machine and set of versions."""
    commits: dict[str, list[str]] = {}
    for environment in filter(None, environments):
        device = environment["gpu"] or f"{environment['cpu']}, {environment['cores']} cores"
        versions = f"Python {environment['python']}, torch {environment['torch']}; tal_fast {environment['tal_fast']}"
        commits.setdefault(f"{device}; {versions}", []).append(str(environment["commit"]))
    return [f"{line}, commit{'s' * (len(found) > 1)} {', '.join(found)}" for line, found in commits.items()]


def _parts(groups: Sequence[Group], metrics: Sequence[str]) -> list[tuple[str, list[Column]]]:
    """Title and columns of each table: Old FD, against each OOD set, under each shift, and the means over sets."""
    parts: dict[str, list[Column]] = {}
    for column in all_columns(groups, metrics) if groups else []:
        shifted, name = column[0].startswith("shift"), groups[0].set_of(column[0])
        of_set = f"{'Under shift' if shifted else 'Against'} {name}"
        over = f"Mean over the {'shifted' if shifted else 'OOD'} sets"
        parts.setdefault({"": "Old FD", "mean": over}.get(name, of_set), []).append(column)
    return list(parts.items())
