"""Console output of log messages."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest

from tal_fast.utils.logs import console_logging, duration

logger = logging.getLogger("tal_fast.some.module")


def test_messages_go_to_stdout_and_warnings_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with console_logging():
        logger.info("epoch %d", 1)
        logger.debug("hidden")
        logger.warning("disk full")
        logging.getLogger("another.package").info("hidden")
    logger.info("hidden")
    assert capsys.readouterr() == ("epoch 1\n", "warning: disk full\n")


def test_a_quiet_console_shows_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    with console_logging(logging.WARNING):
        logger.info("hidden")
        logger.warning("seen")
    assert capsys.readouterr() == ("", "warning: seen\n")


def test_a_closed_terminal_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: Any) -> None:
            raise OSError("gone")

    monkeypatch.setattr(sys, "stdout", Closed())
    with console_logging():
        logger.info("unseen")


def test_durations() -> None:
    texts = ["0 s", "89 s", "2 min", "60 min", "3 h 05 min", "99 h 59 min", "4 d 4 h"]
    assert [duration(seconds) for seconds in (0.4, 89, 91, 3600, 11_100, 359_940, 360_000)] == texts
