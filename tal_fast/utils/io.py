"""Atomic writing of files."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tal_fast.utils.locks import lock

# Read once, at import: reading the mask means setting it, which other threads would notice.
UMASK = os.umask(0o022)
os.umask(UMASK)


@contextmanager
def replacing(path: str | os.PathLike[str], keep: Path | None = None) -> Iterator[Path]:
    """Write a file atomically: a temporary path to write to, which becomes ``path`` on success.

    The temporary file lies beside ``path``, whose folder is created, and has its suffix, which some writers go by. It
    is flushed to disk, then renamed, and the rename is flushed too. On failure it is removed and ``path`` stays as it
    was. Any number of processes may write the same file at once. Temporary files of processes that were killed are
    removed. With ``keep``, a file already at ``path`` is moved there, and one of the two is complete at any time.
    """
    target = Path(path)
    temporary, handle = target.parent / f".{target.stem}-", None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _create_temporary(target)
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
        if handle is not None:
            os.close(handle)
    _sync_folder(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def refuse_pipe(path: str | os.PathLike[str]) -> None:
    """Raise ValueError if a path is a pipe, a socket or a device; reading one may never end."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise ValueError(f"{path} is a pipe or a device, which may have no end; name a file")


def check_zip(path: str | os.PathLike[str]) -> None:
    """Raise an error unless the checksums in a zip file are right, which ``torch.load`` does not compare."""
    with zipfile.ZipFile(path) as file:
        bad = file.testzip()
    if bad is not None:
        raise ValueError(f"the checksum of {bad} is wrong")


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise the OSError that writing files to a folder, or to the one that it would be made in, would raise."""
    path = Path(folder).absolute()
    try:
        with tempfile.TemporaryFile(dir=next(p for p in (path, *path.parents) if p.exists())) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        error.filename = str(folder)
        raise


def _create_temporary(target: Path) -> tuple[int, Path]:
    """Create the temporary file of a target; its descriptor, which holds a lock while this process lives, and path."""
    remove_leftovers(target.parent, f".{glob.escape(target.stem)}-", glob.escape(target.suffix))
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
        if lock(handle) is not False and os.path.exists(name):
            return handle, Path(name)
        os.close(handle)  # another process took it for a leftover before it was locked


def remove_leftovers(folder: Path, prefix: str = ".*-", suffix: str = ".*") -> None:
    """Remove temporary files of ``replacing`` whose processes were killed; none where there are no locks."""
    for path in folder.glob(f"{prefix}????????{suffix}"):
        with contextlib.suppress(OSError), path.open("rb+") as file:
            if lock(file.fileno()):
                path.unlink()


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
