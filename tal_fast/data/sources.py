"""Data sets of images inside other files, by name, and out-of-distribution sets of files of any kind."""

from __future__ import annotations

from pathlib import Path

from tal_fast.data.huggingface import HuggingFace
from tal_fast.data.image_folder import ImageFiles, read_flat
from tal_fast.data.packed import Packed
from tal_fast.data.shards import Shards

PACKED: dict[str, type[Shards] | type[HuggingFace]] = {"webdataset": Shards, "huggingface": HuggingFace}
"""Readers of data sets of images inside other files."""


def packed_source(spec: str) -> Shards | HuggingFace | None:
    """Reader of ``webdataset:WHERE`` or ``huggingface:WHERE``; None for other texts."""
    kind, _, where = spec.partition(":")
    return PACKED[kind](where) if kind in PACKED and where else None


def all_images(source: Shards | HuggingFace) -> list[Packed]:
    """Images of training and validation, or of everything where there is neither."""
    splits = [source.split(split) for split in ("train", "val")]
    return [images for images in splits if images is not None] or [source.all()]


def absolute_place(spec: str, kind: str = "") -> str:
    """``FOLDER``, ``webdataset:WHERE`` or ``huggingface:WHERE`` as an absolute path; addresses stay as they are.

    ``kind`` is the kind of data set of a specification without one.
    """
    prefix, _, where = spec.partition(":")
    if prefix in PACKED and where:
        return f"{prefix}:{absolute_place(where, prefix)}"
    path = Path(spec).expanduser()
    return spec if "://" in spec or (kind == "huggingface" and not path.exists()) else str(path.absolute())


def flat_images(spec: str, name: str) -> ImageFiles:
    """Images of an out-of-distribution set: ``FOLDER``, ``webdataset:WHERE`` or ``huggingface:WHERE``."""
    source = packed_source(spec)
    return read_flat(Path(spec), name) if source is None else source.all().images(None)
