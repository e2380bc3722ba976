"""How a process ends, alone and among several."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys, threading, time
from tal_fast.utils.process import run_and_exit

class Last:  # its end is the interpreter's
    def __del__(self, write=print):
        write("interpreter taken down", flush=True)

last = Last()

def main():
    atexit.register(print, "exit handler")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread done"))).start()
    {ending}

run_and_exit(main)
"""


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("ending", "code"), [("pass", 0), ("return 3", 3), ("raise SystemExit(75)", 75), ("raise SystemExit('why')", 1)]
)
def test_a_process_among_several_ends_without_taking_its_interpreter_down(
    processes: int, ending: str, code: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(ending=ending)],
        env=os.environ | {"WORLD_SIZE": str(processes)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[:2] == ["thread done", "exit handler"]  # nothing of it is lost
    words = ending == "raise SystemExit('why')"  # the interpreter prints them
    assert ("interpreter taken down" in done.stdout) == (processes == 1 or words)
    assert ("why" in done.stderr) == words


def test_a_process_without_output_ends_as_well() -> None:
    words = (
        f"exec {sys.executable} -c 'from tal_fast.utils.process import run_and_exit; run_and_exit(lambda: 7)' >&- 2>&-"
    )
    assert subprocess.run(["sh", "-c", words], env=os.environ | {"WORLD_SIZE": "2"}, timeout=60).returncode == 7


def test_an_error_that_nobody_caught_is_seen() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(ending="raise RuntimeError('lost')")],
        env=os.environ | {"WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "RuntimeError: lost" in done.stderr
