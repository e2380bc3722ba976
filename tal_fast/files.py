"""Files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkstemp

from tal_fast.storage import UMASK


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path``; on success it becomes ``path``, on failure ``path`` stays as it was.

    The parent folder is made if need be. The name keeps the suffix, which some writers go by.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
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
