"""Evaluation of a training run, of weights from a file, or of saved outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tal_fast.config.names import ENSEMBLE_SCORES, FITTED_SCORES, LOGIT_SCORES, is_own_score
from tal_fast.config.schema import DataConfig, ModelConfig
from tal_fast.data.build import build_data
from tal_fast.data.corruptions import Corruption
from tal_fast.data.datasets import DataBundle, Split
from tal_fast.data.digest import split_hash
from tal_fast.data.ood import ood_set, set_named, shift_set
from tal_fast.evaluation.ensemble import combine
from tal_fast.evaluation.evaluation import Evaluation, write_evaluation
from tal_fast.evaluation.galleries import add_galleries
from tal_fast.evaluation.html.page import FILE as HTML_FILE
from tal_fast.evaluation.html.page import write_html
from tal_fast.evaluation.npz import read_npz
from tal_fast.evaluation.pipeline import EvaluationInputs, check_set_names, evaluate_outputs
from tal_fast.evaluation.plots import FILES as PLOT_FILES
from tal_fast.evaluation.plots import write_plots
from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.evaluation.sample_scores import identity_of
from tal_fast.models.features import last_layer
from tal_fast.models.pretrained import PRETRAINED, load_weights
from tal_fast.runs.load import Run, load_run
from tal_fast.runs.predictions import CACHE, Inference, PassOptions, weights_hash
from tal_fast.scores.features import Training, training_needed
from tal_fast.utils.io import check_writable
from tal_fast.utils.locks import alone_in

_WITHOUT_FEATURES = (*LOGIT_SCORES, *FITTED_SCORES, *ENSEMBLE_SCORES)


def evaluate_run(
    run_dir: str | Path, output: str | Path | None = None, *, checkpoint: Literal["best", "last"] = "best",
    typicalness: bool = True, ood: Mapping[str, str] | None = None, shifts: Mapping[str, str] | None = None,
    cache: str | Path | None = None, passes: PassOptions | None = None, options: EvaluationOptions | None = None,
) -> Evaluation | None:  # fmt: skip
    """Evaluate a run of ``python -m tal_fast.train`` and write its report.

    Args:
        run_dir: the run's folder.
        output: folder of the report; default the run's folder.
        checkpoint: ``best`` or ``last``.
        typicalness: show the most and the least typical training images of a TAL run in the HTML report, which takes a
            pass over all of them.
        ood: OOD sets beside those of the run, name -> specification as in ``tal_fast.data.ood``.
        shifts: shifted sets, likewise.
        cache: folder of the cached outputs; default ``eval-cache`` in the run's folder.
        passes: options of the passes over the images; without features only logit scores are computed.
        options: options of the evaluation; the score that the run's method is judged by is added to its scores.

    Returns:
        The evaluation; None on ranks other than 0.
    """
    passes, options = passes or PassOptions(), options or EvaluationOptions()
    run = load_run(run_dir, checkpoint=checkpoint, device=passes.ranks.device)
    options = dataclasses.replace(options, scores=[*options.scores, run.score])
    cache = Path(run_dir) / CACHE / run.checkpoint.stem if cache is None else cache
    provenance = {
        "run": str(run_dir), "checkpoint": run.checkpoint.stem, "epoch": run.epoch, "method": run.method,
        "score": run.score, "weights_sha256": weights_hash(run.model), "config": run.config.to_dict(),
    }  # fmt: skip
    output = run_dir if output is None else output
    passes.ranks.on_main(lambda: check_writable(output))
    inference = run.inference(cache, passes)
    evaluation = _evaluate_model(inference, ood or {}, shifts or {}, options, provenance)
    if evaluation is None:
        return None
    pass_options = {"typicalness": typicalness, "batch_size": passes.batch_size, "device": passes.ranks.device}
    return _write(evaluation, output, run, **pass_options)


def evaluate_weights(
    weights: str | Path, model: ModelConfig, data: DataConfig, output: str | Path | None = None, *,
    weights_key: str | None = None, ood: Mapping[str, str] | None = None, shifts: Mapping[str, str] | None = None,
    cache: str | Path | None = None, passes: PassOptions | None = None, options: EvaluationOptions | None = None,
) -> Evaluation | None:  # fmt: skip
    """Evaluate a network's weights from a file and write their report; arguments and result as for ``evaluate_run``.

    Args:
        weights: the file, or ``pretrained``, see ``tal_fast.models.pretrained``.
        model: the network they are for.
        data: data set and preprocessing; a ``folder`` needs ``train/`` only for scores fitted on training features.
        output: folder of the report and of the cache; default ``default_output``.
        weights_key: key of the weights in a checkpoint, see ``tal_fast.models.weight_files``.
    """
    bundle = build_data(data, training=False)
    network, key = load_weights(weights, model, bundle, weights_key)
    output = default_output(weights, model.name) if output is None else output
    provenance = {
        "weights": str(weights), "weights_key": key, "weights_sha256": weights_hash(network), "model": model.name,
        "images": _preprocessing(bundle),
    }  # fmt: skip
    passes = passes or PassOptions()
    passes.ranks.on_main(lambda: check_writable(output))
    inference = Inference(network, bundle, Path(output) / CACHE if cache is None else cache, passes)
    evaluation = _evaluate_model(inference, ood or {}, shifts or {}, options or EvaluationOptions(), provenance)
    return None if evaluation is None else _write(evaluation, output)


def evaluate_npz(
    path: str | Path, output: str | Path | None = None, options: EvaluationOptions | None = None
) -> Evaluation:
    """Evaluate saved outputs of any model, see ``tal_fast.evaluation.npz``, and write their report."""
    inputs = read_npz(path)
    output = default_output(path) if output is None else output
    check_writable(output)
    return _write(evaluate_outputs(inputs, options, {"npz": str(path)}), output)


def evaluate_ensemble(
    members: Sequence[str], output: str | Path, *, checkpoint: Literal["best", "last"] = "best",
    ood: Mapping[str, str] | None = None, shifts: Mapping[str, str] | None = None,
    passes: PassOptions | None = None, options: EvaluationOptions | None = None,
) -> Evaluation | None:  # fmt: skip
    """Evaluate runs, or ``.npz`` files, as one model, with the scores of ``combine``; the rest as ``evaluate_run``."""
    passes, options = dataclasses.replace(passes or PassOptions(), features=False), options or EvaluationOptions()
    inputs: list[Any] = []
    for member in members:
        if member.endswith(".npz"):
            inputs.append(read_npz(member))
            continue
        run = load_run(member, checkpoint=checkpoint, device=passes.ranks.device)
        inference = run.inference(Path(member) / CACHE / run.checkpoint.stem, passes)
        inputs.append(_model_inputs(inference, ood or {}, shifts or {}))
    if not passes.ranks.is_main:
        return None
    check_writable(output)
    provenance = {"ensemble": list(members), "outputs_sha256": [identity_of(member.id.logits) for member in inputs]}
    if len(set(provenance["outputs_sha256"])) < max(2, len(members)):
        raise ValueError("an ensemble needs two members or more, each with outputs of its own")
    options = dataclasses.replace(options, scores=[*options.scores, *ENSEMBLE_SCORES])
    return _write(evaluate_outputs(combine(inputs), options, provenance), output)


def default_output(path: str | Path, model: str = "") -> Path:
    """Folder of the report of an ``.npz`` or of weights: named after the file, beside it."""
    if str(path) == PRETRAINED:
        return Path(f"{model}-{PRETRAINED}-report".replace("/", "-"))
    return Path(path).with_name(f"{Path(path).stem}-report")


def _write(evaluation: Evaluation, output: str | Path, run: Run | None = None, **options: Any) -> Evaluation:
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder, f"another evaluation writes its report to {folder}; waiting for it"):
        for name in (HTML_FILE, *PLOT_FILES):  # so that no page of an earlier evaluation stays beside the new numbers
            (folder / name).unlink(missing_ok=True)
        write_evaluation(evaluation, folder)  # the numbers are kept if anything below fails
        evaluation = add_galleries(evaluation, run, **options)
        write_plots(evaluation, folder)
        write_html(evaluation, folder)
    return evaluation


def _preprocessing(data: DataBundle) -> dict[str, Any]:
    """Report entry for the preprocessing of the images."""
    mean, std = data.config.normalization()
    entry = {"image_size": data.image_size, "interpolation": data.config.resampling, "mean": mean, "std": std}
    # Images in memory are resized whole.
    return entry if data.loader_name == "memory" else {**entry, "crop_fraction": data.config.central_crop}


def _ood_splits(data: DataBundle, specs: Mapping[str, str]) -> dict[str, Split]:
    """OOD sets by name, those of the data set first."""
    check_set_names(specs)
    splits = {name: data.split(name) for name in data.ood_names}
    for name, spec in specs.items():
        if name in splits:
            raise ValueError(f"the data set has an OOD set {name!r} already; choose another name")
        with set_named(name):
            splits[name] = ood_set(spec, data.image_size, data.channels)
    return splits


def _shift_splits(data: DataBundle, specs: Mapping[str, str]) -> dict[str, tuple[Split, Corruption | None]]:
    """Shifted sets by name, each with its corruption."""
    splits = {}
    for name, spec in specs.items():
        with set_named(name):
            splits[name] = shift_set(spec, data.class_names, data.split("val"), data.channels)
    return splits


def check_sets(data: DataConfig, ood: Mapping[str, str], shifts: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Names of the OOD sets and of the shifted sets that a run of this data is evaluated on.

    Raises the ValueError that the evaluation would end in.
    """
    bundle = build_data(data)
    return [*_ood_splits(bundle, ood)], [*_shift_splits(bundle, shifts)]


