"""Scores and metrics of the user's own: ``FILE.py:FUNCTION``, entry points, or values beside the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tal_fast.config.names import FURTHER_METRICS, KNOWN_SCORES, METRICS, is_own_metric, is_own_score
from tal_fast.metrics.settings import ScoredSetting, means_of
from tal_fast.runs.prediction_store import Outputs
from tal_fast.scores.logits import SCORES as LOGIT
from tal_fast.utils import own_code
from tal_fast.utils.arrays import Floats, to_numpy
from tal_fast.utils.own_code import SCORES, load, running


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
    found = {}
    for name, call in functions.items():
        with running(f"your score {name}, a function of (logits, features),"):
            found[name] = call(logits, features)
    return {name: check_values(values, samples, name) for name, values in found.items()}


def score_values(name: str, outputs: Outputs) -> Floats:
    """Values of a score of logits, of one of the user's own, or of values beside the outputs."""
    if name in outputs.scores or name in LOGIT:
        return outputs.scores[name] if name in outputs.scores else LOGIT[name](outputs.logits)
    return own_scores(outputs, {name: load(name, SCORES)})[name]


def check_values(values: Any, samples: int, name: str) -> Floats:
    """Values of a score as float64; raises ValueError unless they are a number for each sample."""
    array = to_numpy(values)
    if array.shape != (samples,) or array.dtype.kind not in "fiu":
        what = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"{name} must have a number for each of {samples} samples, shape ({samples},); it has {what}")
    if (bad := np.flatnonzero(np.isnan(array))).size:
        raise ValueError(f"{name} is NaN for {bad.size} of {samples} samples, first for sample {bad[0]}; give numbers")
    return array.astype(np.float64)


def load_own(scores: Sequence[str], metrics: Sequence[str]) -> None:
    """Load the user's own among these scores and metrics; raises ValueError for one that cannot be loaded."""
    for name in filter(is_own_score, scores):
        load(name, SCORES)
    for name in filter(is_own_metric, metrics):
        load(name, own_code.METRICS)


def add_own_metrics(report: dict[str, Any], settings: Mapping[str, ScoredSetting], names: Sequence[str]) -> None:
    """Add the metrics among these names that are the user's own to a report: of each setting, and means over sets."""
    own, further = [name for name in names if is_own_metric(name)], report.setdefault("further", {})
    functions = {name.rpartition(":")[2]: load(name, own_code.METRICS) for name in own}
    for name, call in functions.items():
        if name in (*METRICS, *FURTHER_METRICS) or len(functions) < len(own):
            raise ValueError(f"your metric {name} has the name of another metric; rename it")
        sets: dict[tuple[str, str], list[float]] = {}
        for key, judged in settings.items():
            for score, values in judged.confidences().items():
                with running(f"your metric {name}, a function of (scores, correct),"):
                    value = float(call(values.copy(), judged.setting.success.astype(bool)))
                    if math.isinf(value):
                        raise ValueError("it is infinite; return NaN where it is undefined")
                for place in (key, *(mean for mean in means_of(key) if mean in report["settings"])):
                    sets.setdefault((place, score), []).append(value)
        for (place, score), found in sets.items():
            further.setdefault(place, {}).setdefault(score, {})[name] = sum(found) / len(found)
