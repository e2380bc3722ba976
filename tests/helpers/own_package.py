"""A package with entry points, as pip would have installed it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tal_fast.utils import own_code


@contextlib.contextmanager
def installed_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str, entry_points: str
) -> Iterator[None]:
    """Install a module of this name and code with these lines of ``entry_points.txt``, while the block runs."""
    (folder / f"{name}.py").write_text(code)
    about = folder / f"{name}-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1\n")
    (about / "entry_points.txt").write_text(entry_points)
    monkeypatch.syspath_prepend(str(folder))
    own_code.installed.cache_clear()
    try:
        yield
    finally:
        own_code.installed.cache_clear()
        own_code._load.cache_clear()
        sys.modules.pop(name, None)
