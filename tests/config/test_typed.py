"""Conversion of plain values to annotated types."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from tal_fast.config.typed import read


@dataclass
class Inner:
    size: int = 3


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    rate: float | None = None


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (float, "1e-3", 0.001),  # PyYAML reads it as text
        (float, 3, 3.0),
        (float | None, None, None),
        (bool, False, False),
        (Any, {"a": [1]}, {"a": [1]}),
        (Literal[1, 3], 3, 3),
        (tuple[float, float], [1, 2], (1.0, 2.0)),
        (list[tuple[int, int]], [[0, 128], [4, 160]], [(0, 128), (4, 160)]),
        (list[str], [3, "7"], ["3", "7"]),
        (dict[str, str], {"a": "/a"}, {"a": "/a"}),
        (Outer, {"inner": {"size": 4}}, Outer(Inner(4))),
    ],
)
def test_values_get_their_annotated_type(kind: Any, value: Any, expected: Any) -> None:
    got = read(kind, value, "x")
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("kind", "value", "sentence"),
    [
        (int, 3.5, "x is 3.5 but must be a whole number"),
        (int, True, "x is True but must be a whole number"),
        (float, True, "x is True but must be a finite number"),
        (float, "fast", "x is 'fast' but must be a finite number"),
        (bool, 1, "x is 1 but must be true or false"),
        (int, None, "x is None but must be a whole number"),
        (Literal["a", "b"], "c", "x is 'c'; use 'a' or 'b'"),
        (Literal[1, 3], True, "x is True; use 1 or 3"),
        (tuple[float, float], [1.0], r"x is [1.0] but must be tuple[float, float]"),
        (list[int] | None, 3, "x is 3 but must be list[int]"),
        (dict[str, str], [], "x is [] but must be dict[str, str]"),
        (dict[str, str], {"a": 1}, "x is 1 but must be text"),
        (Outer, {"inner": 3}, "x.inner is 3 but must be a mapping"),
        (Outer, {"inner": {"siz": 3}}, "x.inner.siz is not an option; there are x.inner.size"),
    ],
)
def test_wrong_types_and_names_are_refused_by_name(kind: Any, value: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared in full
        read(kind, value, "x")
    assert str(caught.value) == sentence
