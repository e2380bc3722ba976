"""Number of processes and the end of a process, without importing PyTorch."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable


def world_size() -> int:
    """Number of processes that torchrun started for this command; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def run_and_exit(main: Callable[[], int | None]) -> None:
    """Call ``main`` and end the process with the code that it returns or exits with.

    One process of several ends after joining its threads, running its exit handlers and flushing its output, but
    without finalising the interpreter: gloo threads that release their last tensor during finalisation abort the
    process (pytorch issue 190489; 1 finished run in 12 with four processes), which torchrun reports as a failed run.
    """
    alone = world_size() == 1
    try:
        code = main()
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            raise
        code = leaving.code
    if alone or sys.getprofile() or sys.gettrace():  # profilers write their result after main returns
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code or 0)


def program_name(command: str) -> str:
    """The words that started a command: ``tal-fast train`` or ``python -m tal_fast.train``."""
    return sys.argv[0] if sys.argv[0].startswith("tal-fast ") else f"python -m tal_fast.{command.replace('-', '_')}"
