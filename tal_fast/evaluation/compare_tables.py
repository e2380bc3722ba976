"""Tables of a comparison: long for the terminal, wide for Markdown and LaTeX, all digits for CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from tal_fast.evaluation import tables
from tal_fast.evaluation.compare import Column, Difference, Group, Summary, find_group
from tal_fast.evaluation.differences import OVER, seed_pairs
from tal_fast.metrics.bootstrap import LEVEL
from tal_fast.metrics.failure import HIGHER_IS_BETTER

FORMATS = (*tables.STYLES, "csv")
MAX_NAME = 30
"""Longest name of a group in the rows of a text table; longer ones are numbered."""


def format_comparison(groups: Sequence[Group], columns: Sequence[Column], style: str, units: str = "natural") -> str:
    """Format groups of runs and their differences to the baseline, if they have any.

    ``table`` has a block per setting with a row per metric and group. ``markdown`` and ``latex`` have a row per group
    and a column per setting and metric, and the differences in a second table. ``csv`` has a row per group, setting and
    metric, in natural units and with all digits.
    """
    if style == "csv":
        return _csv(groups, columns)
    return _text(groups, columns, units) if style == "table" else _wide(groups, columns, style, units)


def _text(groups: Sequence[Group], columns: Sequence[Column], units: str) -> str:
    names = {group.name: tables.escape(group.name, "table") for group in groups}
    baselines = list(dict.fromkeys(group.baseline for group in groups if group.differences))
    blocks = []
    if len(baselines) > 1 or max(map(len, names.values())) > MAX_NAME:
        blocks.append("\n".join(f"({i}) {name}" for i, name in enumerate(names.values(), 1)))
        names = {name: f"({i})" for i, name in enumerate(names, 1)}
    header, rows = _run_columns(groups, list(names.values()), "table")
    blocks.append(tables.format_table(header, rows, left=2))
    header = ["metric", "run", "value "]
    if baselines:
        header.append("difference" + (f" to\n{names[baselines[0]]}" if len(baselines) == 1 else ""))
    for setting in dict.fromkeys(setting for setting, _ in columns):
        rows = []
        for metric in (m for s, m in columns if s == setting):
            values = _value_cells(groups, (setting, metric), "table", units)
            for i, (group, value) in enumerate(zip(groups, values, strict=True)):
                row = ["" if i else tables.METRIC_TITLES[metric], names[group.name], value]
                if baselines:
                    difference = group.differences.get((setting, metric))
                    text = "" if difference is None else _difference(metric, difference, units)
                    row.append(f"{text} to {names[group.baseline]}" if text and len(baselines) > 1 else text)
                rows.append(row)
        title = tables.setting_title(setting, groups[0].reports[0])
        blocks.append(f"{title}\n{tables.format_table(header, rows, left=2)}")
    return "\n\n".join(blocks)


def _wide(groups: Sequence[Group], columns: Sequence[Column], style: str, units: str) -> str:
    names = [tables.escape(group.name, style) for group in groups]
    # In columns against single OOD sets only the kind of the setting is named.
    titles = [
        f"{tables.SETTING_TITLES[key.partition('/')[0]]} {tables.METRIC_TITLES[metric]}" for key, metric in columns
    ]
    header, rows = _run_columns(groups, names, style)
    cells = zip(*(_value_cells(groups, column, style, units) for column in columns), strict=True)
    rows = [[*row, *values] for row, values in zip(rows, cells, strict=True)]
    blocks = [tables.format_table([*header, *titles], rows, style)]
    rows = [
        [
            tables.escape(f"{group.name} - {group.baseline}", style),
            *(tables.escape(_difference(column[1], group.differences[column], units), style) for column in columns),
        ]
        for group in groups
        if group.differences
    ]
    if rows:
        blocks.append(tables.format_table(["difference", *titles], rows, style))
    return "\n\n".join(blocks)


def _run_columns(groups: Sequence[Group], names: Sequence[str], style: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of name, score, number of runs (if there are several) and accuracy."""
    several = any(len(group.runs) > 1 for group in groups)
    best = tables.mark_best([group.accuracy.mean for group in groups], True)
    rows = [
        [
            name,
            tables.escape(group.score, style),
            *([str(len(group.runs))] if several else []),
            tables.emphasize(tables.escape(_accuracy(group.accuracy), style), is_best, style),
        ]
        for name, group, is_best in zip(names, groups, best, strict=True)
    ]
    accuracy = "accuracy " if style == "table" else "accuracy"
    return ["run", "score", *(["runs"] if several else []), accuracy], rows


