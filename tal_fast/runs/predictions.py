"""Passes of a model over the splits of a data set, with their outputs cached on disk.

``Inference(model, data, cache).store("val")`` computes what is not cached and returns the split's ``OutputStore``.
Outputs are cached under a hash of the network and its weights, the images, their preprocessing, the precision and the
versions of the code. Under torchrun each rank runs its share of a pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tal_fast
from tal_fast.config.schema import Config
from tal_fast.data.cache import cache_dir
from tal_fast.data.corruptions import Corruption
from tal_fast.data.datasets import DataBundle, Split
from tal_fast.data.digest import split_hash
from tal_fast.data.headers import UnreadableImage
from tal_fast.data.loader import IGNORED_LABEL
from tal_fast.models import head_path, without_head
from tal_fast.runs.prediction_store import NotKept, Outputs, OutputStore, ShardWriter, keep, remove_unused
from tal_fast.utils.arrays import Ints
from tal_fast.utils.distributed import Ranks
from tal_fast.utils.environment import version_of
from tal_fast.utils.locks import unlock

logger = logging.getLogger(__name__)

CACHE = "eval-cache"
"""Name of the cache folder in a run's folder; it can be deleted at any time."""


def check_finite(outputs: Outputs, name: str, indices: Ints | None = None) -> None:
    """Raise a ValueError that names the first sample whose logits or features are not finite, by its ``indices``."""
    for what, values in (("logits", outputs.logits), ("features", outputs.features)):
        if values is None:
            continue
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if bad.size:
            first = bad[0] if indices is None else indices[bad].min()
            reason = "training may have diverged: evaluate an earlier checkpoint, or leave such samples out"
            if (masked := (values == -np.inf).all(axis=0)).any():
                reason = f"leave class {masked.argmax()} out, which is masked: -inf in all samples"
            raise ValueError(f"the {what} of sample {first} of {name!r} are not finite; {reason}")


def run_model(
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device | str = "cpu",
    name: str = "",
    amp: str | None = None,
    show: bool = True,
    steps: int | None = None,
) -> Iterator[tuple[Ints, Outputs]]:
    """Run a model over the batches of a loader, (images, labels, indices); yields the indices and outputs of each.

    ``model(images)`` returns ``(logits, features)``; it is put into eval mode. With ``amp``, ``bfloat16`` or
    ``float16``, it runs under autocast, and outputs narrower than float32 are widened to it. ``name`` is the split's,
    for the progress bar and messages; the bar is drawn if standard error is a terminal, of ``steps`` batches, unless
    ``show`` is False.
    """
    from tqdm import tqdm

    model.eval().to(device)
    cast: Any = contextlib.nullcontext()
    if amp is not None:
        cast = torch.autocast(torch.device(device).type, dtype=getattr(torch, amp))
    hidden = None if show else True  # None hides the bar unless on a terminal
    for images, labels, indices in tqdm(loader, name or "inference", leave=False, disable=hidden, total=steps):
        with torch.inference_mode(), cast:
            logits, features = model(images.to(device, non_blocking=True))
        outputs = Outputs(_widened(logits), _widened(features), labels.cpu().long().numpy())
        index = indices.cpu().long().numpy()
        check_finite(outputs, name, index)
        yield index, outputs


def _widened(values: Tensor) -> Any:
    return (values.cpu() if values.dtype == torch.float64 else values.float().cpu()).numpy()


def model_hash(model: nn.Module) -> str:
    """SHA-256 of a model: its layers with their settings, and its state."""
    # Networks may differ in their layers alone: timm's efficientnet_b0 and tf_efficientnet_b0 pad differently.
    return cache_key(re.sub("0x[0-9a-f]+", "", str(model)), weights_hash(model))


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of a model's state: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def cache_key(*parts: str) -> str:
    """SHA-256 of everything a pass depends on."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def code_versions() -> tuple[str, ...]:
    """Versions of the code that reads images and runs networks."""
    return tal_fast.__version__, torch.__version__, *(version_of(name) for name in ("torchvision", "timm", "pillow"))


def cache_path(folder: str | Path, split: str) -> Path:
    """Path of a split's store; every split name gives a legal and unique folder name."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", split)
    return Path(folder) / (plain if plain == split and plain.strip(".") else f"{plain}-{cache_key(split)[:8]}")


