"""How well confidence tells right from wrong: ``python -m tal_fast.evaluate --run runs/digits-tal``.

One pass over the validation split and each OOD or shifted set gives logits and features, which are kept in a cache;
every score, setting and metric comes from them. Writes ``report.json``, ``samples.npz`` (scores of
every sample), ``risk_coverage.png``, ``confidence_histogram.png`` and ``report.html``, a page to look at, and prints
the report as tables. ``--weights`` does the same for a network's weights from
anywhere, ``--npz`` for outputs of any model. ``torchrun -m tal_fast.evaluate`` shares the passes among processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tal_fast import plots, samples
from tal_fast.calibration import calibration_metrics
from tal_fast.config import Config, DataConfig, ModelConfig
from tal_fast.corruptions import CORRUPTIONS, Corruption
from tal_fast.data.bundle import DataBundle, Split
from tal_fast.data.evaluation_sets import ood_set, parse_named, shift_set
from tal_fast.feature_scores import (
    FEATURE_SCORES,
    KNN_SAMPLES,
    PLAIN,
    SIRC,
    FeatureScorer,
    Training,
    training_needed,
)
from tal_fast.html_report import write_html
from tal_fast.inference import AMP, Inference, split_hash
from tal_fast.metrics import CONVENTIONS, Floats
from tal_fast.models.features import FeatureLinear
from tal_fast.npz import read_npz
from tal_fast.output_store import Outputs
from tal_fast.ranks import Ranks
from tal_fast.report import UNITS, Report, format_report, make_report, write_report
from tal_fast.samples import Predictions, Samples, identity_of, write_samples
from tal_fast.scores import SCORES
from tal_fast.settings import Mix
from tal_fast.temperature import HELD_OUT, fit_temperature, held_out

if TYPE_CHECKING:
    from tal_fast.runs import Run

DEFAULT_SCORES = ("cosine", "msp")
# Names that stand for several scores.
GROUPS = {"logits": tuple(SCORES), "features": PLAIN, "sirc": tuple(SIRC), "all": (*SCORES, *FEATURE_SCORES)}
# Folder of a run's outputs; it can be deleted at any time.
CACHE = "eval-cache"


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


def unavailable(
    names: Sequence[str], scorer: FeatureScorer, sets: Mapping[str, Outputs], has_training: bool
) -> dict[str, str]:
    """Scores that cannot be computed from what is there -> why. Fits the others.

    Args:
        names: of scores.
        scorer: of scores over features.
        sets: name, as its arrays are called in an ``.npz`` -> outputs.
        has_training: whether there are training features.
    """
    of_features = [name for name in names if name not in SCORES]
    bare = [f"{name}features" for name, outputs in sets.items() if outputs.features is None]
    if bare:
        return dict.fromkeys(of_features, f"it needs the features of every set, and there are no {', '.join(bare)}")
    if not has_training:
        why = "it needs training features, and there are none"
        return {name: why for name in of_features if training_needed(name)}
    return scorer.undefined(of_features)


def compute_scores(outputs: Outputs, names: Sequence[str], scorer: FeatureScorer) -> dict[str, Floats]:
    """Score name -> (n,) float64, higher = surer.

    Args:
        outputs: of a split.
        names: of scores; those over features need the outputs' features, and training data in the scorer.
        scorer: of scores over features.
    """
    of_features = [name for name in names if name not in SCORES]
    found = scorer.scores(of_features, outputs.logits, outputs.features) if of_features else {}
    return {name: found[name] if name in found else SCORES[name](outputs.logits) for name in names}


def last_layer(model: nn.Module) -> tuple[Any, Any]:
    """Weight (C, D) and bias (C,) or None, as arrays, of the layer that exposes the features."""
    layer = [module for module in model.modules() if isinstance(module, FeatureLinear)][-1]
    bias = None if layer.bias is None else layer.bias.detach().cpu().double().numpy()
    return layer.weight.detach().cpu().double().numpy(), bias


def inference_of(run: Run, cache: str | Path, **options: Any) -> Inference:
    """The passes of a run's model over its splits.

    Args:
        run: from ``tal_fast.runs.load_run``.
        cache: folder of the outputs; made if need be.
        options: ``ranks``, ``batch_size``, ``amp``, ``features`` of ``Inference``.
    """
    return Inference(run.model, run.data, cache, **options)


def collect_outputs(
    run: Run, split: str, cache: str | Path, *, batch_size: int = 256, device: torch.device | str = "cpu"
) -> Outputs:
    """A run's outputs on ``train-eval``, ``val`` or an OOD set, in memory; from the cache if they are there."""
    ranks = Ranks(0, 1, torch.device(device))
    name = f"ood-{split}" if split in run.data.ood_names else split
    return inference_of(run, cache, ranks=ranks, batch_size=batch_size).store(name, run.data.split(split)).load()


