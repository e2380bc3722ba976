"""Command line of ``python -m tal_fast.evaluate``; torch is imported after the options are parsed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tal_fast.config import names
from tal_fast.utils.arguments import ArgumentParser, at_least, checked, whole_number
from tal_fast.utils.logs import console_logging
from tal_fast.utils.process import program_name, report_mistake

if TYPE_CHECKING:
    from tal_fast.config.schema import DataConfig
    from tal_fast.evaluation.evaluation import Evaluation
    from tal_fast.evaluation.report import EvaluationOptions
    from tal_fast.metrics.settings import Mix

RUN_OPTIONS: dict[str, dict[str, Any]] = {
    "checkpoint": {"choices": ("best", "last"), "help": "Checkpoint of the run. Default: best."},
    "no_typicalness": {
        "action": "store_true",
        "help": "Leave the most and least typical training images, which need a pass over all of them, out of "
        "report.html.",
    },
}
WEIGHTS_OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"metavar": "NAME", "help": "Network of torchvision, timm/NAME, or cifar_resnet18 and the like."},
    "weights_key": {
        "metavar": "KEY",
        "help": "Key of the weights in a checkpoint, such as model. Default: averaged weights if there are any.",
    },
    "width": {"type": at_least(1), "help": "Width of a cifar_ network's first stage. Default: its paper's."},
    "data_dir": {"metavar": "DIR", "help": "Folder with val/CLASS/*, and train/CLASS/* for feature scores."},
    "dataset": {"help": "Data set instead of a folder: digits, fashion-mnist, ..., FILE.py:NAME. Default: folder."},
    "image_size": {"type": at_least(1), "help": "Side of the images in pixels. Default: timm's, else 224."},
    "crop_fraction": {"type": float, "help": "Central share of the shorter side to keep. Default: timm's, else 0.875."},
    "interpolation": {"choices": names.INTERPOLATIONS, "help": "Filter of resizing. Default: timm's, else bilinear."},
    "mean": {"type": float, "nargs": "+", "help": "Mean per channel in [0, 1]. Default: timm's, else ImageNet's."},
    "std": {"type": float, "nargs": "+", "help": "Standard deviation per channel, likewise."},
    "channels": {"type": int, "choices": (1, 3), "help": "Channels of the images. Default: 3."},
    "loader": {"choices": ("auto", "dali", "torch"), "help": "Reader of image files. Default: auto."},
    "workers": {"type": at_least(0), "help": "Workers that decode images. Default: 4."},
}
PASS_OPTIONS: dict[str, dict[str, Any]] = {
    "ood": {
        "action": "append", "default": [], "metavar": "NAME=WHERE",
        "help": "OOD set: a folder, webdataset:WHERE, huggingface:WHERE, textures:FOLDER, list:FOLDER:FILE.txt, "
        "imagenet-o:FOLDER, svhn:FILE.mat, mnist[:FOLDER], fashion-mnist[:FOLDER], cifar10:FOLDER, cifar100:FOLDER, "
        "npy:FILE, patches[:N], gaussian[:N] or uniform[:N]. May be repeated. Sets named near/... and far/... have a "
        "mean of each group.",
    },
    "shift": {
        "action": "append", "default": [], "metavar": "NAME=WHERE",
        "help": "Shifted images of the same classes: a folder of class folders, cifar-c:FILE.npy[:SEVERITY], "
        "cifar10.1:FOLDER[:v4], list:FOLDER:FILE.txt, imagenet-v2, imagenet-a, imagenet-r or imagenet-c, each with "
        f":FOLDER, or {', '.join(names.CORRUPTIONS)}, each with [:SEVERITY]. May be repeated.",
    },
    "batch_size": {"type": at_least(1), "help": "Images per step on each rank. Default: 256."},
    "device": {"help": "auto, cpu, cuda, cuda:1, ... Default: auto, a GPU if there is one."},
    "timeout": {"type": at_least(1), "help": "Seconds to wait for a step of the loader. Default: the run's, or 120."},
    "amp": {"choices": ("bfloat16", "float16"), "help": "Run the network under autocast; outputs are kept in float32."},
    "fast": {"action": "store_true", "help": f"Compute only {', '.join(names.LOGIT_SCORES)}; keep no features."},
    "cache": {"metavar": "DIR", "help": "Folder of cached outputs. Default: eval-cache in the run's or output folder."},
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 for bad input, which is named in one sentence."""
    args = parser().parse_args(argv)
    try:
        check_source(args)
        with console_logging():
            evaluation, output = _evaluate(args)
    except (ValueError, OSError) as error:
        return report_mistake(error)
    if evaluation is not None:
        _print(evaluation, output, args.units)
    return 0


def _print(evaluation: Evaluation, output: Path, units: str) -> None:
    from tal_fast.evaluation.html.page import FILE
    from tal_fast.evaluation.tables import format_report

    report = evaluation.report
    if "run" in report:
        print(f"{report['run']}: {report['method']}, {report['checkpoint']} checkpoint, epoch {report['epoch']}")
    elif "ensemble" in report:
        print(f"ensemble of {len(report['ensemble'])}: {', '.join(report['ensemble'])}")
    elif "weights" in report:
        key = f" ({report['weights_key']})" if report["weights_key"] else ""
        print(f"{report['weights']}{key}: {report['model']}")
    print(f"{format_report(report, units)}\n\n{output / FILE}")


