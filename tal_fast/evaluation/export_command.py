"""Command ``export``: a run's model as one graph that classifies and abstains, in ONNX or for ``torch.export``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tal_fast.evaluation.calibrate_command import (
    CALIBRATED,
    add_run_options,
    add_threshold_options,
    describe,
    report,
    threshold_options,
)
from tal_fast.utils.arguments import ArgumentParser
from tal_fast.utils.process import program_name


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=program_name("export"),
        description="Export a run's model as one graph: images in; class, confidence and acceptance out.",
    )
    parser.add_argument("--run", metavar="DIR", required=True, help="Folder of a run of tal_fast.train.")
    parser.add_argument("--format", choices=("onnx", "torch-export"), default="onnx", help="Format. Default: onnx.")
    parser.add_argument(
        "--precision", choices=("fp32", "fp16"), default="fp32", help="Precision of the weights. Default: fp32."
    )
    parser.add_argument("--card", action="store_true", help="Write README.md too: a model card for Hugging Face's hub.")
    parser.add_argument("--output", metavar="DIR", help="Output folder. Default: RUN/exported/FORMAT-PRECISION.")
    add_threshold_options(parser, needed=False)
    add_run_options(parser.add_argument_group("passes over the validation images"))
    parser.set_defaults(checkpoint=None)
    return parser


def _as_calibrated(args: Any) -> dict[str, Any] | None:
    """``options`` of ``export_run`` that the run was calibrated with; None if it was not."""
    from tal_fast.evaluation.export import JSON, read_about

    if threshold_options(args) != threshold_options(_parser().parse_args(["--run", args.run])):
        raise ValueError(
            "--confidence, --calibration-share, --seed, --metric, --ood and --per-class choose a new threshold; "
            "give its --risk too"
        )
    path = Path(args.run) / CALIBRATED / JSON
    if not path.is_file():
        return None
    about = read_about(path)
    args.score = args.score or about["score"]
    args.checkpoint = args.checkpoint or ("best" if about["checkpoint"] == "best" else "last")
    return {
        "share": about["calibration_share"], **{name: about[name] for name in ("risk", "confidence", "seed")},
        "per_class": "class_thresholds" in about, "ood": about.get("ood_set"), "selection": "score_selection" in about,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 if no threshold qualifies, 2 for bad input."""
    args = _parser().parse_args(argv)
    return report(lambda: _export(args))


def _export(args: Any) -> str:
    from tal_fast.evaluation.card import check_report, write_card
    from tal_fast.evaluation.export import GRAPHS, export_run
    from tal_fast.utils.distributed import choose_device

    output = Path(args.output or Path(args.run) / "exported" / f"{args.format}-{args.precision}")
    options = _as_calibrated(args) if args.risk is None else threshold_options(args)
    if args.card:
        check_report(Path(args.run), args.checkpoint or "best")  # before a graph is written
    about = export_run(
        args.run, output, format=args.format, precision=args.precision, score=args.score,
        checkpoint=args.checkpoint or "best", batch_size=args.batch_size, device=choose_device(args.device),
        options=options,
    )  # fmt: skip
    lines = [describe(about), str(output / GRAPHS[args.format])]
    if args.card and (card := write_card(Path(args.run), output, about, describe(about))):
        lines.append(str(card))
    elif args.card:
        print(
            f"warning: {output / 'README.md'} was there already and is kept; its threshold, bound and results may be "
            "those of an earlier export: delete it, or choose another --output, for a new card",
            file=sys.stderr,
        )
    return "\n".join(lines)
