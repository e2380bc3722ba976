"""Fuzzing of the readers of outside files: a damaged file is read, or refused in one sentence.

A test of a reader::

    @FUZZ
    @example(b"a file that failed once")
    @given(mutations(WHOLE))
    def test_damaged_files(tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x.npz").write_bytes(content)
        reads_or_refuses(read_npz, tmp_path / "x.npz")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FUZZ = settings(
    max_examples=25,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
"""Settings of the fast suite: the same examples every time, so failures found by longer runs are kept as @example."""


@st.composite
def mutations(draw: st.DrawFn, data: bytes) -> bytes:
    """Strategy for damaged versions of a file: truncated, with flipped bits, with a piece replaced by another piece of
    it or by random bytes, empty, or random bytes altogether."""
    kind = draw(st.sampled_from(["truncate", "flip", "splice", "overwrite", "empty", "random"]))
    if kind == "empty" or not data:
        return b""
    if kind == "random":
        return draw(st.binary(max_size=200))
    # Formats have their headers at the ends, where damage does most.
    near_end = st.integers(0, min(len(data), 256) - 1)
    position = st.one_of(st.integers(0, len(data) - 1), near_end, near_end.map(lambda i: len(data) - 1 - i))
    if kind == "truncate":
        return data[: draw(position)]
    changed = bytearray(data)
    if kind == "flip":
        for at in draw(st.lists(position, min_size=1, max_size=8)):
            changed[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == "splice":
        first, second = draw(position), draw(position)
        changed[first:] = data[second:]
    else:
        at = draw(position)
        piece = draw(st.one_of(st.binary(min_size=1, max_size=16), st.sampled_from([b"\xff" * 8, bytes(8)])))
        changed[at : at + len(piece)] = piece
    return bytes(changed)


def reads_or_refuses(reader: Callable[[Path], Any], path: Path) -> bool:
    """Whether a reader takes a file; anything but a value or a ValueError of one line is a failure."""
    message = None
    try:
        reader(path)
    except ValueError as error:
        message = str(error)
    assert message is None or (message.strip() and "\n" not in message), repr(message)
    return message is None
