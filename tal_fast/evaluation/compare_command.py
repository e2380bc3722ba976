"""Command line of ``python -m tal_fast.compare``; torch is imported after the options are parsed."""

from __future__ import annotations

import argparse
import glob
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tal_fast.config.names import METRICS, UNITS
from tal_fast.utils.arguments import ArgumentParser, at_least
from tal_fast.utils.logs import console_logging
from tal_fast.utils.process import program_name, report_mistake

if TYPE_CHECKING:
    from tal_fast.evaluation.compare import Group

DEFAULT_METRICS = ("aurc", "auroc", "fpr95")


def parse_runs(text: str) -> list[tuple[str, str | None, str | None]]:
    """(path, row, score) of the runs that ``[NAME=]PATH[:SCORE]`` names, several for a pattern of paths.

    Of all places of ``=`` and ``:`` the first whose path exists count.
    """
    starts = [0, *(match.end() for match in re.finditer("=", text))]
    ends = [len(text), *(match.start() for match in re.finditer(":", text))]
    for start, end in itertools.product(starts, ends):
        path = text[start:end]
        if found := [path] if path and Path(path).exists() else sorted(glob.glob(path)):
            return [(one, text[: max(start - 1, 0)] or None, text[end + 1 :] or None) for one in found]
    row, _, path = text.partition("=")
    return [(path if path and "/" not in row else text, None, None)]  # reading its report says what is missing


def parser() -> ArgumentParser:
    """Parser of all options."""
    parser = ArgumentParser(
        prog=program_name("compare"),
        description="Compare the failure-detection reports of evaluated runs. Runs that differ in nothing but their "
        "seed form one row.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="[NAME=]RUN[:SCORE]",
        help="Folder of an evaluated run, its report.json, or a pattern. Runs of one NAME form one row; SCORE is the "
        "confidence score to judge them by.",
    )  # fmt: skip

    content = parser.add_argument_group("what is compared")
    content.add_argument(
        "--metrics", nargs="+", default=list(DEFAULT_METRICS), metavar="[SETTING:]METRIC",
        help=f"Metrics: {', '.join(METRICS)} or another of the reports, also your own; of each setting, "
        f"or of one: new-fd:aurc, ood/SET:fpr95, 'new-fd/*:aurc'. Default: {' '.join(DEFAULT_METRICS)}.",
    )  # fmt: skip
    content.add_argument("--score", help="Score of the runs that name none. Default: each method's own.")

    intervals = parser.add_argument_group("differences")
    intervals.add_argument("--baseline", metavar="NAME", help="Row to compare the others with. Default: the first.")
    intervals.add_argument(
        "--bootstrap", type=at_least(0), default=2000, metavar="N",
        help="0 for no intervals over the test images; any other N gives the same. Default: %(default)s.",
    )  # fmt: skip
    intervals.add_argument(
        "--over", choices=("images", "seeds", "both"), default="images",
        help="Variation that intervals cover, as far as the runs allow it. Default: %(default)s.",
    )  # fmt: skip

    output = parser.add_argument_group("output")
    output.add_argument("--units", choices=UNITS, default="natural", help="Units of the tables. Default: %(default)s.")
    output.add_argument(
        "--format", choices=("table", "markdown", "latex", "csv", "csv-runs"), default="table",
        help="Format of the tables; csv-runs has a row for each run. Default: %(default)s.",
    )  # fmt: skip
    output.add_argument(
        "--show", nargs="+", choices=("differences", "intervals", "marks"), default=["differences"], metavar="WHAT",
        help="Beside values: differences to the baseline, intervals, marks of those significantly better or worse than "
        "the baseline (differences, intervals, marks). Default: differences.",
    )  # fmt: skip
    output.add_argument("--out", metavar="FILE", help="File to write the tables to instead of printing them.")
    output.add_argument(
        "--curves", nargs="+", default=[], metavar="FILE",
        help="Files (.pdf, .svg, .png) to draw risk against coverage of all rows to.",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 for bad input, which is named in one sentence."""
    args = parser().parse_args(argv)
    try:
        with console_logging():
            text = _compare(args)
        if args.out is not None:
            from tal_fast.utils.io import write_text

            try:
                write_text(args.out, text + "\n")
            except OSError:
                print(text)  # what was computed is not lost
                raise
            return 0
    except (ValueError, OSError) as error:
        return report_mistake(error)
    print(text)
    return 0


def _compare(args: argparse.Namespace) -> str:
    from tal_fast.evaluation.compare import columns_of, find_group
    from tal_fast.evaluation.compare_tables import add_description, conclusions, describe, format_comparison
    from tal_fast.evaluation.differences import Comparison

    groups = _read_groups([run for text in args.runs for run in parse_runs(text)], args.score)
    columns = columns_of(groups, args.metrics)
    if args.curves:
        from tal_fast.evaluation.plots import compare_curves

        compare_curves(groups, columns, args.curves)
    style, kind, _ = args.format.partition("-")
    groups = [run for group in groups for run in group.single_runs()] if kind else groups
    baseline = groups[0] if args.baseline is None else find_group(groups, args.baseline)
    comparison = Comparison(args.bootstrap > 0, args.over)
    comparison.add_differences(groups, baseline, columns)
    comparison.mark_best(groups, columns)
    text = format_comparison(groups, columns, style, args.units, args.show)
    text = f"{text}\n\n{conclusions(groups)}".rstrip() if style == "table" else text
    return add_description(describe(groups, args.units, args.show), text, style)


def _read_groups(runs: Sequence[tuple[str, str | None, str | None]], score: str | None) -> list[Group]:
    from tal_fast.evaluation.compare import check_distinct, group_runs, read_method
    from tal_fast.evaluation.evaluation import samples_of
    from tal_fast.evaluation.report import read_report

    paths, rows, scores = (list(column) for column in zip(*runs, strict=True))
    keys = [(Path(path).resolve(), own) for path, _, own in runs]
    for i, path in enumerate(paths):
        if keys[i] in keys[:i]:
            raise ValueError(f"{path} is named twice; name each run once")
    names = [Path(path).name if Path(path).is_dir() else path for path in paths]
    if len(set(names)) < len(set(paths)):
        names = paths
    reports = [read_report(path) for path in paths]
    samples = [samples_of(path, report) for path, report in zip(paths, reports, strict=True)]
    methods, seeds = zip(*map(read_method, paths, reports), strict=True)
    # A run may be compared with itself by another score.
    judged = [
        f"{own} {method or path}" if own else method for (path, _, own), method in zip(runs, methods, strict=True)
    ]
    check_distinct(reports, names, judged, seeds)
    return group_runs(reports, names, methods, samples, [own or score for own in scores], seeds, rows)