def _evaluate_model(
    inference: Inference,
    ood_specs: Mapping[str, str],
    shift_specs: Mapping[str, str],
    options: EvaluationOptions,
    provenance: dict[str, Any],
) -> Evaluation | None:
    """Run a model over all splits and evaluate its outputs; None on ranks other than 0."""
    passes = inference.options
    if not passes.features:
        scores = [name for name in options.scores if name in _WITHOUT_FEATURES or is_own_score(name)]
        if not scores:
            raise ValueError(f"{options.scores[0]} is a feature score, but --fast keeps no features; leave --fast out")
        options = dataclasses.replace(options, scores=scores)
    if passes.amp is not None:
        provenance["amp"] = passes.amp
    over_features = [name for name in options.scores if name not in _WITHOUT_FEATURES and not is_own_score(name)]
    needs_training = any(map(training_needed, over_features))
    inputs = _model_inputs(inference, ood_specs, shift_specs, needs_training)
    return None if inputs is None else evaluate_outputs(inputs, options, provenance)


def _model_inputs(
    inference: Inference, ood_specs: Mapping[str, str], shift_specs: Mapping[str, str], needs_training: bool = False
) -> EvaluationInputs | None:
    """Outputs of a model on all splits; None on ranks other than 0."""
    data = inference.data
    ood, shifts = _ood_splits(data, ood_specs), _shift_splits(data, shift_specs)
    id_store = inference.store("val")
    # The prefixes keep sets that are called val or train-eval apart from those splits.
    ood_stores = {name: inference.store(f"ood-{name}", images) for name, images in ood.items()}
    shift_stores = {
        name: inference.store(f"shift-{name}", images, corruption) for name, (images, corruption) in shifts.items()
    }
    train_store = inference.store("train-eval") if needs_training and len(data.split("train-eval")) else None
    if not inference.options.ranks.is_main:
        return None
    training = None
    if train_store is not None:
        labels = train_store.columns("labels")["labels"]
        training = Training(train_store, labels, *last_layer(inference.model))
    return EvaluationInputs(
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
