"""Command line of ``python -m tal_fast.compare``; torch is imported after the options are parsed."""

from __future__ import annotations

import argparse
import functools
import glob
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tal_fast.config.names import METRICS, UNITS
from tal_fast.utils.arguments import ArgumentParser, at_least, checked
from tal_fast.utils.logs import console_logging
from tal_fast.utils.process import program_name, report_mistake

if TYPE_CHECKING:
    from tal_fast.evaluation.compare import Group

DEFAULT_METRICS = ("aurc", "auroc", "fpr95")
FORMATS = ("table", "markdown", "latex", "csv", "csv-runs")
SHOW = ("differences", "intervals", "marks")
CURVES = (".pdf", ".svg", ".png")


class Run(NamedTuple):
    """Run named on the command line."""

    path: str
    row: str | None  # name of its row
    score: str | None  # score it is judged by


def parse_runs(text: str) -> list[Run]:
    """Runs that ``[NAME=]PATH[:SCORE]`` names; of all readings the first whose path, or pattern of paths, exists."""
    starts = [0, *(match.end() for match in re.finditer("=", text))]
    ends = [len(text), *(match.start() for match in re.finditer(":", text))]
    for start, end in itertools.product(starts, ends):
        path, row, score = text[start:end], text[: max(start - 1, 0)] or None, text[end + 1 :] or None
        if found := [path] if path and Path(path).exists() else sorted(glob.glob(path)):
            return [Run(one, row, score) for one in found]
    return [Run(text[starts[-1] :], None, None)]  # reading its report says what is missing


def parser() -> ArgumentParser:
    """Parser of all options."""
    parser = ArgumentParser(
        prog=program_name("compare"),
        description="Compare the failure-detection reports of evaluated runs. Runs that differ in nothing but their "
        "seed form one row.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="[NAME=]RUN[:SCORE]",
        help="Folder of an evaluated run, report.json, or pattern of them; NAME: its row, which runs may share; SCORE: "
        "what it is judged by.",
    )  # fmt: skip

    content = parser.add_argument_group("what is compared")
    content.add_argument(
        "--metrics", nargs="+", default=list(DEFAULT_METRICS), metavar="[SETTING:]METRIC",
        help=f"Metrics: {', '.join(METRICS)} or another of the reports; of each setting, or of one: new-fd:aurc, "
        f"ood/SET:fpr95, 'new-fd/*:aurc'. Default: {' '.join(DEFAULT_METRICS)}.",
    )  # fmt: skip
    content.add_argument("--score", help="Score of the runs that name none. Default: each method's own.")

    intervals = parser.add_argument_group("differences")
    intervals.add_argument(
        "--baseline", metavar="NAME", help="Row that differences are taken to. Default: the first.",
    )  # fmt: skip
    intervals.add_argument(
        "--bootstrap", type=at_least(0), default=2000, metavar="N",
        help="Resamples for intervals over the test images; 0: no such intervals. Default: %(default)s.",
    )  # fmt: skip
    intervals.add_argument(
        "--over", choices=("images", "seeds", "both"), default="images",
        help="What intervals are over, as far as the runs allow it. Default: %(default)s.",
    )  # fmt: skip

    output = parser.add_argument_group("output")
    output.add_argument("--units", choices=UNITS, default="natural", help="Units of the tables. Default: %(default)s.")
    output.add_argument(
        "--format", choices=FORMATS, default="table",
        help="Format of the tables; csv-runs has a row for each run. Default: %(default)s.",
    )  # fmt: skip
    output.add_argument(
        "--show", nargs="+", choices=SHOW, default=["differences"], metavar="WHAT",
        help="What to show beside values: differences to the baseline, intervals of the values, marks of values better "
        "or worse than the baseline beyond noise. Default: differences.",
    )  # fmt: skip
    output.add_argument("--out", metavar="FILE", help="File to write the tables to instead of printing them.")
    output.add_argument(
        "--curves", nargs="+", type=checked(_drawing), default=[], metavar="FILE",
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


def _drawing(path: str) -> str:
    if Path(path).suffix not in CURVES:
        raise ValueError(f"{path} must end in one of {', '.join(CURVES)}")
    return path


def _compare(args: argparse.Namespace) -> str:
    from tal_fast.evaluation.compare import columns_of, find_group
    from tal_fast.evaluation.compare_tables import add_description, describe, format_comparison
    from tal_fast.evaluation.differences import add_differences

    groups = _read_groups([run for text in args.runs for run in parse_runs(text)], args.score)
    if args.format == "csv-runs":
        groups = [run for group in groups for run in group.single_runs()]
    columns = columns_of(groups, args.metrics)
    baseline = groups[0] if args.baseline is None else find_group(groups, args.baseline)
    add_differences(groups, baseline, columns, args.bootstrap, args.over)
    if args.curves:
        from tal_fast.evaluation.plots import compare_curves

        compare_curves(groups, columns, args.curves)
    text = format_comparison(groups, columns, args.format, args.units, args.show)
    return add_description(describe(groups, args.units, args.bootstrap, args.show), text, args.format)


def _read_groups(runs: Sequence[Run], score: str | None) -> list[Group]:
    from tal_fast.evaluation.compare import check_distinct, group_runs, read_method
    from tal_fast.evaluation.evaluation import samples_of
    from tal_fast.evaluation.report import read_report

    keys = [(Path(run.path).resolve(), run.score) for run in runs]
    for i, run in enumerate(runs):
        if keys[i] in keys[:i]:
            raise ValueError(f"{run.path} is named twice; name each run once")
    names = [Path(run.path).name if Path(run.path).is_dir() else run.path for run in runs]
    if len(set(names)) < len({run.path for run in runs}):
        names = [run.path for run in runs]
    read = functools.cache(read_report)
    read_samples = functools.cache(lambda path: samples_of(path, read(path)))
    reports, samples = [read(run.path) for run in runs], [read_samples(run.path) for run in runs]
    methods, seeds = zip(*(read_method(run.path, read(run.path)) for run in runs), strict=True)
    # A run may be compared with itself by another score.
    judged = [
        f"{run.score} {method or run.path}" if run.score else method for run, method in zip(runs, methods, strict=True)
    ]
    check_distinct(reports, names, judged, seeds)
    scores, rows = [run.score or score for run in runs], [run.row for run in runs]
    return group_runs(reports, names, methods, samples, scores, seeds, rows)
