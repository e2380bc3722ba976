"""What a model says about a split, on disk in shards: a pass that was killed goes on where it stood.

A store is a folder that holds ``store.json`` (what its content depends on) and ``.npz`` shards of some tens of
megabytes, each written whole or not at all. Which samples are there is what the shards say, so ranks need not agree on
anything but the folder, and a pass may be finished by another number of ranks than began it. No reader holds more than
a shard unless it asks for everything.
"""

from __future__ import annotations

import json
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tal_fast.metrics.failure import Ints
from tal_fast.utils.io import replacing

# A shard is written when so much has gathered, or so long after the last: a slow network loses a minute at most.
SHARD_BYTES = 32 << 20
SHARD_SECONDS = 60.0
_ABOUT = "store.json"
_DAMAGED = (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Outputs:
    """What a model says about a split, in the order of the samples' indices.

    Attributes:
        logits: (n, C) float32 or float64.
        features: (n, D), the input of the last Linear layer, in the same type; None where unknown.
        labels: (n,) int64; −1 in OOD sets.
    """

    logits: NDArray[Any]
    features: NDArray[Any] | None
    labels: NDArray[np.int64]

    @property
    def right(self) -> NDArray[np.bool_]:
        """(n,) whether the largest logit (the first on ties) is the label's."""
        return np.asarray(self.logits.argmax(axis=1) == self.labels)

    def subset(self, indices: Ints) -> Outputs:
        """Those of the samples at ``indices``."""
        features = None if self.features is None else self.features[indices]
        return Outputs(self.logits[indices], features, self.labels[indices])


class OutputStore:
    """The outputs of one split.

    Args:
        folder: of the store.
        key: a hash of what the outputs depend on.
        samples: how many the split has.
    """

    def __init__(self, folder: str | Path, key: str, samples: int) -> None:
        self.folder, self.key, self.samples = Path(folder), key, samples

    def prepare(self, features: bool) -> None:
        """Make the folder ready for these outputs: what belongs to another key, or lacks features, leaves.

        Args:
            features: whether they are wanted; outputs that have them serve either way.

        Raises:
            OSError: the folder cannot be written.
        """
        about = self._about()
        if about.get("key") == self.key and (about.get("features") or not features):
            return
        for path in self.folder.glob("*.npz") if self.folder.is_dir() else ():
            path.unlink()
        with replacing(self.folder / _ABOUT) as temporary:
            temporary.write_text(json.dumps({"key": self.key, "features": features, "samples": self.samples}))

    @property
    def has_features(self) -> bool:
        """Whether the store holds features."""
        return bool(self._about().get("features"))

    def _about(self) -> dict[str, Any]:
        try:
            about = json.loads((self.folder / _ABOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return about if isinstance(about, dict) else {}

    def missing(self) -> Ints:
        """Indices of the samples that no shard holds, rising. Shards that cannot be read leave."""
        there = np.zeros(self.samples, dtype=bool)
        if self._about().get("key") != self.key:
            return np.flatnonzero(~there)
        for path in self._paths():
            try:
                with np.load(path, allow_pickle=False) as shard:
                    there[shard["indices"]] = True
            except (*_DAMAGED, IndexError) as problem:
                print(f"note: {path} cannot be read ({problem}); computing it again", file=sys.stderr)
                path.unlink(missing_ok=True)
        return np.flatnonzero(~there)

    def write(self, indices: Ints, outputs: Outputs) -> None:
        """Add a shard.

        Args:
            indices: (m,) of the samples in the split.
            outputs: of these m samples, in this order.

        Raises:
            OSError: it cannot be written.
        """
        arrays = {"indices": indices, "labels": outputs.labels, "logits": outputs.logits}
        if outputs.features is not None:
            arrays["features"] = outputs.features
        with replacing(self.folder / f"{indices.min():09}-{len(indices)}.npz") as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]

    def shards(self, only: tuple[str, ...] = ("indices", "labels", "logits", "features")) -> Iterator[dict[str, Any]]:
        """The arrays of each shard by name, as far as they are there; a sample comes once, shards in no set order.

        Raises:
            ValueError: a shard is damaged, or another evaluation has taken the folder.
        """
        if self._about().get("key") != self.key:
            raise ValueError(
                f"{self.folder} holds outputs of other weights or images by now; give each evaluation its own --cache"
            )
        seen = np.zeros(self.samples, dtype=bool)
        for path in self._paths():
            try:
                with np.load(path, allow_pickle=False) as shard:
                    indices = shard["indices"]
                    new = ~seen[indices]
                    arrays = {name: shard[name] for name in only if name in shard.files}
            except (*_DAMAGED, IndexError) as problem:
                raise ValueError(f"{path} cannot be read ({problem}); remove it and evaluate again") from None
            seen[indices] = True
            # Two evaluations of the same model at once may both have written a sample.
            yield arrays if new.all() else {name: values[new] for name, values in arrays.items()}

    def load(self) -> Outputs:
        """All of it in memory, in the order of the split.

        Raises:
            ValueError: a shard is damaged.
        """
        columns: dict[str, Any] = {}
        for shard in self.shards():
            indices = shard.pop("indices")
            for name, values in shard.items():
                if name not in columns:
                    columns[name] = np.empty((self.samples, *values.shape[1:]), values.dtype)
                columns[name][indices] = values
        return Outputs(columns["logits"], columns.get("features"), columns["labels"])

    def column(self, name: str) -> NDArray[Any]:
        """One array of all samples, ``labels`` or ``logits``, in the order of the split."""
        found: NDArray[Any] | None = None
        for shard in self.shards(("indices", name)):
            if found is None:
                found = np.empty((self.samples, *shard[name].shape[1:]), shard[name].dtype)
            found[shard["indices"]] = shard[name]
        assert found is not None
        return found

    def features(self) -> StoredFeatures:
        """The features, left on disk."""
        width = next(shard["features"].shape[1] for shard in self.shards(("features",)))
        return StoredFeatures(self, (self.samples, width))

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.npz"))


@dataclass(frozen=True)
class StoredFeatures:
    """The features of a store, a shard in memory at a time.

    Attributes:
        store: whose features they are.
        shape: (n, D).
    """

    store: OutputStore
    shape: tuple[int, int]

    def blocks(self) -> Iterator[tuple[Ints, NDArray[Any]]]:
        """(indices, features) of each shard; each sample once, in no set order."""
        for shard in self.store.shards(("indices", "features")):
            yield shard["indices"], shard["features"]


class ShardWriter:
    """Gathers batches into shards of a store.

    Args:
        store: to write to.
    """

    def __init__(self, store: OutputStore) -> None:
        self._store = store
        self._parts: list[tuple[Any, ...]] = []
        self._bytes = 0
        self._last = time.monotonic()

    def add(self, indices: Ints, outputs: Outputs) -> None:
        """A batch."""
        self._parts.append((indices, outputs.logits, outputs.features, outputs.labels))
        self._bytes += outputs.logits.nbytes + (0 if outputs.features is None else outputs.features.nbytes)
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._last >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what has gathered."""
        if not self._parts:
            return
        indices, logits, features, labels = zip(*self._parts, strict=True)
        together = None if features[0] is None else np.concatenate(features)
        self._store.write(np.concatenate(indices), Outputs(np.concatenate(logits), together, np.concatenate(labels)))
        self._parts, self._bytes, self._last = [], 0, time.monotonic()
