"""A threshold that holds: ``python -m tal_fast.calibrate --run runs/digits-tal --risk 0.02 --confidence 0.95``.

Picks, on held-out samples, the confidence above which predictions are accepted so that the error rate among them is at
most the given risk, with the given confidence over the draw of the held-out samples, and exports the model with it.
The bound needs no assumption but that the held-out samples and those met later are independent draws of one
distribution.

The bound: for a few numbers of accepted samples, fixed before anything is looked at, the threshold is the score at
that rank and samples strictly above it are accepted. Given the threshold, the errors among them are binomial with the
selective risk as their rate, so that the Clopper-Pearson upper limit at level δ/K holds for each of the K candidates
and, by the union bound, for all of them at once; the candidate with the largest coverage whose limit is at most the
risk is taken. This is Geifman and El-Yaniv's selection with guaranteed risk (NeurIPS 2017, Algorithm 1) with the
candidates fixed in advance instead of found by bisection: their bisection chooses each candidate after the errors of
the one before, while its union bound counts only those on the way. It is valid for tied and discrete scores, for any
score and any distribution. Fixed-sequence testing (Angelopoulos et al., *Learn then Test*, 2021) needs no division of
δ, but thresholds from other data, which costs samples, and a place to start: one noisy sample among the surest ends it
there, so that it covers more where the start suits the risk curve and far less, or nothing, where it does not.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import tal_fast
from tal_fast.metrics.failure import Ints, as_correct, as_scores
from tal_fast.scores.logits import NORM_EPS, SCORES
from tal_fast.utils.io import replacing
from tal_fast.utils.process import program_name

FORMAT = 1
JSON, STATE, PROGRAM = "threshold.json", "selective.pt", "selective.pt2"


class NoThreshold(ValueError):
    """No candidate's bound is within the risk."""


@dataclass(frozen=True)
class Threshold:
    """A confidence above which predictions are accepted, and what is known of it.

    Attributes:
        threshold: a sample is accepted if its confidence is strictly above; −inf accepts all.
        risk: the error rate among accepted samples that is not exceeded ...
        confidence: ... with this probability over the draw of the held-out samples.
        samples: how many were held out.
        accepted, errors: how many of them are accepted, and how many of these are wrong.
        bound: the upper limit on the error rate that was compared with ``risk``; it holds with ``confidence``.
        candidates: K, over which δ = 1 − confidence is divided.
    """

    threshold: float
    risk: float
    confidence: float
    samples: int
    accepted: int
    errors: int
    bound: float
    candidates: int

    @property
    def coverage(self) -> float:
        """Share of the held-out samples that are accepted."""
        return self.accepted / self.samples


