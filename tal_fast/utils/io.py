"""Atomic writing of files."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Read once, at import: reading the mask means setting it, which other threads would notice.
UMASK = os.umask(0o022)
os.umask(UMASK)


@contextmanager
def replacing(path: str | os.PathLike[str], keep: Path | None = None) -> Iterator[Path]:
    """Write a file atomically: a temporary path to write to, which becomes ``path`` on success.

    The temporary file lies beside ``path`` and has its suffix, which some writers go by. It is flushed to disk, then
    renamed, and the rename is flushed too. On failure it is removed and ``path`` stays as it was. Any number of
    processes may write the same file at once.

    Args:
        path: the file to write; its folder is created.
        keep: where a file already at ``path`` is moved; ``path`` or ``keep`` is complete at any time.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~UMASK)  # mkstemp makes files private
        if keep is not None and target.exists():
            os.replace(target, keep)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a loss of power."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)
