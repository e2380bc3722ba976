"""Confidence scores of the user's own: ``FILE.py:FUNCTION``, entry points of packages, or values beside the outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tal_fast.config.names import KNOWN_SCORES, is_own_score
from tal_fast.runs.prediction_store import Outputs
from tal_fast.utils.arrays import Floats, to_numpy
from tal_fast.utils.own_code import SCORES, load


def report_names(names: Sequence[str], beside: Iterable[str]) -> tuple[list[str], dict[str, Callable[..., Any]]]:
    """Names of scores as the report has them, and the functions among them by their names.

    ``beside`` are names of values beside the outputs; those that are no score of this package are added.
    """
    short = {name: name.rpartition(":")[2] if is_own_score(name) else name for name in names}
    added = [name for name in beside if name not in KNOWN_SCORES]
    functions = {short[name]: load(name, SCORES) for name in names if is_own_score(name)}
    found = [*short.values(), *added]
    for name in (*functions, *added):
        if name in KNOWN_SCORES or found.count(name) > 1:
            raise ValueError(f"your score {name} has the name of another score; rename it")
    return found, functions


def own_scores(outputs: Outputs, functions: Mapping[str, Callable[..., Any]]) -> dict[str, Floats]:
    """Values by name of functions of logits (n, C) float64 and features (n, D) float64, or None where unknown."""
    logits, features = (None if x is None else x.astype(np.float64) for x in (outputs.logits, outputs.features))
    samples = len(outputs.logits)
    for name, call in functions.items():
        try:
            inspect.signature(call).bind(logits, features)
        except TypeError as error:
            raise ValueError(f"your score {name} must be a function of (logits, features): {error}") from None
    return {name: check_values(call(logits, features), samples, name) for name, call in functions.items()}


def check_values(values: Any, samples: int, name: str) -> Floats:
    """Values of a score as float64; raises ValueError unless they are a number for each sample."""
    array = to_numpy(values)
    if array.shape != (samples,) or array.dtype.kind not in "fiu":
        what = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"{name} must have a number for each of {samples} samples, shape ({samples},); it has {what}")
    if (bad := np.flatnonzero(np.isnan(array))).size:
        raise ValueError(f"{name} is NaN for {bad.size} of {samples} samples, first for sample {bad[0]}; give numbers")
    return array.astype(np.float64)
