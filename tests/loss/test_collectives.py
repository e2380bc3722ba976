"""``queue_scope="global"``: ranks with parts of a batch equal one rank with the batch. Two processes, gloo."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tal_fast import TALLoss
from tal_fast.loss import _extension

WORLD, ROWS, CLASSES = 2, 12, 6
BACKENDS = ["reference"] + (["native"] if _extension.load()[0] else [])


class Net(nn.Module):
    """Without BatchNorm, so that splitting a batch changes nothing but the loss's view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 24), nn.ReLU())
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(x)
        return self.head(features), features


def steps(dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    batches = []
    for step in range(6):
        x = torch.randn(ROWS, 5, generator=generator, dtype=dtype)
        y = torch.randint(CLASSES, (ROWS,), generator=generator)
        if step % 2:
            y[:4] = -100  # rank 0 has fewer valid rows than rank 1
        if step == 3:
            y[: ROWS // 2] = -100  # and here none at all
        batches.append((x, y))
    return batches


def train(model: nn.Module, loss_fn: TALLoss, part: slice) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step, (x, y) in enumerate(steps()):
        logits, features = model(x[part])
        optimizer.zero_grad()
        if step % 3 == 1:
            loss, gradient, _ = loss_fn.loss_and_gradient(logits, features, y[part])
            logits.backward(gradient)
        else:
            loss = loss_fn(logits, features, y[part])
            loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def start(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=store, timeout=timedelta(seconds=60))


def global_worker(rank: int, folder: str) -> None:
    start(rank, folder)
    results = {}
    for backend in BACKENDS:
        for variant in ("paper", "released"):
            torch.manual_seed(0)
            net = Net().double()
            loss_fn = TALLoss(variant, queue_size=20, queue_scope="global", backend=backend).double()
            model = DistributedDataParallel(net)
            half = ROWS // WORLD
            losses = train(model, loss_fn, slice(rank * half, (rank + 1) * half))
            results[backend, variant] = (losses, net.state_dict(), loss_fn.queue.contents())
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_global_scope_equals_one_process(tmp_path: Path) -> None:
    mp.spawn(global_worker, args=(str(tmp_path),), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(WORLD)]
    for backend in BACKENDS:
        for variant in ("paper", "released"):
            torch.manual_seed(0)
            net = Net().double()
            loss_fn = TALLoss(variant, queue_size=20, backend=backend).double()
            losses = train(net, loss_fn, slice(None))
            (losses0, weights0, queue0), (losses1, _, queue1) = (r[backend, variant] for r in ranks)
            assert [(a + b) / 2 for a, b in zip(losses0, losses1, strict=True)] == pytest.approx(losses, rel=1e-10)
            for name, weight in net.state_dict().items():
                torch.testing.assert_close(weights0[name], weight, rtol=1e-9, atol=1e-11)
            for got, other, want in zip(queue0, queue1, loss_fn.queue.contents(), strict=True):
                assert torch.equal(got, other)
                torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


def deferring_worker(rank: int, folder: str) -> None:
    start(rank, folder)
    torch.manual_seed(0)
    net = Net()
    loss_fn = TALLoss(queue_size=50, queue_scope="global", confidence_threshold=-1.0)
    x, y = steps(torch.float32)[0]
    part = slice(rank * 6, rank * 6 + 6)
    logits, features = net(x[part])
    y = logits.argmax(1)  # all right, so that all are accepted

    def rings() -> int:
        return int(loss_fn.queue.cursor[1])

    seen = []
    for read in (
        lambda: len(loss_fn.queue),
        lambda: loss_fn.queue.contents(),
        lambda: loss_fn.queue.nearest(torch.rand(2), torch.rand(2)),
        lambda: loss_fn.queue.push(torch.rand(0), torch.rand(0)),
        lambda: loss_fn.state_dict(),
        lambda: copy.deepcopy(loss_fn),
        lambda: loss_fn.queue.double().float(),
        lambda: loss_fn(logits, features, torch.full_like(y, -100)),
    ):
        before = rings()
        loss_fn(logits, features, y)
        late = rings() - before
        read()
        seen.append((late, rings() - before))
        loss_fn.queue.reset()
    torch.save(seen, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_global_push_is_put_off_until_the_queue_is_used(tmp_path: Path) -> None:
    mp.spawn(deferring_worker, args=(str(tmp_path),), nprocs=WORLD)
    for rank in range(WORLD):
        # Nothing was pushed when the step was over, and 2 x 6 entries once somebody looked.
        assert torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) == [(0, 12)] * 8


class Combined(nn.Module):
    def __init__(self, loss_fn: TALLoss) -> None:
        super().__init__()
        self.net, self.loss_fn = Net(), loss_fn

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits, features = self.net(x)
        return self.loss_fn(logits, features, y)


def local_worker(rank: int, folder: str) -> None:
    start(rank, folder)
    torch.manual_seed(0)
    combined = Combined(TALLoss(queue_size=50))
    combined.register_buffer("something", torch.zeros(1))  # a reason for DDP to broadcast buffers
    model = DistributedDataParallel(combined, broadcast_buffers=True)
    alone = copy.deepcopy(combined.loss_fn)
    for x, y in steps(torch.float32):
        part = slice(rank * 6, rank * 6 + 6)
        model(x[part], y[part]).backward()
        with torch.no_grad():
            logits, features = combined.net(x[part])
        alone(logits, features, y[part])
    torch.save([combined.loss_fn.queue.contents(), alone.queue.contents()], f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_local_queues_stay_apart_even_inside_ddp(tmp_path: Path) -> None:
    mp.spawn(local_worker, args=(str(tmp_path),), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(WORLD)]
    for inside, alone in ranks:
        assert len(inside[0]) > 0
        assert torch.equal(inside[0], alone[0])
    assert not torch.equal(ranks[0][0][0], ranks[1][0][0])


def test_global_scope_without_a_process_group_is_local() -> None:
    torch.manual_seed(1)
    logits, features, labels = torch.randn(8, 4), torch.rand(8, 6), torch.randint(4, (8,))
    a, b = TALLoss(queue_size=9, queue_scope="global"), TALLoss(queue_size=9)
    for _ in range(3):
        assert torch.equal(a(logits, features, labels), b(logits, features, labels))
