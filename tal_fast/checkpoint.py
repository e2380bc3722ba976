"""Checkpoints: everything a run needs to go on as if it had never stopped, in one file.

A file is there whole or not at all: it is written under another name, flushed to disk and renamed. The last two are
kept, so that a damaged one costs one epoch. They hold tensors and plain values only and load with
``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tal_fast.storage import write_atomically

FORMAT = 1
"""Of the files; raised when older code could not read them."""

FOLDER, LAST, PREVIOUS, BEST = "checkpoints", "last.pt", "previous.pt", "best.pt"
_KEYS = ("format", "config", "epoch", "step", "world_size", "model", "shape", "optimizer", "ranks", "best", "history")


class Damaged(ValueError):
    """A checkpoint that cannot be read."""


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint; what was at ``path`` moves to ``previous``.

    Whatever happens in between, ``path`` or ``previous`` is a whole checkpoint.
    """
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **content}, file), keep=previous)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        Damaged: it is missing, incomplete, not a checkpoint, or of another format.
    """
    if not path.is_file():
        raise Damaged(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()  # torch.load does not compare checksums
        if bad is not None:
            raise ValueError(f"the checksum of {bad} is wrong")
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can fail in any layer of unzipping and unpickling
        raise Damaged(f"checkpoint {path} cannot be read ({type(error).__name__}); it is damaged or not one") from error
    if not isinstance(content, dict) or "format" not in content:
        raise Damaged(f"{path} is not a checkpoint of tal-fast")
    if content["format"] != FORMAT:
        raise Damaged(f"checkpoint {path} has format {content['format']} but this version reads {FORMAT}")
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise Damaged(f"checkpoint {path} lacks {', '.join(missing)}")
    return content


def load_newest(folder: Path) -> tuple[dict[str, Any], Path, list[str]]:
    """The last checkpoint in ``folder`` that can be read, its path, and a sentence for each that cannot.

    Raises:
        Damaged: none can be read.
    """
    problems: list[str] = []
    for name in (LAST, PREVIOUS):
        try:
            return load(folder / name), folder / name, problems
        except Damaged as error:
            problems.append(str(error))
    raise Damaged("; ".join(problems))


def exists(folder: Path) -> bool:
    """Whether ``folder`` has a checkpoint to go on from."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def rng_state() -> dict[str, Any]:
    """State of the random generators of Python, NumPy and PyTorch on the CPU and the current GPU."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global one
    return {
        "python": [version, list(internal), gauss],
        # As int64, for weights_only=True admits no NumPy array.
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what ``rng_state`` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
