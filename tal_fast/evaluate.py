"""How well confidence tells right from wrong: ``python -m tal_fast.evaluate --run runs/digits-tal``.

One pass over the validation split and each OOD set gives logits and features, which are kept under the run's
``eval-cache/``; every score, setting and metric comes from them. Writes ``report.json``, ``samples.npz`` (scores of
every sample), ``risk_coverage.png``, ``confidence_histogram.png`` and ``report.html``, a page to look at, and prints
the report as tables. ``--npz`` does the same for outputs of any model.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

import tal_fast
from tal_fast import inference, plots, samples
from tal_fast.calibration import calibration_metrics
from tal_fast.feature_scores import FEATURE_SCORES, PLAIN, SIRC, FeatureScorer, Training
from tal_fast.html_report import write_html
from tal_fast.inference import Outputs
from tal_fast.metrics import CONVENTIONS, Floats
from tal_fast.models.features import FeatureLinear
from tal_fast.report import UNITS, Report, format_report, make_report, write_report
from tal_fast.samples import Predictions, Samples, identity_of, write_samples
from tal_fast.scores import SCORES
from tal_fast.settings import Mix

if TYPE_CHECKING:
    from tal_fast.runs import Run

DEFAULT_SCORES = ("cosine", "msp")
# Names that stand for several scores.
GROUPS = {"logits": tuple(SCORES), "features": PLAIN, "sirc": tuple(SIRC), "all": (*SCORES, *FEATURE_SCORES)}
# Folder of a run's outputs; it can be deleted at any time.
CACHE = "eval-cache"
_OOD_LOGITS = re.compile(r"ood_(.+)_logits")


def check_scores(names: Sequence[str]) -> list[str]:
    """Score names, each once, hyphens read as underscores, groups (``logits``, ``features``, ``sirc``, ``all``) opened.

    Raises:
        ValueError: an unknown name, or none.
    """
    plain = [name.replace("-", "_") for name in names]
    found = list(dict.fromkeys(score for name in plain for score in GROUPS.get(name, (name,))))
    unknown = [name for name in found if name not in GROUPS["all"]]
    if unknown or not found:
        raise ValueError(
            f"unknown score {', '.join(unknown) or '(none given)'}; choose from {', '.join(GROUPS['all'])}, "
            f"or a group: {', '.join(GROUPS)}"
        )
    return found


def compute_scores(
    outputs: Outputs, names: Sequence[str], scorer: FeatureScorer | None = None, split: str = "val"
) -> dict[str, Floats]:
    """Score name -> (n,) float64, higher = surer.

    Args:
        outputs: of a split.
        names: of scores.
        scorer: fitted on training features; needed for scores over features only.
        split: named in errors.

    Raises:
        ValueError: scores over features without features or training features.
    """
    of_features = [name for name in names if name not in SCORES]
    found: dict[str, Floats] = {}
    if of_features:
        if scorer is None:
            raise ValueError(f"the score {of_features[0]} needs training features ('train_features' in an .npz)")
        if outputs.features is None:
            key = "features" if split == "val" else f"ood_{split}_features"
            raise ValueError(f"the score {of_features[0]} needs the features of {split!r} ({key!r} in an .npz)")
        found = scorer.scores(of_features, outputs.logits, outputs.features)
    return {name: found[name] if name in found else SCORES[name](outputs.logits) for name in names}


def last_layer(model: nn.Module) -> tuple[Any, Any]:
    """Weight (C, D) and bias (C,) or None, as arrays, of the layer that exposes the features."""
    layer = [module for module in model.modules() if isinstance(module, FeatureLinear)][-1]
    bias = None if layer.bias is None else layer.bias.detach().cpu().double().numpy()
    return layer.weight.detach().cpu().double().numpy(), bias


def collect_outputs(
    run: Run, split: str, cache: str | Path, *, batch_size: int = 256, device: torch.device | str = "cpu"
) -> Outputs:
    """Outputs of a run's model on a split, from a cache where they are kept for these weights and this data.

    Args:
        run: from ``tal_fast.runs.load_run``.
        split: ``train-eval``, ``val`` or an OOD set.
        cache: folder; made if need be.
        batch_size, device: of the pass, if there has to be one.

    Raises:
        ValueError: no such split, an image that has gone or does not decode, or outputs that are not finite.
    """
    key = inference.cache_key(
        tal_fast.__version__,
        inference.weights_hash(run.model),
        json.dumps(run.config.to_dict()["data"], sort_keys=True),
        run.data.loader_name,
        inference.split_hash(run.data.split(split)),
    )
    path = inference.cache_path(cache, split)
    kept = inference.load_outputs(path, key)
    if kept is not None:
        return kept
    loader = run.data.loader(split, batch_size=batch_size, device=device)
    outputs = inference.run_model(run.model, loader, device, split)
    try:
        inference.save_outputs(path, outputs, key)
    except OSError as problem:
        # A run on a read-only disk can still be evaluated.
        print(f"note: the outputs could not be kept in {path} ({problem})", file=sys.stderr)
    return outputs


def read_npz(path: str | Path) -> tuple[Outputs, dict[str, Outputs], Training | None]:
    """Outputs of a model trained anywhere.

    Args:
        path: an ``.npz`` with ``logits`` (n, C), ``labels`` (n,) integers in [0, C), optionally ``features`` (n, D),
            and for each OOD set ``ood_NAME_logits`` (m, C), optionally ``ood_NAME_features`` (m, D). For scores over
            features also ``train_features`` (k, D) and, as the score needs, ``train_labels`` (k,), ``weight`` (C, D)
            and ``bias`` (C,) of the last Linear layer.

    Returns:
        The ID outputs; name -> outputs of each OOD set; what scores over features are fitted on, if it is there.

    Raises:
        ValueError: the file is missing or is no such file; the sentence says what is wrong with it.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as problem:
        raise ValueError(
            f"{path} cannot be read as .npz without pickle ({problem}); write it with numpy.savez"
        ) from None
    for needed in ("logits", "labels"):
        if needed not in arrays:
            raise ValueError(f"{path} has no {needed!r}; it has {', '.join(arrays) or 'nothing'}")
    logits, labels = _matrix(arrays, "logits"), arrays["labels"]
    classes = logits.shape[1]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be (n,) integers, not {labels.dtype} of shape {labels.shape}")
    if len(labels) != len(logits):
        raise ValueError(f"logits has {len(logits)} samples but labels has {len(labels)}; they must match")
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if outside.size:
        raise ValueError(
            f"labels must lie in 0..{classes - 1}, the columns of logits; {labels[outside[0]]} (index {outside[0]}) "
            f"does not"
        )
    found = Outputs(logits, _features(arrays, "features", len(logits)), labels.astype(np.int64))
    inference.check_finite(found, "logits")
    oods: dict[str, Outputs] = {}
    for key in arrays:
        match = _OOD_LOGITS.fullmatch(key)
        if match is None:
            continue
        ood = _matrix(arrays, key)
        if ood.shape[1] != classes:
            raise ValueError(f"{key} has {ood.shape[1]} columns but logits has {classes}; they must match")
        features = _features(arrays, f"ood_{match[1]}_features", len(ood))
        oods[match[1]] = Outputs(ood, features, np.full(len(ood), -1))
        inference.check_finite(oods[match[1]], key)
    training = None
    if "train_features" in arrays:
        training = Training(arrays["train_features"], *(arrays.get(key) for key in ("train_labels", "weight", "bias")))
    return found, oods, training


