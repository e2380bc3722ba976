"""How typical each training image is for a finished TAL run: its distance to the checkpoint's queue.

In training, typicalness compares a sample with its batch; here the least and the largest distance are those of the
whole training set, so that the figures of two images can be compared.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import tal_fast
from tal_fast.config.schema import Config
from tal_fast.data.loader import IGNORED_LABEL
from tal_fast.evaluation import predictions as inference
from tal_fast.loss.queue import FeatureQueue
from tal_fast.loss.reference import RANGE_EPS, feature_statistics
from tal_fast.metrics.failure import Floats, Ints
from tal_fast.runs import checkpoint as checkpoints
from tal_fast.runs.load import Run
from tal_fast.utils.io import replacing

FILE = "typicalness.npz"
_QUEUE = "loss_fn.queue."


class TrainingTypicalness(NamedTuple):
    """Of each training image, without augmentation, in the order of the split ``train-eval``.

    Attributes:
        distance: (n,) float64 to the nearest entry of the queue; not finite where the features are not, and NaN for a
            file that does not decode.
        typicalness: (n,) float64, 1 for the nearest image and 0 for the farthest; 1 where the distance is not finite.
        prediction: (n,) int64, the model's.
        queue_length: entries that the images were compared with.
    """

    distance: Floats
    typicalness: Floats
    prediction: Ints
    queue_length: int


def queue_of(content: dict[str, Any]) -> FeatureQueue:
    """The queue in a TAL run's checkpoint; those of several ranks merged, as all of them hold past samples.

    Args:
        content: from ``tal_fast.runs.checkpoint.load``.

    Raises:
        ValueError: the checkpoint has no queue, an empty one, or one that is damaged.
    """
    ranks = content["ranks"]
    if Config.from_dict(content["config"]).method.options.get("queue_scope") == "global":
        ranks = ranks[:1]  # every rank holds the same queue
    means, stds = [], []
    for rank in ranks:
        state = {k.removeprefix(_QUEUE): v for k, v in rank["method"].items() if k.startswith(_QUEUE)}
        if not state:
            raise ValueError("the checkpoint holds no queue: the run's method is not TAL")
        queue = FeatureQueue(max(1, state["mean"].numel()), dtype=state["mean"].dtype)
        try:
            queue.load_state_dict(state)
        except RuntimeError as problem:
            raise ValueError(f"the checkpoint's queue cannot be read: {problem}") from None
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
    """Typicalness from distances (paper, equation 3), with minimum and maximum over all of them.

    (n,) -> (n,); 1 where the distance is not finite.
    """
    finite = np.isfinite(distance)
    if not finite.any():
        return np.ones_like(distance)
    nearest, farthest = distance[finite].min(), distance[finite].max()
    return np.where(finite, 1 - (np.where(finite, distance, nearest) - nearest) / (farthest - nearest + RANGE_EPS), 1.0)


def training_typicalness(
    run: Run, cache: str | Path, *, batch_size: int = 256, device: torch.device | str = "cpu"
) -> TrainingTypicalness:
    """One pass over the training images; 16 bytes an image are kept, in memory and in the cache.

    Args:
        run: a TAL run.
        cache: folder that keeps the result for these weights, this queue and these data.
        batch_size, device: of the pass, if there has to be one.

    Raises:
        ValueError: a run without a queue, or data that have gone.
    """
    queue = queue_of(checkpoints.load(run.checkpoint))
    split = run.data.split("train-eval")
    contents = hashlib.sha256(torch.stack(queue.contents()).double().numpy().tobytes()).hexdigest()
    key = inference.cache_key(
        tal_fast.__version__,
        inference.weights_hash(run.model),
        json.dumps(run.config.to_dict()["data"], sort_keys=True),
        run.data.loader_name,
        inference.split_hash(split),
        contents,
    )
    path = Path(cache) / FILE
    kept = _load(path, key)
    if kept is None:
        kept = _measure(run, queue, len(split), batch_size, device)
        try:
            with replacing(path) as temporary:
                np.savez(temporary, key=np.array(key), distance=kept[0], prediction=kept[1])
        except OSError as problem:
            print(f"note: the typicalness could not be kept in {path} ({problem})", file=sys.stderr)
    distance, prediction = kept
    return TrainingTypicalness(distance, rescale(distance), prediction, len(queue))


def _measure(run: Run, queue: FeatureQueue, n: int, batch_size: int, device: torch.device | str) -> tuple[Floats, Ints]:
    distance, prediction = np.full(n, np.nan), np.full(n, -1, dtype=np.int64)
    run.model.eval().to(device)
    # Files that do not decode are left out here as they were in training.
    loader = run.data.loader("train-eval", batch_size=batch_size, device=device, skip_unreadable=True)
    with torch.inference_mode():
        for images, labels, indices in tqdm(loader, desc="typicalness", disable=None, leave=False):
            logits, features = run.model(images.to(device, non_blocking=True))
            mean, std = feature_statistics(features, queue.dtype)
            rows = indices.cpu().numpy()
            found = queue.nearest(mean.cpu(), std.cpu()).double()
            distance[rows] = torch.where(labels.cpu() == IGNORED_LABEL, torch.nan, found).numpy()
            prediction[rows] = logits.argmax(dim=1).cpu().numpy()
    if (prediction < 0).any():
        raise ValueError(f"the loader left out {int((prediction < 0).sum())} of {n} training images")
    return distance, prediction


def _load(path: Path, key: str) -> tuple[Floats, Ints] | None:
    try:
        with np.load(path, allow_pickle=False) as data:
            return (data["distance"], data["prediction"]) if str(data["key"]) == key else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as problem:
        print(f"note: {path} cannot be read ({problem}); computing it again", file=sys.stderr)
        return None
