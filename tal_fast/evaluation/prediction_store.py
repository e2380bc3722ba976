"""Logits, features and labels of a split, stored on disk in shards so that an interrupted pass resumes.

A store is a folder with ``store.json`` (a hash of what its content depends on) and ``.npz`` shards of some tens of
megabytes, each written atomically. The shards themselves record which samples are stored, so ranks have to agree on
nothing but the folder, and a different number of ranks may finish a pass. Readers hold one shard in memory at a time,
except ``load``.
"""

from __future__ import annotations

import json
import logging
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tal_fast.utils.arrays import Ints
from tal_fast.utils.io import replacing

logger = logging.getLogger(__name__)

SHARD_BYTES = 32 << 20
"""Size at which a shard is written."""
SHARD_SECONDS = 60.0
"""Age at which a shard is written: an interrupted slow pass loses at most a minute."""
_METADATA = "store.json"
_READ_ERRORS = (OSError, ValueError, TypeError, KeyError, EOFError, IndexError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Outputs:
    """Logits, features and labels of a split, in the order of the split."""

    logits: NDArray[Any]  # (n, C) float32 or float64
    features: NDArray[Any] | None  # (n, D), the input of the last Linear layer, in the same type; None if unknown
    labels: NDArray[np.int64]  # (n,) int64; −1 in OOD sets

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(n,) bool, whether the largest logit (the first on ties) is the label's."""
        return np.asarray(self.logits.argmax(axis=1) == self.labels)

    def subset(self, indices: Ints) -> Outputs:
        """Outputs of the samples at ``indices``."""
        features = None if self.features is None else self.features[indices]
        return Outputs(self.logits[indices], features, self.labels[indices])


class OutputStore:
    """Stored outputs of the samples of one split; ``key`` is a hash of everything they depend on."""

    def __init__(self, folder: str | Path, key: str, samples: int) -> None:
        self.folder, self.key, self.samples = Path(folder), key, samples

    def prepare(self, features: bool) -> None:
        """Create the folder; delete shards of another key or, if ``features`` are needed, without features."""
        metadata = self._metadata()
        if metadata.get("key") == self.key and (metadata.get("features") or not features):
            return
        for path in self.folder.glob("*.npz") if self.folder.is_dir() else ():
            path.unlink()
        with replacing(self.folder / _METADATA) as temporary:
            temporary.write_text(json.dumps({"key": self.key, "features": features, "samples": self.samples}))

    def _metadata(self) -> dict[str, Any]:
        try:
            metadata = json.loads((self.folder / _METADATA).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return metadata if isinstance(metadata, dict) else {}

    def missing(self) -> Ints:
        """Indices of the samples that no shard holds, ascending. Deletes shards that cannot be read."""
        stored = np.zeros(self.samples, dtype=bool)
        if self._metadata().get("key") != self.key:
            return np.flatnonzero(~stored)
        for path in self._paths():
            try:
                with path.open("rb") as file, np.load(file, allow_pickle=False) as shard:
                    stored[shard["indices"]] = True
            except _READ_ERRORS as error:
                logger.warning("%s cannot be read (%s); it is computed again", path, error)
                path.unlink(missing_ok=True)
        return np.flatnonzero(~stored)

    def write(self, indices: Ints, outputs: Outputs) -> None:
        """Write a shard: outputs of the m samples at the positions ``indices`` (m,) of the split."""
        arrays = {"indices": indices, "labels": outputs.labels, "logits": outputs.logits}
        if outputs.features is not None:
            arrays["features"] = outputs.features
        with replacing(self.folder / f"{indices.min():09}-{len(indices)}.npz") as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]

    def shards(self, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """Iterate over the shards, each sample once, in no particular order.

        Args:
            names: arrays to read; those a shard does not have are left out.

        Raises:
            ValueError: a shard is damaged, or another evaluation uses the folder.
        """
        if self._metadata().get("key") != self.key:
            raise ValueError(
                f"{self.folder} now holds outputs of other weights or images; give each evaluation its own --cache"
            )
        seen = np.zeros(self.samples, dtype=bool)
        for path in self._paths():
            try:
                with path.open("rb") as file, np.load(file, allow_pickle=False) as shard:
                    indices = shard["indices"]
                    new = ~seen[indices]
                    arrays = {name: shard[name] for name in names if name in shard.files}
            except _READ_ERRORS as error:
                raise ValueError(f"{path} cannot be read ({error}); remove it and evaluate again") from None
            seen[indices] = True
            # Two concurrent evaluations of the same model may both have written a sample.
            yield arrays if new.all() else {name: values[new] for name, values in arrays.items()}

    def load(self) -> Outputs:
        """Read the whole store into memory, in the order of the split."""
        columns = self.columns("labels", "logits", "features")
        return Outputs(columns["logits"], columns.get("features"), columns["labels"])

    def columns(self, *names: str) -> dict[str, NDArray[Any]]:
        """Arrays ``labels``, ``logits`` or ``features`` of all samples, in the order of the split."""
        columns: dict[str, NDArray[Any]] = {}
        for shard in self.shards(("indices", *names)):
            indices = shard.pop("indices")
            for name, values in shard.items():
                if name not in columns:
                    columns[name] = np.empty((self.samples, *values.shape[1:]), values.dtype)
                columns[name][indices] = values
        return columns

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(n, D) of the features."""
        return self.samples, next(shard["features"].shape[1] for shard in self.shards(("features",)))

    def blocks(self) -> Iterator[tuple[Ints, NDArray[Any]]]:
        """Yield (indices, features) of each shard; each sample once, in no particular order."""
        for shard in self.shards(("indices", "features")):
            yield shard["indices"], shard["features"]

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.npz"))


class ShardWriter:
    """Collects batches and writes them to a store in shards."""

    def __init__(self, store: OutputStore) -> None:
        self._store = store
        self._batches: list[tuple[Any, ...]] = []
        self._bytes = 0
        self._last_write = time.monotonic()

    def add(self, indices: Ints, outputs: Outputs) -> None:
        """Add a batch."""
        self._batches.append((indices, outputs.logits, outputs.features, outputs.labels))
        self._bytes += outputs.logits.nbytes + (0 if outputs.features is None else outputs.features.nbytes)
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._last_write >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the batches collected so far as a shard."""
        if not self._batches:
            return
        indices, logits, features, labels = zip(*self._batches, strict=True)
        outputs = Outputs(
            np.concatenate(logits), None if features[0] is None else np.concatenate(features), np.concatenate(labels)
        )
        self._store.write(np.concatenate(indices), outputs)
        self._batches, self._bytes, self._last_write = [], 0, time.monotonic()
