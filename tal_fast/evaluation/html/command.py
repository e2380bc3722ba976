"""The command line of ``tal_fast.html_report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tal_fast.evaluation.html.page import write_html
from tal_fast.utils.distributed import choose_device
from tal_fast.utils.process import program_name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name("html-report"),
        description="Write report.html, a page to look at, from what python -m tal_fast.evaluate saved.",
    )
    parser.add_argument("folder", metavar="DIR", help="a run that has been evaluated, or an evaluation's --output")
    parser.add_argument(
        "--no-typicalness", dest="typicalness", action="store_false",
        help="leave out the most and least typical training images, which take a pass over all of them",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=256, help="of that pass (%(default)s)")
    parser.add_argument("--device", default="auto", help="of that pass: auto, cpu, cuda, cuda:1, ...")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input, said in one sentence."""
    args = _parser().parse_args(argv)
    try:
        path = write_html(
            args.folder,
            typicalness=args.typicalness,
            batch_size=args.batch_size,
            device=choose_device(args.device),
        )
    except (ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print(path)
    return 0