def _matrix(arrays: Mapping[str, Any], name: str) -> Any:
    matrix = arrays[name]
    if matrix.ndim != 2 or matrix.shape[1] == 0 or matrix.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be an (n, C) array of real numbers, not {matrix.dtype} of shape {matrix.shape}")
    # Scores are computed in float64 anyway; argmax and isfinite need no wider copy.
    return matrix


def _features(arrays: Mapping[str, Any], name: str, samples: int) -> Any:
    if name not in arrays:
        return None
    features = _matrix(arrays, name)
    if len(features) != samples:
        raise ValueError(f"{name} has {len(features)} samples but its logits have {samples}; they must match")
    return features


def evaluate_outputs(
    id_outputs: Outputs,
    ood_outputs: Mapping[str, Outputs],
    output: str | Path,
    *,
    scores: Sequence[str] = DEFAULT_SCORES,
    mix: Mix | None = None,
    seed: int = 0,
    convention: str = "tal_fast",
    training: Training | None = None,
    about: Mapping[str, Any] | None = None,
    title: str = "",
    resamples: int = 0,
    identity: Mapping[str, str] | None = None,
) -> Report:
    """Report on outputs: make it, write ``report.json``, ``samples.npz`` and both pictures to ``output``, return it.

    It is ``make_report``'s with ``calibration`` of the softmax on the ID samples.

    Args:
        id_outputs: of the validation split.
        ood_outputs: OOD set -> its outputs.
        output: folder; made if need be.
        scores: names from ``tal_fast.scores.SCORES`` and ``tal_fast.feature_scores.FEATURE_SCORES``.
        mix, seed, convention: see ``tal_fast.report.make_report``.
        training: what scores over features are fitted on; needed for these only.
        about: entries to put before the report's own, such as the run.
        title: of the pictures.
        resamples: of the bootstrap; 0: no intervals. Differences are to the run's own score, else to the first.
        identity: split -> hash of its samples, see ``tal_fast.samples``; of labels and sizes unless given.

    Raises:
        ValueError: an unknown score or convention, or a score over features that are not there.
    """
    names = check_scores(scores)
    scorer = None if training is None else FeatureScorer(training)
    id_scores = compute_scores(id_outputs, names, scorer)
    ood_scores = {name: compute_scores(outputs, names, scorer, name) for name, outputs in ood_outputs.items()}
    report = {
        **(about or {}),
        **make_report(
            id_outputs.right, id_scores, ood_scores, mix=mix, seed=seed, convention=convention, resamples=resamples,
            baseline=(about or {}).get("score"), progress=True,
        ),
    }  # fmt: skip
    report["calibration"] = calibration_metrics(id_outputs.logits, id_outputs.labels)
    report["versions"]["torch"] = torch.__version__
    output = Path(output)
    # The numbers first: they stay if a picture fails.
    write_report(report, output / "report.json")
    identity = identity or {"val": identity_of(id_outputs.labels)} | {
        name: identity_of(outputs.labels) for name, outputs in ood_outputs.items()
    }
    predictions = {name: Predictions.of(outputs) for name, outputs in {"val": id_outputs, **ood_outputs}.items()}
    write_samples(Samples(id_outputs.right, id_scores, ood_scores, identity, predictions), output / samples.FILE)
    plots.risk_coverage(output / "risk_coverage.png", id_outputs.right, id_scores, ood_scores, mix, seed, title)
    plots.confidence_histogram(output / "confidence_histogram.png", id_outputs.right, id_scores, ood_scores, title)
    return report


