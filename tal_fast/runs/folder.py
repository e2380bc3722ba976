"""Files of a run folder besides the checkpoints: config.yaml and metrics.csv."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tal_fast.config.schema import Config
from tal_fast.utils.io import replacing

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.csv"

COLUMNS = (
    "epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "aurc", "auroc", "fpr95",
    "images_per_s", "seconds", "data_wait", "unreadable",
)  # fmt: skip
"""Columns of metrics.csv before the method's own.

``val_loss`` is the cross-entropy for every method; ``aurc``, ``auroc`` and ``fpr95`` are of the method's confidence
score on the validation images (Old FD); ``seconds`` are of training alone and ``data_wait`` is the share of them spent
waiting for images; ``unreadable`` counts the files left out so far because they do not decode.
"""


def epoch_row(epoch: int, training: Mapping[str, float], validation: Mapping[str, float]) -> dict[str, float]:
    """Row of metrics.csv for an epoch, counted from 1: ``COLUMNS``, then the method's own columns."""
    values = {"epoch": epoch, **training, **validation}
    return {name: values.pop(name) for name in COLUMNS} | values


def write_config(output: Path, config: Config) -> None:
    """Write config.yaml atomically, without the permissions of this command: ``resume``, ``allow`` and ``extend``."""
    replace(config, resume="never", allow=[], extend=False).save(output / CONFIG_FILE)


def write_metrics(output: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write metrics.csv atomically, one row for each of one or more epochs."""
    with replacing(output / METRICS_FILE) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        names = dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)])  # older versions had fewer
        writer = csv.DictWriter(file, names, restval="nan", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
