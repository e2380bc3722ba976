"""The queue against a plain Python list, on every backend."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from statistics import median

import numpy as np
import pytest
import torch

from bench.harness import clock
from tal_fast import FeatureQueue, TALLoss
from tal_fast.loss import _extension, functional
from tests.helpers.backends import DEVICE, every_backend
from tests.helpers.loss_cases import random_queue

pytestmark = pytest.mark.usefixtures("poison")


def device_for(backend: str) -> torch.device:
    return torch.device("cpu") if backend == "reference" else DEVICE


def brute_force(m: torch.Tensor, s: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    squared = ((m[:, None] - mean) ** 2 + (s[:, None] - std) ** 2).amin(1)
    return torch.from_numpy(np.sqrt(squared.numpy()))  # correctly rounded, which torch.sqrt on the CPU is not always


@every_backend
@pytest.mark.parametrize("capacity", [1, 2, 7, 50, 64])
def test_push_is_a_list_with_the_oldest_dropped(backend: str, capacity: int) -> None:
    device = device_for(backend)
    queue = FeatureQueue(capacity, device=device, backend=backend)
    expected: list[tuple[float, float]] = []
    for rows in (0, 1, 3, 20, 6, 64, 65, 5, 0, 131, 9):
        mean, std = torch.randn(rows), torch.rand(rows)
        accepted = torch.rand(rows) < 0.7 if rows != 20 else torch.zeros(rows, dtype=torch.bool)
        if rows == 9:
            accepted = None
        if rows > 2:
            mean[1], std[2] = torch.nan, torch.inf
        queue.push(mean.to(device), std.to(device), None if accepted is None else accepted.to(device))
        keep = mean.isfinite() & std.isfinite()
        keep = keep if accepted is None else keep & accepted
        expected += list(zip(mean[keep].tolist(), std[keep].tolist(), strict=True))
        expected = expected[-capacity:]
        got = [t.cpu().tolist() for t in queue.contents()]
        assert list(zip(*got, strict=True)) == expected
        assert len(queue) == len(expected)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("entries", [0, 1, 3, 15, 16, 17, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("rows", [0, 1, 4, 5, 33])
def test_nearest_is_the_minimum(backend: str, entries: int, rows: int, dtype: torch.dtype) -> None:
    device = device_for(backend)
    queue = FeatureQueue(5000, dtype=dtype, device=device, backend=backend)
    mean, std = (q.to(dtype) for q in random_queue(entries))
    queue.push(mean.to(device), std.to(device))
    m, s = (q.to(dtype) for q in random_queue(rows))
    got = queue.nearest(m.to(device), s.to(device)).cpu()
    assert got.shape == (rows,)
    assert got.dtype == dtype
    if not entries:
        assert got.isposinf().all()
        return
    if backend == "native" and device.type == "cpu":
        assert torch.equal(got, brute_force(m, s, mean, std))  # to the bit: same operations, a minimum has no order
    else:
        torch.testing.assert_close(got, brute_force(m, s, mean, std), rtol=1e-6, atol=0)


@every_backend
def test_nearest_after_wrapping_sees_only_what_is_left(backend: str) -> None:
    device = device_for(backend)
    queue = FeatureQueue(100, device=device, backend=backend)
    everything = torch.rand(2, 270)
    for part in everything.split(30, dim=1):
        queue.push(part[0].to(device), part[1].to(device))
    old, new = everything[:, :170], everything[:, 170:]
    assert (queue.nearest(*new.to(device)) == 0).all()
    torch.testing.assert_close(queue.nearest(*old.to(device)).cpu(), brute_force(*old, *new), rtol=1e-6, atol=0)


@every_backend
@pytest.mark.parametrize(
    "points",
    [
        torch.full((2, 300), 0.25),
        torch.cat([torch.rand(2, 299), torch.full((2, 1), 1e18)], 1),
        torch.rand(1, 300).expand(2, 300),
    ],
    ids=["all equal", "one far outlier", "collinear"],
)
def test_nearest_of_any_distribution(backend: str, points: torch.Tensor) -> None:
    device = device_for(backend)
    queue = FeatureQueue(300, device=device, backend=backend)
    queue.push(points[0].to(device), points[1].to(device))
    m, s = torch.rand(9), torch.rand(9)
    torch.testing.assert_close(
        queue.nearest(m.to(device), s.to(device)).cpu(), brute_force(m, s, *points), rtol=1e-6, atol=0
    )


@every_backend
def test_statistics_that_are_not_finite_have_no_distance(backend: str) -> None:
    device = device_for(backend)
    queue = FeatureQueue(10, device=device, backend=backend)
    queue.push(torch.rand(5, device=device), torch.rand(5, device=device))
    m = torch.tensor([0.5, torch.nan, torch.inf, 0.5, 0.5], device=device)
    s = torch.tensor([0.5, 0.5, 0.5, torch.nan, -torch.inf], device=device)
    assert queue.nearest(m, s).isfinite().tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.skipif(not _extension.load()[0], reason=_extension.load()[1])
def test_native_does_not_depend_on_threads(threads: int) -> None:
    before = torch.get_num_threads()
    queue = FeatureQueue(100_003, backend="native")
    queue.push(*random_queue(100_003))
    m, s = random_queue(40)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(queue.nearest(m, s), brute_force(m, s, queue.mean_ring, queue.std_ring))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not _extension.load()[0], reason=_extension.load()[1])
def test_every_instruction_set_gives_the_same_bits() -> None:
    code = """
