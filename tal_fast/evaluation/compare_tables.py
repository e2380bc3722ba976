"""Tables of a comparison: long for the terminal, wide for Markdown and LaTeX, all digits for CSV."""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence

from tal_fast.evaluation import tables
from tal_fast.evaluation.compare import Column, Estimate, Group, Summary
from tal_fast.evaluation.differences import OVER, higher_is_better
from tal_fast.metrics.intervals import LEVEL
from tal_fast.metrics.settings import GROUPS

FORMATS = (*tables.STYLES, "csv")
MAX_NAME = 30
"""Longest name of a group in the rows of a text table; longer ones are numbered."""
_CSV = (
    "run", "members", "seeds", "score", "runs", "setting", "set", "metric", "mean", "std", "mean_low", "mean_high", "n",
    "errors", "best", "difference", "low", "high", "over", "baseline", "why_not",
)  # fmt: skip
Show = Collection[str]
"""What tables have beside values: ``differences`` to the baseline, ``intervals`` of the values, and ``marks``: † and ‡
where the interval of the difference excludes 0, better and worse than the baseline."""
SHOWN: Show = ("differences",)


def format_comparison(
    groups: Sequence[Group], columns: Sequence[Column], style: str, units: str = "natural", show: Show = SHOWN
) -> str:
    """Format groups of runs and their differences to the baseline, if they have any.

    ``table`` has a block per setting with a row per metric and group. ``markdown`` and ``latex`` have a row per group
    and a column per setting and metric, and the differences in a second table. ``csv`` has a row per group, setting and
    metric, in natural units and with all digits.
    """
    if style == "csv":
        return _csv(groups, columns)
    return _text(groups, columns, units, show) if style == "table" else _wide(groups, columns, style, units, show)


def _short_names(groups: Sequence[Group], longest: int, numbered: bool = False) -> tuple[list[str], dict[str, str]]:
    """Group -> its name, or its number where names are too long or are to be numbered, with a list of the numbers."""
    names = {group.name: tables.escape(group.name, "table") for group in groups}
    if not numbered and max(map(len, names.values())) <= longest:
        return [], names
    legend = "\n".join(f"({i}) {name}" for i, name in enumerate(names.values(), 1))
    return [legend], {name: f"({i})" for i, name in enumerate(names, 1)}


