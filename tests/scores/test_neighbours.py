"""The 10th nearest training feature: random choices, streams, faiss."""

from __future__ import annotations

import numpy as np
import pytest

from tal_fast.scores.features import FeatureScorer
from tal_fast.scores.neighbours import Neighbours
from tal_fast.scores.training_statistics import Training
from tests.helpers.scores import CASE, WIDTH, Streamed


def test_a_zero_feature_has_neighbours() -> None:
    np.testing.assert_allclose(Neighbours(CASE.training, 400, 0).scores(np.zeros((1, WIDTH))), [-1.0], rtol=1e-12)


def test_large_features_have_the_neighbours_of_their_direction() -> None:
    scorer = Neighbours(CASE.training, 400, 0)
    np.testing.assert_allclose(scorer.scores(CASE.train[:9] * 2.0**900), scorer.scores(CASE.train[:9]), rtol=1e-12)


def test_a_random_choice_of_the_training_features() -> None:
    chosen = CASE.train[np.sort(np.random.default_rng(3).permutation(400)[:50])]
    want = CASE.score("knn", Training(chosen))
    for features in (CASE.train, Streamed(CASE.train)):
        scorer = FeatureScorer(Training(features), knn_samples=50, seed=3)
        np.testing.assert_allclose(scorer.scores(["knn"], CASE.logits, CASE.features)["knn"], want, rtol=1e-12)
        about = scorer.about()
        assert (about["training_samples"], about["knn_samples"]) == (400, 50)


def test_all_training_features_are_read_from_the_stream() -> None:
    scorer = FeatureScorer(Training(Streamed(CASE.train)), knn_samples=None)
    got = scorer.scores(["knn"], CASE.logits, CASE.features)["knn"]
    np.testing.assert_allclose(got, CASE.score("knn"), rtol=1e-9)
    assert scorer.about() == {"training_samples": 400, "knn_samples": 400, "knn_search": "exact"}


def test_too_few_training_features_are_refused() -> None:
    with pytest.raises(ValueError, match="10th nearest training feature but there are 9"):
        CASE.score("knn", Training(CASE.train[:9]))
    with pytest.raises(ValueError, match="knn_samples is 9 but knn takes the 10th neighbour; keep more"):
        CASE.score("knn", knn_samples=9)


def test_faiss_gives_the_distances_of_an_exact_search(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    rng = np.random.default_rng(6)
    # Crowded: float32 cannot distinguish many of the distances.
    crowded = (rng.normal(size=(5, 64))[rng.integers(5, size=3000)] + 1e-4 * rng.normal(size=(3000, 64))).astype("f4")
    features = crowded[:300] + 1e-4 * rng.normal(size=(300, 64))
    fast, spread = Neighbours(Training(crowded), 3000, 0), CASE.score("knn")
    monkeypatch.setattr(Neighbours, "_build_index", staticmethod(lambda bank: None))
    exact = Neighbours(Training(crowded), 3000, 0)
    assert (fast.method, exact.method) == ("faiss", "exact")
    np.testing.assert_allclose(fast.scores(features), exact.scores(features), rtol=0.02)
    np.testing.assert_allclose(spread, CASE.score("knn"), rtol=1e-9)