@dataclass(frozen=True)
class PassOptions:
    """Options of the passes of a model over images."""

    batch_size: int = 256  # images per step on each rank
    # ``bfloat16`` or ``float16`` for autocast of the network; outputs are at least float32 in any case.
    amp: str | None = None
    features: bool = True  # keep features; without them only logit scores can be computed
    # This process among those that share the passes; all of them have to share the cache too.
    ranks: Ranks = field(default_factory=lambda: Ranks(0, 1, torch.device("cpu")))
    timeout: float | None = None  # seconds to wait for a step of the loader; by default the data set's
    skip_unreadable: bool = False  # give a file that does not decode the label -100, up to ``data.max_unreadable``
    elsewhere: str = "name another folder with --cache"  # how to keep outputs in another folder, for messages
    after_batch: Callable[[], None] = lambda: None  # may raise, to end a pass; what was computed is kept


FEATURES_ELSEWHERE = "set TAL_FAST_CACHE to another folder"


def feature_folder(config: Config, image_size: int, amp: str | None) -> Path:
    """Folder of the features that a run's frozen network gives, in the cache; it can be deleted at any time.

    Features of other weights or preprocessing replace those of the same data set, network, image size and precision.
    """
    parts = config.data.dataset, str(config.data.root), config.model.name, str(image_size), str(amp)
    return cache_dir() / "features" / cache_key(*parts)[:16]


