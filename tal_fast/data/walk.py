"""Search for files in a folder at any depth, and the warning of what is left out."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tal_fast.data.headers import HEIF
from tal_fast.utils.logs import say

ABOVE = "link to a folder above it"
"""Problem of a link that is not followed, because the files it leads to are read already."""


class Entry(NamedTuple):
    """File in a folder: its path, its status if there is one, and why it cannot be read, or else ``""``.

    A folder that cannot be read, or is a link to one above, is an entry too.
    """

    path: str
    status: os.stat_result | None
    problem: str = ""
    is_folder: bool = False


def walk(folder: Path) -> Iterator[Entry]:
    """Files at any depth, in any order, without hidden ones."""
    start = os.path.abspath(folder)
    above: frozenset[object] = frozenset(filter(None, (_identity(str(parent)) for parent in Path(start).parents)))
    folders = [(start, above)]
    while folders:
        path, above = folders.pop()
        identity = _identity(path)
        if identity in above:
            yield Entry(path, None, ABOVE, is_folder=True)
            continue
        try:
            entries = list(os.scandir(path))
        except OSError as error:
            yield Entry(path, None, f"{error.strerror}", is_folder=True)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    folders.append((entry.path, above | {identity}))
                    continue
                status = entry.stat()
            except OSError as error:
                broken = entry.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP)
                yield Entry(entry.path, None, "broken link" if broken else f"{error.strerror}")
                continue
            regular = stat.S_ISREG(status.st_mode)
            yield Entry(entry.path, status, "" if regular else "neither a file nor a folder")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino


def ending(path: str) -> str:
    """Ending of a file's name in lower case, for counting."""
    return os.path.splitext(path)[1].lower() or "without an ending"


def report_left_out(folder: Path, left_out: Counter[str]) -> None:
    """Warn of what was left out, once and not on every rank."""
    links = left_out.pop(ABOVE, 0)
    if links:
        say(f"{folder}: links to a folder above them are not followed: {links:,}; their images are read once")
    if left_out.total():
        heif = ", or pip install pillow-heif" if not HEIF and {".heic", ".heif", ".hif"} & left_out.keys() else ""
        say(f"{folder}: {counted(left_out)}; convert images among them to JPEG or PNG{heif}")


def counted(left_out: Counter[str]) -> str:
    """Text such as ``37 files are left out: 30 .heic, 7 .gif``."""
    total = left_out.total()
    kinds = sorted(((-number, kind) for kind, number in left_out.items() if number))
    text = ", ".join(f"{-number:,} {kind}" for number, kind in kinds)
    return f"{total:,} {'file is' if total == 1 else 'files are'} left out: {text}"
