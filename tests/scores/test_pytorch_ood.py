"""Scores against pytorch-ood's detectors, which compute in float32 and where *lower* is surer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tal_fast.scores import logits as scores
from tal_fast.scores.features import FeatureScorer, Training, principal_dimensions

detector = pytest.importorskip("pytorch_ood.detector", reason="pytorch-ood is not installed")
CLASSES, WIDTH, TRAINED = 6, 16, 600


class Case:
    """Features of Gaussian classes, and a linear layer over them."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        means = 2 * rng.normal(size=(CLASSES, WIDTH))
        self.labels = np.arange(TRAINED) % CLASSES
        mixing = rng.normal(size=(WIDTH, WIDTH)) / 3
        self.train = (means[self.labels] + rng.normal(size=(TRAINED, WIDTH)) @ mixing).astype(np.float32)
        self.weight = (means / 5).astype(np.float32)
        self.bias = rng.normal(size=CLASSES).astype(np.float32)
        self.features = (2 * rng.normal(size=(50, WIDTH))).astype(np.float32)
        self.logits = self.features @ self.weight.T + self.bias

    def ours(self, name: str) -> np.ndarray:
        scorer = FeatureScorer(Training(self.train, self.labels, self.weight, self.bias))
        return scorer.scores([name], self.logits, self.features)[name]

    def fitted(self, made: Any) -> np.ndarray:
        made.fit_features(torch.from_numpy(self.train), torch.from_numpy(self.labels))
        return np.asarray(made.predict_features(torch.from_numpy(self.features)))


CASE = Case()


@pytest.mark.parametrize(("ours", "theirs"), [(scores.msp, "MaxSoftmax"), (scores.energy, "EnergyBased")])
def test_over_logits(ours: Callable[[Any], np.ndarray], theirs: str) -> None:
    made = getattr(detector, theirs)(None)
    values = made.predict_logits(torch.from_numpy(CASE.logits))
    np.testing.assert_allclose(ours(CASE.logits), -np.asarray(values), rtol=1e-5, atol=1e-6)


def test_mahalanobis() -> None:
    # Theirs is half the squared distance, by a covariance that is not divided by the number of samples.
    theirs = 2 * TRAINED * CASE.fitted(detector.Mahalanobis(None))
    np.testing.assert_allclose(CASE.ours("mahalanobis"), -theirs, rtol=1e-3)


def test_vim() -> None:
    d = principal_dimensions(WIDTH)
    made = detector.ViM(None, d, torch.from_numpy(CASE.weight), torch.from_numpy(CASE.bias))
    np.testing.assert_allclose(CASE.ours("vim"), -CASE.fitted(made), rtol=1e-3, atol=1e-4)


def test_knn() -> None:
    # Theirs is the distance, not its square.
    theirs = CASE.fitted(detector.KNN(None, k=10)) ** 2
    np.testing.assert_allclose(CASE.ours("knn"), -theirs, rtol=1e-4, atol=1e-6)
