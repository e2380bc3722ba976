"""Command line of ``python -m tal_fast.compare``; torch is imported after the options are parsed."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from tal_fast.config.names import METRICS, UNITS
from tal_fast.utils.arguments import ArgumentParser, at_least
from tal_fast.utils.logs import console_logging
from tal_fast.utils.process import program_name, report_mistake

logger = logging.getLogger(__name__)

DEFAULT_METRICS = ("aurc", "auroc", "fpr95")


def parser() -> ArgumentParser:
    """Parser of all options."""
    parser = ArgumentParser(
        prog=program_name("compare"),
        description="Compare the failure-detection reports of evaluated runs. Runs that differ in nothing but their "
        "seed form one row.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder of an evaluated run, or a report.json.")

    content = parser.add_argument_group("what is compared")
    content.add_argument(
        "--metrics", nargs="+", choices=METRICS, default=list(DEFAULT_METRICS), metavar="METRIC",
        help=f"Metrics of each setting: {', '.join(METRICS)}. Default: {' '.join(DEFAULT_METRICS)}.",
    )  # fmt: skip
    content.add_argument("--score", help="Score that every run is judged by. Default: each by its method's own.")

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
        "--format", choices=("table", "markdown", "latex", "csv"), default="table",
        help="Format of the tables. Default: %(default)s.",
    )  # fmt: skip
    output.add_argument("--out", metavar="FILE", help="File to write the tables to instead of printing them.")
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
    from tal_fast.evaluation.compare import check_distinct, columns_of, find_group, group_runs, read_method
    from tal_fast.evaluation.compare_tables import add_description, describe, format_comparison
    from tal_fast.evaluation.differences import add_differences
    from tal_fast.evaluation.evaluation import samples_of
    from tal_fast.evaluation.report import read_report

    folders = [Path(run).resolve() for run in args.runs]
    for i, run in enumerate(args.runs):
        if folders[i] in folders[:i]:
            raise ValueError(f"{run} is named twice; name each run once")
    names = [Path(run).name if Path(run).is_dir() else str(run) for run in args.runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in args.runs]
    reports = [read_report(run) for run in args.runs]
    samples = [samples_of(run, report) for run, report in zip(args.runs, reports, strict=True)]
    if len({json.dumps(found.identity, sort_keys=True) for found in samples if found is not None}) > 1:
        logger.warning("the runs were evaluated on different images or copies of them; look at differences with care")
    methods, seeds = zip(*map(read_method, args.runs, reports), strict=True)
    check_distinct(reports, names, methods, seeds)
    groups = group_runs(reports, names, methods, samples, args.score, seeds)
    columns = columns_of(groups, args.metrics)
    baseline = groups[0] if args.baseline is None else find_group(groups, args.baseline)
    if len(groups) > 1:
        add_differences(groups, baseline, columns, args.bootstrap, args.over)
    text = format_comparison(groups, columns, args.format, args.units)
    return add_description(describe(groups, args.units, args.bootstrap), text, args.format)
