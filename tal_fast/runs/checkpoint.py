"""Checkpoints: the whole state of a run in one file, saved atomically while training goes on.

A checkpoint is complete or absent: a thread writes it under a temporary name, flushes it to disk and renames it. The
last two are kept, so that a damaged one costs only the work between them. They hold tensors and plain values only and
load with ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tal_fast.config.schema import Config
from tal_fast.config.typed import one_line
from tal_fast.runs.folder import CONFIG_FILE, write_config
from tal_fast.utils.io import check_zip, replacing
from tal_fast.utils.locks import FolderLock
from tal_fast.utils.process import sentence

FORMAT = 1
"""Version of the file format; raised when older code could not read newer files."""

FOLDER = "checkpoints"
"""Folder of the checkpoints within a run folder."""

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"

_KINDS: dict[str, type | tuple[type, ...]] = {
    "config": dict, "epoch": int, "step": int, "world_size": int, "model": dict, "average": (dict, type(None)),
    "shape": dict, "optimizer": dict, "scaler": dict, "ranks": list, "best": dict, "history": list,
}  # fmt: skip
"""Entries of a checkpoint and their types."""

_NOT_EMPTY = ("config", "model", "shape", "optimizer", "ranks")
_SHAPE = {"class_names": list, "channels": int, "image_size": int, "train_images": int}


class Damaged(ValueError):
    """Error for a checkpoint that cannot be read."""


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Save tensors and plain values atomically; the file already at ``path`` becomes ``previous``."""
    with replacing(path, keep=previous) as temporary, temporary.open("wb") as file:
        torch.save({"format": FORMAT, **content}, file)


class Writer:
    """Background writer of a run's checkpoints, one at a time.

    Attributes:
        taken: a sentence on the process that has the run's folder now, where nothing more is written; else None.
    """

    def __init__(self, folder: Path) -> None:
        self.taken: str | None = None
        self._folder, self._lock = folder, FolderLock(folder.parent)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def start(self, content: dict[str, Any], copies: Sequence[str] = ()) -> str | None:
        """Start writing ``last.pt`` and copies of it under other names, after waiting for the write before it.

        ``content`` must not change later, see ``snapshot``. Returns what ``finish`` says of the write before.
        """
        problem = self.finish()
        self._pending = self._thread.submit(self._write, content, list(copies))
        return problem

    def finish(self) -> str | None:
        """Wait for the pending write; returns a sentence on why it failed, or None."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        try:
            pending.result()
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError when the disk is full
            reason = sentence(error).partition("\n")[0] or type(error).__name__
            whole = any(path.is_file() for path in _newest_first(self._folder))
            state = "the one before is whole" if whole else "nothing is saved yet"
            return f"a checkpoint could not be written to {self._folder} ({reason}); {state}"
        return self.taken

    def _write(self, content: dict[str, Any], copies: list[str]) -> None:
        last, previous = self._folder / LAST, self._folder / PREVIOUS
        try:
            self._lock.ensure()
        except ValueError as error:
            self.taken = f"the folder of this run was deleted or moved, and nothing more is written to it: {error}"
            return
        output = self._folder.parent
        if not (output / CONFIG_FILE).exists() and "config" in content:  # the folder was deleted during training
            write_config(output, Config.from_dict(content["config"]))
        if not copies:
            save(last, content, previous)
            return
        # last.pt is written after the copies: a run killed in between and resumed from last.pt writes them again.
        first = self._folder / copies[0]
        save(first, content)
        for name in copies[1:]:
            _copy_file(first, self._folder / name)
        _copy_file(first, last, previous)


def _copy_file(source: Path, path: Path, previous: Path | None = None) -> None:
    """Copy a file atomically; the file already at ``path`` becomes ``previous``."""
    with replacing(path, keep=previous) as temporary, source.open("rb") as old, temporary.open("wb") as new:
        try:
            while os.copy_file_range(old.fileno(), new.fileno(), 1 << 30):  # shares blocks where the disk can
                pass
        except (AttributeError, OSError):  # not Linux, or a file system without it
            shutil.copyfileobj(old, new)


def snapshot(value: Any) -> Any:
    """Copy the tensors within dicts, lists and tuples to the CPU, for the writer's thread."""
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
    """Load a checkpoint; raises Damaged if the file is missing, incomplete, not a checkpoint, or has another format."""
    if not path.is_file():
        raise Damaged(f"there is no checkpoint {path}")
    try:
        check_zip(path)
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # damage can surface anywhere in unzipping and unpickling
        raise Damaged(f"checkpoint {path} cannot be read ({type(error).__name__}); it is damaged or not one") from error
    if not isinstance(content, dict) or "format" not in content:
        raise Damaged(f"{path} is not a checkpoint of tal-fast")
    if not isinstance(content["format"], int) or content["format"] != FORMAT:
        raise Damaged(f"checkpoint {path} has format {content['format']} but this version reads {FORMAT}")
    lacking = _lacking(content)
    if lacking:
        raise Damaged(f"checkpoint {path} lacks {', '.join(lacking)}; it is damaged")
    return content


def _lacking(content: dict[str, Any]) -> list[str]:
    """Names of the entries that are missing, empty or of another type."""
    names = [key for key, kind in _KINDS.items() if not isinstance(content.get(key), kind)]
    if names:
        return names
    shape = content["shape"]
    names = [key for key in _NOT_EMPTY if not content[key]]
    names += [f"shape.{key}" for key, kind in _SHAPE.items() if not isinstance(shape.get(key), kind)]
    names += [f"shape.{key}" for key in ("digests", "conditions") if not isinstance(shape.get(key, {}), dict)]
    try:
        json.dumps([content["config"], shape])
    except TypeError:
        names.append("plain values")
    return names or ["ranks"] * (len(content["ranks"]) != content["world_size"])


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Turn errors from an incomplete or foreign state of the checkpoint at ``path`` into ``Damaged``."""
    try:
        yield
    except Exception as error:  # modules and optimizers raise errors of many types
        reason = one_line(error)[:300] or type(error).__name__
        raise Damaged(
            f"the state in {path} does not fit this run ({reason}); it is damaged or of other code"
        ) from error


def load_newest(folder: Path) -> tuple[dict[str, Any], Path, list[str]]:
    """Newest checkpoint in ``folder`` that can be read, its path, and a sentence on each newer one that cannot."""
    problems: list[str] = []
    for path in _newest_first(folder):
        try:
            return load(path), path, problems
        except Damaged as error:
            problems.append(str(error))
    raise Damaged("; ".join(problems) or f"there is no checkpoint in {folder}")


def exists(folder: Path) -> bool:
    """Whether ``folder`` holds a checkpoint to resume from."""
    return bool(_newest_first(folder))


def epoch_name(epoch: int) -> str:
    """File name of the checkpoint kept for an epoch."""
    return f"epoch-{epoch:04d}.pt"


def _newest_first(folder: Path) -> list[Path]:
    latest = [folder / name for name in (LAST, PREVIOUS)]
    kept = sorted(folder.glob("epoch-*.pt"), reverse=True) if folder.is_dir() else []
    return [path for path in [*latest, *kept] if path.exists()]