def _sets_beside(
    data: DataBundle, ood: Mapping[str, str], shifts: Mapping[str, str]
) -> tuple[dict[str, Split], dict[str, tuple[Split, Corruption | None]]]:
    """OOD sets by name, the data set's own first, and shifted sets.

    Raises:
        ValueError: a name that is taken, or a set that cannot be read.
    """
    found = {name: data.split(name) for name in data.ood_names}
    for name, spec in ood.items():
        if name in found:
            raise ValueError(f"there is an OOD set {name!r} already, the data set's own; choose another name")
        found[name] = ood_set(spec, data.image_size, data.channels)
    shifted = {
        name: shift_set(spec, data.class_names, data.split("val"), data.channels) for name, spec in shifts.items()
    }
    return found, shifted


def _evaluate_model(
    inference: Inference,
    output: str | Path,
    names: Sequence[str],
    *,
    ood: Mapping[str, str] | None,
    shifts: Mapping[str, str] | None,
    **options: Any,
) -> Report | None:
    """Run a model over all it is evaluated on, and report on it; None on ranks other than 0."""
    data = inference.data
    oods, shifted = _sets_beside(data, ood or {}, shifts or {})
    id_store = inference.store("val")
    # The prefixes keep a set that is called val from meeting the validation split.
    ood_stores = {name: inference.store(f"ood-{name}", images) for name, images in oods.items()}
    shift_stores = {
        name: inference.store(f"shift-{name}", images, corruption) for name, (images, corruption) in shifted.items()
    }
    train_store = None
    if any(name in FEATURE_SCORES and training_needed(name) for name in names) and len(data.split("train-eval")):
        train_store = inference.store("train-eval")
    if not inference.ranks.is_main:
        return None
    training = None
    if train_store is not None:
        training = Training(train_store.features(), train_store.column("labels"), *last_layer(inference.model))
    return evaluate_outputs(
        id_store.load(),
        {name: store.load() for name, store in ood_stores.items()},
        output,
        shift_outputs={name: store.load() for name, store in shift_stores.items()},
        scores=names,
        training=training,
        identity={"val": split_hash(data.split("val"))} | {name: split_hash(images) for name, images in oods.items()},
        **options,
    )