def upper_limit(errors: Any, samples: Any, delta: float) -> Any:
    """The Clopper-Pearson upper limit of an error rate: exceeded by the truth with probability at most delta.

    Args:
        errors, samples: numbers or arrays of them, 0 <= errors <= samples.
        delta: in (0, 1).

    Returns:
        The rate p at which so few errors have probability delta; 1 where all are errors or there are no samples.
    """
    from scipy.stats import beta

    errors, samples = np.asarray(errors, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    all_wrong = errors >= samples
    return np.where(all_wrong, 1.0, beta.ppf(1 - delta, errors + 1, np.where(all_wrong, 1, samples - errors)))


def lower_limit(errors: int, samples: int, delta: float) -> float:
    """The Clopper-Pearson lower limit: above the truth with probability at most delta."""
    return 1 - float(upper_limit(samples - errors, samples, delta))


def candidate_ranks(samples: int, risk: float, delta: float) -> Ints:
    """How many samples each candidate accepts at most, rising; known before scores and errors are.

    2.5 √(n · risk) of them (4 to 64), evenly spaced from the fewest samples that could qualify, all right, to all. More
    would be spaced more finely but bounded more loosely, and n · risk is how many errors there are to tell them apart.
    """
    count = min(max(math.ceil(2.5 * math.sqrt(samples * risk)), 4), 64)
    fewest = math.ceil(math.log(delta / count) / math.log1p(-risk))
    if fewest > samples:
        return np.zeros(0, dtype=np.int64)
    return np.unique(np.linspace(fewest, samples, count).round().astype(np.int64))


def choose_threshold(scores: Any, correct: Any, *, risk: float, confidence: float = 0.95) -> Threshold:
    """The threshold of largest coverage whose selective risk is at most ``risk`` with the given confidence.

    Args:
        scores: (n,) confidences of held-out samples, which no one has fitted anything on; higher = surer.
        correct: (n,) 0/1 or bool.
        risk: the error rate among accepted samples not to exceed, in (0, 1).
        confidence: 1 − δ, in (0, 1).

    Raises:
        NoThreshold: no candidate qualifies; the sentence says what would.
        ValueError: vectors that do not match, NaN scores, or numbers out of range.
    """
    for name, value in (("risk", risk), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie in (0, 1), not {value}")
    values, outcomes = as_scores(scores, "scores"), as_correct(correct)
    n = values.size
    if outcomes.size != n:
        raise ValueError(f"scores has {n} samples but correct has {outcomes.size}; they must match")
    delta = 1 - confidence
    ranks = candidate_ranks(n, risk, delta)
    if not ranks.size:
        needed = next(m for m in _growing() if candidate_ranks(m, risk, delta).size)
        raise NoThreshold(
            f"{n} held-out samples are too few to bound the risk by {risk:g} with confidence {confidence:g}, even "
            f"without an error: hold out about {needed}, or allow a larger risk"
        )
    order = np.argsort(-values, kind="stable")
    ranked, errors = values[order], np.append(0, np.cumsum(1 - outcomes[order]))
    thresholds = np.append(ranked, -np.inf)[ranks]
    # With ties fewer than the rank are strictly above.
    accepted = np.searchsorted(-ranked, -thresholds, side="left")
    limits = upper_limit(errors[accepted], accepted, delta / ranks.size)
    qualify = np.flatnonzero(limits <= risk)
    if not qualify.size:
        best = int(np.argmin(limits))
        raise NoThreshold(
            f"no threshold keeps the risk within {risk:g} with confidence {confidence:g}: the lowest bound is "
            f"{limits[best]:.4g} ({errors[accepted[best]]} errors among {accepted[best]} of {n} held-out samples); "
            f"allow a larger risk, hold out more samples or use a better score"
        )
    chosen = qualify[-1]
    return Threshold(
        threshold=float(thresholds[chosen]),
        risk=risk,
        confidence=confidence,
        samples=n,
        accepted=int(accepted[chosen]),
        errors=int(errors[accepted[chosen]]),
        bound=float(limits[chosen]),
        candidates=int(ranks.size),
    )


def _growing() -> Any:
    samples = 1.0
    while True:
        yield math.ceil(samples)
        samples *= 1.02


def split_samples(samples: int, share: float, seed: int) -> tuple[Ints, Ints]:
    """Indices of the samples to choose the threshold on, and of those to test it on; both rising, drawn at random.

    Raises:
        ValueError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"the calibration share must lie in (0, 1], not {share}")
    order = np.random.default_rng(seed).permutation(samples)
    cut = round(share * samples)
    return np.sort(order[:cut]).astype(np.int64), np.sort(order[cut:]).astype(np.int64)


def _cosine(z: Tensor) -> Tensor:
    return z.amax(1) / (z.square().sum(1).sqrt() + NORM_EPS)


def _neg_entropy(z: Tensor) -> Tensor:
    p = z.softmax(1)
    return torch.special.xlogy(p, p).sum(1)


# The scores of tal_fast.scores in operations that torch.export takes; (B, C) float64 -> (B,) float64.
TORCH_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": _cosine,
    "msp": lambda z: z.softmax(1).amax(1),
    "max_logit": lambda z: z.amax(1),
    "energy": lambda z: z.logsumexp(1),
    "neg_entropy": _neg_entropy,
    "doctor": lambda z: z.softmax(1).square().sum(1),
}


class SelectiveClassifier(nn.Module):
    """A classifier that knows when to abstain.

    Args:
        model: images -> logits (B, C), or (logits, features).
        score: a name from ``tal_fast.scores.SCORES``.
        threshold: a prediction is accepted if its confidence is strictly above; kept in the state dict.

    Raises:
        ValueError: an unknown score.
    """

    threshold: Tensor

    def __init__(self, model: nn.Module, score: str, threshold: float) -> None:
        super().__init__()
        if score not in TORCH_SCORES:
            raise ValueError(f"unknown score {score!r}; choose from {', '.join(TORCH_SCORES)}")
        self.model = model
        self.score = score
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float64))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images to (prediction (B,) int64, confidence (B,) float64, accept (B,) bool)."""
        outputs = self.model(images)
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        # In float64, as the threshold was found: in float32 ties alone would move samples across it.
        confidence = TORCH_SCORES[self.score](logits.double())
        return logits.argmax(1), confidence, confidence > self.threshold


def export(classifier: SelectiveClassifier, images: Tensor, folder: str | Path) -> list[Path]:
    """Write ``selective.pt2`` (``torch.export.load(path).module()(images)``; any batch size) and ``selective.pt``, the
    state dict.

    Args:
        classifier: on the CPU; put into eval mode, its gradients off.
        images: two or more of the images it takes, as an example.
        folder: made if need be.

    Raises:
        ValueError: the model cannot be exported; the state dict is written all the same.
    """
    folder = Path(folder)
    classifier.eval().requires_grad_(False)
    with replacing(folder / STATE) as temporary:
        torch.save(classifier.state_dict(), temporary)
    try:
        program = torch.export.export(classifier, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    except Exception as problem:
        # Whatever torch.export meets in a user's model.
        raise ValueError(
            f"torch.export cannot take the model ({str(problem).splitlines()[0]}); {folder / STATE} holds its weights "
            f"and the threshold"
        ) from problem
    with replacing(folder / PROGRAM) as temporary:
        torch.export.save(program, temporary)
    return [folder / PROGRAM, folder / STATE]


def calibrate(
    scores: Any, correct: Any, *, risk: float, confidence: float = 0.95, share: float = 0.5, seed: int = 0
) -> tuple[Threshold, dict[str, Any]]:
    """Choose a threshold on a share of the samples and look at it on the rest.

    Args:
        scores, correct, risk, confidence: as for ``choose_threshold``.
        share: of the samples to choose on, drawn at random.
        seed: of the draw.

    Returns:
        The threshold, and what ``threshold.json`` says: its fields with ``coverage``, ``calibration_share``, ``seed``
        and, where samples are left, ``test``: ``samples``, ``accepted``, ``errors``, ``coverage``, ``risk`` and
        ``risk_interval``, its two-sided Clopper-Pearson interval at ``confidence``. An infinite threshold is null.

    Raises:
        NoThreshold, ValueError: as ``choose_threshold``.
    """
    values, outcomes = as_scores(scores, "scores"), as_correct(correct)
    held_out, rest = split_samples(values.size, share, seed)
    found = choose_threshold(values[held_out], outcomes[held_out], risk=risk, confidence=confidence)
    about: dict[str, Any] = {
        "format": FORMAT, **asdict(found), "coverage": found.coverage, "calibration_share": share, "seed": seed,
        "bound_name": "Clopper-Pearson, union over ranks fixed in advance",
    }  # fmt: skip
    about["threshold"] = found.threshold if math.isfinite(found.threshold) else None
    if rest.size:
        accept = values[rest] > found.threshold
        accepted, errors = int(accept.sum()), int((1 - outcomes[rest])[accept].sum())
        half = (1 - confidence) / 2
        about["test"] = {
            "samples": int(rest.size), "accepted": accepted, "errors": errors, "coverage": accepted / rest.size,
            "risk": errors / accepted if accepted else None,
            "risk_interval": [lower_limit(errors, accepted, half), float(upper_limit(errors, accepted, half))],
        }  # fmt: skip
    return found, about


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
    """Choose a threshold on a run's validation images and export the model with it.

    Args:
        run_dir: of ``python -m tal_fast.train``.
        output: folder of the three files; ``calibrated`` in the run's unless given.
        score: from ``tal_fast.scores.SCORES``; the run's own unless given.
        checkpoint: ``best`` or ``last``.
        batch_size, device: of the pass over the images, if there has to be one.
        options: of ``calibrate``.

    Returns:
        What was written to ``threshold.json``.

    Raises:
        NoThreshold: nothing is written.
        ValueError: no run or checkpoint there, its data gone, an unknown score, or numbers out of range.
    """
    from tal_fast.evaluation.predictions import CACHE, collect_outputs
    from tal_fast.runs.load import load_run

    run = load_run(run_dir, checkpoint=checkpoint, device=device)
    score = _check_score(score or run.score)
    cache = Path(run_dir) / CACHE / run.checkpoint.stem
    outputs = collect_outputs(run, "val", cache, batch_size=batch_size, device=device)
    found, about = calibrate(SCORES[score](outputs.logits), outputs.correct, **options)
    mean, std = run.config.data.normalization()
    about |= {
        "score": score, "run": str(run_dir), "checkpoint": run.checkpoint.stem, "epoch": run.epoch,
        "class_names": list(run.class_names), "image_size": run.data.image_size, "channels": run.config.data.channels,
        "mean": list(mean), "std": list(std),
    }  # fmt: skip
    output = Path(run_dir) / "calibrated" if output is None else Path(output)
    _write(about, output / JSON)
    example = torch.zeros(2, run.config.data.channels, run.data.image_size, run.data.image_size)
    export(SelectiveClassifier(run.model.cpu(), score, found.threshold), example, output)
    return about


def calibrate_npz(path: str | Path, output: str | Path | None = None, *, score: str, **options: Any) -> dict[str, Any]:
    """Choose a threshold on outputs of any model, an ``.npz`` as ``python -m tal_fast.evaluate --npz`` takes it.

    Args:
        path: the file; ``logits`` and ``labels`` are used.
        output: folder of ``threshold.json``; ``FILE-calibrated`` beside the file unless given.
        score, options: as for ``calibrate_run``.

    Raises:
        NoThreshold, ValueError: as ``calibrate_run``.
    """
    from tal_fast.evaluation.npz import read_npz

    path = Path(path)
    outputs = read_npz(path).id
    _, about = calibrate(SCORES[_check_score(score)](outputs.logits), outputs.correct, **options)
    about |= {"score": _check_score(score), "npz": str(path)}
    _write(about, (path.with_name(path.stem + "-calibrated") if output is None else Path(output)) / JSON)
    return about


def _check_score(name: str) -> str:
    plain = name.replace("-", "_")
    if plain not in SCORES:
        raise ValueError(f"unknown score {name!r}; choose one over logits: {', '.join(SCORES)}")
    return plain


def _write(about: dict[str, Any], path: Path) -> None:
    about["versions"] = {"tal_fast": tal_fast.__version__, "torch": torch.__version__}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(about, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def describe(about: dict[str, Any]) -> str:
    """What was found, in a few lines."""
    rule = "every prediction" if about["threshold"] is None else f"{about['score']} > {about['threshold']:.10g}"
    lines = [
        f"accept {rule}",
        f"risk at most {about['risk']:.2%} with confidence {about['confidence']:.4g} (bound {about['bound']:.2%} over "
        f"{about['candidates']} candidates)",
        f"chosen on {about['samples']} held-out samples: coverage {about['coverage']:.2%}, {about['errors']} errors "
        f"among {about['accepted']} accepted",
    ]
    if "test" in about:
        test = about["test"]
        lines.append(f"on the other {test['samples']}: coverage {test['coverage']:.2%}, {test['errors']} errors among ")
        lines[-1] += f"{test['accepted']} accepted"
        if test["accepted"]:
            low, high = test["risk_interval"]
            lines[-1] += f", risk {test['risk']:.2%} [{low:.2%}, {high:.2%}]"
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name("calibrate"),
        description="Pick a confidence threshold whose error rate is bounded, and export the model with it.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--run", metavar="DIR", help="folder of a run of tal_fast.train; its validation images are used"
    )
    source.add_argument("--npz", metavar="FILE", help="logits and labels of any model on held-out samples")
    parser.add_argument("--risk", type=float, required=True, help="error rate among accepted predictions, as in 0.02")
    parser.add_argument("--confidence", type=float, default=0.95, help="with which the risk holds (%(default)s)")
    parser.add_argument("--score", help=f"{', '.join(SCORES)} (the run's own)")
    parser.add_argument(
        "--calibration-share", type=float, default=0.5, metavar="SHARE",
        help="of the samples to choose on, drawn at random; the rest tests the threshold (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of that draw (%(default)s)")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="of the run (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="of the pass (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--output", metavar="DIR", help="where to write (DIR/calibrated; FILE-calibrated for --npz)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 when no threshold qualifies, 2 for bad input."""
    args = _parser().parse_args(argv)
    options: dict[str, Any] = {
        "risk": args.risk, "confidence": args.confidence, "share": args.calibration_share, "seed": args.seed,
    }  # fmt: skip
    try:
        if args.batch_size < 1 or args.seed < 0:
            raise ValueError("--batch-size must be at least 1 and --seed at least 0")
        if args.npz is not None:
            if args.score is None:
                raise ValueError(f"an .npz names no score of its own; choose one with --score: {', '.join(SCORES)}")
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
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print(describe(about))
    return 0
