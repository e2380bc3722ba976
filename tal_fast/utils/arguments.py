"""Command-line parsing shared by the commands."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

HELP_WIDTH = 100
"""Largest number of columns of the help."""


def help_formatter(prog: str) -> argparse.HelpFormatter:
    """Formatter of every command's help, at most ``HELP_WIDTH`` columns wide."""
    return argparse.HelpFormatter(prog, max_help_position=30, width=min(HELP_WIDTH, shutil.get_terminal_size().columns))


class ArgumentParser(argparse.ArgumentParser):
    """Argument parser that reads ``--batch_size`` as ``--batch-size``, and names a mistake in one sentence."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=help_formatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([with_hyphens(word) for word in words], namespace)


def with_hyphens(word: str) -> str:
    """A word of the command line with hyphens in the option's name; other words are unchanged."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def checked(convert: Callable[[str], T]) -> Callable[[str], T]:
    """A ``type`` for ``add_argument`` that shows the message of the ValueError ``convert`` raises."""

    def convert_argument(text: str) -> T:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert_argument


def at_least(minimum: int) -> Callable[[str], int]:
    """A ``type`` for ``add_argument``: a whole number not below ``minimum``."""
    return checked(lambda text: whole_number(text, minimum))


def add_pass_options(group: Any, images: int = 256) -> None:
    """Add ``--batch-size`` and ``--device`` of passes of a network over images."""
    group.add_argument("--batch-size", type=at_least(1), default=images, help="Images per step. Default: %(default)s.")
    group.add_argument("--device", default="auto", help="auto (a GPU if any), cpu, cuda, cuda:1, ... Default: auto.")


def whole_number(text: str, minimum: int) -> int:
    """The number that ``text`` spells; raises ValueError below ``minimum`` or if it is not a whole number."""
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"must be a whole number, not {text!r}") from None
    if value < minimum:
        raise ValueError(f"must be at least {minimum}, not {value}")
    return value
