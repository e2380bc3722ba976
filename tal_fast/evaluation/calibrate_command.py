"""Command ``calibrate``: choose a confidence threshold on held-out samples and export the model with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tal_fast
from tal_fast.config.names import is_own_score
from tal_fast.evaluation.calibration import DEFAULTS
from tal_fast.evaluation.selective import NoThreshold
from tal_fast.scores.logits import SCORES
from tal_fast.utils.arguments import ArgumentParser, add_pass_options, at_least
from tal_fast.utils.io import check_writable
from tal_fast.utils.process import program_name, report_mistake

CALIBRATED = "calibrated"
"""Name of the output folder in a run's folder."""


def calibrate_run(run_dir: str | Path, output: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Choose a threshold on a run's validation images, export the model with it and return ``threshold.json``.

    Args:
        run_dir: folder of a run of ``python -m tal_fast.train``.
        output: folder of the three files; ``calibrated`` in the run's folder unless given.
        options: ``score``, ``checkpoint``, ``batch_size`` and ``device`` of ``export_run``, whose errors it raises, and
            its ``options``.
    """
    from tal_fast.evaluation.export import export_run

    folder = Path(run_dir) / CALIBRATED if output is None else Path(output)
    pass_options = {k: options.pop(k) for k in ("score", "checkpoint", "batch_size", "device") if k in options}
    return export_run(run_dir, folder, format="torch-export", state=True, options=options, **pass_options)


def calibrate_npz(path: str | Path, output: str | Path | None = None, *, score: str, **options: Any) -> dict[str, Any]:
    """Choose a threshold on outputs of any model, an ``.npz`` as ``python -m tal_fast.evaluate --npz`` takes it.

    ``threshold.json`` goes to ``FILE-calibrated`` beside the file unless ``output`` names a folder; the rest is as for
    ``calibrate_run``.
    """
    from tal_fast.evaluation.export import choose, select_score, write_about
    from tal_fast.evaluation.npz import read_npz
    from tal_fast.evaluation.own_scores import score_values
    from tal_fast.utils.environment import version_of

    path = Path(path)
    folder = path.with_name(path.stem + "-calibrated") if output is None else Path(output)
    check_writable(folder)
    inputs = read_npz(path)
    outputs, options = inputs.id, DEFAULTS | options
    ood, by_class = options.get("ood"), options.pop("per_class", False)
    if ood is not None and ood not in inputs.ood:
        raise ValueError(f"{path} has no OOD set {ood!r}; it has: {', '.join(inputs.ood) or 'none'}")
    selection: dict[str, Any] = {}
    if score not in outputs.scores and not is_own_score(score):
        score, selection = select_score(score, outputs, options)
    if ood is not None:
        options["ood"] = score_values(score, inputs.ood[ood])
    if by_class:
        options |= {"predictions": outputs.logits.argmax(1), "classes": outputs.logits.shape[1]}
    _, about = choose(score, score_values(score, outputs), outputs, outputs.correct, options)
    about |= {"score": score, **selection, "npz": str(path), **({} if ood is None else {"ood_set": ood})}
    about["versions"] = {"tal_fast": tal_fast.__version__, "torch": version_of("torch")}
    write_about(about, folder)
    return about


def describe(about: dict[str, Any]) -> str:
    """Summary of the content of ``threshold.json``."""
    rule = "every prediction" if about["threshold"] is None else f"{about['score']} > {about['threshold']:.10g}"
    if about["risk"] is None:
        errors = f"{about['errors']} of {about['samples']} validation images are classified wrongly"
        lines = [f"accept {rule}, as no risk is given: {errors}"]
    else:
        lines, what = [f"accept {rule}"], "risk"
        if "class_thresholds" in about:
            limits = about["class_thresholds"]
            names = about.get("class_names", range(len(limits)))
            lines = [f"accept {about['score']} above the threshold of the predicted class:"]
            lines += [
                f"  {k}: {x if x in ('all', 'none') else f'{x:.10g}'}" for k, x in zip(names, limits, strict=True)
            ]
            what = "risk of every class"
        if "ood" in about:
            what = f"share of {about['ood_set']} accepted"
        lines += [
            f"{what} at most {about['risk']:.2%} with confidence {about['confidence']:.4g} "
            f"(bound {about['bound']:.2%})",
            f"chosen on {about['samples']} held-out samples: coverage {about['coverage']:.2%}, {_errors(about)}",
        ]
        if "score_selection" in about:
            others = about["score_selection"]["samples"]
            lines.append(f"{about['score']} has the largest coverage on {others} other samples, left out of the bound")
        for part, when in (("ood", ""), ("ood_test", ", which took no part in the choice")):
            if about.get(part, {}).get("samples"):
                found = about[part]
                lines.append(f"{about['ood_set']}: {found['accepted']} of {found['samples']} accepted{when}")
    if "test" in about:
        test = about["test"]
        low, high = test["risk_interval"]
        risk = f", risk {test['risk']:.2%} [{low:.2%}, {high:.2%}]" if test["accepted"] else ""
        lines.append(f"on the other {test['samples']}: coverage {test['coverage']:.2%}, {_errors(test)}{risk}")
    if "agreement" in about:
        found = about["agreement"]
        lines.append(
            f"the export decides as PyTorch on {found['images'] - found['decisions_differ']} of {found['images']} "
            f"images; within {found['bound']:.2g} of the threshold there are {found['inside']}, where it may differ"
        )
    return "\n".join(lines)


def _errors(about: Any) -> str:
    return f"{about['errors']} error{'' if about['errors'] == 1 else 's'} among {about['accepted']} accepted"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=program_name("calibrate"),
        description="Choose a confidence threshold whose error rate is bounded, and export the model with it.",
    )
    source = parser.add_argument_group("held-out samples (one of these)").add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR", help="Folder of a run of tal_fast.train: its validation images.")
    source.add_argument("--npz", metavar="FILE", help="Logits and labels of any model on held-out samples.")
    add_threshold_options(parser, needed=True)
    add_run_options(parser.add_argument_group("options with --run"))
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="DIR", help="Output folder. Default: RUN/calibrated, or FILE-calibrated.")
    return parser


def add_threshold_options(parser: ArgumentParser, needed: bool) -> None:
    """Add the options of ``calibrate``, without which nothing is chosen unless ``needed``."""
    threshold = parser.add_argument_group("threshold")
    threshold.add_argument(
        "--risk", type=float, required=needed, help="Error rate among accepted predictions not to exceed, such as 0.02."
        + ("" if needed else " Default: that of RUN/calibrated, with its options; else all are accepted.")
    )  # fmt: skip
    threshold.add_argument(
        "--confidence", type=float, default=0.95, help="Probability that the risk holds. Default: 0.95."
    )
    threshold.add_argument(
        "--score",
        help=f"Confidence score: {', '.join(SCORES)}; or auto: the one of largest coverage on samples that the bound "
        "does not use. Default: that of the run's method" + ("; needed with --npz." if needed else "."),
    )
    threshold.add_argument(
        "--metric", choices=("risk", "false-accept-ood"), default="risk",
        help="What --risk bounds: the error rate among accepted predictions, or the share of --ood that is accepted. "
        "Default: risk.",
    )  # fmt: skip
    threshold.add_argument("--ood", metavar="NAME[=WHERE]", help="OOD set: of the run or the .npz, or as for evaluate.")
    threshold.add_argument(
        "--per-class", action="store_true", help="A threshold for each predicted class; the risk holds for all of them."
    )
    threshold.add_argument(
        "--calibration-share", type=float, default=0.5, metavar="SHARE",
        help="Random share of the samples to choose the threshold on; the rest tests it. Default: 0.5.",
    )  # fmt: skip
    threshold.add_argument("--seed", type=at_least(0), default=0, help="Seed of the random share. Default: 0.")


def add_run_options(group: Any) -> None:
    """Add the options of the passes of a run's model over its validation images."""
    group.add_argument("--checkpoint", choices=("best", "last"), default="best", help="Checkpoint. Default: best.")
    add_pass_options(group)


def threshold_options(args: Any) -> dict[str, Any]:
    """``options`` of ``export_run`` from the command line."""
    if (args.metric == "risk") != (args.ood is None):
        raise ValueError("--metric false-accept-ood and --ood NAME go together; give both, or neither")
    return {
        "risk": args.risk, "confidence": args.confidence, "share": args.calibration_share, "seed": args.seed,
        "per_class": args.per_class, "ood": args.ood,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 if no threshold qualifies, 2 for bad input."""
    args = _parser().parse_args(argv)
    return report(lambda: describe(_calibrate(args)))


def _calibrate(args: Any) -> dict[str, Any]:
    options = threshold_options(args)
    if args.npz is not None:
        if args.score is None:
            raise ValueError(f"an .npz names no score; choose one with --score: {', '.join(SCORES)}, auto")
        return calibrate_npz(args.npz, args.output, score=args.score, **options)
    from tal_fast.utils.distributed import choose_device

    return calibrate_run(
        args.run, args.output, score=args.score, checkpoint=args.checkpoint, batch_size=args.batch_size,
        device=choose_device(args.device), **options,
    )  # fmt: skip


def report(work: Callable[[], str]) -> int:
    """Print the text that ``work`` returns; returns the exit code: 0, 1 if no threshold qualifies, 2 for bad input."""
    try:
        print(work())
    except NoThreshold as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as problem:
        return report_mistake(problem)
    return 0
