"""One pass of a model over a split: logits, features and labels, kept on disk so that no score asks for a second.

``Inference(model, data, cache).store("val")`` runs what is not there yet and gives the split's ``OutputStore``. Outputs
are kept under a hash of what they came from: the weights, the images, how these are read, the precision. Under torchrun
each rank runs its share.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import tal_fast
from tal_fast.data.corruptions import Corruption
from tal_fast.data.datasets import DataBundle, MemoryImages, Split
from tal_fast.evaluation.prediction_store import Outputs, OutputStore, ShardWriter
from tal_fast.metrics.failure import Ints
from tal_fast.utils.distributed import Ranks

if TYPE_CHECKING:
    from tal_fast.runs.load import Run

CACHE = "eval-cache"
"""Folder of a run's outputs; it can be deleted at any time."""
AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def check_finite(outputs: Outputs, name: str, indices: Ints | None = None) -> None:
    """Refuse NaN and infinity: they have no confidence.

    Args:
        outputs: to look at.
        name: of the split or array.
        indices: (n,) of the samples in the split; 0..n−1 unless given.

    Raises:
        ValueError: names the first of them.
    """
    for what, values in (("logits", outputs.logits), ("features", outputs.features)):
        if values is None:
            continue
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if bad.size:
            first = bad[0] if indices is None else indices[bad].min()
            raise ValueError(
                f"the {what} of sample {first} of {name!r} are not finite; training may have diverged: evaluate an "
                f"earlier checkpoint, or leave such samples out"
            )


def run_model(
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device | str = "cpu",
    name: str = "",
    amp: str | None = None,
    show: bool = True,
    steps: int | None = None,
) -> Iterator[tuple[Ints, Outputs]]:
    """Run a model over the batches of a loader.

    Args:
        model: ``model(images)`` returns ``(logits, features)``; put into eval mode here and left in it.
        loader: yields ``(images, labels, indices)``.
        device: where to run.
        name: of the split, for the progress bar (on a terminal only) and for errors.
        amp: ``bfloat16`` or ``float16`` to run the network under autocast; None: as it is.
        show: draw a progress bar.
        steps: how many batches there are, for the bar.

    Yields:
        The batch's indices and outputs. Types narrower than float32 are widened to it.

    Raises:
        ValueError: outputs that are not finite.
    """
    from tqdm import tqdm

    model.eval().to(device)
    cast: Any = contextlib.nullcontext()
    if amp is not None:
        cast = torch.autocast(torch.device(device).type, dtype=AMP[amp])
    hidden = None if show else True  # None: where there is no terminal
    for images, labels, indices in tqdm(loader, name or "inference", leave=False, disable=hidden, total=steps):
        with torch.inference_mode(), cast:
            logits, features = model(images.to(device, non_blocking=True))
        outputs = Outputs(_wide(logits), _wide(features), labels.cpu().long().numpy())
        index = indices.cpu().long().numpy()
        check_finite(outputs, name, index)
        yield index, outputs


