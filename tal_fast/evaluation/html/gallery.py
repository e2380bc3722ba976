"""Which images are worth a look, and small copies of them that a page can carry in itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from tal_fast.data.datasets import MemoryImages, Split
from tal_fast.evaluation.sample_scores import Predictions, Samples
from tal_fast.evaluation.train_typicalness import TrainingTypicalness
from tal_fast.metrics.failure import Floats

SIDE = 112
"""Longest side of a small copy, in pixels; images of at most this size are shown pixel by pixel."""

TILES = 24
"""Images of a gallery."""

OOD_TILES = 12
"""Images of an OOD set; fewer where there are more than 20 sets, so that the page stays below some 4 MB."""

_ALL_OOD_TILES = 240


@dataclass(frozen=True)
class Tile:
    """An image with what is to be said about it.

    Attributes:
        image: data URI; empty where the image cannot be read.
        width, height: of the copy, in pixels.
        alt: what the image is, for those who do not see it.
        lines: below the image.
        name: of the file; or the image's number, where it comes from memory.
        problem: why there is no image.
    """

    image: str
    width: int
    height: int
    alt: str
    lines: tuple[str, ...]
    name: str
    problem: str = ""


@dataclass(frozen=True)
class Gallery:
    """Images under a heading.

    Attributes:
        title: the heading.
        note: what they have in common and how they are ordered.
        tiles: the images; none where there are none of the kind, which ``note`` says.
    """

    title: str
    note: str
    tiles: list[Tile] = field(default_factory=list)


def printable(text: str) -> str:
    r"""Names of files and classes as they can be shown: what does not print, or would turn its surroundings, escaped.

    Bytes that are no UTF-8 become ``\xff``, control and direction marks ``\x1b`` and ``\u202e``.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python carries the bytes 0x80..0xff of a name that is no UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def surest(values: Floats, among: np.ndarray, tiles: int = TILES) -> np.ndarray:
    """Indices of the largest finite values where ``among`` holds, falling; the first of equal ones first."""
    index = np.flatnonzero(among & np.isfinite(values))
    return index[np.argsort(-values[index], kind="stable")][:tiles]


def copy_of(pixels: np.ndarray | Path, channels: int) -> tuple[str, int, int]:
    """A small copy as data URI, and its width and height.

    Small images stay as they are, as PNG; larger ones are scaled down and become JPEG.

    Args:
        pixels: (H, W, C) uint8, or an image file.
        channels: 1 or 3, as the model sees the file.

    Raises:
        OSError, ValueError, SyntaxError: the file does not decode.
    """
    mode = "L" if channels == 1 else "RGB"
    if isinstance(pixels, Path):
        with Image.open(pixels) as file:
            file.draft(mode, (2 * SIDE, 2 * SIDE))  # JPEG: decoded at a fraction of its size
            image = file.convert(mode)
    else:
        image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    small = max(image.size) <= SIDE
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=80)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", image.width, image.height


class Images:
    """Small copies of a data set's images.

    Args:
        splits: by name: ``val``, OOD sets, and ``train-eval`` where training images are to be shown.
        class_names: a name for each label.
        channels: 1 or 3, as the model sees image files.
    """

    def __init__(self, splits: Mapping[str, Split], class_names: Sequence[str], channels: int) -> None:
        self.splits = splits
        self._classes = [printable(name) for name in class_names]
        self._channels = channels

    def class_name(self, label: int) -> str:
        """Of a label or prediction."""
        return self._classes[label] if 0 <= label < len(self._classes) else str(label)

    def tile(self, split: str, index: int, what: str, lines: tuple[str, ...]) -> Tile:
        """The image at a place of a split; one that does not decode is named, not raised.

        Args:
            split: its name.
            index: place in it.
            what: the image in a few words, for its alternative text.
            lines: to go below it.
        """
        images = self.splits[split]
        try:
            if isinstance(images, MemoryImages):
                name = f"{split} #{index}"
                row = index if images.rows is None else images.rows[index]
                uri, width, height = copy_of(images.pixels[row], self._channels)
            else:
                path = Path(images.paths[index])
                name = printable("/".join(path.parts[-2:]))
                uri, width, height = copy_of(path, self._channels)
        except Exception as problem:  # a damaged file can fail in any decoder
            reason = printable(str(problem)) or type(problem).__name__
            return Tile("", SIDE, SIDE, f"{what} (cannot be read)", lines, name, reason)
        return Tile(uri, width, height, f"{what}: {name}", lines, name)