def _evaluate(args: argparse.Namespace) -> tuple[Evaluation | None, Path]:
    """Evaluate what the options name; returns the evaluation (None on ranks other than 0) and the output folder."""
    from tal_fast.config.schema import ModelConfig
    from tal_fast.data.ood import parse_named
    from tal_fast.evaluation import sources
    from tal_fast.runs.predictions import PassOptions
    from tal_fast.utils.distributed import Ranks

    options = options_of(args)
    path = args.npz or args.weights or Path((args.ensemble or ["."])[0]).absolute().with_name("ensemble")
    output = Path(args.output or args.run or sources.default_output(path, args.model or ""))
    if args.npz is not None:
        # There are no passes to share, so the first of torchrun's processes does everything.
        return sources.evaluate_npz(args.npz, output, options) if os.environ.get("RANK", "0") == "0" else None, output
    ranks = Ranks.start(args.device or "auto")
    try:
        shared: dict[str, Any] = {
            "ood": parse_named(args.ood, "--ood"),
            "shifts": parse_named(args.shift, "--shift"),
            "cache": args.cache,
            "passes": PassOptions(args.batch_size or 256, args.amp, not args.fast, ranks, args.timeout),
            "options": options,
        }
        if args.ensemble:
            del shared["cache"]
            shared["checkpoint"] = args.checkpoint or "best"
            return sources.evaluate_ensemble(args.ensemble, output, **shared), output
        if args.run is not None:
            shared |= {"checkpoint": args.checkpoint or "best", "typicalness": not args.no_typicalness}
            return sources.evaluate_run(args.run, output, **shared), output
        model = ModelConfig(name=args.model, width=args.width)
        shared |= {"weights_key": args.weights_key}
        return sources.evaluate_weights(args.weights, model, _data_config(args), output, **shared), output
    finally:
        ranks.stop()


def options_of(args: argparse.Namespace) -> EvaluationOptions:
    """Options of an evaluation; raises ValueError for an unknown score or metric, and for what does not go together."""
    from tal_fast.evaluation.report import EvaluationOptions

    scores = ("msp",) if args.ensemble else names.DEFAULT_SCORES
    return EvaluationOptions(
        scores=[name for group in args.scores or scores for name in group.split(",") if name], mix=args.mix,
        seed=args.seed, convention=args.convention, choose_by=args.choose_by, temperature=args.temperature,
        intervals=args.bootstrap > 0, metrics=args.metrics,
        costs=None if args.costs is None else _read_costs(args.costs),
        **({} if args.knn_samples is None else {"knn_samples": args.knn_samples or None}),
    )  # fmt: skip


def _data_config(args: argparse.Namespace) -> DataConfig:
    """Data set for ``--weights``."""
    from tal_fast.config.schema import Config
    from tal_fast.models.pretrained import PRETRAINED, preprocessing

    given = ("image_size", "mean", "std", "crop_fraction", "channels", "interpolation")
    fields = preprocessing(args.model, {name: getattr(args, name) for name in given}, args.weights == PRETRAINED)
    fields |= {name: getattr(args, name) for name in ("loader", "workers") if getattr(args, name) is not None}
    # crop_area is for training, and not allowed for images in memory.
    data = {"dataset": args.dataset or "folder", "root": args.data_dir, "crop_area": None, **fields}
    return Config.from_dict({"data": data}).data


def _read_costs(path: str) -> Any:
    """Matrix of costs from a CSV file without a header; raises ValueError if it is none."""
    import numpy as np

    try:
        return np.loadtxt(path, delimiter=",", ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path} must hold rows of numbers with commas between them: {error}") from None