def _value_cells(groups: Sequence[Group], column: Column, style: str, units: str) -> list[str]:
    summaries = [group.summary(column) for group in groups]
    best = tables.mark_best([summary.mean for summary in summaries], HIGHER_IS_BETTER[column[1]])
    return [
        tables.emphasize(tables.escape(_with_std(column[1], summary, units), style), is_best, style)
        for summary, is_best in zip(summaries, best, strict=True)
    ]


def _accuracy(accuracy: Summary) -> str:
    return tables.format_percent(accuracy.mean) + (f" ± {100 * accuracy.std:.2f}" if accuracy.runs > 1 else "")


def _with_std(metric: str, summary: Summary, units: str) -> str:
    text = tables.format_value(metric, summary.mean, units)
    return text if summary.runs == 1 else f"{text} ± {tables.format_value(metric, summary.std, units)}"


def _difference(metric: str, difference: Difference, units: str) -> str:
    texts = [tables.format_value(metric, number, units) for number in difference[:3]]
    value, low, high = (text if text[0] in "-+" else f"+{text}" for text in texts)
    return f"{value} [{low}, {high}]" if difference.over else value


def _csv(groups: Sequence[Group], columns: Sequence[Column]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = "run,score,runs,setting,metric,mean,std,best,difference,low,high,over,baseline"
    writer.writerow(header.split(","))
    for setting, metric in columns:
        summaries = [group.summary((setting, metric)) for group in groups]
        best = tables.mark_best([summary.mean for summary in summaries], HIGHER_IS_BETTER[metric])
        for group, summary, is_best in zip(groups, summaries, best, strict=True):
            difference = group.differences.get((setting, metric), Difference(math.nan, math.nan, math.nan, ""))
            numbers = [summary.mean, summary.std, int(is_best), *difference[:3]]
            writer.writerow(
                [group.name, group.score, summary.runs, setting, metric]
                + ["" if math.isnan(number) else number for number in numbers]
                + [difference.over, group.baseline]
            )
    return text.getvalue().rstrip("\n")


def describe(groups: Sequence[Group], units: str, resamples: int) -> list[str]:
    """Describe the conventions, units and intervals of a comparison, in one line or more."""
    report = groups[0].reports[0]
    conditions = f"convention {report['convention']}; ID:OOD mix {tables.mix_with_seed(report)}"
    line = f"{conditions}; {tables.UNIT_NAMES[units]}; * best"
    if any(len(group.runs) > 1 for group in groups):
        line += "; mean ± standard deviation over runs"
    over = {difference.over for group in groups for difference in group.differences.values()}
    return [line] + [
        f"{LEVEL:.0%} intervals of differences: {_describe_intervals(kind, groups, resamples)}"
        for kind in OVER
        if kind in over
    ]


def _describe_intervals(over: str, groups: Sequence[Group], resamples: int) -> str:
    bootstrap = f"paired bootstrap over the test images, {resamples} resamples"
    if over == "images":
        return bootstrap
    paired = {
        seed_pairs(group, find_group(groups, group.baseline)) is not None
        for group in groups
        if any(difference.over == over for difference in group.differences.values())
    }
    names = {True: "Student's t over pairs of the same seed", False: "Welch's t over seeds"}
    t = " or ".join(name for is_paired, name in names.items() if is_paired in paired)
    return t if over == "seeds" else f"over seeds and test images together: {t}, and {bootstrap}"


def add_description(lines: Sequence[str], text: str, style: str) -> str:
    """Put the lines of ``describe`` above the tables, in a form that suits the style."""
    if style == "csv":
        return text
    if style == "table":
        return "\n".join([*map(tables.wrap, lines), "", text])
    lines = [line.replace("* best", "bold: best") for line in lines]
    if style == "latex":
        return "".join(f"% {line}\n" for line in lines) + text
    return tables.escape("\n".join(lines), style) + "\n\n" + text