import torch
from tal_fast import TALLoss
torch.manual_seed(0)
loss_fn = TALLoss(queue_size=1000, backend="native")
loss_fn.queue.push(torch.rand(900), torch.rand(900))
z, f, y = torch.randn(33, 1003) * 5, torch.rand(33, 515), torch.randint(1003, (33,))
y[:20] = z[:20].argmax(1)
z.requires_grad_()
loss, stats = loss_fn(z, f, y, return_stats=True)
loss.backward()
values = torch.cat([loss.detach().view(1), z.grad.flatten(), stats.distance, stats.typicalness])
digest = values.view(torch.int32).long().mul(torch.arange(1, values.numel() + 1)).sum().item()
print(torch.ops.tal_fast.cpu_isa(), digest)
"""
    results = {}
    for isa in ("base", "avx2", "avx512"):
        env = {**os.environ, "TAL_FAST_ISA": isa}
        used, digest = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        ).stdout.split()
        results[used] = digest
    assert "base" in results
    assert len(set(results.values())) == 1, results


@pytest.mark.skipif(not _extension.load()[0], reason=_extension.load()[1])
def test_operators_pass_opcheck() -> None:
    ops = torch.ops.tal_fast
    queue = FeatureQueue(20, backend="native")
    queue.push(*random_queue(12))
    ring = queue.mean_ring, queue.std_ring, queue.cursor
    mean, std = random_queue(5)
    accepted = torch.tensor([True, False, True, True, False])
    logits, features, labels = torch.randn(5, 7), torch.rand(5, 9), torch.randint(7, (5,))
    _, _, distance, batch = ops.statistics_distance(features, labels, *ring, -100)
    torch.use_deterministic_algorithms(False)  # opcheck compares memory that deterministic mode fills
    torch.library.opcheck(ops.push_.default, (*(t.clone() for t in ring), mean, std, accepted))
    torch.library.opcheck(ops.push_.default, (*(t.clone() for t in ring), mean, std, None))
    torch.library.opcheck(ops.nearest.default, (*ring, mean, std))
    torch.library.opcheck(ops.statistics_distance.default, (features, labels, *ring, -100))
    torch.library.opcheck(ops.batch_sums.default, (logits, labels, distance, batch, 0.0, -100))
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for need_grad in (True, False):
            arguments = (True, 10.0, 100.0, None, 0.0, 0.1, -100, False, need_grad)
            torch.library.opcheck(ops.loss_forward.default, (logits.to(dtype), labels, distance, batch, *arguments))


# ---- State ----------------------------------------------------------------------------------------------------------


def test_state_dict_continues_the_queue() -> None:
    queue = FeatureQueue(10)
    queue.push(*random_queue(14))
    twin = FeatureQueue(10)
    twin.load_state_dict(copy.deepcopy(queue.state_dict()))
    more = random_queue(3)
    queue.push(*more)
    twin.push(*more)
    assert torch.equal(queue.contents()[0], twin.contents()[0])
    assert torch.equal(queue.contents()[1], twin.contents()[1])


@pytest.mark.parametrize(("size", "pushed"), [(4, 14), (10, 14), (30, 14), (30, 6), (4, 2)])
def test_state_of_another_capacity_keeps_the_newest(size: int, pushed: int) -> None:
    queue = FeatureQueue(10)
    queue.push(*random_queue(pushed))
    other = FeatureQueue(size)
    other.load_state_dict(queue.state_dict())
    want = queue.contents()[0][-size:]
    assert torch.equal(other.contents()[0], want)
    other.push(torch.tensor([7.0]), torch.tensor([1.0]))
    assert torch.equal(other.contents()[0], torch.cat([want, torch.tensor([7.0])])[-size:])


def test_loss_state_dict_has_the_queue_and_strict_loading_refuses_strangers() -> None:
    loss_fn = TALLoss(queue_size=5)
    assert set(loss_fn.state_dict()) == {"queue.mean", "queue.std", "queue.cursor"}
    state = loss_fn.state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        loss_fn.load_state_dict({k: v for k, v in state.items() if k != "queue.std"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        loss_fn.load_state_dict({**state, "queue.more": torch.ones(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cursor": torch.tensor([11, 4])}, "lies outside a ring of 10"),
        ({"cursor": torch.tensor([0, -1])}, "lies outside a ring of 10"),
        ({"cursor": torch.tensor([0.0, 1.0])}, "2 int64 values"),
        ({"std": torch.rand(9)}, r"must both be \(N,\)"),
        ({"mean": torch.full((10,), torch.nan)}, "not finite"),
        ({"mean": "rubbish"}, "must be tensors"),
    ],
)
def test_damaged_state_is_refused_and_the_queue_kept(change: dict, message: str) -> None:
    queue = FeatureQueue(10)
    queue.push(*random_queue(10))
    before = queue.contents()
    with pytest.raises(RuntimeError, match=message):
        queue.load_state_dict({**copy.deepcopy(queue.state_dict()), **change})
    assert torch.equal(queue.contents()[0], before[0])


def test_conversions_keep_the_queue_precise() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), TALLoss(queue_size=5)])
    model.bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    assert model[1].queue.dtype == torch.float32
    assert model.double()[1].queue.dtype == torch.float64
    assert model.to("meta")[1].queue.device.type == "meta"


def test_no_buffers_for_ddp_to_overwrite() -> None:
    assert not list(TALLoss(queue_size=5).buffers())
    assert not list(TALLoss(queue_size=5).parameters())


# ---- Refusals -------------------------------------------------------------------------------------------------------


def test_bad_queues() -> None:
    with pytest.raises(ValueError, match="capacity is 0"):
        FeatureQueue(0)
    with pytest.raises(TypeError, match="float16"):
        FeatureQueue(5, dtype=torch.float16)
    queue = FeatureQueue(5)
    with pytest.raises(ValueError, match=r"must both be \(B,\)"):
        queue.push(torch.rand(3), torch.rand(4))
    with pytest.raises(ValueError, match=r"must both be \(B,\)"):
        queue.nearest(torch.rand(3, 1), torch.rand(3, 1))
    with pytest.raises(TypeError, match="must be torch.bool"):
        queue.push(torch.rand(3), torch.rand(3), torch.ones(3))
    with pytest.raises(ValueError, match="accepted is"):
        queue.push(torch.rand(3), torch.rand(3), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="the queue is on cpu"):
        queue.push(torch.rand(3, device="meta"), torch.rand(3, device="meta"))
    assert len(queue) == 0
    with pytest.raises(ValueError, match="queue_mean and queue_std"):
        functional.tal_loss(
            torch.rand(2, 3), torch.rand(2, 3), torch.zeros(2, dtype=torch.int64), torch.rand(3), torch.rand(4)
        )


@pytest.mark.gpu
def test_no_synchronisation_on_a_gpu() -> None:
    loss_fn = TALLoss(queue_size=100).cuda()
    logits, features = torch.randn(16, 10, device="cuda", requires_grad=True), torch.rand(16, 32, device="cuda")
    labels = torch.randint(10, (16,), device="cuda")
    loss_fn(logits, features, labels).backward()  # compiles
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            loss_fn(logits, features, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(loss_fn.queue) > 0


# ---- The index of large queues on the CPU ---------------------------------------------------------------------------

NATIVE = pytest.mark.skipif(not _extension.load()[0], reason=f"C++ extension: {_extension.load()[1]}")

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
    """Its answers to the bit: at points like its own, elsewhere, and at its oldest and newest entry."""
    mean, std = queue.contents()
    ends = torch.stack([mean[[0, 1, -1]], std[[0, 1, -1]]])
    queries = torch.cat([DISTRIBUTIONS[name](9, step).to(queue.dtype), torch.rand(2, 3).to(queue.dtype), ends], 1)
    got = queue.nearest(*queries)
    assert torch.equal(got, brute_force(*queries, mean, std)), (name, step)


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("capacity", [4096, 5000])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_index_is_brute_force_to_the_bit(name: str, capacity: int, dtype: torch.dtype) -> None:
    queue = FeatureQueue(capacity, dtype=dtype, backend="native")
    assert queue.index is not None
    for step in range(45):  # over three times round, at lengths that never fit the index's own
        points = DISTRIBUTIONS[name](int(torch.randint(2, 900, ())), step).to(dtype)
        queue.push(*points)
        check_index(queue, name, step)


@NATIVE
@pytest.mark.parametrize("capacity", [40_000, 140_000])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_index_of_several_grids_is_brute_force_to_the_bit(name: str, capacity: int) -> None:
    queue = FeatureQueue(capacity, backend="native")  # too large to be moved to each new grid
    for step in range(30):
        for part in DISTRIBUTIONS[name](capacity // 10 + 7, step).split(1000, dim=1):
            queue.push(*part)
        check_index(queue, name, step)


@NATIVE
def test_index_numbers_its_entries_beyond_32_bits() -> None:
    queue = FeatureQueue(4096, backend="native")
    queue.push(*random_queue(100))
    number_of_the_next = queue.index[32:40].view(torch.int64)
    assert number_of_the_next.item() == 101
    number_of_the_next.fill_(2**32 - 9000)  # as after so many pushes; links are made from 512 entries on
    for step in range(40):
        queue.push(*random_queue(500))
        check_index(queue, "spread", step)


@NATIVE
def test_index_of_entries_and_queries_that_are_not_finite() -> None:
    queue = FeatureQueue(4096, backend="native")
    mean, std = random_queue(6000)
    mean[::7], std[3::11] = torch.nan, -torch.inf
    queue.push(mean, std)
    check_index(queue, "spread", 0)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.5])
    assert queue.nearest(odd, odd.flip(0)).isposinf().all()
    assert torch.equal(queue.nearest(odd[3:], odd[3:]), brute_force(odd[3:], odd[3:], *queue.contents()))


@NATIVE
@pytest.mark.parametrize(("name", "gain"), [("spread", 10), ("all equal", 10), ("one mean", 10), ("growing", 3)])
def test_index_looks_at_few_entries(name: str, gain: int) -> None:
    """What it is for: the search must not cost brute force. Measured in this one run, at a queue of 400,000."""
    queue = FeatureQueue(400_000, backend="native")
    for step in range(8):
        queue.push(*DISTRIBUTIONS[name](100_000, step))
    batches = [DISTRIBUTIONS[name](64, 7) for _ in range(21)]  # fresh ones, whose branches no processor has learnt
    ring = queue.mean_ring, queue.std_ring, queue.cursor
    turns = iter(batches), iter(batches)
    index = median(clock(lambda: queue.nearest(*next(turns[0])), 20))
    brute_force = median(clock(lambda: torch.ops.tal_fast.nearest(*ring, *next(turns[1]), None), 20))
    assert index < brute_force / gain


@NATIVE
def test_index_follows_reset_loading_and_copies() -> None:
    queue = FeatureQueue(4096, backend="native")
    queue.push(*random_queue(5000))
    state = copy.deepcopy(queue.state_dict())
    other = FeatureQueue(4096, backend="native")
    other.push(*(100 + q for q in random_queue(5000)))  # the same cursor, other contents
    assert other.cursor.tolist() == queue.cursor.tolist()
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


@NATIVE
def test_index_passes_opcheck_and_is_checked() -> None:
    ops = torch.ops.tal_fast
    queue = FeatureQueue(4096, backend="native")
    queue.push(*random_queue(5000))
    ring = queue.mean_ring, queue.std_ring, queue.cursor
    mean, std = random_queue(5)
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(ops.push_.default, (*(t.clone() for t in ring), mean, std, None, queue.index.clone()))
    torch.library.opcheck(ops.nearest.default, (*ring, mean, std, queue.index))
    with pytest.raises(ValueError, match="index must be"):
        ops.nearest(*ring, mean, std, queue.index[:-1].clone())
    assert FeatureQueue(100, backend="native").index is None
    assert FeatureQueue(5000, backend="reference").index is None
