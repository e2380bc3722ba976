"""Galleries of an evaluation as small images with captions that a page carries in itself."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tal_fast.data.datasets import MemoryImages
from tal_fast.evaluation.evaluation import Evaluation, Gallery, GalleryImages
from tal_fast.evaluation.tables import printable
from tal_fast.evaluation.train_typicalness import TrainTypicalness

THUMBNAIL_SIDE = 112
"""Longest side of a thumbnail in pixels; images of at most this size are shown pixel by pixel."""


@dataclass(frozen=True)
class Tile:
    """An image with its caption."""

    image: str  # data URI; empty if the image cannot be read
    width: int  # of the thumbnail in pixels
    height: int
    alt: str
    lines: tuple[str, ...]
    name: str  # file name, or split and position for images in memory
    problem: str = ""  # why there is no image


@dataclass(frozen=True)
class GallerySection:
    """Tiles under a heading."""

    title: str
    note: str  # what the images have in common and how they are ordered
    tiles: list[Tile]


def gallery_sections(evaluation: Evaluation) -> list[GallerySection]:
    """Sections of the page for the galleries of an evaluation."""
    sections = []
    for gallery in evaluation.galleries:
        assert evaluation.images is not None
        if gallery.split == "train-eval":
            assert evaluation.typicalness is not None
            sections.append(_typicalness_section(gallery, evaluation.images, evaluation.typicalness))
        else:
            sections.append(_confidence_section(gallery, evaluation, evaluation.images))
    return sections


def _confidence_section(gallery: Gallery, evaluation: Evaluation, images: GalleryImages) -> GallerySection:
    score, samples = evaluation.primary_score, evaluation.samples
    predictions = samples.predictions[gallery.split]
    values = samples.id_scores[score] if gallery.split == "val" else samples.ood_scores[gallery.split][score]
    tiles = []
    for i in map(int, gallery.chosen):
        predicted = _class_name(images, predictions.prediction[i])
        label = _class_name(images, predictions.label[i])
        confidence = [f"{score} {values[i]:.4g}"]
        if score != "msp":
            confidence.append(f"softmax {predictions.probability[i]:.1%}")
        alt, lines = {
            "mistakes": (f"{label} predicted as {predicted}", [f"predicted: {predicted}", f"label: {label}"]),
            "correct": (f"{label}, correctly classified", [f"label: {label}"]),
            "ood": (f"out-of-distribution image predicted as {predicted}", [f"predicted: {predicted}"]),
        }[gallery.kind]
        tiles.append(_tile(images, gallery.split, int(predictions.index[i]), alt, (*lines, *confidence)))
    total, correct = len(predictions), int(predictions.correct.sum())
    title, note = {
        "mistakes": (
            "Most confident mistakes",
            f"Misclassified validation images, largest {score} first; {total - correct:,} of {total:,} are incorrect.",
        ),
        "correct": (
            "Least confident hits",
            f"Correctly classified validation images, smallest {score} first; {correct:,} of {total:,} are correct.",
        ),
        "ood": (
            f"Most confident out-of-distribution: {printable(gallery.split)}",
            f"The {total:,} images of {printable(gallery.split)}, largest {score} first.",
        ),
    }[gallery.kind]
    return GallerySection(title, note, tiles)


def _typicalness_section(gallery: Gallery, images: GalleryImages, typicalness: TrainTypicalness) -> GallerySection:
    labels = images.splits[gallery.split].labels
    tiles = []
    for i in map(int, gallery.chosen):
        label, predicted = _class_name(images, labels[i]), _class_name(images, typicalness.prediction[i])
        lines = (
            f"label: {label}",
            "correct" if label == predicted else f"predicted: {predicted}",
            f"τ {typicalness.typicalness[i]:.4f}",
            f"distance {typicalness.distance[i]:.3g}",
        )
        alt = f"training image of {label}, typicalness {typicalness.typicalness[i]:.2f}"
        tiles.append(_tile(images, gallery.split, i, alt, lines))
    least = gallery.kind == "least_typical"
    return GallerySection(
        f"{'Least' if least else 'Most'} typical training images",
        f"τ = 1 − (d − min) / (max − min) over all {len(labels):,} training images, without augmentation; d is the "
        f"distance to the nearest of the {typicalness.queue_length:,} entries in the checkpoint's queue. "
        f"{'Farthest' if least else 'Nearest'} first.",
        tiles,
    )


def _class_name(images: GalleryImages, label: int) -> str:
    return printable(images.class_names[label]) if 0 <= label < len(images.class_names) else str(label)


def _tile(images: GalleryImages, split: str, index: int, alt: str, lines: tuple[str, ...]) -> Tile:
    """Tile of the image at a position of a split; an image that does not decode is named instead of raised."""
    source = images.splits[split]
    try:
        if isinstance(source, MemoryImages):
            name = f"{split} #{index}"
            row = index if source.rows is None else source.rows[index]
            uri, width, height = thumbnail(source.pixels[row], images.channels)
        else:
            path = Path(source.paths[index])
            name = printable("/".join(path.parts[-2:]))
            uri, width, height = thumbnail(source.open(index), images.channels)
    except Exception as error:  # a damaged file can fail in any decoder
        reason = printable(str(error)) or type(error).__name__
        return Tile("", THUMBNAIL_SIDE, THUMBNAIL_SIDE, f"{alt} (cannot be read)", lines, name, reason)
    return Tile(uri, width, height, f"{alt}: {name}", lines, name)


def thumbnail(pixels: np.ndarray | str | Path | io.BytesIO, channels: int) -> tuple[str, int, int]:
    """Thumbnail of an image (H, W, C) uint8 or in a file, as data URI, with its width and height.

    Small images stay as they are, as PNG; larger ones are scaled down and become JPEG. ``channels`` is 1 or 3, as the
    model reads the file.
    """
    mode = "L" if channels == 1 else "RGB"
    if not isinstance(pixels, np.ndarray):
        with Image.open(pixels) as file:
            file.draft(mode, (2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))  # JPEG: decode at a fraction of the size
            image = file.convert(mode)
    else:
        image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    kind = "png" if max(image.size) <= THUMBNAIL_SIDE else "jpeg"
    options: dict[str, Any] = {"optimize": True} if kind == "png" else {"quality": 80}
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", image.width, image.height
