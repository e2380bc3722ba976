"""Locks between processes, which the kernel releases when their process ends, however it ends.

``FolderLock`` belongs to a process: the workers it forks do not keep it, and it holds between machines. ``lock``
belongs to an open file: it can be shared, also holds within a process, and child processes inherit it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_held: dict[str, tuple[int, list[FolderLock]]] = {}  # real path of the file -> descriptor, holders in this process
_guard = threading.Lock()


class FolderLock:
    """Exclusive lock of a folder between processes: a POSIX record lock on its file ``.lock``.

    Forked children do not inherit it, and it holds between the machines of a network file system. Locks of one process
    share it, since they cannot exclude each other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / ".lock"
        self._key = os.path.realpath(self._path)
        self._process = os.getpid()

    @property
    def held(self) -> bool:
        """Whether this lock is held."""
        return self in _held.get(self._key, (-1, []))[1]

    def acquire(self, wait: float = 0.0) -> None:
        """Take the lock, waiting at most ``wait`` seconds for another process; the folder is created.

        Where the file system has no locks, a warning says so. Raises ValueError if another process holds the lock, and
        OSError if the folder cannot be written.
        """
        with _guard:
            if self._key not in _held:
                self.folder.mkdir(parents=True, exist_ok=True)
                _held[self._key] = self._lock(wait), []
            if self not in _held[self._key][1]:
                _held[self._key][1].append(self)

    def ensure(self) -> None:
        """Take the lock again if this process holds it, but its file was deleted, as with the folder; else do nothing.

        Raises as ``acquire`` does, if another process took the lock in between.
        """
        with _guard:
            if self._key not in _held or os.getpid() != self._process:
                return
            handle, holders = _held[self._key]
            if not self._is_file_of(handle):
                self.folder.mkdir(parents=True, exist_ok=True)
                _held[self._key] = self._lock(0.0), holders
                os.close(handle)

    def release(self) -> None:
        """Release the lock and remove its file, unless this process holds it elsewhere too."""
        with _guard:
            handle, holders = _held.get(self._key, (-1, []))
            if self not in holders or os.getpid() != self._process:
                return
            holders.remove(self)
            if not holders:
                del _held[self._key]
                if self._is_file_of(handle):  # else it is another process's
                    with contextlib.suppress(OSError):
                        self._path.unlink()
                os.close(handle)

    def _is_file_of(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self._path))
        except OSError:
            return False

    def _lock(self, wait: float) -> int:
        deadline, told = time.monotonic() + wait, False
        while True:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if fcntl is not None:
                    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(handle), os.stat(self._path)):
                    break
            except FileNotFoundError:  # its holder has just removed the file
                pass
            except (BlockingIOError, PermissionError):
                holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
                if time.monotonic() >= deadline:
                    os.close(handle)
                    raise ValueError(
                        f"{self.folder} is in use by {holder}; wait until it ends, or name another folder"
                    ) from None
                if not told:
                    logger.info("waiting up to %.0f s for %s, which uses %s", wait, holder, self.folder)
                told = True
                time.sleep(0.1)
            except OSError as error:
                logger.warning("%s has no file locks (%s); start one run at a time there", self.folder, error.strerror)
                break
            os.close(handle)
        started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {platform.node()}, started {started}\n".encode(), 0)
        except OSError as error:  # a full disk
            os.close(handle)
            error.filename = str(self._path)
            raise
        return handle


def lock(handle: int, *, shared: bool = False, wait: bool = False) -> bool | None:
    """Take the kernel's lock of an open file, which lasts until ``unlock`` or the end of the process.

    Returns False if another open file holds it, None where there are no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def alone_in(folder: Path, waiting: str = "") -> Iterator[None]:
    """Hold a kernel lock of a folder; first wait for the process that holds it, after logging the message ``waiting``.

    Without a message there is no waiting; nor is there where there are no locks.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        if lock(handle) is False and waiting:
            logger.warning(waiting)
            lock(handle, wait=True)
        yield
    finally:
        unlock(handle)


def unlock(handle: int) -> None:
    """Release a lock, also where a forked process has inherited the file, and close the file."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)
