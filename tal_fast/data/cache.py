"""The folder for what can be made again: embedded images, sizes of a folder's images."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_dir() -> Path:
    """``TAL_FAST_CACHE``, else ``~/.cache/tal_fast``."""
    return Path(os.environ.get("TAL_FAST_CACHE") or Path.home() / ".cache" / "tal_fast")


def make_folder_once(path: Path, fill: Callable[[Path], None]) -> Path:
    """``path``, made by ``fill`` if it is not there: whole or not at all, however many processes make it at once."""
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        fill(temporary)
        temporary.chmod(0o755)
        temporary.rename(path)
    except OSError:
        if not path.is_dir():  # else another process was first, with the same content
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path