def parser() -> ArgumentParser:
    """Parser of all options."""
    parser = ArgumentParser(
        prog=program_name("evaluate"),
        usage="%(prog)s (--run | --weights | --npz | --ensemble) WHAT [options]",
        description="Report how well confidence separates correct from incorrect predictions: Old FD, OOD and New FD, "
        "and Old FD under shift.",
    )
    source_group = parser.add_argument_group("what is evaluated (one of these)")
    source = source_group.add_mutually_exclusive_group(required=True)
    # torchrun mistakes --run for an abbreviation of an option of its own.
    source.add_argument("--run", "--run-dir", metavar="DIR", help="Folder of a run of tal_fast.train.")
    source.add_argument(
        "--weights", metavar="FILE", help="Weights of --model: .pt, .pth or .safetensors, or 'pretrained'.",
    )  # fmt: skip
    source.add_argument("--npz", metavar="FILE", help="Logits, labels and more of any model.")
    source.add_argument("--ensemble", nargs="+", metavar="DIR", help="Several runs, or .npz files, as one model.")

    for title, options in (
        ("options with --run", RUN_OPTIONS),
        ("options with --weights", WEIGHTS_OPTIONS),
        ("options with --run and --weights", PASS_OPTIONS),
    ):
        group = parser.add_argument_group(title)
        for name, settings in options.items():
            group.add_argument(f"--{name.replace('_', '-')}", **settings)

    scores = parser.add_argument_group("scores")
    scores.add_argument(
        "--scores", nargs="+", metavar="SCORE",
        help=f"Confidence scores: {', '.join((*names.LOGIT_SCORES, *names.FITTED_SCORES, *names.FEATURE_SCORES))}, "
        "sirc_S1_S2, ood:DETECTOR of pytorch-ood, FILE.py:FUNCTION of your own; or groups: "
        f"{', '.join(names.SCORE_GROUPS)}. "
        f"Default: {' '.join(names.DEFAULT_SCORES)}. "
        "The run's own score is always added.",
    )  # fmt: skip
    scores.add_argument(
        "--knn-samples", type=checked(lambda text: 0 if text == "all" else whole_number(text, 10)), metavar="N",
        help="Training features that knn compares with, chosen at random; or all. Default: 50000.",
    )  # fmt: skip
    scores.add_argument(
        "--temperature", type=checked(_held_out_share), metavar="held-out[=SHARE]",
        help="Divide logits by a temperature fitted on a random share of the validation samples, which are used for "
        "nothing else. Default share: 0.2.",
    )  # fmt: skip

    scores.add_argument(
        "--choose-by", default="new-fd", metavar="old-fd|new-fd[=OOD-SET]",
        help="AURC by which pnorm is fitted on the held-out samples. OOD-SET is used for nothing else; without it "
        "outliers are synthetic. Default: %(default)s.",
    )  # fmt: skip

    metrics = parser.add_argument_group("metrics")
    metrics.add_argument(
        "--convention", choices=names.CONVENTIONS, default="tal_fast", metavar="NAME",
        help=f"Convention of the metrics: {', '.join(names.CONVENTIONS)}. Default: %(default)s.",
    )  # fmt: skip
    metrics.add_argument(
        "--mix", type=checked(_mix), default="balanced-random",
        help="ID:OOD samples: balanced-random, all, first-n, or prior=P with P the share of OOD; with "
        ",full-spectrum appended, shifted sets count as ID. Default: %(default)s.",
    )  # fmt: skip
    metrics.add_argument(
        "--seed", type=at_least(0), default=0, help="Seed of everything that is random. Default: %(default)s."
    )
    metrics.add_argument(
        "--bootstrap", type=at_least(0), default=0, metavar="N",
        help="Any N above 0 adds confidence intervals of metrics and of differences between scores. Default: "
        "%(default)s, no intervals.",
    )  # fmt: skip

    further = f"{', '.join(names.FURTHER_METRICS)}, coverage@risk=0.05, risk@coverage=0.8, ds=msp+energy, FILE.py:NAME"
    metrics.add_argument("--metrics", nargs="+", default=[], help=f"Further metrics for report.json: {further}.")
    metrics.add_argument("--costs", metavar="FILE.csv", help="Cost of each label (row) and prediction, for cost_*.")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", metavar="DIR", help="Folder of the report. Default: the run's folder, or FILE-report next to FILE.",
    )  # fmt: skip
    output.add_argument(
        "--units", choices=names.UNITS, default="natural", help="Units of the printed tables. Default: %(default)s."
    )
    return parser


def check_source(args: argparse.Namespace) -> None:
    """Raise ValueError if an option does not go with the source, or one is missing."""
    foreign = {"run": WEIGHTS_OPTIONS, "weights": RUN_OPTIONS, "npz": (*RUN_OPTIONS, *WEIGHTS_OPTIONS, *PASS_OPTIONS)}
    foreign["ensemble"] = (*WEIGHTS_OPTIONS, "no_typicalness", "cache", "fast", "temperature")
    source = next(name for name in foreign if getattr(args, name) is not None)
    for name in foreign[source]:
        if getattr(args, name) not in (None, [], False):
            raise ValueError(f"--{name.replace('_', '-')} does not go with --{source}; leave it out")
    if source == "weights":
        if args.model is None:
            raise ValueError("--weights needs --model NAME, the network they are for")
        if args.data_dir is None and args.dataset is None:
            raise ValueError("--weights needs --data-dir DIR, which holds val/CLASS/*, or --dataset")
    if source == "ensemble" and (args.ood or args.shift) and any(member.endswith(".npz") for member in args.ensemble):
        raise ValueError("--ood and --shift go with runs; an .npz has to hold its own sets")


def _mix(text: str) -> Mix:
    from tal_fast.metrics.settings import Mix

    return Mix.parse(text)


def _held_out_share(text: str) -> float:
    """Share of the validation samples: ``held-out`` or ``held-out=0.3``."""
    from tal_fast.scores.temperature import HELD_OUT

    kind, equals, value = text.partition("=")
    try:
        share = float(value) if equals else HELD_OUT
    except ValueError:
        share = 0.0
    if kind != "held-out" or not 0 < share < 1:
        raise ValueError(f"must be held-out or held-out=SHARE with SHARE in (0, 1), not {text!r}")
    return share
