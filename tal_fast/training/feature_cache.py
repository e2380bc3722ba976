"""Features of a frozen network, computed once and kept on disk, in place of images: ``model.cache_features``."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor, nn

from tal_fast.config.schema import Config
from tal_fast.data.augment import PixelAugmentation
from tal_fast.data.datasets import DataBundle, Split
from tal_fast.data.image_folder import ImageFiles, undecodable
from tal_fast.data.loader import IGNORED_LABEL, ImageBatch, Source, prefetch, to_device
from tal_fast.data.sampler import Batch, Plan
from tal_fast.methods import Method
from tal_fast.models import without_head
from tal_fast.runs.predictions import FEATURES_ELSEWHERE, Inference, PassOptions, feature_folder
from tal_fast.training.runtime import Runtime
from tal_fast.utils.distributed import Ranks
from tal_fast.utils.signals import Stopped, StopRequest

logger = logging.getLogger(__name__)


class FeatureBundle(DataBundle):
    """Data set whose loaders give features (B, D) float32 in place of images, once ``compute`` has been called."""

    def __init__(self, data: DataBundle, method: Method) -> None:
        if method.outliers is not None:
            raise ValueError(
                f"the method {method.name} trains on mixtures of images, but model.cache_features keeps features of "
                "whole images; set it to false"
            )
        self.__dict__.update(vars(data))
        self._data = data
        self._features: dict[int, tuple[Tensor, dict[int, str]]] = {}  # by the identity of a split

    def compute(self, network: nn.Module, config: Config, runtime: Runtime, ranks: Ranks, stop: StopRequest) -> None:
        """Read the features of the training and validation images, or compute and keep those that are missing.

        All ranks must call it. Raises Stopped when ``stop`` asks for it; what was computed until then is kept.
        """

        def check_stop() -> None:
            if number := stop.poll():
                name = signal.Signals(number).name
                raise Stopped(number, f"stopped by {name}; the features so far are kept: run the same command again")

        options = PassOptions(
            config.eval_batch_size,
            None if runtime.dtype is None else str(runtime.dtype).removeprefix("torch."),
            ranks=ranks,
            skip_unreadable=True,
            elsewhere=FEATURES_ELSEWHERE,
            after_batch=check_stop,
        )
        parts = []
        with without_head(network) as backbone, stop.while_training():
            inference = Inference(backbone, self._data, feature_folder(config, self.image_size, options.amp), options)
            for name, title in (("train-eval", "training"), ("val", "validation")):
                started = time.perf_counter()
                store = inference.store(name)
                columns = store.columns("features", "labels")
                split = self.split(name)
                parts.append(f"{len(split):,} {title} images in {time.perf_counter() - started:.1f} s")
                bad = np.flatnonzero(columns["labels"] == IGNORED_LABEL)
                self._features[id(split)] = torch.from_numpy(columns["features"]), _reasons(split, bad)
        if ranks.is_main:
            logger.info(
                "features of the frozen network, %d for each image, without random augmentation: %s; kept in %s",
                columns["features"].shape[1], " and ".join(parts), store.folder.parents[1],
            )  # fmt: skip

    def _source(
        self, images: Split, plan: Plan, device: torch.device, augment: PixelAugmentation | None = None
    ) -> Source:
        return _FeatureSource(plan, self._features, id(images), device)


def _reasons(split: Split, rows: np.ndarray) -> dict[int, str]:
    """Index -> reason of the files of a split that did not decode."""
    if not isinstance(split, ImageFiles):
        return {}
    return {i: undecodable(split, i) or f"{split.paths[i]} could not be decoded before" for i in rows.tolist()}


class _FeatureSource:
    """Source of the rows of a matrix (N, D)."""

    def __init__(
        self, plan: Plan, features: dict[int, tuple[Tensor, dict[int, str]]], split: int, device: torch.device
    ) -> None:
        self._plan, self._features, self._split, self._device = plan, features, split, device

    def steps(self, epoch: int, start_step: int, image_size: int) -> Generator[ImageBatch, None, None]:
        features, unreadable = self._features[self._split]

        def make(batch: Batch) -> ImageBatch:
            indices = torch.from_numpy(batch.indices)
            bad = {row: unreadable[i] for row, i in enumerate(indices.tolist()) if i in unreadable}
            return ImageBatch(to_device(features[indices], self._device), indices, bad)

        batches = self._plan.batches(epoch, start_step)
        return prefetch(batches, make, self._device)

    def close(self) -> None:
        pass