def confidence_galleries(images: Images, samples: Samples, score: str) -> list[Gallery]:
    """The most confident mistakes, the least confident hits, and the most confident images of each OOD set.

    Args:
        images: where they come from.
        samples: of the evaluation.
        score: by which confidence is judged.
    """
    ids, values = samples.predictions["val"], samples.id_scores[score]
    wrong = ids.right == 0

    def lines(split: Predictions, confidence: Floats, i: int) -> tuple[str, ...]:
        found = f"{score} {confidence[i]:.4g}"
        return (found,) if score == "msp" else (found, f"softmax {split.probability[i]:.1%}")

    def mistake(i: int) -> Tile:
        said, is_ = images.class_name(ids.prediction[i]), images.class_name(ids.label[i])
        return images.tile(
            "val", ids.index[i], f"{is_} taken for {said}", (f"said: {said}", f"is: {is_}", *lines(ids, values, i))
        )

    def hit(i: int) -> Tile:
        said = images.class_name(ids.prediction[i])
        return images.tile("val", ids.index[i], f"{said}, rightly recognised", (f"is: {said}", *lines(ids, values, i)))

    errors, hits = int(wrong.sum()), int((~wrong).sum())
    galleries = [
        Gallery(
            "Most confident mistakes",
            f"Misclassified validation images of the largest {score} first; {errors:,} of {len(ids):,} are wrong.",
            [mistake(int(i)) for i in surest(values, wrong)],
        ),
        Gallery(
            "Least confident hits",
            f"Rightly classified validation images of the smallest {score} first; {hits:,} of {len(ids):,} are right.",
            [hit(int(i)) for i in surest(-values, ~wrong)],
        ),
    ]
    per_set = max(1, min(OOD_TILES, _ALL_OOD_TILES // max(1, len(samples.ood_scores))))
    for name, scores in samples.ood_scores.items():
        if name not in images.splits:
            continue
        split, confidence = samples.predictions[name], scores[score]
        chosen = surest(confidence, np.ones(len(split), dtype=bool), per_set)
        tiles = []
        for i in map(int, chosen):
            said = images.class_name(split.prediction[i])
            what = f"out-of-distribution image taken for {said}"
            tiles.append(images.tile(name, split.index[i], what, (f"said: {said}", *lines(split, confidence, i))))
        note = f"Of the {len(split):,} images of {printable(name)}, those of the largest {score} first."
        galleries.append(Gallery(f"Most confident out-of-distribution: {printable(name)}", note, tiles))
    return galleries


def typicalness_galleries(images: Images, labels: np.ndarray, found: TrainingTypicalness) -> list[Gallery]:
    """The most and the least typical training images.

    Args:
        images: where they come from.
        labels: (n,) of the training images.
        found: their typicalness.
    """

    def tile(i: int) -> Tile:
        is_, said = images.class_name(labels[i]), images.class_name(found.prediction[i])
        numbers = (f"τ {found.typicalness[i]:.4f}", f"distance {found.distance[i]:.3g}")
        outcome = "recognised" if is_ == said else f"said: {said}"
        what = f"training image of {is_}, typicalness {found.typicalness[i]:.2f}"
        return images.tile("train-eval", i, what, (f"is: {is_}", outcome, *numbers))

    everything = np.ones(len(labels), dtype=bool)
    # By distance: it tells images apart whose typicalness rounds to the same number.
    return [
        Gallery(
            f"{which} typical training images",
            f"τ = 1 − (d − min) / (max − min) over all {len(labels):,} training images, without augmentation; d is the "
            f"distance to the nearest of the {found.queue_length:,} entries in the checkpoint's queue. {order}",
            [tile(int(i)) for i in surest(sign * found.distance, everything)],
        )
        for which, sign, order in (
            ("Least", 1.0, "The farthest first."),
            ("Most", -1.0, "The nearest first."),
        )
    ]
