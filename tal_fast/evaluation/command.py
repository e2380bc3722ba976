"""The command line: its options, which of them go together, and what they are turned into."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from tal_fast.config.schema import Config, DataConfig, ModelConfig
from tal_fast.data.corruptions import CORRUPTIONS
from tal_fast.data.loader import INTERPOLATIONS
from tal_fast.data.ood import parse_named
from tal_fast.evaluation.predictions import AMP
from tal_fast.evaluation.report import UNITS, Report, format_report
from tal_fast.evaluation.score_selection import DEFAULT_SCORES, GROUPS
from tal_fast.evaluation.sources import evaluate_npz, evaluate_run, evaluate_weights
from tal_fast.metrics.failure import CONVENTIONS
from tal_fast.metrics.settings import Mix
from tal_fast.scores.features import KNN_SAMPLES
from tal_fast.scores.temperature import HELD_OUT
from tal_fast.utils.distributed import Ranks, choose_device
from tal_fast.utils.process import program_name


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for bad input, said in one sentence."""
    args = parser().parse_args(argv)
    try:
        check_source(args)
        report = _report_for(args)
    except (ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if report is None:
        return 0
    if "run" in report:
        print(f"{report['run']}: {report['method']}, {report['checkpoint']} checkpoint, epoch {report['epoch']}")
    elif "weights" in report:
        print(f"{report['weights']}: {report['model']}")
    print(format_report(report, args.units))
    return 0


def _report_for(args: argparse.Namespace) -> Report | None:
    options: dict[str, Any] = {
        "mix": args.mix,
        "seed": args.seed,
        "convention": args.convention,
        "scores": [name for group in args.scores for name in group.split(",") if name],
        "knn_samples": args.knn_samples,
        "temperature": args.temperature,
        "resamples": args.bootstrap,
    }
    if args.npz is not None:
        # There are no passes to share: of torchrun's processes the first does it all.
        return evaluate_npz(args.npz, args.output, **options) if os.environ.get("RANK", "0") == "0" else None
    options |= {
        "ood": parse_named(args.ood, "--ood"),
        "shifts": parse_named(args.shift, "--shift"),
        "batch_size": args.batch_size or 256,
        "amp": args.amp,
        "fast": args.fast,
        "cache": args.cache,
    }
    ranks = _start_ranks(args.device or "auto")
    try:
        if args.run is not None:
            options |= {"checkpoint": args.checkpoint or "best", "typicalness": not args.no_typicalness}
            return evaluate_run(args.run, args.output, ranks=ranks, **options)
        model = ModelConfig(name=args.model, width=args.width)
        data, interpolation = _data_config(args)
        options |= {"interpolation": interpolation}
        return evaluate_weights(args.weights, model, data, args.output, ranks=ranks, **options)
    finally:
        ranks.stop()


def _start_ranks(device: str) -> Ranks:
    """The processes torchrun started, or this one alone on the device of that name."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return Ranks.start(device)
    return Ranks(0, 1, torch.device(choose_device(device)))


def parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(
        prog=program_name("evaluate"),
        description="Report how well confidence tells right predictions from wrong ones: Old FD, OOD and New FD, and "
        "Old FD under shift. docs/evaluation.md tells more.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    # torchrun stumbles over --run, which could be the start of an option of its own.
    source.add_argument("--run", "--run-dir", metavar="DIR", help="folder of a run of tal_fast.train")
    source.add_argument(
        "--weights", metavar="FILE", help="weights of --model: .pt, .pth, .safetensors, or 'pretrained'"
    )
    source.add_argument("--npz", metavar="FILE", help="logits, labels and more of any model")
    parser.add_argument("--output", metavar="DIR", help="where to write (the run's folder; FILE-report beside a file)")

    run = parser.add_argument_group("with --run")
    run.add_argument("--checkpoint", choices=("best", "last"), help="of the run (best)")
    run.add_argument(
        "--no-typicalness", action="store_true", help="leave the most and least typical training images, which take a "
        "pass over all of them, out of report.html",
    )  # fmt: skip

    weights = parser.add_argument_group("with --weights")
    weights.add_argument("--model", metavar="NAME", help="of torchvision, timm/NAME, or cifar_resnet18, ...")
    weights.add_argument("--width", type=_at_least(1), help="of a cifar_ network's first stage (its paper's)")
    weights.add_argument("--data-dir", metavar="DIR", help="holds val/CLASS/*, and train/CLASS/* for feature scores")
    weights.add_argument("--dataset", help="instead of a folder: digits, fashion-mnist, ... (folder)")
    weights.add_argument("--image-size", type=_at_least(1), help="side in pixels (timm's for the model, else 224)")
    weights.add_argument("--crop-fraction", type=float, help="central share of the shorter side (timm's, else 0.875)")
    weights.add_argument("--interpolation", choices=INTERPOLATIONS, help="of the resizing (timm's, else bilinear)")
    weights.add_argument("--mean", type=float, nargs="+", help="a channel, of [0, 1] (timm's, else ImageNet's)")
    weights.add_argument("--std", type=float, nargs="+", help="a channel, likewise")
    weights.add_argument("--channels", type=int, choices=(1, 3), help="of the images (3)")
    weights.add_argument("--loader", choices=("auto", "dali", "torch"), help="what reads image files (auto)")
    weights.add_argument("--workers", type=_at_least(0), help="that decode images (4)")

    passes = parser.add_argument_group("with --run and --weights")
    passes.add_argument(
        "--ood", action="append", default=[], metavar="NAME=WHERE", help="an OOD set: a folder, textures:FOLDER, "
        "svhn:FILE.mat, mnist[:FOLDER], fashion-mnist[:FOLDER], npy:FILE, patches[:N], gaussian[:N], uniform[:N]",
    )  # fmt: skip
    passes.add_argument(
        "--shift", action="append", default=[], metavar="NAME=WHERE", help="shifted images of the same classes: a "
        f"folder of class folders, cifar-c:FILE.npy[:SEVERITY], or {', '.join(CORRUPTIONS)}, each with [:SEVERITY]",
    )  # fmt: skip
    passes.add_argument("--batch-size", type=_at_least(1), help="of the pass, on each rank (256)")
    passes.add_argument("--device", help="auto (a GPU if there is one; the default), cpu, cuda, cuda:1, ...")
    passes.add_argument("--amp", choices=tuple(AMP), help="autocast of the network; outputs are float32 all the same")
    passes.add_argument("--fast", action="store_true", help="only scores over logits; features are not kept")
    passes.add_argument("--cache", metavar="DIR", help="of the outputs (eval-cache in the run's or the output folder)")

    parser.add_argument(
        "--scores", nargs="+", default=list(DEFAULT_SCORES), metavar="SCORE",
        help=f"confidence scores ({' '.join(DEFAULT_SCORES)}): {', '.join(GROUPS['all'])}; or a group: "
        "logits, features, sirc, all",
    )  # fmt: skip
    parser.add_argument(
        "--knn-samples", type=_argument(_count_or_all), default=KNN_SAMPLES, metavar="N",
        help="training features that knn compares with, a random choice where there are more; or all (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=_argument(_share), metavar="held-out[=SHARE]", help="divide logits by a temperature "
        f"fitted on a random share ({HELD_OUT:g}) of the validation samples, which then take part in nothing else",
    )  # fmt: skip
    parser.add_argument("--convention", choices=CONVENTIONS, default="tal_fast", help="of the metrics (%(default)s)")
    parser.add_argument(
        "--mix", type=_argument(Mix.parse), default=Mix(), help="ID:OOD samples: balanced-random (default), all, "
        "first-n, or prior=P with P the share of OOD",
    )  # fmt: skip
    parser.add_argument("--seed", type=_at_least(0), default=0, help="of a random mix or choice (%(default)s)")
    parser.add_argument(
        "--bootstrap", type=_at_least(0), default=0, metavar="N", help="resamples for confidence intervals of every "
        "metric and of differences between scores; 10000 is usual (0: none)",
    )  # fmt: skip
    parser.add_argument("--units", choices=UNITS, default="natural", help="of the printed tables (%(default)s)")
    return parser


# Options that only some sources know, by the name argparse gives them.
_OF_RUN = ("checkpoint", "no_typicalness")
OF_WEIGHTS = (
    "model", "width", "data_dir", "dataset", "image_size", "crop_fraction", "interpolation", "mean", "std", "channels",
    "loader", "workers",
)  # fmt: skip
_OF_PASSES = ("ood", "shift", "batch_size", "device", "amp", "fast", "cache")


def check_source(args: argparse.Namespace) -> None:
    """Refuse an option that would be passed over.

    Raises:
        ValueError: names it.
    """
    foreign = {"run": OF_WEIGHTS, "weights": _OF_RUN, "npz": (*_OF_RUN, *OF_WEIGHTS, *_OF_PASSES)}
    source = next(name for name in foreign if getattr(args, name) is not None)
    for name in foreign[source]:
        if getattr(args, name) not in (None, [], False):
            raise ValueError(f"--{name.replace('_', '-')} does not go with --{source}; leave it out")
    if source == "weights":
        if args.model is None:
            raise ValueError("--weights needs --model NAME, the network they are for")
        if args.data_dir is None and args.dataset is None:
            raise ValueError("--weights needs --data-dir DIR, which holds val/CLASS/*, or --dataset")


def _data_config(args: argparse.Namespace) -> tuple[DataConfig, str]:
    """What weights are evaluated on, and the interpolation of its images."""
    from tal_fast.models.pretrained import PRETRAINED, preprocessing

    dataset = args.dataset or "folder"
    asked = ("image_size", "mean", "std", "crop_fraction", "channels", "interpolation")
    given = {key: getattr(args, key) for key in asked}
    fields = preprocessing(args.model, given, args.weights == PRETRAINED)
    interpolation = fields.pop("interpolation")
    fields |= {key: getattr(args, key) for key in ("loader", "workers") if getattr(args, key) is not None}
    # Training's random boxes are for image files only; an evaluation makes none.
    config = Config.from_dict({"data": {"dataset": dataset, "root": args.data_dir, "crop_area": None, **fields}})
    return config.data, interpolation


def _argument(check: Any) -> Any:
    """A type for argparse whose ValueError is shown as it is."""

    def convert(text: str) -> Any:
        try:
            return check(text)
        except ValueError as problem:
            raise argparse.ArgumentTypeError(str(problem)) from None

    return convert


def _share(text: str) -> float:
    """``held-out`` or ``held-out=0.3`` -> share of the validation samples."""
    kind, equals, value = text.partition("=")
    try:
        share = float(value) if equals else HELD_OUT
    except ValueError:
        share = 0.0
    if kind != "held-out" or not 0 < share < 1:
        raise ValueError(f"must be held-out or held-out=SHARE with SHARE in (0, 1), not {text!r}")
    return share


def _count_or_all(text: str) -> int | None:
    return None if text == "all" else _whole(text, 10)


def _whole(text: str, limit: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"must be a whole number, not {text!r}") from None
    if value < limit:
        raise ValueError(f"must be at least {limit}, not {value}")
    return value


def _at_least(limit: int) -> Any:
    return _argument(lambda text: _whole(text, limit))
