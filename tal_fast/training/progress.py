"""Progress on the console: a bar for each epoch and one line when it is finished."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping

import torch
from tqdm import tqdm

from tal_fast.utils.logs import duration

REFRESH_SECONDS = 1.0
"""Seconds between two readings of the loss for the bar."""


class Progress:
    """Progress bar over the images of one epoch, ``done`` of them trained on; drawn if ``show``, on a terminal only."""

    def __init__(self, title: str, total: int, done: int, show: bool) -> None:
        self._next = time.monotonic() + REFRESH_SECONDS
        self._bar = tqdm(
            total=total, initial=done, desc=title, disable=None if show else True,
            leave=False, unit=" images", unit_scale=True, dynamic_ncols=True,
        )  # fmt: skip

    def advance(self, images: int, describe: Callable[[], str]) -> None:
        """Advance by a number of images; once a second ``describe``, which may wait for the GPU, gives the text."""
        self._bar.update(images)
        now = time.monotonic()
        if not self._bar.disable and now >= self._next:
            self._bar.set_postfix_str(describe())
            self._next = now + REFRESH_SECONDS

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def memory_in_use(device: torch.device) -> int:
    """Bytes of GPU memory that PyTorch holds, or on the CPU the peak memory of the process."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def epoch_line(row: Mapping[str, float], epochs: int, seconds: float) -> str:
    """Line of at most 100 characters for the row of a finished epoch, which took ``seconds`` with validation."""
    loss, rate = row["train_loss"], row["images_per_s"]
    validated = row["val_accuracy"] == row["val_accuracy"]  # else NaN
    return "  ".join(
        [
            f"epoch {int(row['epoch']):>{len(str(epochs))}}/{epochs}",
            f"loss {loss:.4f}" if loss < 10 else f"loss {loss:.3g}",
            f"acc {row['train_accuracy']:.2%}",
            *([f"val {row['val_accuracy']:.2%}", f"AURC {row['aurc']:.5f}"] if validated else ["not validated"]),
            f"{rate:,.0f} images/s" if rate < 100_000 else f"{rate / 1000:,.0f}k images/s",
            f"ETA {duration(seconds * (epochs - row['epoch']))}",
        ]
    )
