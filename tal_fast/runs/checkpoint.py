"""Checkpoints: everything a run needs to go on as if it had never stopped, in one file.

A file is there whole or not at all: it is written under another name, flushed to disk and renamed, by a thread of its
own while training goes on. The last two are kept, so that a damaged one costs what lies between them. They hold tensors
and plain values only and load with ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import zipfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tal_fast.utils.io import write_atomically

FORMAT = 1
"""Of the files; raised when older code could not read them."""

FOLDER, LAST, PREVIOUS, BEST = "checkpoints", "last.pt", "previous.pt", "best.pt"
_KEYS = (
    "format",
    "config",
    "epoch",
    "step",
    "world_size",
    "model",
    "average",
    "shape",
    "optimizer",
    "scaler",
    "ranks",
    "best",
    "history",
)


class Damaged(ValueError):
    """A checkpoint that cannot be read."""


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint; what was at ``path`` moves to ``previous``.

    Whatever happens in between, ``path`` or ``previous`` is a whole checkpoint.
    """
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **content}, file), keep=previous)


class Writer:
    """Writes a run's checkpoints one after the other while training goes on.

    Args:
        folder: of the checkpoints; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def start(self, content: dict[str, Any], copies: Sequence[str] = ()) -> str | None:
        """Begin to write ``last.pt``.

        Args:
            content: nothing in it may change later; see ``snapshot``.
            copies: further names of the same checkpoint.

        Returns:
            What went wrong with the one before, as one sentence; None if nothing did.
        """
        problem = self.finish()
        self._pending = self._thread.submit(self._write, content, list(copies))
        return problem

    def finish(self) -> str | None:
        """Wait for the disk; what went wrong, as one sentence, or None."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        try:
            pending.result()
        except (OSError, RuntimeError) as error:  # torch.save raises the latter when a disk is full
            return (
                f"a checkpoint could not be written to {self._folder} ({_first_line(error)}); the one before is whole"
            )
        return None

    def _write(self, content: dict[str, Any], copies: list[str]) -> None:
        last, previous = self._folder / LAST, self._folder / PREVIOUS
        if not copies:
            save(last, content, previous)
            return
        # last.pt comes after the copies: were it the first and the process killed in between, the resumed run would
        # take best.pt for written.
        first = self._folder / copies[0]
        save(first, content)
        for name in copies[1:]:
            _link(first, self._folder / name)
        if last.exists():
            os.replace(last, previous)
        _link(first, last)


def _link(path: Path, other: Path) -> None:
    """Give a file another name, in place of what had it; nothing is written where links are to be had."""
    temporary = other.with_name(f".{other.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # some file systems have no hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, other)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def snapshot(value: Any) -> Any:
    """A copy on the CPU of tensors within dicts, lists and tuples, for a thread to write while training goes on."""
    copied = _copy(value)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copied


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.device.type == "cpu":
            return value.detach().clone()
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {key: _copy(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(v) for v in value)
    return value


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
    """The newest checkpoint in ``folder`` that can be read, its path, and a sentence for each newer one that cannot.

    Raises:
        Damaged: none can be read.
    """
    problems: list[str] = []
    for path in _newest_first(folder):
        try:
            return load(path), path, problems
        except Damaged as error:
            problems.append(str(error))
    raise Damaged("; ".join(problems) or f"there is no checkpoint in {folder}")


def exists(folder: Path) -> bool:
    """Whether ``folder`` has a checkpoint to go on from."""
    return bool(_newest_first(folder))


def epoch_name(epoch: int) -> str:
    """Name of the checkpoint kept of an epoch."""
    return f"epoch-{epoch:04d}.pt"


def _newest_first(folder: Path) -> list[Path]:
    latest = [folder / name for name in (LAST, PREVIOUS)]
    kept = sorted(folder.glob("epoch-*.pt"), reverse=True) if folder.is_dir() else []
    return [path for path in [*latest, *kept] if path.exists()]


def clean(output: Path) -> None:
    """Remove what a run that was killed while writing left in its folder."""
    for path in [*(output / FOLDER).glob(".*.pt.*"), *output.glob(".metrics.csv.*"), *output.glob(".config.yaml.*")]:
        with contextlib.suppress(OSError):
            path.unlink()


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
