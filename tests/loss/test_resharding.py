"""Redistribution of the queues over another number of ranks."""

from __future__ import annotations

from typing import Any

import torch

from tal_fast import FeatureQueue
from tal_fast.loss.resharding import reshard


def filled(capacity: int, values: list[float]) -> dict[str, Any]:
    queue = FeatureQueue(capacity, backend="reference")
    queue.push(torch.tensor(values), torch.tensor(values) / 2)
    return dict(queue.state_dict())


def content(state: dict[str, Any]) -> list[float]:
    queue = FeatureQueue(state["mean"].numel(), backend="reference")
    queue.load_state_dict(state)
    mean, std = queue.contents()
    assert torch.equal(std, mean / 2)
    return mean.tolist()


def test_queues_merge_by_age_and_split_in_turn() -> None:
    two = [filled(6, [1, 2, 3]), filled(6, [11, 12, 13])]
    assert content(reshard(two, 0, 1, False)) == [1, 11, 2, 12, 3, 13]
    four = [filled(6, [1, 2, 3, 4, 5]), filled(6, [11, 12])]
    assert content(reshard(four, 0, 1, False)) == [2, 3, 4, 11, 5, 12]  # the oldest leaves
    one = [filled(4, [1, 2, 3, 4, 5, 6])]
    assert [content(reshard(one, rank, 2, False)) for rank in (0, 1)] == [[3, 5], [4, 6]]
    assert content(reshard([filled(5, []), filled(5, [])], 0, 3, False)) == []


def test_shared_queue_stays_the_same() -> None:
    states = [filled(6, [1, 2, 3])] * 2
    assert content(reshard(states, 2, 3, True)) == [1, 2, 3]


def test_twice_the_ranks_and_back_gives_the_same_queues() -> None:
    old = [filled(8, (torch.arange(11) + 100 * rank).tolist()) for rank in range(3)]
    halves = [reshard(old, rank, 6, False) for rank in range(6)]
    assert sum(len(content(half)) for half in halves) == 24
    for rank in range(3):
        assert content(reshard(halves, rank, 3, False)) == content(old[rank])
