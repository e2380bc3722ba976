"""Training features that scores are fitted on, and statistics of them that need one block in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tal_fast.utils.arrays import Floats, as_matrix, to_numpy

# Rows in a block of float64 features.
ROWS = 4096


class Rows(Protocol):
    """Training features on disk, such as ``tal_fast.runs.prediction_store.OutputStore``."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, D)."""

    def blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """(indices, features) of some samples at a time; each sample once, in any order."""


def principal_dimensions(width: int) -> int:
    """Number of principal directions that ``residual`` and ``vim`` leave out for (n, ``width``) features."""
    return 1000 if width >= 2048 else 512 if width >= 768 else width // 2


@dataclass(frozen=True)
class Training:
    """Training data that feature scores are fitted on; only what the wanted scores need has to be given.

    Attributes:
        features: (n, D), the input of the last Linear layer for training images without augmentation; an array, or
            ``Rows`` on disk.
        labels: (n,) int64; for ``mahalanobis`` and ``ctm``.
        weight: (C, D) of the last Linear layer; for ``residual``, ``vim`` and SIRC with ``residual``.
        bias: (C,); zeros where the layer has none.
        logits: (n, C) of the training images, for α of ``vim``; W f + b unless given.
    """

    features: NDArray[Any] | Rows
    labels: NDArray[Any] | None = None
    weight: NDArray[Any] | None = None
    bias: NDArray[Any] | None = None
    logits: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        for name in ("labels", "weight", "bias", "logits"):
            if getattr(self, name) is not None:
                given = to_numpy(getattr(self, name))
                if given.dtype.kind not in ("iu" if name == "labels" else "fiu"):
                    kind = "integers" if name == "labels" else "real numbers"
                    raise ValueError(f"training {name} must be {kind}, not {given.dtype}")
                if not np.isfinite(given).all():
                    raise ValueError(f"training {name} must be finite; NaN or infinity is among them")
                object.__setattr__(self, name, given)
        if not hasattr(self.features, "blocks"):
            object.__setattr__(self, "features", as_matrix(self.features, "training features"))
            for _, block in self.blocks():
                if not np.isfinite(block).all():
                    raise ValueError("training features must be finite; NaN or infinity is among them")
        samples, width = self.features.shape
        if not samples:
            raise ValueError("there are no training features to fit scores on")
        for name, values, dimensions in (("labels", self.labels, 1), ("logits", self.logits, 2)):
            if values is not None and (values.ndim != dimensions or len(values) != samples):
                raise ValueError(
                    f"training features have {samples} samples but training {name} are of shape {values.shape}"
                )
        if self.weight is not None and (self.weight.ndim != 2 or self.weight.shape[1] != width):
            raise ValueError(
                f"the last layer's weight must be (C, {width}) for these features, not {self.weight.shape}"
            )
        if self.bias is not None and (self.weight is None or self.bias.shape != self.weight.shape[:1]):
            raise ValueError("the last layer's bias must be (C,) and come with its weight (C, D)")

    def blocks(self) -> Iterator[tuple[NDArray[np.int64], Floats]]:
        """(indices, float64 features) of at most 4,096 samples at a time; each sample once, in any order."""
        parts: Any = [(np.arange(len(self.features)), self.features)] if isinstance(self.features, np.ndarray) else None
        for indices, features in self.features.blocks() if parts is None else parts:  # type: ignore[union-attr]
            for i in range(0, len(indices), ROWS):
                yield indices[i : i + ROWS], features[i : i + ROWS].astype(np.float64)

    def chosen(self, limit: int | None, seed: int) -> NDArray[np.int64]:
        """Indices of the training samples of ``choose``."""
        return np.sort(np.random.default_rng(seed).permutation(self.features.shape[0])[:limit])

    def choose(self, limit: int, seed: int) -> NDArray[Any]:
        """At most ``limit`` training features, in the order of their indices: a random choice where there are more."""
        samples, width = self.features.shape
        if isinstance(self.features, np.ndarray) and samples <= limit:
            return self.features
        chosen = self.chosen(limit, seed)
        # In their stored type: in float64 they would take twice the memory.
        if isinstance(self.features, np.ndarray):
            return self.features[chosen]
        place = np.full(samples, -1)
        place[chosen] = np.arange(len(chosen))
        found: NDArray[Any] | None = None
        for indices, block in self.features.blocks():
            if found is None:
                found = np.empty((len(chosen), width), block.dtype)
            inside = place[indices] >= 0
            found[place[indices[inside]]] = block[inside]
        assert found is not None
        return found

    def scaled(self, temperature: float) -> Training:
        """Training data with the logits divided by a temperature."""
        given = self.weight, self.bias, self.logits
        divided = (None if x is None else np.divide(x, temperature, dtype=np.float64) for x in given)
        return Training(self.features, self.labels, *divided)


class Moments:
    """Mean and population standard deviation of numbers that come a block at a time, in float64."""

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def update(self, values: Floats) -> None:
        """Add (m,) numbers."""
        if not values.size:
            return
        mean, total = float(values.mean()), self.count + values.size
        step = mean - self.mean
        self._squares += float(np.square(values - mean).sum()) + step * step * self.count * values.size / total
        self.mean += step * values.size / total
        self.count = total

    @property
    def std(self) -> float:
        """Population standard deviation of all numbers so far."""
        return math.sqrt(self._squares / self.count)


class ClassScatter:
    """Class means of features that come a block at a time, and the scatter about them.

    Attributes:
        classes: (K,) labels seen so far, rising.
        counts: (K,) samples of each class.
        means: (K, D) float64.
        within: (D, D) Σ (f − μ)(f − μ)ᵀ, μ the mean of the sample's class.
    """

    def __init__(self, width: int) -> None:
        self.classes = np.zeros(0, np.int64)
        self.counts, self.means = np.zeros(0), np.zeros((0, width))
        self.within = np.zeros((width, width))

    def update(self, features: Floats, labels: NDArray[np.int64]) -> None:
        """Add (m, D) features with their (m,) labels: the sums of two sets from those of each (Chan et al., 1979)."""
        classes, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
        new = np.setdiff1d(classes, self.classes)
        if new.size:
            place = np.searchsorted(self.classes, new)
            self.classes = np.insert(self.classes, place, new)
            self.counts = np.insert(self.counts, place, 0.0)
            self.means = np.insert(self.means, place, 0.0, axis=0)
        at = np.searchsorted(self.classes, classes)
        # Sums by class over runs of the sorted rows; np.add.at over rows is many times slower.
        order = np.argsort(index, kind="stable")
        means = np.add.reduceat(features[order], np.append(0, np.cumsum(counts)[:-1])) / counts[:, None]
        centred = features - means[index]
        step, before = means - self.means[at], self.counts[at]
        after = before + counts
        between = step * np.sqrt(before * counts / after)[:, None]
        self.within += centred.T @ centred
        self.within += between.T @ between
        self.means[at] += step * (counts / after)[:, None]
        self.counts[at] = after

    def about(self, origin: Floats) -> Floats:
        """(D, D) Σ (f − origin)(f − origin)ᵀ over all samples."""
        between = (self.means - origin) * np.sqrt(self.counts)[:, None]
        return self.within + between.T @ between
