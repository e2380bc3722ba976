"""Number of processes and the end of a process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tal_fast.utils.process import world_size

PROGRAM = """
import atexit, sys, threading, time
from tal_fast.utils.process import run_and_exit

class Last:  # deleted when the interpreter is finalised
    def __del__(self, write=print):
        write("interpreter finalised", flush=True)

last = Last()

def main():
    atexit.register(print, "exit handler")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread done"))).start()
    {ending}

run_and_exit(main)
"""


def test_the_number_of_processes_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "")
    assert world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert world_size() == 4


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("ending", "code"), [("pass", 0), ("return 3", 3), ("raise SystemExit(75)", 75), ("raise SystemExit('why')", 1)]
)
def test_one_process_of_several_ends_without_finalising_the_interpreter(processes: int, ending: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(ending=ending)],
        env=os.environ | {"WORLD_SIZE": str(processes)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[:2] == ["thread done", "exit handler"]  # nothing of it is lost
    words = ending == "raise SystemExit('why')"  # the interpreter prints them
    assert ("interpreter finalised" in done.stdout) == (processes == 1 or words)
    assert ("why" in done.stderr) == words


def test_a_process_without_output_streams_ends_with_its_code() -> None:
    words = (
        f"exec {sys.executable} -c 'from tal_fast.utils.process import run_and_exit; run_and_exit(lambda: 7)' >&- 2>&-"
    )
    assert subprocess.run(["sh", "-c", words], env=os.environ | {"WORLD_SIZE": "2"}).returncode == 7


def test_an_uncaught_error_is_printed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(ending="raise RuntimeError('lost')")],
        env=os.environ | {"WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "RuntimeError: lost" in done.stderr