def evaluate_run(
    run_dir: str | Path,
    output: str | Path | None = None,
    *,
    checkpoint: Literal["best", "last"] = "best",
    batch_size: int = 256,
    device: str = "cpu",
    scores: Sequence[str] = DEFAULT_SCORES,
    typicalness: bool = True,
    **options: Any,
) -> Report:
    """Report on a run of ``python -m tal_fast.train``.

    Args:
        run_dir: the run's folder.
        output: where to write; the run's folder unless given.
        checkpoint: ``best`` or ``last``.
        batch_size, device: of the pass over the images.
        scores: names of scores; that by which the run's method is judged is added.
        typicalness: see ``tal_fast.html_report.write_html``.
        options: ``mix``, ``seed``, ``convention``, ``resamples`` of ``evaluate_outputs``.

    Raises:
        ValueError: no run or checkpoint there, its data gone, or outputs that are not finite.
    """
    from tal_fast.runs import load_run

    names = check_scores(scores)
    run = load_run(run_dir, checkpoint=checkpoint, device=device)
    names = check_scores([*names, run.score])
    cache = Path(run_dir) / CACHE / run.checkpoint.stem
    splits = {
        split: collect_outputs(run, split, cache, batch_size=batch_size, device=device)
        for split in ("val", *run.data.ood_names)
    }
    training = None
    if set(names) & set(FEATURE_SCORES):
        fitted_on = collect_outputs(run, "train-eval", cache, batch_size=batch_size, device=device)
        assert fitted_on.features is not None
        training = Training(fitted_on.features, fitted_on.labels, *last_layer(run.model))
    about = {
        "run": str(run_dir),
        "checkpoint": run.checkpoint.stem,
        "epoch": run.epoch,
        "method": run.method,
        "score": run.score,
    }
    output = run_dir if output is None else output
    report = evaluate_outputs(
        splits["val"],
        {name: outputs for name, outputs in splits.items() if name != "val"},
        output,
        scores=names,
        training=training,
        about=about,
        identity={name: inference.split_hash(run.data.split(name)) for name in splits},
        title=f"{run.method} ({Path(run_dir).name})",
        **options,
    )
    write_html(output, run=run, typicalness=typicalness, batch_size=batch_size, device=device)
    return report


