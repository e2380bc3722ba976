"""Search index that the C++ extension keeps beside large queues on CPUs."""

from __future__ import annotations

import copy
from statistics import median

import pytest
import torch

from bench.harness import clock
from tal_fast import FeatureQueue
from tests.helpers.backends import NEEDS_EXTENSION
from tests.helpers.loss_cases import random_queue
from tests.helpers.queues import brute_force

pytestmark = [NEEDS_EXTENSION, pytest.mark.usefixtures("poison")]

DISTRIBUTIONS = {
    "spread": lambda n, step: torch.rand(2, n),
    "all equal": lambda n, step: torch.full((2, n), 0.3),
    "equal, then others": lambda n, step: torch.full((2, n), 0.3) if step % 20 < 8 else torch.rand(2, n),
    "collinear": lambda n, step: torch.rand(1, n).repeat(2, 1),
    "one mean": lambda n, step: torch.stack([torch.full((n,), 0.5), torch.rand(n)]),
    "one std": lambda n, step: torch.stack([torch.rand(n), torch.full((n,), 0.5)]),
    "duplicates": lambda n, step: (torch.randn(2, n) * 4).round() / 4,  # zeros of both signs among them
    "drifting": lambda n, step: torch.rand(2, n) * 0.01 + step * 0.01,
    "one far outlier": lambda n, step: torch.cat([torch.rand(2, n - 1), torch.full((2, 1), 1e15)], 1),
    "drifting scale": lambda n, step: torch.randn(2, n) * 10.0 ** (step % 9 - 4),
    "growing": lambda n, step: torch.rand(2, n) * 1.2**step,
    "two clusters": lambda n, step: torch.rand(2, n) * 1e-3 + 1000 * torch.randint(2, (1, n)),
    "jumping clusters": lambda n, step: torch.rand(2, n) * 1e-4 + step * 7919 % 101,
    "heavy tails": lambda n, step: torch.randn(2, n) / torch.randn(2, n),
    "squares overflow": lambda n, step: torch.randn(2, n) * 1e38 / 4,
    "squares underflow": lambda n, step: torch.rand(2, n) * 1e-20,
}


def check_index(queue: FeatureQueue, name: str, step: int) -> None:
    """Compare searches to the bit: for points like the queue's, for others, and for its oldest and newest entries."""
    mean, std = queue.contents()
    ends = torch.stack([mean[[0, 1, -1]], std[[0, 1, -1]]])
    queries = torch.cat([DISTRIBUTIONS[name](9, step).to(queue.dtype), torch.rand(2, 3).to(queue.dtype), ends], 1)
    got = queue.nearest(*queries)
    assert torch.equal(got, brute_force(*queries, mean, std)), (name, step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("capacity", [4096, 5000])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_index_equals_brute_force_to_the_bit(name: str, capacity: int, dtype: torch.dtype) -> None:
    queue = FeatureQueue(capacity, dtype=dtype, backend="native")
    assert queue.ring.index is not None
    for step in range(45):  # over three times round, at lengths that never fit the index's own
        points = DISTRIBUTIONS[name](int(torch.randint(2, 900, ())), step).to(dtype)
        queue.push(*points)
        check_index(queue, name, step)


@pytest.mark.parametrize("capacity", [40_000, pytest.param(140_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_index_of_several_grids_equals_brute_force_to_the_bit(name: str, capacity: int) -> None:
    queue = FeatureQueue(capacity, backend="native")  # too large to be moved to each new grid
    for step in range(30):
        for part in DISTRIBUTIONS[name](capacity // 10 + 7, step).split(1000, dim=1):
            queue.push(*part)
        check_index(queue, name, step)


def test_entries_are_numbered_beyond_32_bits() -> None:
    queue = FeatureQueue(4096, backend="native")
    queue.push(*random_queue(100))
    number_of_the_next = queue.ring.index[32:40].view(torch.int64)
    assert number_of_the_next.item() == 101
    number_of_the_next.fill_(2**32 - 9000)  # as after so many pushes; links are made from 512 entries on
    for step in range(40):
        queue.push(*random_queue(500))
        check_index(queue, "spread", step)


def test_entries_and_queries_that_are_not_finite() -> None:
    queue = FeatureQueue(4096, backend="native")
    mean, std = random_queue(6000)
    mean[::7], std[3::11] = torch.nan, -torch.inf
    queue.push(mean, std)
    check_index(queue, "spread", 0)
    queries = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.5])
    assert queue.nearest(queries, queries.flip(0)).isposinf().all()
    assert torch.equal(
        queue.nearest(queries[3:], queries[3:]), brute_force(queries[3:], queries[3:], *queue.contents())
    )


@pytest.mark.parametrize(("name", "gain"), [("spread", 10), ("all equal", 10), ("one mean", 10), ("growing", 3)])
def test_search_with_an_index_takes_a_fraction_of_the_time(name: str, gain: int) -> None:
    queue = FeatureQueue(400_000, backend="native")
    for step in range(8):
        queue.push(*DISTRIBUTIONS[name](100_000, step))
    batches = [DISTRIBUTIONS[name](64, 7) for _ in range(21)]  # fresh ones, for which no branch predictor is trained
    ring = queue.ring.mean, queue.ring.std, queue.ring.cursor
    turns = iter(batches), iter(batches)
    index = median(clock(lambda: queue.nearest(*next(turns[0])), 20))
    brute = median(clock(lambda: torch.ops.tal_fast.nearest(*ring, *next(turns[1]), None), 20))
    assert index < brute / gain


def test_index_follows_reset_loading_and_copies() -> None:
    queue = FeatureQueue(4096, backend="native")
    queue.push(*random_queue(5000))
    state = copy.deepcopy(queue.state_dict())
    other = FeatureQueue(4096, backend="native")
    other.push(*(100 + q for q in random_queue(5000)))  # the same cursor, other contents
    assert other.ring.cursor.tolist() == queue.ring.cursor.tolist()
    other.load_state_dict(state)
    m, s = random_queue(9)
    for twin in (other, copy.deepcopy(queue), queue.double(), queue.float()):
        for _ in range(2):
            d = twin.nearest(m, s)
            assert torch.equal(d, brute_force(m.to(d.dtype), s.to(d.dtype), *twin.contents()))
            twin.push(*random_queue(700))
    queue.reset()
    assert queue.nearest(m, s).isposinf().all()
    queue.push(*random_queue(2))
    assert torch.equal(queue.nearest(m, s), brute_force(m, s, *queue.contents()))


def test_only_large_queues_of_the_extension_have_an_index() -> None:
    assert FeatureQueue(4096).ring.index is not None
    assert FeatureQueue(100, backend="native").ring.index is None
    assert FeatureQueue(5000, backend="reference").ring.index is None
