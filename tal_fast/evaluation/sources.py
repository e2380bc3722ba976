"""Evaluation of a training run, of weights from a file, or of saved outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tal_fast.config.schema import DataConfig, ModelConfig
from tal_fast.data.corruptions import Corruption
from tal_fast.data.datasets import DataBundle, Split
from tal_fast.data.ood import ood_set, shift_set
from tal_fast.evaluation.evaluation import Evaluation, write_evaluation
from tal_fast.evaluation.galleries import add_galleries
from tal_fast.evaluation.html.page import write_html
from tal_fast.evaluation.npz import read_npz
from tal_fast.evaluation.pipeline import EvaluationInputs, EvaluationOptions, check_set_names, evaluate_outputs
from tal_fast.evaluation.plots import write_plots
from tal_fast.evaluation.predictions import CACHE, Inference, split_hash
from tal_fast.evaluation.score_selection import check_scores, without_feature_scores
from tal_fast.models.features import last_layer
from tal_fast.models.pretrained import PRETRAINED, evaluation_data, load_weights
from tal_fast.runs.load import load_run
from tal_fast.scores.features import FEATURE_SCORES, Training, training_needed
from tal_fast.utils.distributed import Ranks


@dataclass(frozen=True)
class PassOptions:
    """Options of the passes of a model over images.

    Attributes:
        ood: OOD sets beside those of the run, name -> specification as in ``tal_fast.data.ood``.
        shifts: shifted sets, likewise.
        batch_size: images per step on each rank.
        amp: ``bfloat16`` or ``float16`` for autocast of the network.
        fast: compute logit scores only, and keep no features.
        cache: folder of the cached outputs; default ``eval-cache`` in the run's folder or in the output folder.
        ranks: this process among those that share the passes.
    """

    ood: Mapping[str, str] = field(default_factory=dict)
    shifts: Mapping[str, str] = field(default_factory=dict)
    batch_size: int = 256
    amp: str | None = None
    fast: bool = False
    cache: str | Path | None = None
    ranks: Ranks = field(default_factory=lambda: Ranks(0, 1, torch.device("cpu")))


def evaluate_run(
    run_dir: str | Path,
    output: str | Path | None = None,
    *,
    checkpoint: Literal["best", "last"] = "best",
    typicalness: bool = True,
    passes: PassOptions | None = None,
    options: EvaluationOptions | None = None,
) -> Evaluation | None:
    """Evaluate a run of ``python -m tal_fast.train`` and write its report.

    Args:
        run_dir: the run's folder.
        output: folder of the report; default the run's folder.
        checkpoint: ``best`` or ``last``.
        typicalness: show the most and the least typical training images of a TAL run in the HTML report, which takes a
            pass over all of them.
        passes: options of the passes over the images.
        options: options of the evaluation; the score that the run's method is judged by is added to its scores.

    Returns:
        The evaluation; None on ranks other than 0.

    Raises:
        ValueError: the run, its checkpoint or its data are missing, or an output is not finite.
    """
    passes, options = passes or PassOptions(), options or EvaluationOptions()
    scores = check_scores(options.scores)
    run = load_run(run_dir, checkpoint=checkpoint, device=passes.ranks.device)
    options = dataclasses.replace(options, scores=check_scores([*scores, run.score]))
    cache = Path(run_dir) / CACHE / run.checkpoint.stem if passes.cache is None else passes.cache
    inference = Inference.from_run(run, cache, **_inference_options(passes))
    provenance = {
        "run": str(run_dir),
        "checkpoint": run.checkpoint.stem,
        "epoch": run.epoch,
        "method": run.method,
        "score": run.score,
    }
    evaluation = _evaluate_model(inference, passes, options, provenance)
    if evaluation is None:
        return None
    output = run_dir if output is None else output
    write_evaluation(evaluation, output)  # the numbers are kept if anything below fails
    evaluation = add_galleries(
        evaluation, run, typicalness=typicalness, batch_size=passes.batch_size, device=passes.ranks.device
    )
    write_plots(evaluation, output)
    write_html(evaluation, output)
    return evaluation


def evaluate_weights(
    weights: str | Path,
    model: ModelConfig,
    data: DataConfig,
    output: str | Path | None = None,
    *,
    interpolation: str = "bilinear",
    passes: PassOptions | None = None,
    options: EvaluationOptions | None = None,
) -> Evaluation | None:
    """Evaluate a network's weights from a file and write their report.

    Args:
        weights: the file, or ``pretrained``, see ``tal_fast.models.pretrained``.
        model: the network they are for.
        data: data set and preprocessing; a ``folder`` needs ``train/`` only for scores fitted on training features.
        output: folder of the report; default ``default_output``.
        interpolation: filter that images are resized with, ``bilinear`` or ``bicubic``.
        passes, options: as for ``evaluate_run``.

    Returns:
        The evaluation; None on ranks other than 0.

    Raises:
        ValueError: weights or data cannot be read or do not fit, or an output is not finite.
    """
    passes, options = passes or PassOptions(), options or EvaluationOptions()
    options = dataclasses.replace(options, scores=check_scores(options.scores))
    bundle = evaluation_data(data, interpolation)
    network = load_weights(weights, model, bundle)
    output = default_output(weights, model.name) if output is None else output
    cache = Path(output) / CACHE if passes.cache is None else passes.cache
    inference = Inference(network, bundle, cache, **_inference_options(passes))
    provenance = {"weights": str(weights), "model": model.name, "images": _preprocessing(bundle)}
    evaluation = _evaluate_model(inference, passes, options, provenance)
    return None if evaluation is None else _write(evaluation, output)


def evaluate_npz(
    path: str | Path, output: str | Path | None = None, options: EvaluationOptions | None = None
) -> Evaluation:
    """Evaluate saved outputs of any model and write their report.

    Args:
        path: the file, see ``tal_fast.evaluation.npz``.
        output: folder of the report; default ``default_output``.
        options: options of the evaluation.

    Raises:
        ValueError: the file cannot be read, or its arrays do not fit.
    """
    evaluation = evaluate_outputs(read_npz(path), options, {"npz": str(path)})
    return _write(evaluation, default_output(path) if output is None else output)


def default_output(path: str | Path, model: str = "") -> Path:
    """Folder of the report of an ``.npz`` or of weights: named after the file, beside it."""
    if str(path) == PRETRAINED:
        return Path(f"{model}-{PRETRAINED}-report".replace("/", "-"))
    return Path(path).with_name(f"{Path(path).stem}-report")


def _write(evaluation: Evaluation, output: str | Path) -> Evaluation:
    write_evaluation(evaluation, output)
    evaluation = add_galleries(evaluation, None)
    write_plots(evaluation, output)
    write_html(evaluation, output)
    return evaluation


def _inference_options(passes: PassOptions) -> dict[str, Any]:
    return {
        "ranks": passes.ranks, "batch_size": passes.batch_size, "amp": passes.amp, "features": not passes.fast,
    }  # fmt: skip


def _preprocessing(data: DataBundle) -> dict[str, Any]:
    """How images are preprocessed, for the report."""
    mean, std = data.config.normalization()
    entry = {"image_size": data.image_size, "interpolation": data.interpolation, "mean": mean, "std": std}
    # Images in memory are resized whole.
    return entry if data.loader_name == "memory" else {**entry, "crop_fraction": data.config.crop_fraction}


def _named_sets(
    data: DataBundle, passes: PassOptions
) -> tuple[dict[str, Split], dict[str, tuple[Split, Corruption | None]]]:
    """OOD sets by name, those of the data set first, and shifted sets.

    Raises:
        ValueError: a name is taken, or a set cannot be read.
    """
    check_set_names(passes.ood)
    ood = {name: data.split(name) for name in data.ood_names}
    for name, spec in passes.ood.items():
        if name in ood:
            raise ValueError(f"the data set has an OOD set {name!r} already; choose another name")
        ood[name] = ood_set(spec, data.image_size, data.channels)
    shifts = {
        name: shift_set(spec, data.class_names, data.split("val"), data.channels)
        for name, spec in passes.shifts.items()
    }
    return ood, shifts


def _evaluate_model(
    inference: Inference, passes: PassOptions, options: EvaluationOptions, provenance: dict[str, Any]
) -> Evaluation | None:
    """Run a model over all splits and evaluate its outputs; None on ranks other than 0."""
    if passes.fast:
        options = dataclasses.replace(options, scores=without_feature_scores(options.scores))
    if passes.amp is not None:
        provenance["amp"] = passes.amp
    data = inference.data
    ood, shifts = _named_sets(data, passes)
    id_store = inference.store("val")
    # The prefixes keep sets that are called val or train-eval apart from those splits.
    ood_stores = {name: inference.store(f"ood-{name}", images) for name, images in ood.items()}
    shift_stores = {
        name: inference.store(f"shift-{name}", images, corruption) for name, (images, corruption) in shifts.items()
    }
    train_store = None
    needs_training = any(name in FEATURE_SCORES and training_needed(name) for name in options.scores)
    if needs_training and len(data.split("train-eval")):
        train_store = inference.store("train-eval")
    if not inference.ranks.is_main:
        return None
    training = None
    if train_store is not None:
        training = Training(train_store.features(), train_store.column("labels"), *last_layer(inference.model))
    inputs = EvaluationInputs(
        id_store.load(),
        {name: store.load() for name, store in ood_stores.items()},
        {name: store.load() for name, store in shift_stores.items()},
        training,
        identity={
            "val": split_hash(data.split("val")),
            **{name: split_hash(images) for name, images in ood.items()},
            **{f"shift/{name}": f"{split_hash(images)} {corruption}" for name, (images, corruption) in shifts.items()},
        },
        corrupted=[name for name, (_, corruption) in shifts.items() if corruption is not None],
    )
    return evaluate_outputs(inputs, options, provenance)
