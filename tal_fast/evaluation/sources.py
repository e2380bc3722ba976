"""The three ways in: a run of the trainer, weights from anywhere, outputs of any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from tal_fast.config.schema import DataConfig, ModelConfig
from tal_fast.data.corruptions import Corruption
from tal_fast.data.datasets import DataBundle, Split
from tal_fast.data.ood import ood_set, shift_set
from tal_fast.evaluation.html import write_html
from tal_fast.evaluation.npz import read_npz
from tal_fast.evaluation.pipeline import check_names, evaluate_outputs
from tal_fast.evaluation.predictions import CACHE, Inference, inference_of, split_hash
from tal_fast.evaluation.report import Report
from tal_fast.evaluation.score_selection import DEFAULT_SCORES, check_scores, logit_scores
from tal_fast.models.features import last_layer
from tal_fast.scores.features import FEATURE_SCORES, Training, training_needed
from tal_fast.utils.distributed import Ranks


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
        ood: OOD sets beside the data set's own, name -> text as in ``tal_fast.data.ood``.
        shifts: shifted sets, likewise.
        typicalness: see ``tal_fast.html_report.write_html``.
        options: ``mix``, ``seed``, ``convention``, ``knn_samples``, ``temperature``, ``resamples`` of
            ``evaluate_outputs``.

    Returns:
        The report; None on ranks other than 0.

    Raises:
        ValueError: no run or checkpoint there, its data gone, or outputs that are not finite.
    """
    from tal_fast.runs.load import load_run

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
        logit_scores(names) if fast else names,
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
    interpolation: str = "bilinear",
    **options: Any,
) -> Report | None:
    """Report on a network's weights from anywhere.

    Args:
        weights: the file, see ``tal_fast.models.pretrained``.
        model: the network they are for.
        data: what to evaluate on, and how images are read; a ``folder`` needs ``train/`` for scores that are fitted on
            training features only.
        output: where to write; a folder named after the file, beside it, unless given.
        cache: folder of the outputs; ``eval-cache`` in ``output`` unless given.
        interpolation: that images are resized with: ``bilinear`` or ``bicubic``.
        batch_size, device, ranks, amp, fast, scores, ood, shifts, options: as for ``evaluate_run``.

    Returns:
        The report; None on ranks other than 0.

    Raises:
        ValueError: weights or data that cannot be read or do not fit, or outputs that are not finite.
    """
    from tal_fast.models.pretrained import PRETRAINED, evaluation_data, load_weights

    ranks = ranks or Ranks(0, 1, torch.device(device))
    names = check_scores(scores)
    bundle = evaluation_data(data, interpolation)
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
        logit_scores(names) if fast else names,
        ood=ood,
        shifts=shifts,
        about={"weights": str(weights), "model": model.name, "images": _images(bundle), **_how(amp)},
        title=f"{model.name} ({Path(weights).name})",
        **options,
    )
    if report is not None:
        write_html(output)
    return report


def _images(data: DataBundle) -> dict[str, Any]:
    """How images are made ready, for the report."""
    mean, std = data.config.normalization()
    found = {"image_size": data.image_size, "interpolation": data.interpolation, "mean": mean, "std": std}
    # Images in memory are resized whole.
    return found if data.loader_name == "memory" else {**found, "crop_fraction": data.config.crop_fraction}


def _how(amp: str | None) -> dict[str, str]:
    return {} if amp is None else {"amp": amp}


def evaluate_npz(path: str | Path, output: str | Path | None = None, **options: Any) -> Report:
    """Report on outputs of any model; see ``tal_fast.evaluation.npz`` for the file and ``evaluate_outputs`` for the options.

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


def _sets_beside(
    data: DataBundle, ood: Mapping[str, str], shifts: Mapping[str, str]
) -> tuple[dict[str, Split], dict[str, tuple[Split, Corruption | None]]]:
    """OOD sets by name, the data set's own first, and shifted sets.

    Raises:
        ValueError: a name that is taken, or a set that cannot be read.
    """
    check_names(ood)
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
        corrupted=[name for name, (_, corruption) in shifted.items() if corruption is not None],
        identity={
            "val": split_hash(data.split("val")),
            **{name: split_hash(images) for name, images in oods.items()},
            **{f"shift/{name}": f"{split_hash(images)} {corruption}" for name, (images, corruption) in shifted.items()},
        },
        **options,
    )
