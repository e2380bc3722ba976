"""Typicalness of training images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tal_fast.evaluation.train_typicalness import queue_of, rescale, training_typicalness
from tal_fast.loss.reference import feature_statistics, nearest_distance
from tal_fast.runs import checkpoint
from tal_fast.runs.load import load_run
from tests.helpers.evaluation import make_run, queue_state


def test_local_queues_of_all_ranks_are_merged() -> None:
    config = {"method": {"name": "tal", "queue_scope": "local"}}
    ranks = [queue_state(30, seed=1), queue_state(120, capacity=50, seed=2), queue_state(0)]
    mean, std = queue_of({"config": config, "ranks": ranks}).contents()
    assert len(mean) == 30 + 50
    torch.manual_seed(1)
    assert torch.equal(mean[:30], torch.rand(30))
    assert torch.equal(std[:30], torch.rand(30))
    config["method"]["queue_scope"] = "global"
    assert len(queue_of({"config": config, "ranks": ranks[:1] * 2})) == 30


@pytest.mark.parametrize(
    ("ranks", "message"),
    [([queue_state(0)], "queue is empty"), ([{"method": {}}], "holds no queue"), ([], "queue is empty")],
)
def test_a_checkpoint_without_entries_is_refused(ranks: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        queue_of({"config": {"method": {}}, "ranks": ranks})


def test_distances_are_rescaled_over_the_whole_set() -> None:
    np.testing.assert_allclose(rescale(np.array([3.0, 1.0, np.inf, 2.0, np.nan])), [0, 1, 1, 0.5, 1], atol=1e-7)
    assert rescale(np.array([2.0, 2.0])).tolist() == [1, 1]
    assert rescale(np.array([np.nan])).tolist() == [1]


def test_typicalness_against_the_reference_and_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "run", ranks=[queue_state(25, seed=3), queue_state(15, seed=4)])
    run = load_run(folder)
    found = training_typicalness(run, tmp_path / "cache", batch_size=300)
    images = torch.cat([batch for batch, _, _ in run.data.loader("train-eval", batch_size=500)])
    with torch.inference_mode():
        logits, features = run.model(images)
    queue = queue_of(checkpoint.load(run.checkpoint))
    distance = nearest_distance(*feature_statistics(features), *queue.contents()).double().numpy()
    np.testing.assert_allclose(found.distance, distance, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found.typicalness, rescale(found.distance))
    assert (found.prediction == logits.argmax(1).numpy()).mean() > 0.99
    assert found.queue_length == 40
    # The result is cached until the queue changes.
    monkeypatch.setattr(run.model, "forward", None)
    np.testing.assert_array_equal(training_typicalness(run, tmp_path / "cache").distance, found.distance)
    make_run(folder, ranks=[queue_state(40, seed=5)])
    changed = training_typicalness(load_run(folder), tmp_path / "cache")
    assert not np.array_equal(changed.distance, found.distance)
