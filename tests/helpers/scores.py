"""Features of a linear classifier on Gaussian classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tal_fast.scores.features import FeatureScorer, Training

CLASSES, WIDTH = 5, 13


class Case:
    """Training data of a linear classifier on Gaussian classes, and test data half of which is far away."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.weight, self.bias = rng.normal(size=(CLASSES, WIDTH)), rng.normal(size=CLASSES)
        means = 2 * rng.normal(size=(CLASSES, WIDTH))
        mixing = rng.normal(size=(WIDTH, WIDTH)) / 3
        self.labels = rng.integers(CLASSES, size=400)
        self.train = means[self.labels] + rng.normal(size=(400, WIDTH)) @ mixing
        self.features = np.concatenate((
            means[rng.integers(CLASSES, size=40)] + rng.normal(size=(40, WIDTH)) @ mixing,
            4 * rng.normal(size=(40, WIDTH)),
        ))  # fmt: skip
        self.logits = self.features @ self.weight.T + self.bias
        self.training = Training(self.train, self.labels, self.weight, self.bias)

    def score(self, name: str, training: Training | None = None, **options: Any) -> np.ndarray:
        """A score of the test data, fitted on the case's training data unless others are given."""
        scorer = FeatureScorer(training or self.training, **options)
        return scorer.scores([name], self.logits, self.features)[name]


CASE = Case()


class Streamed:
    """Training features in blocks of 37 samples, in another order at each pass, as from disk."""

    def __init__(self, features: np.ndarray) -> None:
        self.features, self.shape, self.passes = features, features.shape, 0

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        self.passes += 1
        order = np.random.default_rng(self.passes).permutation(len(self.features))
        for i in range(0, len(order), 37):
            yield order[i : i + 37], self.features[order[i : i + 37]]
