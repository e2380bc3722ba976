"""Outputs of any model, read from an ``.npz`` file."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tal_fast.config.names import KNOWN_SCORES
from tal_fast.evaluation.own_scores import check_values
from tal_fast.evaluation.pipeline import EvaluationInputs
from tal_fast.runs.prediction_store import Outputs
from tal_fast.runs.predictions import check_finite
from tal_fast.scores.features import Training
from tal_fast.utils.arrays import as_classes, as_matrix, open_npz

logger = logging.getLogger(__name__)

_SET_LOGITS = re.compile(r"(ood|shift)_(.+)_logits")
_TRAINING = ("train_features", "train_labels", "fc_weight", "fc_bias", "train_logits")


def read_npz(path: str | Path) -> EvaluationInputs:
    """Read the outputs of a model trained anywhere. Arrays with other names are ignored and named in a warning.

    Args:
        path: an ``.npz`` with

            - ``logits`` (n, C), ``labels`` (n,) integers in [0, C); optionally ``features`` (n, D);
            - ``score_NAME`` (n,), ``ood_SET_score_NAME`` (m,) and ``shift_SET_score_NAME`` (m,) of a confidence score
              of your own;
            - for each OOD set ``ood_NAME_logits`` (m, C); optionally ``ood_NAME_features`` (m, D);
            - for each shifted set ``shift_NAME_logits`` (m, C) and ``shift_NAME_labels`` (m,); optionally
              ``shift_NAME_features`` (m, D);
            - for feature scores, as far as they need them, ``train_features`` (k, D), ``train_labels`` (k,),
              ``train_logits`` (k, C), and ``fc_weight`` (C, D) and ``fc_bias`` (C,) of the last Linear layer.
    """
    arrays = _load(path)
    for name in ("logits", "labels"):
        if name not in arrays:
            raise ValueError(f"{path} has no {name!r}; it has {', '.join(arrays) or 'nothing'}")
    inputs = EvaluationInputs(_outputs(arrays, "", path))
    if taken := [name for name in inputs.id.scores if name in KNOWN_SCORES]:
        raise ValueError(f"score_{taken[0]} has the name of a score of this package; rename it")
    if slashed := [name for name in inputs.id.scores if "/" in name]:
        raise ValueError(f"score_{slashed[0]} has a '/' in the score's name, which cannot name a file; rename it")
    used = {"logits", "labels", "features", *_TRAINING, *(f"score_{name}" for name in inputs.id.scores)}
    for key in arrays:
        match = _SET_LOGITS.fullmatch(key)
        if match is None:
            continue
        kind, name = match.groups()
        prefix = f"{kind}_{name}_"
        used |= {key, f"{prefix}features"} | ({f"{prefix}labels"} if kind == "shift" else set())
        outputs = _outputs(arrays, prefix, path, labelled=kind == "shift")
        used |= {f"{prefix}score_{score}" for score in outputs.scores if score in inputs.id.scores}
        if outputs.logits.shape[1] != inputs.id.logits.shape[1]:
            raise ValueError(
                f"{key} has {outputs.logits.shape[1]} columns but logits has {inputs.id.logits.shape[1]}; "
                "they must match"
            )
        (inputs.shifts if kind == "shift" else inputs.ood)[name] = outputs
    unknown = [key for key in arrays if key not in used]
    if unknown:
        logger.warning("%s has arrays with names that are not used: %s", path, ", ".join(unknown))
    if "train_features" in arrays:
        inputs.training = Training(*(arrays.get(key) for key in _TRAINING))  # type: ignore[arg-type]
    return inputs


def _load(path: str | Path) -> dict[str, Any]:
    try:
        with open_npz(path) as arrays:
            return {name: arrays[name] for name in arrays.names}
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except ValueError as error:
        raise ValueError(f"{error}; write it with numpy.savez") from None


def _outputs(arrays: Mapping[str, Any], prefix: str, path: str | Path, labelled: bool = True) -> Outputs:
    """Outputs in the arrays ``PREFIXlogits``, ``PREFIXfeatures`` and, where the set is labelled, ``PREFIXlabels``."""
    key = f"{prefix}logits"
    logits = as_matrix(arrays[key], key)
    features = None
    if f"{prefix}features" in arrays:
        features = as_matrix(arrays[f"{prefix}features"], f"{prefix}features")
        if len(features) != len(logits):
            raise ValueError(
                f"{prefix}features has {len(features)} samples but its logits have {len(logits)}; they must match"
            )
    labels = np.full(len(logits), -1)
    if labelled:
        if f"{prefix}labels" not in arrays:
            raise ValueError(f"{path} has {key!r} but no '{prefix}labels'; a shifted set needs its labels")
        labels = as_classes(arrays[f"{prefix}labels"], logits.shape[1], f"{prefix}labels", len(logits))
    scores = {
        name.removeprefix(f"{prefix}score_"): check_values(values, len(logits), name)
        for name, values in arrays.items()
        if name.startswith(f"{prefix}score_")
    }
    outputs = Outputs(logits, features, labels, scores)
    check_finite(outputs, key)
    if not len(logits):
        logger.warning("%s of %s has no samples, so that no metric over it is defined", key, path)
    if logits.shape[1] > 1 and logits.size and logits.min() >= 0 and np.allclose(logits.sum(1, float), 1, atol=1e-2):
        logger.warning("%s of %s are probabilities but taken for logits: save numpy.log of them", key, path)
    return outputs
