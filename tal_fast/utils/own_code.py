"""Functions and classes of the user's own: ``FILE.py:NAME``, or an entry point of an installed package."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

METHODS, SCORES, METRICS, DATA = "tal_fast.methods", "tal_fast.scores", "tal_fast.metrics", "tal_fast.data"
"""Groups of entry points."""


def in_file(name: str) -> bool:
    """Whether a name is ``FILE.py:NAME``."""
    return ".py:" in name


def absolute(name: str) -> str:
    """``FILE.py:NAME`` with the absolute path of the file; other names as they are."""
    file, _, member = name.rpartition(":")
    return f"{os.path.abspath(os.path.expanduser(file))}:{member}" if in_file(name) else name


@cache
def installed(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group by name."""
    return {found.name: found for found in entry_points(group=group)}


def file_digest(name: str) -> str | None:
    """Start of the SHA-256 of the file in ``FILE.py:NAME``; None for other names."""
    return hashlib.sha256(Path(name.rpartition(":")[0]).read_bytes()).hexdigest()[:8] if in_file(name) else None


def load(name: str, group: str) -> Any:
    """Function or class of a name.

    Raises ValueError if the file is missing, fails when it is run, or has no such name.
    """
    return _load(absolute(name), group)


@cache
def _load(name: str, group: str) -> Any:
    file, _, member = name.rpartition(":")
    if in_file(name) and not Path(file).is_file():
        raise ValueError(f"there is no file {file}, which defines {member}; put it there, or name another")
    try:
        if not in_file(name):
            return installed(group)[name].load()
        spec: Any = importlib.util.spec_from_file_location(file, file)
        module = sys.modules[file] = importlib.util.module_from_spec(spec)  # dataclasses look for their module there
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name} cannot be imported ({type(error).__name__}: {error})") from error
    if not hasattr(module, member):
        raise ValueError(f"{file} defines no {member}")
    return getattr(module, member)


@contextlib.contextmanager
def running(what: str) -> Iterator[None]:
    """Context in which a user's code runs: its errors become one sentence with the line of the user's file."""
    try:
        yield
    except (Exception, SystemExit) as error:
        # ``load`` names modules by their files.
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in sys.modules]
        place = "".join(f" in line {frame.lineno} of {frame.filename}" for frame in frames[-1:])
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{what} failed{place} ({reason}); mend it there") from error
