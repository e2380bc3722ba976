"""Typicalness of each training image of a finished TAL run: its distance to the queue in the checkpoint.

During training typicalness compares a sample with its batch. Here the smallest and the largest distance are those of
the whole training set, so that images can be compared with each other.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from tal_fast.config.schema import Config
from tal_fast.data.digest import split_hash
from tal_fast.data.loader import IGNORED_LABEL
from tal_fast.loss.queue import FeatureQueue
from tal_fast.loss.reference import RANGE_EPS, feature_statistics
from tal_fast.runs import checkpoint
from tal_fast.runs.load import Run
from tal_fast.runs.predictions import cache_key, code_versions, model_hash
from tal_fast.utils.arrays import Floats, Ints, open_npz
from tal_fast.utils.io import replacing

logger = logging.getLogger(__name__)

FILE = "typicalness.npz"
"""Name of the file in a run's cache."""
_QUEUE_PREFIX = "loss_fn.queue."


class TrainTypicalness(NamedTuple):
    """Typicalness of training images without augmentation, in the order of the split ``train-eval``."""

    # (n,) float64, distance to the nearest entry of the queue; not finite where the features are not, NaN where the
    # image file does not decode.
    distance: Floats
    # (n,) float64, 1 for the nearest image and 0 for the farthest; 1 where the distance is not finite.
    typicalness: Floats
    prediction: Ints  # (n,) int64, predicted classes
    queue_length: int  # number of queue entries


def queue_of(content: dict[str, Any]) -> FeatureQueue:
    """Read the queue from the content of a TAL run's checkpoint; the local queues of several ranks are merged."""
    ranks = content["ranks"]
    if Config.from_dict(content["config"]).method.options.get("queue_scope") == "global":
        ranks = ranks[:1]  # every rank holds the same queue
    means, stds = [], []
    for rank in ranks:
        state = {
            key.removeprefix(_QUEUE_PREFIX): value
            for key, value in rank["method"].items()
            if key.startswith(_QUEUE_PREFIX)
        }
        if not state:
            raise ValueError("the checkpoint holds no queue: the run's method is not TAL")
        queue = FeatureQueue(max(1, state["mean"].numel()), dtype=state["mean"].dtype)
        try:
            queue.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"the checkpoint's queue cannot be read: {error}") from None
        mean, std = queue.contents()
        means.append(mean)
        stds.append(std)
    entries = sum(len(mean) for mean in means)
    if not entries:
        raise ValueError("the checkpoint's queue is empty: no sample had been accepted yet")
    merged = FeatureQueue(entries, dtype=means[0].dtype)
    merged.push(torch.cat(means), torch.cat(stds))
    return merged


def rescale(distance: Floats) -> Floats:
    """Typicalness (n,) from distances (n,), with minimum and maximum over all of them (TAL paper, equation 3).

    It lies in [0, 1]; 1 where the distance is not finite.
    """
    finite = np.isfinite(distance)
    if not finite.any():
        return np.ones_like(distance)
    nearest, farthest = distance[finite].min(), distance[finite].max()
    return np.where(finite, 1 - (np.where(finite, distance, nearest) - nearest) / (farthest - nearest + RANGE_EPS), 1.0)


def training_typicalness(
    run: Run, cache: str | Path, *, batch_size: int = 256, device: torch.device | str = "cpu"
) -> TrainTypicalness:
    """Measure the typicalness of a run's training images, in one pass over them unless the result is cached.

    The cached result is valid for these weights, this queue and these images.
    """
    content = checkpoint.load(run.checkpoint)
    if (content["epoch"], str(content["history"])) != (run.epoch, str(run.history)):
        raise ValueError(f"{run.checkpoint} has changed since the evaluation began")
    queue = queue_of(content)
    split = run.data.split("train-eval")
    key = cache_key(
        *code_versions(),
        model_hash(run.model),
        torch.device(device).type,
        json.dumps(run.config.to_dict()["data"], sort_keys=True),
        run.data.loader_name,
        split_hash(split),
        hashlib.sha256(torch.stack(queue.contents()).double().numpy().tobytes()).hexdigest(),
    )
    path = Path(cache) / FILE
    result = _load(path, key, len(split))
    if result is None:
        result = _measure(run, queue, len(split), batch_size, device)
        try:
            with replacing(path) as temporary:
                np.savez(temporary, key=np.array(key), distance=result[0], prediction=result[1])
        except OSError as error:
            logger.warning("the typicalness could not be kept in %s (%s)", path, error)
    distance, prediction = result
    return TrainTypicalness(distance, rescale(distance), prediction, len(queue))


def _measure(run: Run, queue: FeatureQueue, n: int, batch_size: int, device: torch.device | str) -> tuple[Floats, Ints]:
    distance, prediction = np.full(n, np.nan), np.full(n, -1, dtype=np.int64)
    run.model.eval().to(device)
    # Files that do not decode are skipped as in training.
    loader = run.data.loader("train-eval", batch_size=batch_size, device=device, skip_unreadable=True)
    with closing(loader), torch.inference_mode():
        for images, labels, indices in tqdm(loader, desc="typicalness", disable=None, leave=False):
            logits, features = run.model(images.to(device, non_blocking=True))
            mean, std = feature_statistics(features, queue.dtype)
            rows = indices.cpu().numpy()
            nearest = queue.nearest(mean.cpu(), std.cpu()).double()
            distance[rows] = torch.where(labels.cpu() == IGNORED_LABEL, torch.nan, nearest).numpy()
            prediction[rows] = logits.argmax(dim=1).cpu().numpy()
    if (prediction < 0).any():
        raise ValueError(f"the loader left out {int((prediction < 0).sum())} of {n} training images")
    return distance, prediction


def _load(path: Path, key: str, samples: int) -> tuple[Floats, Ints] | None:
    try:
        with open_npz(path) as data:
            kept, distance, prediction = str(data["key"]), data["distance"], data["prediction"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s; it is computed again", error)
        return None
    whole = distance.shape == prediction.shape == (samples,) and (distance.dtype.kind, prediction.dtype.kind) == (
        "f",
        "i",
    )
    return (distance, prediction) if kept == key and whole else None
