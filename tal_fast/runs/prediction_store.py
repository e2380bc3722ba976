"""Logits, features and labels of a split, stored on disk in shards so that an interrupted pass resumes.

A split's folder has a folder for each key, a hash of everything the outputs depend on, with ``.npz`` shards of some
tens of megabytes, each written atomically. The shards hold the key and a SHA-256 of each array too, and record which
samples are stored, so ranks have to agree on nothing but the folder, and a different number of ranks may finish a pass.
Readers hold one shard in memory at a time, except ``load``.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tal_fast.utils.arrays import Ints, open_npz
from tal_fast.utils.io import remove_leftovers, replacing
from tal_fast.utils.locks import alone_in, lock, unlock

logger = logging.getLogger(__name__)

SHARD_BYTES = 32 << 20
"""Size at which a shard is written."""
SHARD_SECONDS = 60.0
"""Age at which a shard is written: an interrupted slow pass loses at most a minute."""
KEY_LENGTH = 16
"""Characters of the key in the name of its folder."""
_IN_USE = "in-use.lock"


@dataclass(frozen=True)
class Outputs:
    """Logits, features and labels of a split, in the order of the split."""

    logits: NDArray[Any]  # (n, C) float32 or float64
    features: NDArray[Any] | None  # (n, D), the input of the last Linear layer, in the same type; None if unknown
    labels: NDArray[np.int64]  # (n,) int64; −1 in OOD sets
    scores: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # score -> (n,), those computed elsewhere

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(n,) bool, whether the largest logit (the first on ties) is the label's."""
        return np.asarray(self.logits.argmax(axis=1) == self.labels)

    def subset(self, indices: Ints) -> Outputs:
        """Outputs of the samples at ``indices``."""
        features = None if self.features is None else self.features[indices]
        scores = {name: values[indices] for name, values in self.scores.items()}
        return Outputs(self.logits[indices], features, self.labels[indices], scores)


class NotKept(ValueError):
    """Error for outputs that cannot be written to their folder."""


