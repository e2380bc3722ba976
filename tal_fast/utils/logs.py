"""Console output of the commands: the package's log messages, as plain lines."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

logger = logging.getLogger(__name__)


class ConsoleHandler(logging.Handler):
    """Handler that prints messages on stdout, and warnings and errors on stderr, after their level (``warning: ``)."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        line = f"{record.levelname.lower()}: {record.getMessage()}\n" if warning else f"{record.getMessage()}\n"
        with contextlib.suppress(OSError):  # a closed terminal must not end a run
            stream = sys.stderr if warning else sys.stdout
            stream.write(line)  # in one piece: several ranks write at the same time
            stream.flush()


@contextlib.contextmanager
def console_logging(level: int = logging.INFO) -> Iterator[None]:
    """Print the package's messages of ``level`` and above while the ``with`` block runs."""
    logger = logging.getLogger(__name__.partition(".")[0])
    handler, before = ConsoleHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def say(message: str, level: int = logging.WARNING) -> None:
    """Log a message, once and not on every rank."""
    if int(os.environ.get("RANK") or 0) == 0:
        logger.log(level, "%s", message)
