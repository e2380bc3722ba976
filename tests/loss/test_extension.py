"""Operators of the C++ extension."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tal_fast import FeatureQueue, TALLoss
from tests.helpers.backends import NEEDS_EXTENSION
from tests.helpers.loss_cases import random_queue
from tests.helpers.queues import brute_force

pytestmark = NEEDS_EXTENSION


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    queue = FeatureQueue(100_003, backend="native")
    queue.push(*random_queue(100_003))
    m, s = random_queue(40)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(queue.nearest(m, s), brute_force(m, s, queue.ring.mean, queue.ring.std))
    finally:
        torch.set_num_threads(before)


def digest() -> int:
    """Number that depends on every bit of the results of a step, and of one with class weights and label smoothing."""
    torch.manual_seed(0)
    z, f, y = torch.randn(33, 1003) * 5, torch.rand(33, 515), torch.randint(1003, (33,))
    y[:20] = z[:20].argmax(1)
    queue, results = (torch.rand(900), torch.rand(900)), []
    for options in ({}, {"class_weight": torch.rand(1003), "label_smoothing": 0.1}):
        loss_fn = TALLoss(queue_size=1000, backend="native", **options)
        loss_fn.queue.push(*queue)
        leaf = z.clone().requires_grad_()
        loss, stats = loss_fn(leaf, f, y, return_stats=True)
        loss.backward()
        results += [loss.detach().view(1), leaf.grad.flatten(), stats.distance, stats.typicalness]
    values = torch.cat(results)
    return int(values.view(torch.int32).long().mul(torch.arange(1, values.numel() + 1)).sum())


@pytest.mark.parametrize("isa", ["base", *(pytest.param(isa, marks=pytest.mark.slow) for isa in ("avx2", "avx512"))])
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    code = "import torch, tests.loss.test_extension as t; print(t.digest(), torch.ops.tal_fast.cpu_isa())"
    env = {**os.environ, "TAL_FAST_ISA": isa}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, cwd=root)
    value, used = done.stdout.split()
    if used != isa:
        pytest.skip(f"this CPU has {used} at most")
    assert int(value) == digest()


@pytest.mark.parametrize("capacity", [20, 5000], ids=["without an index", "with an index"])
def test_queue_operators_pass_opcheck(capacity: int) -> None:
    ops = torch.ops.tal_fast
    queue = FeatureQueue(capacity, backend="native")
    queue.push(*random_queue(capacity - 8))
    ring = queue.ring.mean, queue.ring.std, queue.ring.cursor
    index = queue.ring.index
    assert (index is None) == (capacity == 20)
    mean, std = random_queue(5)
    accepted = torch.tensor([True, False, True, True, False])
    for rows in (accepted, None):
        copies = [None if t is None else t.clone() for t in (*ring, index)]
        torch.library.opcheck(ops.push_.default, (*copies[:3], mean, std, rows, copies[3]))
    torch.library.opcheck(ops.nearest.default, (*ring, mean, std, index))
    rows = torch.rand(5, 9), torch.arange(5)
    for weight in (None, torch.rand(5)):
        torch.library.opcheck(ops.statistics_distance.default, (*rows, *ring, -100, index, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_loss_operators_pass_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.tal_fast
    queue = FeatureQueue(20, backend="native")
    queue.push(*random_queue(12))
    ring = queue.ring
    logits, features, labels = torch.randn(5, 7).to(dtype), torch.rand(5, 9), torch.randint(7, (5,))
    _, _, distance, summary = ops.statistics_distance(features, labels, ring.mean, ring.std, ring.cursor, -100)
    torch.library.opcheck(ops.batch_sums.default, (logits, labels, distance, summary, 0.0, -100))
    for need_grad in (True, False):
        for reduction, weight in ((0, torch.rand(7)), (1, None), (2, None)):
            arguments = (True, 10.0, 100.0, None, 0.0, 0.1, -100, False, reduction, weight, need_grad)
            torch.library.opcheck(ops.loss_forward.default, (logits, labels, distance, summary, *arguments))


def test_index_of_another_size_is_refused() -> None:
    ring = FeatureQueue(4096, backend="native").ring
    with pytest.raises(ValueError, match="index must be"):
        torch.ops.tal_fast.nearest(ring.mean, ring.std, ring.cursor, *random_queue(5), ring.index[:-1].clone())
