"""Files that are there whole or not at all, whatever interrupts their writing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# Read once: it can be read only by setting it, which threads would notice.
UMASK = os.umask(0o022)
os.umask(UMASK)


def write_atomically(path: Path, write: Callable[[BinaryIO], Any], keep: Path | None = None) -> None:
    """Write a file under another name, flush it to disk and rename it; any number of processes may do so at once.

    Args:
        path: the file; its folder is made.
        write: called with the open file.
        keep: where a file that is at ``path`` already moves; ``path`` or ``keep`` is whole at any time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the renames last through a loss of power."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems cannot
    finally:
        os.close(handle)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path``; on success it becomes ``path``, on failure ``path`` stays as it was.

    The parent folder is made if need be. The name keeps the suffix, which some writers go by.
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
        # mkstemp makes files private; results are as readable as anything else the user writes.
        temporary.chmod(0o666 & ~UMASK)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