def format_summary(groups: Sequence[Group], cost: Sequence[str], metric: str = "aurc") -> str:
    """Text table with a row per group: accuracy, a metric in Old FD and New FD, and the cost of its training."""
    blocks, names = _short_names(groups, MAX_NAME // 2)
    for most in (3, 0):  # against each set, or their mean if that is too wide
        header, rows = ["run", "score", "accuracy"], [[names[g.name], g.score, _accuracy(g.accuracy)] for g in groups]
        for setting in _main_settings(groups, most):
            title = re.sub(" against |: |(?<=mean over) ", "\n", tables.setting_title(setting, groups[0].reports[0]))
            header.append(f"{title}\n{_metric_title(metric, 'paper')}")
            for row, group in zip(rows, groups, strict=True):
                row.append(_value_cell(group, (setting, metric), "table", "paper", ()))
        rows = [[*row, spent] for row, spent in zip(rows, cost, strict=True)]
        table = tables.format_table([*header, "training\nof a run"], rows, left=2)
        if max(map(len, table.splitlines())) <= tables.WIDTH:
            break
    return "\n\n".join([*blocks, table])


def _main_settings(groups: Sequence[Group], most: int = 3) -> list[str]:
    """Old FD, and New FD against each OOD set, or against more sets than ``most`` their mean, near and far apart."""
    known = groups[0].reports[0]["settings"]
    each = [f"new_fd/{name}" for name in groups[0].reports[0]["ood_names"] if f"new_fd/{name}" in known]
    if len(each) > most > 0:
        each = [f"new_fd/{name}" for name in GROUPS if f"new_fd/{name}" in known]
    return [key for key in ("old_fd", *(each if 0 < len(each) <= most else ["new_fd"])) if key in known]


def conclusions(groups: Sequence[Group], metric: str = "aurc") -> str:
    """A sentence on each group: a metric in Old FD and New FD compared with its baseline's, where there are intervals.

    Differences and their 95% intervals are in percent of the baseline's mean, and a metric falls by 100% at most. Where
    the baseline's is 0 there are no percents, and the metric is stated.
    """
    by_name, sentences = {group.name: group for group in groups}, []
    compared = {setting for group in groups for setting, _ in group.differences}
    settings = _main_settings(groups)
    if not compared.issuperset(settings):  # ``compare`` has the mean over the sets unless asked for each
        settings = _main_settings(groups, 0)
    for group in groups:
        clauses = []
        for setting in settings:
            found = group.differences.get((setting, metric), Estimate(math.nan))
            base = by_name[group.baseline].summary((setting, metric)).mean if found.over else math.nan
            title = tables.setting_title(setting, groups[0].reports[0])
            if base > 0:
                value, low, high = (max(number / base, -1.0) for number in found[:3])
                how = f"is {abs(value):.0%} {'lower' if value < 0 else 'higher'}"
                digits = 0 if min(abs(low), abs(high)) >= 0.005 else 1  # an end of 0% would say nothing
                how = how if found.significant else "does not differ significantly"
                how += f" [{low:+.{digits}%}, {high:+.{digits}%}]"
                clauses.append(f"{title} {how}")
            elif base == 0:
                clauses.append(f"{title} is {tables.format_value(metric, found.value, 'natural')} where that has 0")
        if clauses:
            what = tables.METRIC_TITLES.get(metric, metric)
            text = f"{what} of {group.name} compared with {group.baseline}: {'; '.join(clauses)}."
            sentences.append(tables.wrap(tables.printable(text)))
    return "\n".join(sentences)


def _text(groups: Sequence[Group], columns: Sequence[Column], units: str, show: Show) -> str:
    baselines = list(dict.fromkeys(group.baseline for group in groups if group.differences and "differences" in show))
    blocks, names = _short_names(groups, MAX_NAME, len(baselines) > 1)
    header, rows = _run_columns(groups, list(names.values()), "table")
    blocks.append(tables.format_table(header, rows, left=2))
    header = ["metric", "run", "value "]
    if baselines:
        header.append("difference" + (f" to\n{names[baselines[0]]}" if len(baselines) == 1 else ""))
    for setting in dict.fromkeys(setting for setting, _ in columns):
        rows = []
        for column in (column for column in columns if column[0] == setting):
            for i, group in enumerate(groups):
                value = _value_cell(group, column, "table", units, show)
                row = ["" if i else tables.METRIC_TITLES.get(column[1], column[1]), names[group.name], value]
                if baselines:
                    difference = group.differences.get(column)
                    text = "" if difference is None else _difference(column[1], difference, units)
                    row.append(f"{text} to {names[group.baseline]}" if text and len(baselines) > 1 else text)
                rows.append(row)
        title = tables.setting_title(setting, groups[0].reports[0])
        blocks.append(f"{title}\n{tables.format_table(header, rows, left=2)}")
    return "\n\n".join(blocks)


def _wide(groups: Sequence[Group], columns: Sequence[Column], style: str, units: str, show: Show) -> str:
    settings = Counter(setting for setting, _ in columns)
    headings = {setting: tables.setting_title(setting, groups[0].reports[0]) for setting in settings}
    if style == "markdown" and len({setting.partition("/")[0] for setting in settings}) == len(settings):
        headings = {setting: tables.SETTING_TITLES[setting.partition("/")[0]] for setting in settings}
    spans = [(headings[setting], count) for setting, count in settings.items()]
    titles = [_metric_title(metric, units) for _, metric in columns]
    if style == "markdown":
        titles = [tables.escape(f"{headings[s]} {title}", style) for (s, _), title in zip(columns, titles, strict=True)]

    header, rows = _run_columns(groups, [tables.escape(group.name, style) for group in groups], style)
    for group, row in zip(groups, rows, strict=True):
        row += [_value_cell(group, column, style, units, show) for column in columns]
    blocks = [tables.format_table([*header, *titles], rows, style, 1, [("", len(header)), *spans])]
    rows = [
        [
            tables.escape(f"{group.name} − {group.baseline}", style),
            *(_numbers(_difference(column[1], group.differences[column], units), style) for column in columns),
        ]
        for group in groups
        if group.differences and "differences" in show
    ]
    if rows:
        blocks.append(tables.format_table(["difference", *titles], rows, style, 1, [("", 1), *spans]))
    return "\n\n".join(blocks)


def _metric_title(metric: str, units: str) -> str:
    unit = "" if units == "natural" else " ×1000" if tables.paper_scale(metric) == 1000 else " (%)"
    return f"{tables.METRIC_TITLES.get(metric, metric)}{unit} {'↑' if higher_is_better(metric) else '↓'}"


def _run_columns(groups: Sequence[Group], names: Sequence[str], style: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of name, score, number of runs (if there are several) and accuracy."""
    several = any(len(group.runs) > 1 for group in groups)
    rows = []
    for name, group in zip(names, groups, strict=True):
        runs = [str(len(group.runs))] if several else []
        rows.append([name, *(tables.escape(text, style) for text in (group.score, *runs, _accuracy(group.accuracy)))])
    return ["run", "score", *(["runs"] if several else []), "accuracy" if style == "table" else "accuracy ↑"], rows


def _value_cell(group: Group, column: Column, style: str, units: str, show: Show) -> str:
    """Mean with standard deviation, its marks, and its interval."""
    text = _numbers(_with_std(column[1], group.summary(column), units), style)
    text = tables.emphasize(text, column in group.best, style)
    difference, found = group.differences.get(column, Estimate(math.nan)), group.intervals.get(column)
    if "marks" in show and difference.significant:
        text += tables.escape("†" if (difference.value > 0) == higher_is_better(column[1]) else "‡", style)
    if "intervals" in show and found is not None and found.over:
        ends = (tables.format_value(column[1], end, units) for end in (found.low, found.high))
        text += f" {_numbers('[{}, {}]'.format(*ends), style)}"
    return text


def _numbers(text: str, style: str) -> str:
    """Escaped numbers, in LaTeX with a minus instead of a hyphen."""
    return tables.escape(re.sub(r"-(?=\d)", "−", text) if style == "latex" else text, style)


def _accuracy(accuracy: Summary) -> str:
    return tables.format_percent(accuracy.mean) + (f" ± {100 * accuracy.std:.2f}" if accuracy.runs > 1 else "")


def _with_std(metric: str, summary: Summary, units: str) -> str:
    text = tables.format_value(metric, summary.mean, units)
    return text if summary.runs == 1 else f"{text} ± {tables.format_value(metric, summary.std, units)}"


def _difference(metric: str, difference: Estimate, units: str) -> str:
    texts = [tables.format_value(metric, number, units) for number in difference[:3]]
    value, low, high = (text if text[0] in "-+" else f"+{text}" for text in texts)
    return f"{value} [{low}, {high}]" if difference.over else value


def _csv(groups: Sequence[Group], columns: Sequence[Column]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    for (setting, metric), group in itertools.product(columns, groups):
        column, none = (setting, metric), Estimate(math.nan)
        summary, own, difference = (
            group.summary(column), group.intervals.get(column, none), group.differences.get(column, none),
        )  # fmt: skip
        row = [
            group.name, " ".join(group.runs), " ".join("?" if seed is None else str(seed) for seed in group.seeds),
            group.score, summary.runs, setting, group.set_of(setting), metric, *summary[:2], *own[1:3],
            *group.counts(setting), int(column in group.best), *difference[:4], group.baseline,
            difference.why_not or own.why_not,
        ]  # fmt: skip
        writer.writerow(["" if value != value else value for value in row])
    return text.getvalue().rstrip("\n")


def describe(groups: Sequence[Group], units: str, show: Show = ()) -> list[str]:
    """Describe the conventions, units and intervals of a comparison, and why intervals are missing, in some lines."""
    report = groups[0].reports[0]
    conditions = f"convention {report['convention']}; ID:OOD mix {tables.mix_with_seed(report)}"
    line = f"{conditions}; {tables.UNIT_NAMES[units]}; * significantly best"
    if "marks" in show:
        line += "; † better, ‡ worse than the baseline"
    if any(len(group.runs) > 1 for group in groups):
        line += "; mean ± SD over runs"
    found = {f"{g.name} − {g.baseline}": list(g.differences.values()) for g in groups if g.differences}
    if "intervals" in show or not found:
        found |= {group.name: list(group.intervals.values()) for group in groups}
    over = {estimate.over for estimates in found.values() for estimate in estimates}
    reasons: dict[str, dict[str, None]] = {}  # reason -> names of what it is the reason for
    for name, estimate in ((name, estimate) for name, estimates in found.items() for estimate in estimates):
        if estimate.why_not:
            what = "intervals over seeds alone" if estimate.over else "no interval"
            reasons.setdefault(f"{what}, since {estimate.why_not}", {})[name] = None
    return [
        line,
        *(f"{LEVEL:.0%} intervals: {OVER[o]}" for o in OVER if o in over),
        *(f"{', '.join(names)}: {reason}" for reason, names in reasons.items()),
    ]


def add_description(lines: Sequence[str], text: str, style: str) -> str:
    """Put the lines of ``describe`` above the tables, in a form that suits the style."""
    if style == "csv":
        return text
    if style == "table":
        return "\n".join([*map(tables.wrap, lines), "", text])
    lines = [line.replace("* significantly", "bold: significantly") for line in lines]
    if style == "latex":
        return "".join(f"% {line}\n" for line in lines) + text
    return "  \n".join(tables.escape(line, style) for line in lines) + "\n\n" + text
