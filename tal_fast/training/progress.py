"""What a run tells while it trains: a bar on a terminal, a line an epoch everywhere, metrics.csv."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tal_fast.utils.io import write_atomically

if TYPE_CHECKING:
    import torch

REFRESH_SECONDS = 1.0

COLUMNS = (
    "epoch",
    "lr",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "aurc",
    "auroc",
    "fpr95",
    "images_per_s",
    "seconds",
    "data_wait",
    "unreadable",
)
"""Of metrics.csv, before the method's own. ``val_loss`` is cross-entropy for every method; ``aurc``, ``auroc`` and
``fpr95`` are of the method's score on the validation images (Old FD); ``seconds`` are of training, ``data_wait`` is the
share of them spent waiting for images; ``unreadable`` counts the files that did not decode so far and were left out."""


class Progress:
    """The steps of one epoch.

    Args:
        title: shown before the bar.
        total: images of the epoch; ``done`` of them are through already.
        show: draw a bar.
    """

    def __init__(self, title: str, total: int, done: int, show: bool) -> None:
        self._bar: Any = None
        self._next = time.monotonic() + REFRESH_SECONDS
        if show:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=done, desc=title, leave=False, unit=" images", unit_scale=True, dynamic_ncols=True
            )

    def step(self, images: int, describe: Callable[[], str]) -> None:
        """A step of so many images is through. ``describe``, which may wait for the GPU, is called once a second."""
        if self._bar is None:
            return
        self._bar.update(images)
        now = time.monotonic()
        if now >= self._next:
            self._bar.set_postfix_str(describe())
            self._next = now + REFRESH_SECONDS

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def memory_in_use(device: torch.device) -> int:
    """Bytes: of the GPU's memory that PyTorch holds, or of this process's at its largest."""
    import torch

    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def shows_bar(mode: str) -> bool:
    """Whether a run with this ``Config.progress`` draws bars here."""
    return mode == "auto" and sys.stderr.isatty()


def epoch_line(row: Mapping[str, float], epochs: int, seconds: float) -> str:
    """One line for a finished epoch that took so many seconds, validation and saving included."""
    parts = [
        f"epoch {int(row['epoch']):>{len(str(epochs))}}/{epochs}",
        f"loss {row['train_loss']:.4f}",
        f"acc {row['train_accuracy']:.2%}",
        f"val loss {row['val_loss']:.4f}",
        f"val acc {row['val_accuracy']:.2%}",
        f"AURC {row['aurc'] * 1000:.2f}e-3",
    ]
    if "typicalness" in row:
        parts.append(f"typicalness {row['typicalness']:.3f}")
        parts.append(f"queue {int(row['queue_length'])}")
    remaining = timedelta(seconds=round(seconds * (epochs - row["epoch"])))
    parts += [f"{row['images_per_s']:,.0f} images/s", f"data wait {row['data_wait']:.0%}", f"ETA {remaining}"]
    return "  ".join(parts)


def write_metrics(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write metrics.csv: a row for each of one or more epochs, whole or not at all."""
    text = io.StringIO()
    extra = [name for name in rows[0] if name not in COLUMNS]
    writer = csv.DictWriter(text, [*COLUMNS, *extra], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
