"""The scores of every sample beside a report, for comparisons and pictures that need no model.

``samples.npz`` holds ``right`` (n,), ``id/SCORE`` (n,) and ``ood/SET/SCORE`` (m,); of shifted sets ``shift/SET/SCORE``
and ``shift-right/SET``; for each split (``val`` and the OOD sets) ``label/SPLIT``, ``prediction/SPLIT``,
``probability/SPLIT`` and ``index/SPLIT``; all in the order of the data. ``identity`` is for each split a hash of its
samples, by which two files are known to be about the same ones; a shifted set's is under ``shift/SET``.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tal_fast.evaluation.prediction_store import Outputs
from tal_fast.metrics.failure import Floats, Ints
from tal_fast.metrics.settings import Shifts
from tal_fast.scores.logits import msp
from tal_fast.utils.io import replacing

FILE = "samples.npz"
_PREDICTIONS = ("label", "prediction", "probability", "index")


@dataclass(frozen=True)
class Predictions:
    """What a model takes the samples of a split for.

    Attributes:
        label: (n,) int64; −1 in OOD sets.
        prediction: (n,) int64, the class of the largest logit (the first on ties).
        probability: (n,) float64, its softmax probability.
        index: (n,) int64, each sample's place in the split.
    """

    label: Ints
    prediction: Ints
    probability: Floats
    index: Ints

    @classmethod
    def of(cls, outputs: Outputs) -> Predictions:
        """From the outputs of a split."""
        # The softmax of a single logit may exceed 1 by a rounding.
        probability = np.minimum(msp(outputs.logits), 1)
        prediction = outputs.logits.argmax(axis=1).astype(np.int64)
        return cls(outputs.labels, prediction, probability, np.arange(len(prediction)))

    def __len__(self) -> int:
        return len(self.label)

    @property
    def right(self) -> Ints:
        """(n,) 0 or 1, whether the prediction is the label."""
        return (self.label == self.prediction).astype(np.int64)


@dataclass(frozen=True)
class Samples:
    """Scores of single samples.

    Attributes:
        right: (n,) bool, whether each ID sample is classified right.
        id_scores: score -> (n,) float64.
        ood_scores: OOD set -> score -> (m,) float64.
        identity: split -> hash of its samples; ``val`` is the ID split.
        predictions: split -> what the model takes them for.
        shifts: shifted set -> (m,) bool, which of its samples are classified right, and score -> (m,) float64.
    """

    right: NDArray[np.bool_]
    id_scores: Mapping[str, Floats]
    ood_scores: Mapping[str, Mapping[str, Floats]]
    identity: Mapping[str, str]
    predictions: Mapping[str, Predictions] = field(default_factory=dict)
    shifts: Shifts = field(default_factory=dict)


def identity_of(values: Any) -> str:
    """SHA-256 of an array: what stands for the samples of a split where nothing better is known."""
    array = np.ascontiguousarray(values)
    return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()


def write_samples(samples: Samples, path: str | Path) -> None:
    """Write a file that is whole or not there."""
    arrays: dict[str, Any] = {"right": np.asarray(samples.right, dtype=bool)}
    arrays |= {f"id/{score}": values for score, values in samples.id_scores.items()}
    for name, scores in samples.ood_scores.items():
        arrays |= {f"ood/{name}/{score}": values for score, values in scores.items()}
    for name, (right, scores) in samples.shifts.items():
        arrays[f"shift-right/{name}"] = np.asarray(right, dtype=bool)
        arrays |= {f"shift/{name}/{score}": values for score, values in scores.items()}
    for name, found in samples.predictions.items():
        arrays |= {f"{what}/{name}": getattr(found, what) for what in _PREDICTIONS}
    arrays["identity"] = np.array(json.dumps(dict(samples.identity)))
    with replacing(path) as temporary:
        np.savez(temporary, **arrays)


def read_samples(path: str | Path) -> Samples | None:
    """The samples beside a report (its folder, or a file in it), or None where there are none.

    Raises:
        ValueError: the file is there but cannot be read.
    """
    path = Path(path)
    path = (path if path.is_dir() else path.parent) / FILE
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
        identity = json.loads(str(arrays["identity"]))
        right = arrays["right"]
        splits = [key.removeprefix("prediction/") for key in arrays if key.startswith("prediction/")]
        predictions = {
            name: Predictions(**{what: arrays[f"{what}/{name}"] for what in _PREDICTIONS}) for name in splits
        }
        shifts = {name: (arrays[f"shift-right/{name}"], of) for name, of in _by_set(arrays, "shift/").items()}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as problem:
        raise ValueError(f"{path} cannot be read ({problem}); evaluate again to write it anew") from None
    id_scores = {k.removeprefix("id/"): v for k, v in arrays.items() if k.startswith("id/")}
    return Samples(right, id_scores, _by_set(arrays, "ood/"), identity, predictions, shifts)


def _by_set(arrays: Mapping[str, Any], prefix: str) -> dict[str, dict[str, Floats]]:
    """Set -> score -> values, of the arrays called ``PREFIX SET/SCORE``; a set's name may have slashes in it."""
    found: dict[str, dict[str, Floats]] = {}
    for key, values in arrays.items():
        if key.startswith(prefix):
            name, _, score = key.removeprefix(prefix).rpartition("/")
            found.setdefault(name, {})[score] = values
    return found
