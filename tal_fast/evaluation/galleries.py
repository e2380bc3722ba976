"""Images worth looking at: confident mistakes, unconfident hits, confident OOD images, typical training images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tal_fast.data.digest import split_hash
from tal_fast.evaluation.evaluation import Evaluation, Gallery, GalleryImages
from tal_fast.evaluation.sample_scores import Samples
from tal_fast.evaluation.tables import printable
from tal_fast.evaluation.train_typicalness import training_typicalness
from tal_fast.methods import method_class
from tal_fast.methods.tal import TAL
from tal_fast.runs.checkpoint import FOLDER as CHECKPOINTS
from tal_fast.runs.load import Run, load_run
from tal_fast.runs.predictions import CACHE, weights_hash
from tal_fast.utils.arrays import Floats, Ints

GALLERY_SIZE = 24
"""Images per gallery."""
OOD_GALLERY_SIZE = 12
"""Images per gallery of an OOD set."""
ALL_OOD_IMAGES = 240
"""Images of all OOD sets together, so that the page stays below about 4 MB."""


def largest(values: Floats, among: NDArray[np.bool_] | bool = True, count: int = GALLERY_SIZE) -> Ints:
    """Indices of the largest finite values where ``among`` holds, descending; the first of equal ones first."""
    index = np.flatnonzero(among & np.isfinite(values))
    return index[np.argsort(-values[index], kind="stable")][:count]


def confidence_galleries(samples: Samples, score: str) -> list[Gallery]:
    """Choose the most confident mistakes, the least confident hits and the most confident images of each OOD set."""
    values, correct = samples.id_scores[score], samples.predictions["val"].correct
    mistakes, hits = largest(values, ~correct), largest(-values, correct)
    galleries = [Gallery("mistakes", "val", mistakes), Gallery("correct", "val", hits)]
    size = max(1, min(OOD_GALLERY_SIZE, ALL_OOD_IMAGES // max(1, len(samples.ood_scores))))
    for name, scores in samples.ood_scores.items():
        galleries.append(Gallery("ood", name, largest(scores[score], count=size)))
    return galleries


def find_galleries(evaluation: Evaluation, folder: Path, **options: Any) -> Evaluation:
    """Add the galleries of an evaluation that was read from ``folder``, if its run is still there."""
    report = evaluation.report
    if "run" not in report:
        return add_galleries(evaluation, None)
    run_dir = folder if (folder / CHECKPOINTS).is_dir() else report["run"]
    try:
        run = load_run(run_dir, report["checkpoint"], options.get("device", "cpu"))
    except (ValueError, OSError) as error:
        return replace(evaluation, notes=(f"No images: {error}.",))
    if report.get("weights_sha256", "") not in ("", weights_hash(run.model)):
        return replace(
            evaluation, notes=(f"No images: {run.checkpoint} has changed since the evaluation; evaluate it again.",)
        )
    return add_galleries(evaluation, run, **options)


def add_galleries(
    evaluation: Evaluation,
    run: Run | None,
    *,
    typicalness: bool = True,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Choose the images of an evaluation for display: ``galleries``, ``images``, ``typicalness`` and ``notes``.

    ``run`` is None for weights and saved outputs, whose images are not known. The typicalness of a TAL run's training
    images takes a pass over all of them, with ``batch_size`` and ``device``, unless it is cached.
    """
    if run is None:
        return replace(evaluation, notes=("No images: they are known for training runs only.",))
    samples = evaluation.samples
    try:
        fit = evaluation.report.get("temperature") or evaluation.report.get("fitted_scores", {})
        images = _images_of(run, samples, fit.get("held_out", 0))
    except (ValueError, OSError) as error:
        return replace(evaluation, notes=(f"No images: {error}.",))
    galleries = [g for g in confidence_galleries(samples, evaluation.primary_score) if g.split in images.splits]
    notes = [
        f"No images of {printable(name)}: only the evaluation itself knows where they are."
        for name in samples.ood_scores
        if name not in images.splits
    ]
    measured = None
    if not issubclass(method_class(run.config.method.name), TAL):
        notes.append("No typicalness: only runs trained with TAL keep the queue that it is measured by.")
    elif not typicalness:
        notes.append("No typicalness: the pass over the training images was left out.")
    else:
        try:
            cache = run.checkpoint.parents[1] / CACHE / run.checkpoint.stem
            measured = training_typicalness(run, cache, batch_size=batch_size, device=device)
            images = replace(images, splits={**images.splits, "train-eval": run.data.split("train-eval")})
            # Distances differ where the typicalness rounds to the same number.
            galleries.append(Gallery("least_typical", "train-eval", largest(measured.distance)))
            galleries.append(Gallery("most_typical", "train-eval", largest(-measured.distance)))
        except (ValueError, OSError) as error:
            notes.append(f"No typicalness: {error}.")
    return replace(evaluation, galleries=tuple(galleries), images=images, typicalness=measured, notes=tuple(notes))


def _images_of(run: Run, samples: Samples, held_out: int) -> GalleryImages:
    """Images of the evaluated splits; a ValueError if a split has other images than at the evaluation."""
    splits = {name: run.data.split(name) for name in samples.predictions if name in ("val", *run.data.ood_names)}
    for name, split in splits.items():
        evaluated = len(samples.predictions[name]) + (held_out if name == "val" else 0)
        if len(split) != evaluated:
            raise ValueError(f"{name} has {len(split)} images now and had {evaluated}")
        if samples.identity.get(name, "").partition(" ")[0] not in ("", split_hash(split)):
            raise ValueError(f"the images of {name} have changed since the evaluation")
    return GalleryImages(splits, run.data.class_names, run.data.channels)
