"""Statistics of training features that come a block at a time, and the memory that fitting takes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tal_fast.scores.features import FeatureScorer
from tal_fast.scores.training_statistics import ClassScatter, Moments, Training
from tests.helpers.scores import CASE, CLASSES


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_scatter_of_blocks_is_that_of_the_whole(offset: float) -> None:
    rng = np.random.default_rng(4)
    features, labels = offset + rng.normal(size=(300, 6)), rng.integers(20, size=300) * 3
    scatter = ClassScatter(6)
    for part in np.split(np.arange(300), [1, 3, 100]):
        scatter.update(features[part], labels[part])
    classes = np.unique(labels)
    means = np.stack([features[labels == c].mean(0) for c in classes])
    centred = features - means[np.searchsorted(classes, labels)]
    assert scatter.classes.tolist() == classes.tolist()
    assert scatter.counts.tolist() == [np.sum(labels == c) for c in classes]
    # At an offset of a million, sums of squares would keep four digits; merged moments keep ten.
    np.testing.assert_allclose(scatter.means, means, rtol=1e-12)
    np.testing.assert_allclose(scatter.within, centred.T @ centred, rtol=1e-9, atol=1e-7)
    origin = features.mean(0) + 1
    np.testing.assert_allclose(scatter.about(origin), (features - origin).T @ (features - origin), rtol=1e-9, atol=1e-6)


def test_moments_of_blocks_are_those_of_the_whole() -> None:
    values = 1e8 + np.random.default_rng(5).normal(size=1000)
    moments = Moments()
    for part in np.split(values, [0, 1, 7, 500]):
        moments.update(part)
    assert moments.count == 1000
    assert moments.mean == pytest.approx(values.mean(), rel=1e-15)
    assert moments.std == pytest.approx(values.std(), rel=1e-7)


class Generated:
    """Features of 64 columns that are never in memory as a whole."""

    def __init__(self, samples: int) -> None:
        self.shape = (samples, 64)

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for i in range(0, self.shape[0], 5000):
            yield np.arange(i, i + 5000), np.random.default_rng(i).normal(size=(5000, 64)).astype(np.float32)


def test_memory_does_not_grow_with_the_training_set() -> None:
    peaks = []
    for samples in (20_000, 120_000):
        training = Training(
            Generated(samples), np.zeros(samples, np.int8), np.random.default_rng(0).normal(size=(10, 64))
        )
        tracemalloc.start()
        scorer = FeatureScorer(training, knn_samples=2000)
        names = ["mahalanobis", "vim", "knn", "sirc_msp_residual", "sirc_msp_feature_norm"]
        assert scorer.undefined(names) == {}
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # In float64 the features take 61 MB; what grows is the permutation that chooses neighbours, 16 bytes a sample.
    assert peaks[1] - peaks[0] < 16 * 100_000 + 1e6
    assert peaks[1] < 40e6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"features": np.zeros((0, 3))}, "no training features"),
        ({"features": np.array([[np.nan, 1]])}, "must be finite"),
        ({"features": np.zeros(3)}, "training features must be (n, C)"),
        ({"labels": np.zeros(3, int)}, "400 samples but training labels are of shape (3,)"),
        ({"logits": np.zeros((3, CLASSES))}, "400 samples but training logits are of shape (3, 5)"),
        ({"weight": np.zeros((CLASSES, 3))}, "weight must be (C, 13)"),
        ({"bias": np.zeros(3)}, "bias must be (C,)"),
        ({"weight": None}, "bias must be (C,) and come with its weight"),
    ],
)
def test_training_data_that_do_not_match_are_refused(values: dict[str, Any], message: str) -> None:
    good = {"features": CASE.train, "labels": CASE.labels, "weight": CASE.weight, "bias": CASE.bias}
    if "features" in values:
        good = {}
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        Training(**{**good, **values})
    assert message in str(refusal.value)