def evaluate_outputs(
    id_outputs: Outputs,
    ood_outputs: Mapping[str, Outputs],
    output: str | Path,
    *,
    shift_outputs: Mapping[str, Outputs] | None = None,
    scores: Sequence[str] = DEFAULT_SCORES,
    mix: Mix | None = None,
    seed: int = 0,
    convention: str = "tal_fast",
    training: Training | None = None,
    knn_samples: int | None = KNN_SAMPLES,
    temperature: float | None = None,
    about: Mapping[str, Any] | None = None,
    title: str = "",
    resamples: int = 0,
    identity: Mapping[str, str] | None = None,
) -> Report:
    """Report on outputs: make it, write ``report.json``, ``samples.npz`` and both pictures to ``output``, return it.

    It is ``make_report``'s with ``calibration`` of the softmax on the ID samples, ``left_out`` (score -> why it could
    not be computed), ``fitted`` (on how many training features) and, with a temperature, ``temperature``.

    Args:
        id_outputs: of the validation split.
        ood_outputs: OOD set -> its outputs.
        output: folder; made if need be.
        shift_outputs: shifted set -> its outputs, with labels.
        scores: names from ``tal_fast.scores.SCORES`` and ``tal_fast.feature_scores.FEATURE_SCORES``. Those that lack
            their inputs are left out.
        mix, seed, convention: see ``tal_fast.report.make_report``.
        training: what scores over features are fitted on; needed for these only.
        knn_samples: see ``FeatureScorer``.
        temperature: share of the ID samples that a temperature is fitted on. They take part in nothing else; all other
            logits are divided by it.
        about: entries to put before the report's own, such as the run.
        title: of the pictures.
        resamples: of the bootstrap; 0: no intervals. Differences are to the run's own score, else to the first.
        identity: split -> hash of its samples, see ``tal_fast.samples``; of labels and sizes unless given.

    Raises:
        ValueError: an unknown score or convention, no score that can be computed, or no temperature that fits.
    """
    names = check_scores(scores)
    shift_outputs = shift_outputs or {}
    scaling: dict[str, Any] | None = None
    if temperature is not None:
        id_outputs, scaling = _scaled_on_held_out(id_outputs, temperature, seed)
        t = scaling["value"]
        ood_outputs = {name: _divided(outputs, t) for name, outputs in ood_outputs.items()}
        shift_outputs = {name: _divided(outputs, t) for name, outputs in shift_outputs.items()}
        training = None if training is None else training.scaled(t)
    scorer = FeatureScorer(training, knn_samples, seed)
    sets = {"": id_outputs, **{f"ood_{name}_": o for name, o in ood_outputs.items()}}
    sets |= {f"shift_{name}_": o for name, o in shift_outputs.items()}
    left_out = unavailable(names, scorer, sets, training is not None)
    names = [name for name in names if name not in left_out]
    if not names:
        score, why = next(iter(left_out.items()))
        raise ValueError(f"none of the scores can be computed from what is there; {score}: {why}")
    id_scores = compute_scores(id_outputs, names, scorer)
    ood_scores = {name: compute_scores(outputs, names, scorer) for name, outputs in ood_outputs.items()}
    shift_scores = {name: (o.right, compute_scores(o, names, scorer)) for name, o in shift_outputs.items()}
    report = {
        **(about or {}),
        **make_report(
            id_outputs.right, id_scores, ood_scores, shifts=shift_scores, mix=mix, seed=seed, convention=convention,
            resamples=resamples, baseline=(about or {}).get("score"), progress=True,
        ),
    }  # fmt: skip
    report["calibration"] = calibration_metrics(id_outputs.logits, id_outputs.labels)
    if scaling is not None:
        report["temperature"] = scaling
    report["left_out"] = left_out
    if any(name in FEATURE_SCORES for name in names):
        report["fitted"] = scorer.about()
    report["versions"]["torch"] = torch.__version__
    output = Path(output)
    # The numbers first: they stay if a picture fails.
    write_report(report, output / "report.json")
    identity = identity or {"val": identity_of(id_outputs.labels)} | {
        name: identity_of(outputs.labels) for name, outputs in ood_outputs.items()
    }
    if scaling is not None:
        # Another seed or share leaves other samples.
        identity = {**identity, "val": f"{identity['val']} without {scaling['held_out']}, seed {seed}"}
    predictions = {name: Predictions.of(outputs) for name, outputs in {"val": id_outputs, **ood_outputs}.items()}
    write_samples(Samples(id_outputs.right, id_scores, ood_scores, identity, predictions), output / samples.FILE)
    plots.risk_coverage(output / "risk_coverage.png", id_outputs.right, id_scores, ood_scores, mix, seed, title)
    plots.confidence_histogram(output / "confidence_histogram.png", id_outputs.right, id_scores, ood_scores, title)
    return report


def _divided(outputs: Outputs, temperature: float) -> Outputs:
    return dataclasses.replace(outputs, logits=outputs.logits / temperature)


def _scaled_on_held_out(outputs: Outputs, share: float, seed: int) -> tuple[Outputs, dict[str, Any]]:
    """The samples that are not held out, their logits divided by the temperature, and an account of it."""
    fit, rest = held_out(len(outputs.labels), share, seed)
    value = fit_temperature(outputs.logits[fit], outputs.labels[fit])
    features = None if outputs.features is None else outputs.features[rest]
    kept = Outputs(outputs.logits[rest], features, outputs.labels[rest])
    before = calibration_metrics(kept.logits, kept.labels)
    scaling = {"value": value, "held_out": len(fit), "evaluated": len(rest), "seed": seed, "calibration_before": before}
    return _divided(kept, value), scaling


