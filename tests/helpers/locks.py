"""Processes that hold the lock of a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HOLD = """
import os, sys; from pathlib import Path; from tal_fast.utils.locks import FolderLock
FolderLock(Path(sys.argv[1])).acquire(); print(os.getpid(), flush=True); input()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the lock until it gets a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert int(process.stdout.readline()) == process.pid
    return process