def _wide(values: Tensor) -> Any:
    return (values.cpu() if values.dtype == torch.float64 else values.float().cpu()).numpy()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a model's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def split_hash(split: Split) -> str:
    """SHA-256 of a split: paths, sizes and times of change of image files, or pixels in memory; and the labels.

    Raises:
        ValueError: an image file has gone.
    """
    digest = hashlib.sha256(np.ascontiguousarray(split.labels).tobytes())
    if isinstance(split, MemoryImages):
        digest.update(str(split.pixels.shape).encode())
        digest.update(np.ascontiguousarray(split.pixels).data)
        if split.rows is not None:
            digest.update(np.ascontiguousarray(split.rows).data)
        return digest.hexdigest()
    for path in split.paths:
        try:
            found = os.stat(path)
        except OSError as problem:
            raise ValueError(f"{path} cannot be read ({problem.strerror}); put it back or evaluate again") from None
        digest.update(f"{path}\0{found.st_size} {found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def cache_key(*parts: str) -> str:
    """A hash of what a pass depends on: a weights hash, a description of the data, versions."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def cache_path(folder: str | Path, split: str) -> Path:
    """Where a split's store is; any name of a split makes a legal folder name, and no two the same."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", split)
    return Path(folder) / (plain if plain == split and plain.strip(".") else f"{plain}-{cache_key(split)[:8]}")


@dataclass
class Inference:
    """A model's passes over the splits of a data set.

    Attributes:
        model: images (B, C, S, S) -> logits (B, classes), features (B, D).
        data: whose splits it is run over, and how images are read.
        cache: folder of the stores; it can be deleted at any time. Where it cannot be written, outputs go to a
            temporary folder and are gone with this object.
        ranks: this process among those that share the work. They have to share ``cache`` too.
        batch_size: images of a step on this rank.
        amp: ``bfloat16`` or ``float16``: of the network only. Outputs are float32 or wider in any case.
        features: keep them; without, only scores over logits can be had.
    """

    model: nn.Module
    data: DataBundle
    cache: str | Path
    ranks: Ranks = field(default_factory=lambda: Ranks(0, 1, torch.device("cpu")))
    batch_size: int = 256
    amp: str | None = None
    features: bool = True
    _temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    @cached_property
    def _of_model(self) -> str:
        # What decides the outputs beside the images of a split. Reading with more workers changes nothing.
        config = {k: v for k, v in vars(self.data.config).items() if k not in ("workers", "ood")}
        return cache_key(
            tal_fast.__version__,
            weights_hash(self.model),
            json.dumps(config, sort_keys=True),
            self.data.loader_name,
            self.data.interpolation,
            str(self.amp),
        )

    def store(self, name: str, images: Split | None = None, corruption: Corruption | None = None) -> OutputStore:
        """The outputs of a split; what is not kept yet is computed first. All ranks have to call it alike.

        Args:
            name: of the split, for the cache and for messages.
            images: the split; the data set's of that name unless given.
            corruption: done to the images before the model sees them.

        Raises:
            ValueError: no such split, an image that has gone or does not decode, outputs that are not finite, a loader
                that gives a sample twice or not at all, or ranks that do not share the cache.
        """
        images = self.data.split(name) if images is None else images
        if not len(images):
            raise ValueError(f"the split {name!r} has no samples")
        key = cache_key(self._of_model, split_hash(images), str(corruption))
        store = self._prepared(name, key, len(images))
        missing = store.missing()
        self.ranks.barrier()  # nobody writes before everybody knows what is missing
        if missing.size:
            self._run(store, name, images, missing, corruption)
            self.ranks.barrier()
            left = store.missing()
            if left.size:
                raise ValueError(
                    f"{len(left)} of {len(images)} samples of {name!r} are missing in {store.folder} after the pass; "
                    f"all ranks must share that folder: name another with --cache"
                )
        return store

    def _prepared(self, name: str, key: str, samples: int) -> OutputStore:
        store = OutputStore(cache_path(self._temporary.name if self._temporary else self.cache, name), key, samples)
        try:
            self.ranks.on_main(lambda: self._prepare(store))
        except ValueError as problem:
            if self.ranks.world_size > 1 or self._temporary is not None:
                raise
            print(f"note: {problem}; outputs go to a temporary folder", file=sys.stderr)
            self._temporary = tempfile.TemporaryDirectory(prefix="tal-fast-")
            return self._prepared(name, key, samples)
        return store

    def _prepare(self, store: OutputStore) -> None:
        try:
            store.prepare(self.features)
        except OSError as problem:
            raise ValueError(
                f"outputs cannot be kept in {store.folder} ({problem}); name another folder with --cache"
            ) from None

    def _run(self, store: OutputStore, name: str, images: Split, missing: Ints, corruption: Corruption | None) -> None:
        loader = self.data.loader(
            images if missing.size == len(images) else images.subset(missing),
            batch_size=self.batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            device=self.ranks.device,
        )
        batches = _renumbered(loader, missing)
        if corruption is not None:
            batches = corruption.of_batches(batches, *self.data.config.normalization())
        show, steps = self.ranks.is_main, len(loader)
        writer = ShardWriter(store)
        try:
            for indices, outputs in run_model(self.model, batches, self.ranks.device, name, self.amp, show, steps):
                writer.add(indices, outputs if self.features else Outputs(outputs.logits, None, outputs.labels))
        finally:
            writer.flush()  # what an unreadable image ends need not be computed again


def _renumbered(loader: Iterable[Any], indices: Ints) -> Iterator[Any]:
    """A loader over a part of a split, with the indices its samples have in the whole."""
    for images, labels, places in loader:
        yield images, labels, torch.from_numpy(indices)[places.cpu()]


def inference_of(run: Run, cache: str | Path, **options: Any) -> Inference:
    """The passes of a run's model over its splits.

    Args:
        run: from ``tal_fast.runs.load.load_run``.
        cache: folder of the outputs; made if need be.
        options: ``ranks``, ``batch_size``, ``amp``, ``features`` of ``Inference``.
    """
    return Inference(run.model, run.data, cache, **options)


def collect_outputs(
    run: Run, split: str, cache: str | Path, *, batch_size: int = 256, device: torch.device | str = "cpu"
) -> Outputs:
    """A run's outputs on ``train-eval``, ``val`` or an OOD set, in memory; from the cache if they are there."""
    ranks = Ranks(0, 1, torch.device(device))
    name = f"ood-{split}" if split in run.data.ood_names else split
    return inference_of(run, cache, ranks=ranks, batch_size=batch_size).store(name, run.data.split(split)).load()