def evaluate_run(
    run_dir: str | Path,
    output: str | Path | None = None,
    *,
    checkpoint: Literal["best", "last"] = "best",
    batch_size: int = 256,
    device: str = "cpu",
    ranks: Ranks | None = None,
    amp: str | None = None,
    fast: bool = False,
    cache: str | Path | None = None,
    scores: Sequence[str] = DEFAULT_SCORES,
    ood: Mapping[str, str] | None = None,
    shifts: Mapping[str, str] | None = None,
    typicalness: bool = True,
    **options: Any,
) -> Report | None:
    """Report on a run of ``python -m tal_fast.train``.

    Args:
        run_dir: the run's folder.
        output: where to write; the run's folder unless given.
        checkpoint: ``best`` or ``last``.
        batch_size, device: of the pass over the images.
        ranks: this process among those that share the passes; its device then counts, not ``device``.
        amp: ``bfloat16`` or ``float16``: autocast of the network.
        fast: only scores over logits; features are not kept.
        cache: folder of the outputs; ``eval-cache`` in the run's unless given.
        scores: names of scores; that by which the run's method is judged is added.
        ood: OOD sets beside the data set's own, name -> text as in ``tal_fast.data.evaluation_sets``.
        shifts: shifted sets, likewise.
        typicalness: see ``tal_fast.html_report.write_html``.
        options: ``mix``, ``seed``, ``convention``, ``knn_samples``, ``temperature``, ``resamples`` of
            ``evaluate_outputs``.

    Returns:
        The report; None on ranks other than 0.

    Raises:
        ValueError: no run or checkpoint there, its data gone, or outputs that are not finite.
    """
    from tal_fast.runs import load_run

    ranks = ranks or Ranks(0, 1, torch.device(device))
    names = check_scores(scores)
    run = load_run(run_dir, checkpoint=checkpoint, device=ranks.device)
    names = check_scores([*names, run.score])
    cache = Path(run_dir) / CACHE / run.checkpoint.stem if cache is None else cache
    inference = inference_of(run, cache, ranks=ranks, batch_size=batch_size, amp=amp, features=not fast)
    about = {
        "run": str(run_dir),
        "checkpoint": run.checkpoint.stem,
        "epoch": run.epoch,
        "method": run.method,
        "score": run.score,
        **_how(amp),
    }
    output = run_dir if output is None else output
    report = _evaluate_model(
        inference,
        output,
        _logit_scores(names) if fast else names,
        ood=ood,
        shifts=shifts,
        about=about,
        title=f"{run.method} ({Path(run_dir).name})",
        **options,
    )
    if report is not None:
        write_html(output, run=run, typicalness=typicalness, batch_size=batch_size, device=ranks.device)
    return report


def evaluate_weights(
    weights: str | Path,
    model: ModelConfig,
    data: DataConfig,
    output: str | Path | None = None,
    *,
    batch_size: int = 256,
    device: str = "cpu",
    ranks: Ranks | None = None,
    amp: str | None = None,
    fast: bool = False,
    cache: str | Path | None = None,
    scores: Sequence[str] = DEFAULT_SCORES,
    ood: Mapping[str, str] | None = None,
    shifts: Mapping[str, str] | None = None,
    **options: Any,
) -> Report | None:
    """Report on a network's weights from anywhere.

    Args:
        weights: the file, see ``tal_fast.weights``.
        model: the network they are for.
        data: what to evaluate on, and how images are read; a ``folder`` needs ``train/`` for scores that are fitted on
            training features only.
        output: where to write; a folder named after the file, beside it, unless given.
        cache: folder of the outputs; ``eval-cache`` in ``output`` unless given.
        batch_size, device, ranks, amp, fast, scores, ood, shifts, options: as for ``evaluate_run``.

    Returns:
        The report; None on ranks other than 0.

    Raises:
        ValueError: weights or data that cannot be read or do not fit, or outputs that are not finite.
    """
    from tal_fast.weights import PRETRAINED, evaluation_data, load_weights

    ranks = ranks or Ranks(0, 1, torch.device(device))
    names = check_scores(scores)
    bundle = evaluation_data(data)
    network = load_weights(weights, model, bundle)
    if output is None:
        is_file = str(weights) != PRETRAINED
        stem = Path(weights).stem if is_file else f"{model.name}-{PRETRAINED}".replace("/", "-")
        output = (Path(weights).parent if is_file else Path()) / f"{stem}-report"
    inference = Inference(
        network,
        bundle,
        Path(output) / CACHE if cache is None else cache,
        ranks=ranks,
        batch_size=batch_size,
        amp=amp,
        features=not fast,
    )
    report = _evaluate_model(
        inference,
        output,
        _logit_scores(names) if fast else names,
        ood=ood,
        shifts=shifts,
        about={"weights": str(weights), "model": model.name, **_how(amp)},
        title=f"{model.name} ({Path(weights).name})",
        **options,
    )
    if report is not None:
        write_html(output)
    return report


