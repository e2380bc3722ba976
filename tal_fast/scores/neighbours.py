"""Distance to the 10th nearest training feature (KNN; Sun et al., 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tal_fast.scores.training_statistics import ROWS, Training
from tal_fast.utils.arrays import Floats

NEIGHBOUR = 10
"""Rank of the neighbour whose distance is the score."""
# Neighbours beyond the tenth that faiss returns: it works in float32, and float64 distances then decide.
_SPARE = 6


class Neighbours:
    """The 10th nearest of the L2-normalised training features, or of a random choice of them.

    faiss, where it is installed, finds candidates among features in memory; their distances are computed in float64
    either way.

    Args:
        limit: number of features kept in memory; None compares with all of them, read anew for each block of samples.
        seed: of the random choice.

    Attributes:
        samples: number of training features compared with.
        method: ``exact`` or ``faiss``.
    """

    def __init__(self, training: Training, limit: int | None, seed: int) -> None:
        self._training = training
        self._bank = None if limit is None else training.choose(limit, seed)
        self.samples = training.features.shape[0] if self._bank is None else len(self._bank)
        if self.samples < NEIGHBOUR:
            raise ValueError(f"knn takes the {NEIGHBOUR}th nearest training feature but there are {self.samples}")
        self._index = None if self._bank is None else self._build_index(self._bank)
        self.method = "exact" if self._index is None else "faiss"

    @staticmethod
    def _build_index(bank: NDArray[Any]) -> Any:
        try:
            import faiss
        except ImportError:
            return None
        index = faiss.IndexFlatL2(bank.shape[1])
        for rows in _normalised_blocks(bank):
            index.add(rows.astype(np.float32))
        return index

    def scores(self, features: NDArray[Any]) -> Floats:
        """(n, D) -> (n,) minus the squared distance to the 10th neighbour."""
        nearest = self._by_blocks if self._index is None else self._by_faiss
        parts = [nearest(rows) for rows in _normalised_blocks(features)]
        return -np.concatenate(parts) if parts else np.zeros(0)

    def _by_blocks(self, rows: Floats) -> Floats:
        best = np.full((len(rows), NEIGHBOUR), np.inf)
        others = map(normalised, (block for _, block in self._training.blocks()))
        for other in others if self._bank is None else _normalised_blocks(self._bank):
            # 2 − 2 rows · otherᵀ would be wrong for zero vectors, whose norm is not 1.
            squared = (rows * rows).sum(axis=1)[:, None] + (other * other).sum(axis=1) - 2 * rows @ other.T
            best = np.partition(np.concatenate((best, squared), axis=1), NEIGHBOUR - 1, axis=1)[:, :NEIGHBOUR]
        return np.maximum(best.max(axis=1), 0)

    def _by_faiss(self, rows: Floats) -> Floats:
        assert self._bank is not None
        assert self._index is not None
        _, candidates = self._index.search(rows.astype(np.float32), min(NEIGHBOUR + _SPARE, self.samples))
        found = np.empty(len(rows))
        step = 256  # 67 MB of candidates at 2,048 wide
        for i in range(0, len(rows), step):
            chosen = candidates[i : i + step]
            others = normalised(self._bank[chosen.ravel()].astype(np.float64)).reshape(*chosen.shape, -1)
            squared = np.square(others - rows[i : i + step, None]).sum(axis=2)
            found[i : i + step] = np.partition(squared, NEIGHBOUR - 1, axis=1)[:, NEIGHBOUR - 1]
        return found


def normalised(rows: Floats) -> Floats:
    """Rows (n, D) divided by their L2 norms; rows of zeros stay."""
    largest = np.abs(rows).max(1, keepdims=True, initial=0)
    rows = rows * np.where(largest > 2.0**500, 2.0**-600, 1)  # squares beyond 1e308 are infinite
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)


def _normalised_blocks(features: NDArray[Any]) -> Iterator[Floats]:
    for i in range(0, len(features), ROWS):
        yield normalised(features[i : i + ROWS].astype(np.float64))
