"""Tables of an experiment, as text, Markdown and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tal_fast.evaluation.compare import Column, Group
from tal_fast.evaluation.compare_tables import describe, format_comparison
from tal_fast.evaluation.tables import escape, wrap
from tal_fast.experiments.results import Results, all_columns, groups_of
from tal_fast.utils.io import write_text

FILES = {"table": "table.txt", "markdown": "table.md", "csv": "table.csv"}
"""Style of the table -> file name."""


def format_results(results: Results, style: str) -> str:
    """Text of all tables in a style of ``FILES``; ``csv`` has one line per row and column, in natural units."""
    groups = groups_of(results)
    options = results["compare"]
    if style == "csv":
        return format_comparison(groups, all_columns(groups, options["metrics"]), style) if groups else ""
    markdown = style == "markdown"
    blocks = [_head(results, groups, style)]
    parts = _parts(groups, options["metrics"])
    if markdown:
        for title, columns in parts:
            blocks.append(f"### {title}\n\n{format_comparison(groups, columns, style, options['units'])}")
    elif groups:
        all_parts = [column for _, columns in parts for column in columns]
        blocks.append(format_comparison(groups, all_parts, style, options["units"]))
    return "\n\n".join(blocks)


def _head(results: Results, groups: Sequence[Group], style: str) -> str:
    markdown = style == "markdown"
    lines = [f"{results['experiment']}: {len(results['runs'])} of {results['jobs']} runs"]
    if groups:
        about = describe(groups, results["compare"]["units"])
        lines += [line.replace("* best", "bold: best") for line in about] if markdown else about
    lines += [_machine(environment) for environment in results["environments"] if environment]
    lines += [f"missing: {missing['name']} ({missing['why']})" for missing in results["missing"]]
    return "\n".join(f"{escape(line, style)}  " if markdown else wrap(line) for line in lines)


def _machine(environment: dict[str, Any]) -> str:
    """Hardware, versions and commit."""
    device = environment["gpu"] or f"{environment['cpu']}, {environment['cores']} cores"
    return (
        f"{device}; Python {environment['python']}, torch {environment['torch']}; tal_fast {environment['tal_fast']}, "
        f"commit {environment['commit']}"
    )


def _parts(groups: Sequence[Group], metrics: Sequence[str]) -> list[tuple[str, list[Column]]]:
    """Title and columns of each table: Old FD, against each OOD set, under each shift, and the means over sets."""
    parts: dict[str, list[Column]] = {}
    for column in all_columns(groups, metrics) if groups else []:
        shifted, name = column[0].startswith("shift"), groups[0].set_of(column[0])
        of_set = f"{'Under shift' if shifted else 'Against'} {name}"
        mean = f"Mean over the {'shifted' if shifted else 'OOD'} sets"
        parts.setdefault({"": "Old FD", "mean": mean}.get(name, of_set), []).append(column)
    return list(parts.items())


def write_tables(results: Results, output: Path) -> None:
    """Write the files of ``FILES``."""
    for style, name in FILES.items():
        write_text(output / name, format_results(results, style) + "\n")
