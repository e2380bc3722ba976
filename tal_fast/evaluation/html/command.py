"""Command line of ``python -m tal_fast.html_report``; torch is imported after the options are parsed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tal_fast.utils.arguments import ArgumentParser, add_pass_options
from tal_fast.utils.logs import console_logging
from tal_fast.utils.process import program_name, report_mistake


def parser() -> ArgumentParser:
    """Parser of all options."""
    parser = ArgumentParser(
        prog=program_name("html-report"),
        description="Write report.html of an evaluation from the report.json and samples.npz in its folder.",
    )
    parser.add_argument("folder", metavar="DIR", help="Evaluated run, or the --output folder of an evaluation.")
    typicalness = parser.add_argument_group("typicalness of training images")
    typicalness.add_argument(
        "--no-typicalness", dest="typicalness", action="store_false",
        help="Leave out the most and least typical training images, which need a pass over all of them unless it "
        "is cached.",
    )  # fmt: skip
    add_pass_options(typicalness)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 for bad input, which is named in one sentence."""
    args = parser().parse_args(argv)

    from tal_fast.evaluation.evaluation import read_evaluation
    from tal_fast.evaluation.galleries import find_galleries
    from tal_fast.evaluation.html.page import write_html
    from tal_fast.utils.distributed import choose_device

    try:
        folder, device = Path(args.folder), choose_device(args.device)
        with console_logging():
            evaluation = find_galleries(
                read_evaluation(folder), folder, typicalness=args.typicalness, batch_size=args.batch_size, device=device
            )
            print(write_html(evaluation, folder))
    except (ValueError, OSError) as error:
        return report_mistake(error)
    return 0
