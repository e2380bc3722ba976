"""Conversion of plain YAML values to annotated types."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from reprlib import repr as short
from typing import Any, Literal

_EXPECTED = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
"""Names of the scalar types in messages."""


def read(kind: Any, value: Any, name: str) -> Any:
    """Convert a plain value to an annotated type.

    Args:
        kind: a dataclass, or one of its field types: ``int``, ``float``, ``bool``, ``str``, ``Any``, ``Literal``,
            ``list``, ``tuple`` and ``dict`` of these, or a union of these and None.
        value: a value as PyYAML returns it.
        name: dotted name of the option, with which error messages begin.

    Raises:
        ValueError: an unknown name or a value of the wrong type.
    """
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, name)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [arg for arg in args if arg is not type(None)]
        if len(kinds) == 1:
            return read(kinds[0], value, name)
        for arg in kinds:
            with contextlib.suppress(ValueError):
                return read(arg, value, name)
        raise ValueError(f"{name} is {short(value)} but must be {', '.join(map(_expected, kinds))}")
    if origin is Literal:
        if value not in args or type(value) not in {type(a) for a in args}:
            raise ValueError(f"{name} is {short(value)}; use {' or '.join(map(repr, args))}")
        return value
    if origin is list and isinstance(value, (list, tuple)):
        return [read(args[0], str(v) if args[0] is str and type(v) is int else v, name) for v in value]  # class 3
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(args):
        return tuple(read(a, v, name) for a, v in zip(args, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {read(args[0], k, name): read(args[1], v, name) for k, v in value.items()}
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(number := float(value)):  # PyYAML reads 1e-3 as text
                return number
    elif kind in (int, bool, str) and type(value) is kind:
        return value
    raise ValueError(f"{name} is {short(value)} but must be {_expected(kind)}")


def _expected(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return _EXPECTED.get(kind) or str(kind).replace("typing.", "")


def _read_dataclass(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{name or 'the configuration'} is {short(value)} but must be a mapping")
    kinds = field_types(kind)
    prefix = f"{name}." if name else ""
    unknown = [key for key in value if key not in kinds]
    if unknown:
        names = ", ".join(prefix + field for field in kinds) or "none"
        raise ValueError(f"{prefix}{one_line(unknown[0])} is not an option; there are {names}")
    return kind(**{key: read(kinds[key], v, prefix + key) for key, v in value.items()})


def suggestion(name: str, names: Sequence[str], otherwise: str = "") -> str:
    """End of a message on an unknown name: the known names close to it, or ``otherwise`` where none is."""
    close = difflib.get_close_matches(name, names)
    hint = f"did you mean {' or '.join(close)}?" if close else otherwise
    return f"; {hint}" if hint else ""


def one_line(text: object) -> str:
    """Text in one line, with single spaces."""
    return " ".join(str(text).split())


def field_types(kind: Any) -> dict[str, Any]:
    """Types of a dataclass's fields by name, in their order."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def not_none(kind: Any) -> Any:
    """The type that a union with None has beside None; any other type as it is."""
    kinds = [arg for arg in typing.get_args(kind) if arg is not type(None)]
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return kinds[0] if is_union and len(kinds) == 1 else kind


def to_plain(value: Any) -> Any:
    """Nested dicts, lists and scalars, as YAML and JSON hold them; tuples become lists."""
    if isinstance(value, dict):
        return {key: to_plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value


def check_at_least(name: str, value: float | None, limit: float) -> None:
    """Raise ValueError if a value is below a limit."""
    if value is not None and value < limit:
        raise ValueError(f"{name} is {value} but must be at least {limit}")


def check_positive(name: str, value: float | None, remedy: str = "") -> None:
    """Raise ValueError if a value is 0 or below."""
    if value is not None and value <= 0:
        raise ValueError(f"{name} is {value} but must be above 0{remedy}")


def check_range(name: str, value: float | None, limits: str, remedy: str = "") -> None:
    """Raise ValueError if a value is outside limits such as ``[0, 1)``."""
    low, high = map(float, limits[1:-1].split(","))
    ends = [end for end, included in ((low, limits[0] == "["), (high, limits[-1] == "]")) if included]
    if value is not None and not (low < value < high or value in ends):
        raise ValueError(f"{name} is {value} but must be in {limits}{remedy}")
