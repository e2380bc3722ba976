"""Scores and predictions of every sample, as written to ``samples.npz``.

The file holds ``right`` (n,), whether each ID sample is classified correctly, ``id/SCORE`` (n,) and ``ood/SET/SCORE``
(m,); for shifted sets ``shift/SET/SCORE`` and ``shift-right/SET``; for each split (``val`` and the OOD sets)
``label/SPLIT``, ``prediction/SPLIT``, ``probability/SPLIT`` and ``index/SPLIT``; all in the order of the data.
``identity`` maps each split to a hash of its samples, from which it is known whether two files are about the same
samples; the key of a shifted set is ``shift/SET``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tal_fast.metrics.settings import Mix, ScoredSetting, Shifts, scored_settings
from tal_fast.runs.prediction_store import Outputs
from tal_fast.scores.logits import msp
from tal_fast.utils.arrays import Floats, Ints, open_npz
from tal_fast.utils.io import replacing

FILE = "samples.npz"
_PREDICTION_ARRAYS = ("label", "prediction", "probability", "index")


@dataclass(frozen=True)
class Predictions:
    """Predictions for one split."""

    label: Ints  # (n,) int64; −1 in OOD sets
    prediction: Ints  # (n,) int64, the class of the largest logit (the first on ties)
    probability: Floats  # (n,) float64, softmax probability of the predicted class
    index: Ints  # (n,) int64, position of each sample in the split

    @classmethod
    def from_outputs(cls, outputs: Outputs, index: Ints | None = None) -> Predictions:
        """Predictions from the outputs on a split, or on the samples of a split at ``index``."""
        # The softmax of a single logit may exceed 1 by a rounding error.
        probability = np.minimum(msp(outputs.logits), 1)
        prediction = outputs.logits.argmax(axis=1).astype(np.int64)
        index = np.arange(len(prediction)) if index is None else index
        return cls(outputs.labels, prediction, probability, index)

    def __len__(self) -> int:
        return len(self.label)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(n,) bool, whether the prediction is the label."""
        return np.asarray(self.label == self.prediction)


@dataclass(frozen=True)
class Samples:
    """Scores and predictions of every sample of an evaluation."""

    correct: NDArray[np.bool_]  # (n,) bool, whether each ID sample is classified correctly
    id_scores: Mapping[str, Floats]  # score -> (n,) float64
    ood_scores: Mapping[str, Mapping[str, Floats]]  # OOD set -> score -> (m,) float64
    identity: Mapping[str, str]  # split -> hash of its samples; ``val`` is the ID split
    predictions: Mapping[str, Predictions] = field(default_factory=dict)  # split -> predictions for its samples
    # Shifted set -> (m,) bool, whether each sample is classified correctly, and score -> (m,) float64.
    shifts: Shifts = field(default_factory=dict)
    digest: str | None = None  # SHA-256 of the file they were read from

    def settings(self, mix: Mix, seed: int) -> dict[str, ScoredSetting]:
        """All settings of these samples, see ``tal_fast.metrics.settings.scored_settings``."""
        return scored_settings(self.correct, self.id_scores, self.ood_scores, self.shifts, mix, seed)

    def with_score(self, score: str) -> Samples:
        """Copy of the samples with a single score."""
        return replace(
            self,
            id_scores={score: self.id_scores[score]},
            ood_scores={name: {score: scores[score]} for name, scores in self.ood_scores.items()},
            shifts={name: (correct, {score: scores[score]}) for name, (correct, scores) in self.shifts.items()},
        )


def identity_of(values: Any) -> str:
    """SHA-256 of an array, the identity of a split's samples where nothing better is known."""
    array = np.ascontiguousarray(values)
    return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()


def write_samples(samples: Samples, path: str | Path) -> str:
    """Write ``samples.npz`` atomically and return its SHA-256."""
    arrays: dict[str, Any] = {"right": np.asarray(samples.correct, dtype=bool)}
    arrays |= {f"id/{score}": values for score, values in samples.id_scores.items()}
    for name, scores in samples.ood_scores.items():
        arrays |= {f"ood/{name}/{score}": values for score, values in scores.items()}
    for name, (correct, scores) in samples.shifts.items():
        arrays[f"shift-right/{name}"] = np.asarray(correct, dtype=bool)
        arrays |= {f"shift/{name}/{score}": values for score, values in scores.items()}
    for name, predictions in samples.predictions.items():
        arrays |= {f"{array}/{name}": getattr(predictions, array) for array in _PREDICTION_ARRAYS}
    arrays["identity"] = np.array(json.dumps(dict(samples.identity)))
    with replacing(path) as temporary:
        np.savez(temporary, **arrays)
        return _digest(temporary)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_samples(path: str | Path) -> Samples | None:
    """Read the ``samples.npz`` in the folder of a report, or beside a file in it; None if there is none."""
    path = Path(path)
    path = (path if path.is_dir() else path.parent) / FILE
    if not path.is_file():
        return None
    try:
        with open_npz(path) as data:
            arrays = {name: data[name] for name in data.names}
        predictions = {
            split: Predictions(**{name: arrays[f"{name}/{split}"] for name in _PREDICTION_ARRAYS})
            for split in (key.removeprefix("prediction/") for key in arrays if key.startswith("prediction/"))
        }
        return Samples(
            correct=arrays["right"],
            id_scores={key.removeprefix("id/"): values for key, values in arrays.items() if key.startswith("id/")},
            ood_scores=_scores_by_set(arrays, "ood/"),
            identity=json.loads(str(arrays["identity"])),
            predictions=predictions,
            shifts={
                name: (arrays[f"shift-right/{name}"], scores)
                for name, scores in _scores_by_set(arrays, "shift/").items()
            },
            digest=_digest(path),
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error}); evaluate again to write it anew") from None


def _scores_by_set(arrays: Mapping[str, Any], prefix: str) -> dict[str, dict[str, Floats]]:
    """Set -> score -> values, from the arrays named ``PREFIXSET/SCORE``; the name of a set may contain slashes."""
    sets: dict[str, dict[str, Floats]] = {}
    for key, values in arrays.items():
        if key.startswith(prefix):
            name, _, score = key.removeprefix(prefix).rpartition("/")
            sets.setdefault(name, {})[score] = values
    return sets