@dataclass
class Inference:
    """Cached passes of a model over the splits of a data set."""

    model: nn.Module  # images (B, C, S, S) -> logits (B, classes), features (B, D)
    data: DataBundle  # the data set, which also defines the preprocessing
    # Folder of the stores. If it cannot be written, outputs go to a temporary folder that is deleted with this object.
    cache: str | Path
    options: PassOptions = field(default_factory=PassOptions)  # options of the passes
    # ``feature_folder`` of a model with a frozen network, which runs only for features that this does not hold.
    frozen: Path | None = None
    _temporary: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.options.timeout is not None:
            self.data.config = dataclasses.replace(self.data.config, timeout=self.options.timeout)

    def _model_key(self) -> str:
        # The workers, how long to wait for them, and the run's OOD sets do not change the outputs of a split.
        config = {k: v for k, v in vars(self.data.config).items() if k not in ("workers", "timeout", "ood")}
        return cache_key(
            *code_versions(),
            model_hash(self.model),
            json.dumps(config, sort_keys=True),
            self.data.loader_name,
            self.data.config.resampling,
            f"{self.options.amp} {self.options.ranks.device.type}",
        )

    def store(self, name: str, images: Split | None = None, corruption: Corruption | None = None) -> OutputStore:
        """Outputs of a split; what is not cached is computed first. All ranks have to make the same calls.

        ``name`` is for the cache and for messages; ``images`` are by default the data set's split of that name, and
        ``corruption`` is applied to them.
        """
        images = self.data.split(name) if images is None else images
        if not len(images):
            raise ValueError(f"the split {name!r} has no samples")
        key = cache_key(self._model_key(), split_hash(images), str(corruption))
        store = self._store(self._temporary or self.cache, name, key, images)
        try:
            return self._complete(store, name, images, corruption)
        except NotKept as error:
            if self.options.ranks.world_size > 1 or self._temporary is not None:
                raise
            logger.warning("%s; they go to a temporary folder", error)
        for path in Path(tempfile.gettempdir()).glob("tal-fast-????????"):  # of evaluations that were killed
            remove_unused(path)
        self._temporary = tempfile.mkdtemp(prefix="tal-fast-")
        weakref.finalize(self, unlock, keep(Path(self._temporary)))
        weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)
        temporary = self._store(self._temporary, name, key, images)
        temporary.prepare()
        temporary.continue_from(store)
        return self._complete(temporary, name, images, corruption)

    def _store(self, folder: str | Path, name: str, key: str, images: Split) -> OutputStore:
        options = self.options
        return OutputStore(cache_path(folder, name), key, len(images), options.features, options.elsewhere)

    def _complete(self, store: OutputStore, name: str, images: Split, corruption: Corruption | None) -> OutputStore:
        """Compute the samples that a store lacks, and return it; raises NotKept if they cannot be written."""
        ranks = self.options.ranks
        try:
            ranks.on_main(store.prepare)
        except NotKept:
            if ranks.on_main(store.missing).size:
                raise
        if ranks.on_main(store.missing).size:
            with store.only_pass(wait=ranks.world_size == 1) if ranks.is_main else contextlib.nullcontext():
                missing = ranks.on_main(lambda: store.missing(check=False))
                if missing.size:
                    self._run(store, name, images, missing, corruption)
                    ranks.barrier()
            still_missing = ranks.on_main(lambda: store.missing(check=False))
            if still_missing.size:
                raise ValueError(
                    f"{len(still_missing)} of {len(images)} samples of {name!r} are missing in {store.folder} after "
                    f"the pass; all ranks must share that folder: {self.options.elsewhere}"
                )
        return store

    def _run(self, store: OutputStore, name: str, images: Split, missing: Ints, corruption: Corruption | None) -> None:
        if self.frozen is not None:
            self._run_head(self.frozen, store, name, images, missing, corruption)
            return
        options, ranks = self.options, self.options.ranks
        if missing.size < len(images):
            images = images.subset(missing)
        loader = self.data.loader(
            images, batch_size=options.batch_size, rank=ranks.rank, world_size=ranks.world_size, device=ranks.device,
            skip_unreadable=options.skip_unreadable,
        )  # fmt: skip
        positions = torch.from_numpy(missing)  # batches of a subset get each sample's position in the whole split
        batches: Iterator[Any] = ((x, labels, positions[index.cpu()]) for x, labels, index in loader)
        if corruption is not None:
            batches = corruption.of_batches(batches, *self.data.config.normalization())
        writer = ShardWriter(store)
        try:
            for indices, outputs in run_model(
                self.model, batches, ranks.device, name, options.amp, ranks.is_main, len(loader)
            ):
                writer.add(indices, outputs if options.features else Outputs(outputs.logits, None, outputs.labels))
                options.after_batch()
        finally:
            loader.close()
            writer.flush()  # keeps what was computed before an unreadable image

    def _run_head(
        self, folder: Path, store: OutputStore, name: str, images: Split, missing: Ints, corruption: Corruption | None
    ) -> None:
        """Compute samples from the features of the frozen network."""
        options = dataclasses.replace(self.options, features=True, elsewhere=FEATURES_ELSEWHERE)
        head = self.model.get_submodule(head_path(self.model))
        with without_head(self.model) as network:
            inference = Inference(network, self.data, folder, options)
            features = inference.store(name, images, corruption)
        if not self.options.ranks.is_main:
            return
        for shard in features.shards(("indices", "features", "labels")):
            kept = np.isin(shard["indices"], missing)
            rows, labels = shard["indices"][kept], shard["labels"][kept]
            for i in rows[labels == IGNORED_LABEL]:  # left out of training
                raise UnreadableImage(
                    f"image {i} of {name!r} ({images.paths[i]}) did not decode; remove or replace it"  # type: ignore
                )
            batch = tuple(map(torch.from_numpy, (shard["features"][kept], labels, rows)))
            for indices, outputs in run_model(head, [batch], options.ranks.device, name, options.amp, False):
                wanted = outputs if self.options.features else Outputs(outputs.logits, None, outputs.labels)
                store.write(indices, wanted)
