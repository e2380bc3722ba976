"""Being told to stop: noted when it comes, acted on between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import Any

REQUEUE = 75
"""Exit code after SIGTERM and SIGUSR1: saved, run the same command again. (EX_TEMPFAIL of sysexits.h.)"""

_STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class Stopped(Exception):
    """A signal ended the run early; it is saved.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number

    @property
    def exit_code(self) -> int:
        """Of the process: ``REQUEUE``, or 130 after Ctrl-C, which nobody wants run again by itself."""
        return 128 + self.signal if self.signal == signal.SIGINT else REQUEUE


class StopRequest(contextlib.AbstractContextManager["StopRequest"]):
    """Turns SIGTERM, SIGUSR1 and, while training, the first Ctrl-C into a note to stop between two steps.

    Also notes when torchrun, which started this process, is no more: the ranks it left behind would train on while
    whoever watches over the job starts it anew.

    Attributes:
        number: of the signal that came, or 0.
        training: steps are being made; before that, and at a second time, Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self.training = False
        self._depth = 0  # of with statements, the outermost of which counts
        self._before: dict[int, Any] = {}
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> StopRequest:
        self._depth += 1
        if self._depth > 1:
            return self
        with contextlib.suppress(ValueError):  # not in the main thread: whoever called it decides
            for number in _STOPPING:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def poll(self) -> int:
        """The number of the signal that came, or SIGTERM's when the launcher has gone, or 0."""
        if self._launcher is not None and os.getppid() != self._launcher:
            return self.number or signal.SIGTERM
        return self.number

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (self.number or not self.training):
            raise KeyboardInterrupt
        self.number = int(number)
