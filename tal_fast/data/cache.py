"""Cache of files that can be made again."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_dir() -> Path:
    """Folder of the cache: ``TAL_FAST_CACHE``, or else ``~/.cache/tal_fast``, or a temporary one without a home."""
    try:
        return Path(os.environ.get("TAL_FAST_CACHE") or Path.home() / ".cache" / "tal_fast")
    except RuntimeError:
        return _temporary()


def make_folder_once(path: Path, fill: Callable[[Path], None]) -> Path:
    """Make a folder atomically if it does not exist; any number of processes may do so at once.

    ``fill`` writes the content into the folder it is given. Returns ``path``, or a folder for this process if ``path``
    cannot be made.
    """
    try:
        return _make(path, fill)
    except OSError:  # a read-only home, a full disk
        return _make(_temporary() / path.name, fill)


@functools.cache
def _temporary() -> Path:
    """Folder that is removed at exit."""
    folder = tempfile.mkdtemp(prefix="tal-fast-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _make(path: Path, fill: Callable[[Path], None]) -> Path:
    if os.path.isdir(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        fill(temporary)
        temporary.chmod(0o755)
        temporary.rename(path)
    except OSError:
        if not os.path.isdir(path):  # otherwise another process was first, with the same content
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path
