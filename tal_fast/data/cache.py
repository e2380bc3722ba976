"""Cache of files that can be made again."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_dir() -> Path:
    """Folder of the cache: ``TAL_FAST_CACHE``, or else ``~/.cache/tal_fast``."""
    return Path(os.environ.get("TAL_FAST_CACHE") or Path.home() / ".cache" / "tal_fast")


def make_folder_once(path: Path, fill: Callable[[Path], None]) -> Path:
    """Make a folder atomically if it does not exist; any number of processes may do so at once.

    Args:
        path: the folder.
        fill: writes the content into the folder it is given.

    Returns:
        ``path``.
    """
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        fill(temporary)
        temporary.chmod(0o755)
        temporary.rename(path)
    except OSError:
        if not path.is_dir():  # otherwise another process was first, with the same content
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path
