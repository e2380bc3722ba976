"""Number of processes, and how a command's process ends; does not import PyTorch."""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator

from tal_fast.utils.signals import REQUEUE

MISTAKE = 2
"""Exit code after what the user must mend: an option, a file, a full or read-only disk."""

_CHOOSE = "name a place where this user may write, or change its permissions"
_A_FILE = "a part of the path is a file; name another"
_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EROFS: _CHOOSE,
    errno.EACCES: _CHOOSE,
    errno.EPERM: _CHOOSE,
    errno.ENOENT: "check the path",
    errno.ENOTDIR: _A_FILE,
    errno.EEXIST: _A_FILE,
    errno.EISDIR: "a folder has this name; remove it or name another",
    errno.EMFILE: "raise the limit with ulimit -n",
    errno.EIO: "the disk or its network fails",
}


def world_size() -> int:
    """Number of processes that torchrun started for this command; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def run_and_exit(main: Callable[[], int | None]) -> None:
    """Call ``main`` and end the process with the code that it returns or exits with.

    One process of several ends after joining its threads, running its exit handlers and flushing its output, but
    without finalising the interpreter: gloo threads that release their last tensor during finalisation abort the
    process (pytorch issue 190489; 1 finished run in 12 with four processes), which torchrun reports as a failed run.

    Ctrl-C ends in one sentence and code 130, an error of the file system in one and code 2, a lost rank in one and code
    75. Other exceptions show their traceback, as errors of files do with ``python -X dev``.
    """
    alone = world_size() == 1
    try:
        code = main()
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            raise
        code = leaving.code
    except KeyboardInterrupt:
        sys.stderr.write("stopped by Ctrl-C\n")
        code = 128 + 2
    except BrokenPipeError:  # ``tal-fast compare ... | head``
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        code = 128 + 13
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        # A program's own OSError has no number.
        if isinstance(error, OSError) and (error.filename is not None or error.errno in _REMEDIES):
            code = report_mistake(error)
        elif (lost := _lost_ranks(error)) is not None:
            sys.stderr.write(lost)
            code = REQUEUE
        else:
            raise
    if alone or sys.getprofile() or sys.gettrace():  # profilers write their result after main returns
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code or 0)


def report_mistake(error: Exception) -> int:
    """Print an error of the input or of a file as one line on stderr; returns ``MISTAKE``.

    Raises a BrokenPipeError, which ``run_and_exit`` takes: the reader of the output has seen enough.
    """
    if isinstance(error, BrokenPipeError):
        raise error
    rank = os.environ.get("RANK", "0") if world_size() > 1 else "0"
    where = f" (rank {rank})" if rank != "0" else ""
    sys.stderr.write(f"error{where}: {sentence(error)}\n")  # one write, because ranks write at the same time
    return MISTAKE


def sentence(error: Exception) -> str:
    """Message of an error; for one of the operating system the file, the reason and what helps."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes, os.PathLike)) else ""
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{place}{error.strerror}" + (f"; {remedy}" if remedy else "")


def _lost_ranks(error: Exception) -> str | None:
    """Line that names the ranks that a failed collective waited for; None for any other error."""
    if world_size() == 1 or "torch.distributed" not in sys.modules:
        return None
    from tal_fast.utils.distributed import name_lost_ranks

    return name_lost_ranks(error)


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """Fork inside this block: the new process gets no garbage of this one.

    A process that collects the garbage of a DALI pipeline would wait forever for threads that only exist here.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def program_name(command: str) -> str:
    """The words that started a command: ``tal-fast train`` or ``python -m tal_fast.train``."""
    return sys.argv[0] if sys.argv[0].startswith("tal-fast ") else f"python -m tal_fast.{command.replace('-', '_')}"
