"""Outputs of a model trained anywhere, from one ``.npz``: ``read_npz("outputs.npz")``."""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tal_fast.evaluation.prediction_store import Outputs
from tal_fast.evaluation.predictions import check_finite
from tal_fast.scores.features import Training

_OF_SET = re.compile(r"(ood|shift)_(.+)_(logits|features|labels)")
_PLAIN = (
    "logits", "labels", "features", "fc_weight", "fc_bias", "train_features", "train_logits", "train_labels",
)  # fmt: skip


class NpzContent(NamedTuple):
    """What an ``.npz`` holds.

    Attributes:
        id: the ID outputs.
        ood: OOD set -> its outputs.
        shifts: shifted set -> its outputs.
        training: what scores over features are fitted on, if it is there.
    """

    id: Outputs
    ood: dict[str, Outputs]
    shifts: dict[str, Outputs]
    training: Training | None


def read_npz(path: str | Path) -> NpzContent:
    """Outputs of a model trained anywhere. Arrays of other names are not used, and named on standard error.

    Args:
        path: an ``.npz`` with

            - ``logits`` (n, C), ``labels`` (n,) integers in [0, C); optionally ``features`` (n, D);
            - for each OOD set ``ood_NAME_logits`` (m, C); optionally ``ood_NAME_features`` (m, D);
            - for each shifted set ``shift_NAME_logits`` (m, C) and ``shift_NAME_labels`` (m,); optionally
              ``shift_NAME_features`` (m, D);
            - for scores over features, as far as they need them, ``train_features`` (k, D), ``train_labels`` (k,),
              ``train_logits`` (k, C), and ``fc_weight`` (C, D) and ``fc_bias`` (C,) of the last Linear layer.

    Raises:
        ValueError: the file is missing or is no such file; the sentence says what is wrong with it.
    """
    arrays = _read(path)
    for needed in ("logits", "labels"):
        if needed not in arrays:
            raise ValueError(f"{path} has no {needed!r}; it has {', '.join(arrays) or 'nothing'}")
    logits = _matrix(arrays, "logits")
    classes = logits.shape[1]
    found = Outputs(logits, _features(arrays, "features", len(logits)), _labels(arrays, "labels", "logits", classes))
    check_finite(found, "logits")
    sets: dict[str, dict[str, Outputs]] = {"ood": {}, "shift": {}}
    unused = [key for key in arrays if key not in _PLAIN]
    for key in arrays:
        match = _OF_SET.fullmatch(key)
        if match is None or match[3] != "logits":
            continue
        kind, name = match[1], match[2]
        of_set = _matrix(arrays, key)
        if of_set.shape[1] != classes:
            raise ValueError(f"{key} has {of_set.shape[1]} columns but logits has {classes}; they must match")
        features = _features(arrays, f"{kind}_{name}_features", len(of_set))
        labels = np.full(len(of_set), -1)
        if kind == "shift":
            if f"shift_{name}_labels" not in arrays:
                raise ValueError(f"{path} has {key!r} but no 'shift_{name}_labels'; a shifted set needs its labels")
            labels = _labels(arrays, f"shift_{name}_labels", key, classes)
        sets[kind][name] = Outputs(of_set, features, labels)
        check_finite(sets[kind][name], key)
        used = ["logits", "features", *(["labels"] if kind == "shift" else [])]
        unused = [k for k in unused if k not in [f"{kind}_{name}_{what}" for what in used]]
    if unused:
        print(f"note: {path} has arrays of names that mean nothing here: {', '.join(unused)}", file=sys.stderr)
    training = None
    if "train_features" in arrays:
        keys = ("train_labels", "fc_weight", "fc_bias", "train_logits")
        training = Training(arrays["train_features"], *(arrays.get(key) for key in keys))
    return NpzContent(found, sets["ood"], sets["shift"], training)


def _read(path: str | Path) -> dict[str, Any]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as problem:
        raise ValueError(
            f"{path} cannot be read as .npz without pickle ({problem}); write it with numpy.savez"
        ) from None


def _labels(arrays: Mapping[str, Any], name: str, of: str, classes: int) -> Any:
    labels, samples = arrays[name], len(arrays[of])
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"{name} must be (n,) integers, not {labels.dtype} of shape {labels.shape}")
    if len(labels) != samples:
        raise ValueError(f"{of} has {samples} samples but {name} has {len(labels)}; they must match")
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if outside.size:
        raise ValueError(
            f"{name} must lie in 0..{classes - 1}, the columns of {of}; {labels[outside[0]]} (index {outside[0]}) does "
            f"not"
        )
    return labels.astype(np.int64)


def _matrix(arrays: Mapping[str, Any], name: str) -> Any:
    matrix = arrays[name]
    if matrix.ndim != 2 or matrix.shape[1] == 0 or matrix.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be an (n, C) array of real numbers, not {matrix.dtype} of shape {matrix.shape}")
    # Scores are computed in float64 anyway; argmax and isfinite need no wider copy.
    return matrix


def _features(arrays: Mapping[str, Any], name: str, samples: int) -> Any:
    if name not in arrays:
        return None
    features = _matrix(arrays, name)
    if len(features) != samples:
        raise ValueError(f"{name} has {len(features)} samples but its logits have {samples}; they must match")
    return features
