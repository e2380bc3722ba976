"""Graceful shutdown on signals."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

REQUEUE = 75
"""Exit code after SIGTERM and SIGUSR1: saved, run the same command again (EX_TEMPFAIL of sysexits.h)."""

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class Stopped(Exception):
    """Exception that ends a saved run early because of a signal, whose number is ``signal``."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number

    @property
    def exit_code(self) -> int:
        """Exit code of the process: ``REQUEUE``, or 130 after Ctrl-C, so that a scheduler does not run it again."""
        return 128 + self.signal if self.signal == signal.SIGINT else REQUEUE


class StopRequest(contextlib.AbstractContextManager["StopRequest"]):
    """Signal handler that records SIGTERM, SIGUSR1 and Ctrl-C for the training loop to poll between two steps.

    The death of the torchrun process that started this one counts as SIGTERM: otherwise orphaned ranks would train on
    while a scheduler starts the job anew. May be entered more than once; the outermost ``with`` installs the handlers.
    """

    def __init__(self) -> None:
        self.number = 0  # the signal received, or 0
        # Whether training steps are running. Before that, and on the second time, Ctrl-C raises KeyboardInterrupt.
        self.training = False
        self._depth = 0
        self._previous: dict[int, Any] = {}
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @contextlib.contextmanager
    def while_training(self) -> Iterator[None]:
        """Record Ctrl-C too, for ``poll``."""
        self.training = True
        try:
            yield
        finally:
            self.training = False

    def __enter__(self) -> StopRequest:
        self._depth += 1
        if self._depth > 1:
            return self
        with contextlib.suppress(ValueError):  # not the main thread, which alone may install handlers
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._record)
        if self._launcher is not None:
            threading.Thread(target=self._end_without_launcher, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def poll(self) -> int:
        """The signal received, SIGTERM if the launcher has died, or 0."""
        if self._launcher is not None and os.getppid() != self._launcher:
            return self.number or signal.SIGTERM
        return self.number

    def _end_without_launcher(self) -> None:
        """End the process if its launcher dies before training: it would wait minutes for a store that is gone."""
        while self._depth and not self.training:
            if os.getppid() != self._launcher:
                sys.stderr.write("torchrun has died before training began; run the same command again\n")
                os._exit(REQUEUE)
            time.sleep(0.2)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (self.number or not self.training):
            raise KeyboardInterrupt
        self.number = int(number)
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            # Not print, which may be interrupted in the middle of its own output.
            os.write(2, b"\nCtrl-C: finishing the step and saving; press again to quit at once\n")
