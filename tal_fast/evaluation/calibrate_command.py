"""Command ``calibrate``: choose a confidence threshold on held-out samples and export the model with it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tal_fast
from tal_fast.evaluation.selective import NoThreshold, calibrate
from tal_fast.scores.logits import SCORES
from tal_fast.utils.arguments import ArgumentParser, at_least
from tal_fast.utils.io import check_writable, write_text
from tal_fast.utils.locks import alone_in
from tal_fast.utils.process import program_name, report_mistake

JSON = "threshold.json"


def calibrate_run(
    run_dir: str | Path,
    output: str | Path | None = None,
    *,
    score: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
    batch_size: int = 256,
    device: str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """Choose a threshold on a run's validation images, export the model with it and return ``threshold.json``.

    Args:
        run_dir: folder of a run of ``python -m tal_fast.train``.
        output: folder of the three files; ``calibrated`` in the run's folder unless given.
        score: name from ``tal_fast.scores.SCORES``; the score of the run's method unless given.
        checkpoint: ``best`` or ``last``.
        batch_size, device: of the pass over the images, where its outputs are not cached.
        options: arguments of ``calibrate``.

    Raises:
        NoThreshold: no threshold qualifies; nothing is written.
        ValueError: no run, checkpoint or data there, an unknown score, or numbers out of range.
    """
    import torch

    from tal_fast.evaluation.export import PROGRAM, STATE, SelectiveClassifier, export
    from tal_fast.runs.load import load_run
    from tal_fast.runs.predictions import CACHE, PassOptions, weights_hash
    from tal_fast.utils.distributed import Ranks

    folder = Path(run_dir) / "calibrated" if output is None else Path(output)
    check_writable(folder)
    run = load_run(run_dir, checkpoint=checkpoint, device=device)
    score = _check_score(score or run.score)
    cache = Path(run_dir) / CACHE / run.checkpoint.stem
    passes = PassOptions(batch_size, ranks=Ranks(0, 1, torch.device(device)))
    outputs = run.inference(cache, passes).store("val").load()
    chosen, about = calibrate(SCORES[score](outputs.logits), outputs.correct, **options)
    data = run.config.data
    mean, std = data.normalization()
    about |= {
        "score": score, "run": str(run_dir), "checkpoint": run.checkpoint.stem, "epoch": run.epoch,
        "weights_sha256": weights_hash(run.model),
        "class_names": list(run.class_names), "image_size": run.data.image_size, "channels": data.channels,
        "mean": list(mean), "std": list(std),
    }  # fmt: skip
    example = torch.zeros(2, data.channels, run.data.image_size, run.data.image_size)
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder, f"another calibration writes to {folder}; waiting for it"):
        (folder / JSON).unlink(missing_ok=True)  # written last: the files beside it are of one model and threshold
        problem = None
        try:
            export(SelectiveClassifier(run.model.cpu(), score, chosen.threshold), example, folder)
        except ValueError as error:  # torch.export cannot take the model; its weights are written
            problem = error
        files = [folder / name for name in (STATE, PROGRAM) if (folder / name).exists()]
        about["sha256"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        _write(about, folder)
    if problem is not None:
        raise problem
    return about


def calibrate_npz(path: str | Path, output: str | Path | None = None, *, score: str, **options: Any) -> dict[str, Any]:
    """Choose a threshold on outputs of any model, an ``.npz`` as ``python -m tal_fast.evaluate --npz`` takes it.

    ``threshold.json`` goes to ``FILE-calibrated`` beside the file unless ``output`` names a folder; the rest is as for
    ``calibrate_run``.
    """
    from tal_fast.evaluation.npz import read_npz

    path, score = Path(path), _check_score(score)
    folder = path.with_name(path.stem + "-calibrated") if output is None else Path(output)
    check_writable(folder)
    outputs = read_npz(path).id
    _, about = calibrate(SCORES[score](outputs.logits), outputs.correct, **options)
    about |= {"score": score, "npz": str(path)}
    _write(about, folder)
    return about


def _check_score(name: str) -> str:
    plain = name.replace("-", "_")
    if plain not in SCORES:
        raise ValueError(f"unknown score {name!r}; choose a score of logits: {', '.join(SCORES)}")
    return plain


def _write(about: dict[str, Any], folder: Path) -> None:
    import torch

    about["versions"] = {"tal_fast": tal_fast.__version__, "torch": torch.__version__}
    write_text(folder / JSON, json.dumps(about, indent=2, allow_nan=False) + "\n")


def describe(about: dict[str, Any]) -> str:
    """Summary of the content of ``threshold.json`` in a few lines."""
    rule = "every prediction" if about["threshold"] is None else f"{about['score']} > {about['threshold']:.10g}"
    lines = [
        f"accept {rule}",
        f"risk at most {about['risk']:.2%} with confidence {about['confidence']:.4g} (bound {about['bound']:.2%} over "
        f"{about['candidates']} candidates)",
        f"chosen on {about['samples']} held-out samples: coverage {about['coverage']:.2%}, {_errors(about)}",
    ]
    if "test" in about:
        test = about["test"]
        low, high = test["risk_interval"]
        risk = f", risk {test['risk']:.2%} [{low:.2%}, {high:.2%}]" if test["accepted"] else ""
        lines.append(f"on the other {test['samples']}: coverage {test['coverage']:.2%}, {_errors(test)}{risk}")
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
    threshold = parser.add_argument_group("threshold")
    threshold.add_argument(
        "--risk", type=float, required=True, help="Error rate among accepted predictions not to exceed, such as 0.02."
    )
    threshold.add_argument(
        "--confidence", type=float, default=0.95, help="Probability that the risk holds. Default: 0.95."
    )
    threshold.add_argument(
        "--score", help=f"Confidence score: {', '.join(SCORES)}. Default: that of the run's method; needed with --npz."
    )
    threshold.add_argument(
        "--calibration-share", type=float, default=0.5, metavar="SHARE",
        help="Random share of the samples to choose the threshold on; the rest tests it. Default: 0.5.",
    )  # fmt: skip
    threshold.add_argument("--seed", type=at_least(0), default=0, help="Seed of the random share. Default: 0.")
    run = parser.add_argument_group("options with --run")
    run.add_argument("--checkpoint", choices=("best", "last"), default="best", help="Checkpoint. Default: best.")
    run.add_argument("--batch-size", type=at_least(1), default=256, help="Images per step. Default: 256.")
    run.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, ... Default: auto, a GPU if there is one."
    )
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="DIR", help="Output folder. Default: RUN/calibrated, or FILE-calibrated.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 if no threshold qualifies, 2 for bad input."""
    args = _parser().parse_args(argv)
    options: dict[str, Any] = {
        "risk": args.risk, "confidence": args.confidence, "share": args.calibration_share, "seed": args.seed,
    }  # fmt: skip
    try:
        if args.npz is not None:
            if args.score is None:
                raise ValueError(f"an .npz names no score; choose one with --score: {', '.join(SCORES)}")
            about = calibrate_npz(args.npz, args.output, score=args.score, **options)
        else:
            from tal_fast.utils.distributed import choose_device

            about = calibrate_run(
                args.run, args.output, score=args.score, checkpoint=args.checkpoint, batch_size=args.batch_size,
                device=choose_device(args.device), **options,
            )  # fmt: skip
    except NoThreshold as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as problem:
        return report_mistake(problem)
    print(describe(about))
    return 0