def _how(amp: str | None) -> dict[str, str]:
    return {} if amp is None else {"amp": amp}


def _logit_scores(names: Sequence[str]) -> list[str]:
    """Those of the names that need no features.

    Raises:
        ValueError: there are none.
    """
    found = [name for name in names if name in SCORES]
    if not found:
        raise ValueError(f"--fast keeps to scores over logits but {names[0]} is over features; leave --fast out")
    return found


def evaluate_npz(path: str | Path, output: str | Path | None = None, **options: Any) -> Report:
    """Report on outputs of any model; see ``tal_fast.npz`` for the file and ``evaluate_outputs`` for the options.

    Args:
        path: the ``.npz``.
        output: where to write; a folder named after the file, beside it, unless given.
    """
    path = Path(path)
    content = read_npz(path)
    output = path.with_name(path.stem + "-report") if output is None else output
    report = evaluate_outputs(
        content.id,
        content.ood,
        output,
        shift_outputs=content.shifts,
        training=content.training,
        about={"npz": str(path)},
        title=path.name,
        **options,
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tal_fast.evaluate",
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
_OF_WEIGHTS = (
    "model", "width", "data_dir", "dataset", "image_size", "crop_fraction", "mean", "std", "channels", "loader",
    "workers",
)  # fmt: skip
_OF_PASSES = ("ood", "shift", "batch_size", "device", "amp", "fast", "cache")


def _check_source(args: argparse.Namespace) -> None:
    """Refuse an option that would be passed over.

    Raises:
        ValueError: names it.
    """
    foreign = {"run": _OF_WEIGHTS, "weights": _OF_RUN, "npz": (*_OF_RUN, *_OF_WEIGHTS, *_OF_PASSES)}
    source = next(name for name in foreign if getattr(args, name) is not None)
    for name in foreign[source]:
        if getattr(args, name) not in (None, [], False):
            raise ValueError(f"--{name.replace('_', '-')} does not go with --{source}; leave it out")
    if source == "weights":
        if args.model is None:
            raise ValueError("--weights needs --model NAME, the network they are for")
        if args.data_dir is None and args.dataset is None:
            raise ValueError("--weights needs --data-dir DIR, which holds val/CLASS/*, or --dataset")


def _data_config(args: argparse.Namespace) -> DataConfig:
    from tal_fast.weights import preprocessing

    dataset = args.dataset or "folder"
    given = {key: getattr(args, key) for key in ("image_size", "mean", "std", "crop_fraction", "channels")}
    fields = preprocessing(args.model, given)
    fields |= {key: getattr(args, key) for key in ("loader", "workers") if getattr(args, key) is not None}
    # Training's random boxes are for image files only; an evaluation makes none.
    config = Config.from_dict({"data": {"dataset": dataset, "root": args.data_dir, "crop_area": None, **fields}})
    return config.data


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
    try:
        _check_source(args)
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
        return evaluate_npz(args.npz, args.output, **options)
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
        return evaluate_weights(args.weights, model, _data_config(args), args.output, ranks=ranks, **options)
    finally:
        ranks.stop()


def _start_ranks(device: str) -> Ranks:
    """The processes torchrun started, or this one alone on the device of that name."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return Ranks.start(device)
    return Ranks(0, 1, torch.device(choose_device(device)))


if __name__ == "__main__":
    sys.exit(main())