def evaluate_npz(path: str | Path, output: str | Path | None = None, **options: Any) -> Report:
    """Report on outputs of any model; see ``read_npz`` for the file and ``evaluate_outputs`` for the options.

    Args:
        path: the ``.npz``.
        output: where to write; a folder named after the file, beside it, unless given.
    """
    path = Path(path)
    id_outputs, ood_outputs, training = read_npz(path)
    output = path.with_name(path.stem + "-report") if output is None else output
    report = evaluate_outputs(
        id_outputs, ood_outputs, output, training=training, about={"npz": str(path)}, title=path.name, **options
    )
    write_html(output)
    return report


def _argument(check: Any) -> Any:
    """A type for argparse whose ValueError is shown as it is."""

    def convert(text: str) -> Any:
        try:
            return check(text)
        except ValueError as problem:
            raise argparse.ArgumentTypeError(str(problem)) from None

    return convert


def _at_least(limit: int) -> Any:
    def check(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"must be a whole number, not {text!r}") from None
        if value < limit:
            raise ValueError(f"must be at least {limit}, not {value}")
        return value

    return _argument(check)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tal_fast.evaluate",
        description="Report how well confidence tells right predictions from wrong ones: Old FD, OOD and New FD.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR", help="folder of a run of tal_fast.train")
    source.add_argument("--npz", metavar="FILE", help="logits, labels and ood_NAME_logits of any model")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="of the run (%(default)s)")
    parser.add_argument(
        "--scores", nargs="+", default=list(DEFAULT_SCORES), metavar="SCORE",
        help=f"confidence scores ({' '.join(DEFAULT_SCORES)}): {', '.join(GROUPS['all'])}; or a group: "
        "logits, features, sirc, all",
    )  # fmt: skip
    parser.add_argument("--convention", choices=CONVENTIONS, default="tal_fast", help="of the metrics (%(default)s)")
    parser.add_argument(
        "--mix", type=_argument(Mix.parse), default=Mix(), help="ID:OOD samples: balanced-random (default), all, "
        "first-n, or prior=P with P the share of OOD",
    )  # fmt: skip
    parser.add_argument("--seed", type=_at_least(0), default=0, help="of a random mix (%(default)s)")
    parser.add_argument(
        "--bootstrap", type=_at_least(0), default=0, metavar="N", help="resamples for confidence intervals of every "
        "metric and of differences between scores; 10000 is usual (0: none)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=_at_least(1), default=256, help="of the pass (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--units", choices=UNITS, default="natural", help="of the printed tables (%(default)s)")
    parser.add_argument(
        "--no-typicalness", dest="typicalness", action="store_false",
        help="leave the most and least typical training images, which take a pass over all of them, out of report.html",
    )  # fmt: skip
    parser.add_argument("--output", metavar="DIR", help="where to write (the run's folder; FILE-report for --npz)")
    return parser


def choose_device(name: str) -> str:
    """``auto`` -> cuda if there is one, else cpu; other names are checked.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as problem:
        raise ValueError(f"the device {name!r} cannot be used: {str(problem).splitlines()[0]}") from None
    return name


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for bad input, said in one sentence."""
    args = _parser().parse_args(argv)
    scores = [name for group in args.scores for name in group.split(",") if name]
    options: dict[str, Any] = {
        "mix": args.mix, "seed": args.seed, "convention": args.convention, "scores": scores,
        "resamples": args.bootstrap,
    }  # fmt: skip
    try:
        if args.npz is not None:
            report = evaluate_npz(args.npz, args.output, **options)
        else:
            device = choose_device(args.device)
            report = evaluate_run(
                args.run,
                args.output,
                checkpoint=args.checkpoint,
                batch_size=args.batch_size,
                device=device,
                typicalness=args.typicalness,
                **options,
            )
    except (ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if "run" in report:
        print(f"{report['run']}: {report['method']}, {report['checkpoint']} checkpoint, epoch {report['epoch']}")
    print(format_report(report, args.units))
    return 0


if __name__ == "__main__":
    sys.exit(main())
