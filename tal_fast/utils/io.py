"""Atomic writing of files."""

from __future__ import annotations

import contextlib
import errno
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
    temporary = target.parent / f".{target.stem}-"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=temporary.name, suffix=target.suffix, dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~UMASK)  # mkstemp makes files private
        if keep is not None and target.exists():
            os.replace(target, keep)
        os.replace(temporary, target)
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        # torch.save says of a disk that takes no more only where in the file it was.
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, or the disk fails", str(target)) from error
    except OSError as error:
        if error.errno and (error.filename is None or str(error.filename).startswith(str(temporary))):
            error.filename = str(target)  # writing names no file, and the temporary file's name means nothing to a user
        raise
    finally:
        with contextlib.suppress(OSError):
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
