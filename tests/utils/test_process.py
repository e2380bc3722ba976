"""Number of processes and the end of a process."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tal_fast.utils.process import run_and_exit, sentence, world_size

OLD_RUN = Path(__file__).parents[1] / "data" / "v0.1.0"

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


@pytest.mark.parametrize(
    "words",
    [
        "training.command --data.dataset synthetic --data.image-size 8 --data.crop-area null --model.name cifar_resnet8"
        " --method.name ce --device cpu --output {to}",
        "evaluation.command --npz {old}/outputs.npz --output {to}",
        "evaluation.compare_command {old}/experiment/runs/ce-label_smoothing=0.1-seed0 "
        "{old}/experiment/runs/tal-label_smoothing=0.1-t_max=40-seed0 --out {to}",
        "evaluation.calibrate_command --npz {old}/outputs.npz --score msp --risk 0.2 --output {to}",
        "data.check {images} --workers 1 --out {to}",
        "experiments.command {old}/experiment.yaml --output {to}",
    ],
)
@pytest.mark.parametrize("place", ["below a file", "full"])
def test_every_command_names_a_place_that_cannot_be_written(
    tmp_path: Path, words: str, place: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAL_FAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    target = tmp_path / "place" / "x"
    if place == "full":
        monkeypatch.setattr(os, "fsync", failing_with(errno.ENOSPC))
    else:
        target.parent.write_text("")
    module, *options = (word.format(to=target, old=OLD_RUN, images=tmp_path / "images") for word in words.split())
    main = importlib.import_module(f"tal_fast.{module}").main
    with pytest.raises(SystemExit) as caught:
        run_and_exit(lambda: main(options))
    assert caught.value.code == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert str(target.parent) in err
    assert ("No space left on device; make room" if place == "full" else "a part of the path is a file") in err


def failing_with(number: int) -> object:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_sentences_name_file_reason_and_remedy() -> None:
    assert sentence(PermissionError(errno.EACCES, "Permission denied", "/x/y")) == (
        "/x/y: Permission denied; name a place where this user may write, or change its permissions"
    )
    assert sentence(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device; make room"
    assert sentence(OSError("a message alone")) == "a message alone"
    assert sentence(ValueError("mine")) == "mine"


@pytest.mark.parametrize("error", [TimeoutError(errno.ETIMEDOUT, "timed out"), OSError("no number"), KeyError("x")])
def test_errors_that_no_file_explains_keep_their_traceback(error: Exception) -> None:
    def main() -> None:
        raise error

    with pytest.raises(type(error)):
        run_and_exit(main)


def test_an_interrupt_ends_in_a_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_and_exit(main)
    assert caught.value.code == 130
    assert capfd.readouterr().err == "stopped by Ctrl-C\n"


def test_a_reader_that_left_is_no_error() -> None:
    code = (
        "from tal_fast.utils.process import run_and_exit; run_and_exit(lambda: [print('x' * 99) for _ in range(9999)])"
    )
    done = subprocess.run(
        ["sh", "-c", f'{sys.executable} -c "{code}" | head -1'], capture_output=True, text=True, env=dict(os.environ)
    )
    assert (done.stdout, done.stderr) == ("x" * 99 + "\n", "")