class OutputStore:
    """Stored outputs of the samples of one split.

    ``key`` is a hash of everything the outputs depend on, and ``samples`` the number of samples. If ``features`` are
    needed, shards without them count as missing; else features are not read. ``elsewhere`` says how to name another
    folder, in messages.
    """

    def __init__(
        self, folder: str | Path, key: str, samples: int, features: bool = True,
        elsewhere: str = "name another folder with --cache",
    ) -> None:  # fmt: skip
        self.elsewhere = elsewhere
        self.folder = Path(folder) / key[:KEY_LENGTH]
        self.key, self.samples, self.features = key, samples, features

    def prepare(self) -> None:
        """Create the folder, and keep it from being removed while this object lives.

        Removes the folders of other keys that no process has in use. Raises NotKept if the folder cannot be written.
        """
        with self._keeping():
            weakref.finalize(self, unlock, keep(self.folder))
            remove_leftovers(self.folder)
            for path in self.folder.parent.iterdir():
                if re.fullmatch(f"[0-9a-f]{{{KEY_LENGTH}}}", path.name) and path.name != self.folder.name:
                    remove_unused(path)
                elif path.name.startswith(".removed-") and path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif re.fullmatch(r"[0-9]{9}-[0-9]+\.npz|store\.json", path.name):  # of version 0.2.0
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _keeping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise NotKept(
                f"outputs cannot be kept in {self.folder} ({error.strerror or error}); free space or {self.elsewhere}"
            ) from None

    def continue_from(self, other: OutputStore) -> None:
        """Take over the shards of a store of the same key, which stay where they are."""
        self._other = other  # keeps its folder
        for path in other._paths():
            (self.folder / path.name).symlink_to(path.resolve())

    def only_pass(self, wait: bool = True) -> contextlib.AbstractContextManager[None]:
        """Keep other processes from computing the same outputs; with ``wait``, first wait for one that does."""
        message = (
            f"another process computes the same outputs in {self.folder}; waiting for it ({self.elsewhere} to "
            "compute them at the same time)"
        )
        return alone_in(self.folder, message if wait else "")

    def missing(self, check: bool = True) -> Ints:
        """Indices of the samples that no shard holds, ascending. Deletes shards of another key or, with ``check``, that
        are damaged anywhere, which takes a read of them all."""
        stored = np.zeros(self.samples, dtype=bool)
        names = ("labels", "logits", "features") if check else ()
        for path in self._paths():
            try:
                stored[self._read(path, names).get("indices", [])] = True
            except OSError as error:
                logger.warning("%s cannot be read (%s); it is computed again", path, error)
            except ValueError as error:
                logger.warning("%s; it is computed again", error)
                _remove_shard(path)
        return np.flatnonzero(~stored)

    def write(self, indices: Ints, outputs: Outputs) -> None:
        """Write a shard: outputs of the m samples at the positions ``indices`` (m,) of the split.

        Raises NotKept if it cannot be written.
        """
        arrays = {"key": np.array(self.key), "indices": indices, "labels": outputs.labels, "logits": outputs.logits}
        if outputs.features is not None:
            arrays["features"] = outputs.features
        arrays |= {f"sha256/{name}": np.array(self._digest(name, arrays[name])) for name in arrays if name != "key"}
        # Processes may have stored other samples with the same first index and number.
        name = f"{indices.min():09}-{len(indices)}-{self.key[:KEY_LENGTH]}-{os.urandom(4).hex()}.npz"
        with self._keeping(), replacing(self.folder / name) as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]

    def shards(self, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """Iterate over the arrays ``names`` of the shards, each sample once, in no particular order.

        Features are left out where they are not needed. Raises OSError if a shard cannot be read, and ValueError if one
        is damaged or of another key, and was deleted, or, at the end, if samples are missing.
        """
        seen = np.zeros(self.samples, dtype=bool)
        for path in self._paths():
            try:
                arrays = self._read(path, names)
            except ValueError as error:
                _remove_shard(path)
                raise ValueError(f"{error}; evaluate again to compute it anew") from None
            if not arrays:
                continue
            indices = arrays["indices"]
            # Two concurrent evaluations of the same model may both have written a sample.
            new = ~seen[indices]
            seen[indices] = True
            yield {name: arrays[name] if new.all() else arrays[name][new] for name in names if name in arrays}
        if not seen.all():
            raise ValueError(
                f"{self.samples - int(seen.sum())} of {self.samples} samples are missing in {self.folder}, whose files "
                "were removed meanwhile; evaluate again"
            )

    def _read(self, path: Path, names: tuple[str, ...]) -> dict[str, Any]:
        """Indices and arrays of a shard; nothing if it lacks the features that are needed.

        Raises OSError if the shard cannot be read, and ValueError if it is damaged or has another key.
        """
        with open_npz(path) as shard:
            key, has_features = str(shard["key"]), "features" in shard.names
            wanted = {"indices", *names} - (set() if self.features else {"features"})
            arrays = {name: shard[name] for name in wanted if has_features or name != "features"}
            digests = {name: str(shard[f"sha256/{name}"]) for name in arrays if key == self.key}
        if key != self.key:
            raise ValueError(f"{path} holds outputs of other weights, images or settings")
        changed = sorted(name for name, array in arrays.items() if self._digest(name, array) != digests[name])
        if changed:
            raise ValueError(f"{path} has other {' and '.join(changed)} than were written")
        indices = arrays["indices"]
        if indices.ndim != 1 or indices.dtype.kind != "i" or not np.all((indices >= 0) & (indices < self.samples)):
            raise ValueError(f"{path} has indices that are not those of {self.samples} samples")
        if any(array.shape[:1] != indices.shape for array in arrays.values()):
            raise ValueError(f"{path} has arrays of different lengths")
        return arrays if has_features or not self.features else {}

    def _digest(self, name: str, array: NDArray[Any]) -> str:
        """SHA-256 of an array of a shard: about 1 s a gigabyte on one core, and reading takes 0.65 s."""
        digest = hashlib.sha256(f"{self.key} {name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

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
        # Neither folders nor pipes, on which a reader would wait.
        return [path for path in sorted(self.folder.glob("[0-9]*.npz")) if path.is_file()]


def _remove_shard(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def keep(folder: Path) -> int:
    """Make a folder, which ``remove_unused`` leaves alone until the returned descriptor is unlocked."""
    path = folder / _IN_USE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder was removed a moment ago
            continue
        lock(handle, shared=True, wait=True)
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            return handle
        unlock(handle)


def remove_unused(folder: Path) -> None:
    """Remove a folder, unless a process keeps it or may keep it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder / _IN_USE, os.O_RDWR)
        try:
            if lock(handle):
                # At once, so that no process sees a part of it.
                removed = folder.rename(folder.with_name(f".removed-{folder.name}-{os.urandom(4).hex()}"))
                shutil.rmtree(removed, ignore_errors=True)
        finally:
            unlock(handle)


class ShardWriter:
    """Writer of batches to a store, in shards."""

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
