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


def duration(seconds: float) -> str:
    """Text of a duration: ``47 s``, ``12 min``, ``3 h 05 min``, or ``4 d 4 h`` from 100 hours on."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24} d {hours % 24} h"
    return f"{minutes} min" if minutes < 90 else f"{hours} h {minute:02d} min"


def printable(text: str) -> str:
    r"""Text with everything escaped that does not print.

    Bytes that are not UTF-8 become ``\xff``, control and bidirectional characters ``\x1b`` and ``\u202e``.
    """
    return "".join(c if c.isprintable() else _escape_sequence(c) for c in text)


def _escape_sequence(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # surrogates stand for the bytes 0x80..0xff of a file name that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
