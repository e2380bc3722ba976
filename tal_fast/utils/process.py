"""The end of a process."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable


def run_and_exit(main: Callable[[], int | None]) -> None:
    """Call ``main`` and end this process with the code that it returns or exits with.

    A process among several (``WORLD_SIZE`` above 1) ends when its threads are done, its exit handlers called and its
    output written, without taking the interpreter down: threads of gloo that let go of their last tensor meanwhile
    abort the process (pytorch issue 190489), 1 finished run in 12 of four processes here, and torchrun takes that for
    a failure of the run.
    """
    alone = int(os.environ.get("WORLD_SIZE") or 1) == 1
    try:
        code = main()
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            raise
        code = leaving.code
    if alone or sys.getprofile() or sys.gettrace():  # a profiler writes its result when main has returned
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
