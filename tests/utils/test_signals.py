"""Graceful shutdown on signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tal_fast.utils.signals import REQUEUE, Stopped, StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_recorded_while_training(number: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.training = True
        assert stop.poll() == 0
        os.kill(os.getpid(), number)
        assert stop.poll() == number
    assert signal.getsignal(number) is before


def test_ctrl_c_interrupts_at_once_before_training_and_the_second_time(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        stop.training = True
        os.kill(os.getpid(), signal.SIGINT)
        assert "Ctrl-C: finishing the step and saving; press again to quit at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_outermost_block_installs_and_restores_the_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        installed = signal.getsignal(signal.SIGTERM)
        with stop:
            assert signal.getsignal(signal.SIGTERM) == installed
        assert signal.getsignal(signal.SIGTERM) == installed
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_death_of_the_launcher_counts_as_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    stop = StopRequest()
    assert stop.poll() == 0
    launcher = os.getppid()  # 1 itself in some containers
    monkeypatch.setattr(os, "getppid", lambda: launcher + 1)
    assert stop.poll() == signal.SIGTERM


def test_a_rank_whose_launcher_dies_before_training_ends(tmp_path: Path) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import time\nfrom tal_fast.utils.signals import StopRequest\n"
        "with StopRequest():\n    print('waiting', flush=True)\n    time.sleep(60)\n"
    )
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, {str(rank)!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", launcher], env={**os.environ, "TORCHELASTIC_RUN_ID": "x"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.kill()
    # The rank holds the other end of these pipes until it ends.
    _out, err = process.communicate(timeout=30)
    assert err == "torchrun has died before training began; run the same command again\n"


def test_outside_the_main_thread_the_handlers_stay() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run() -> None:
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_exit_codes_ask_for_a_new_run_except_after_ctrl_c() -> None:
    assert [Stopped(number, "").exit_code for number in (signal.SIGTERM, signal.SIGUSR1)] == [REQUEUE, REQUEUE]
    assert REQUEUE == 75
    assert Stopped(signal.SIGINT, "").exit_code == 130
