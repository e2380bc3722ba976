"""``queue_scope="global"``: ranks with parts of a batch equal one rank with the batch. Two processes, gloo."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tal_fast import TALLoss
from tal_fast.loss import _extension
from tests.helpers.ranks import run_ranks

WORLD, ROWS, CLASSES = 2, 12, 6
BACKENDS = ["reference"] + (["native"] if _extension.load()[0] else [])


class Net(nn.Module):
    """Network without BatchNorm, so that only the loss depends on how a batch is split."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 24), nn.ReLU())
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(x)
        return self.head(features), features


class NetWithLoss(nn.Module):
    def __init__(self, loss_fn: TALLoss) -> None:
        super().__init__()
        self.net, self.loss_fn = Net(), loss_fn

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits, features = self.net(x)
        return self.loss_fn(logits, features, y)


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


def rows_of(rank: int) -> slice:
    return slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)


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


def train_with_global_scope(rank: int) -> dict[tuple[str, str], Any]:
    results = {}
    for backend in BACKENDS:
        for variant in ("paper", "released"):
            torch.manual_seed(0)
            net = Net().double()
            loss_fn = TALLoss(variant, queue_size=20, queue_scope="global", backend=backend).double()
            losses = train(DistributedDataParallel(net), loss_fn, rows_of(rank))
            results[backend, variant] = (losses, net.state_dict(), loss_fn.queue.contents())
    return results


def weighted_losses(part: slice, scope: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Losses with class weights and their gradients, by variant and reduction, of some rows of a batch."""
    torch.manual_seed(5)
    logits, features = torch.randn(ROWS, CLASSES).double(), torch.rand(ROWS, 5).double()
    labels = torch.where(torch.rand(ROWS) < 0.5, logits.argmax(1), torch.randint(CLASSES, (ROWS,)))
    labels[:3], weight = -100, torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0, 0.25])
    results = []
    for backend in BACKENDS:
        for variant in ("paper", "released"):
            for reduction in ("mean", "sum", "none"):
                loss_fn = TALLoss(
                    variant, queue_scope=scope, label_smoothing=0.1, backend=backend, reduction=reduction,
                    class_weight=weight,
                ).double()  # fmt: skip  # type: ignore[arg-type]
                loss_fn.queue.push(torch.linspace(0.3, 0.6, 9).double(), torch.full((9,), 0.3).double())
                leaf = logits[part].requires_grad_()
                loss = loss_fn(leaf, features[part], labels[part])
                results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    return results


def entries_before_and_after_reading(rank: int) -> list[tuple[int, int]]:
    """Numbers of entries that a step adds to the ring before the queue is read, and afterwards."""
    torch.manual_seed(0)
    net = Net()
    loss_fn = TALLoss(queue_size=50, queue_scope="global", confidence_threshold=-1.0)
    x, y = steps(torch.float32)[0]
    logits, features = net(x[rows_of(rank)])
    y = logits.argmax(1)  # all correct, so that all are accepted
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
        loss_fn(logits, features, y)
        before = int(loss_fn.queue.ring.cursor[1])
        read()
        seen.append((before, int(loss_fn.queue.ring.cursor[1])))
        loss_fn.queue.reset()
    return seen


def local_queues_inside_and_outside_ddp(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    combined = NetWithLoss(TALLoss(queue_size=50))
    combined.register_buffer("something", torch.zeros(1))  # a reason for DDP to broadcast buffers
    model = DistributedDataParallel(combined, broadcast_buffers=True)
    alone = copy.deepcopy(combined.loss_fn)
    for x, y in steps(torch.float32):
        part = rows_of(rank)
        model(x[part], y[part]).backward()
        with torch.no_grad():
            logits, features = combined.net(x[part])
        alone(logits, features, y[part])
    return [combined.loss_fn.queue.contents(), alone.queue.contents()]


def losses_compiled_and_eager(rank: int) -> tuple[list[float], list[float]]:
    torch.manual_seed(rank)
    losses = [TALLoss(queue_size=50, queue_scope="global") for _ in range(2)]
    compiled = torch.compile(losses[0], fullgraph=True, backend="aot_eager")
    results: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        batch = torch.randn(6, CLASSES), torch.rand(6, 5), torch.randint(CLASSES, (6,))
        for values, loss_fn in zip(results, (compiled, losses[1]), strict=True):
            values.append(float(loss_fn(*batch)))
    return results


def errors_of_unequal_rows(rank: int) -> tuple[list[str], int]:
    """Messages of steps whose ranks have 6 and 5, 6 and 0, 0 and 6 rows, and the entries that even steps push then."""
    loss_fn = TALLoss(queue_size=50, queue_scope="global", confidence_threshold=-1.0)
    logits, features = torch.randn(6, CLASSES), torch.rand(6, 5)
    messages = []
    for sizes in ((6, 6), (6, 5), (6, 0), (0, 6), (0, 0), (6, 6)):
        rows = slice(sizes[rank])
        for step in (loss_fn, loss_fn.loss_and_gradient):
            try:
                step(logits[rows], features[rows], logits.argmax(1)[rows])
            except ValueError as error:
                messages.append(str(error))
    return messages, len(loss_fn.queue)


class Results(NamedTuple):
    trained: dict[tuple[str, str], Any]
    entries: list[tuple[int, int]]
    queues: list[tuple[torch.Tensor, torch.Tensor]]
    losses: tuple[list[float], list[float]]
    unequal: tuple[list[str], int]
    weighted: list[tuple[torch.Tensor, torch.Tensor]]


def everything(rank: int) -> Results:
    return Results(
        train_with_global_scope(rank),
        entries_before_and_after_reading(rank),
        local_queues_inside_and_outside_ddp(rank),
        losses_compiled_and_eager(rank),
        errors_of_unequal_rows(rank),
        weighted_losses(rows_of(rank), "global"),
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """Results of both ranks for all tests here: starting processes is what takes time."""
    return run_ranks(everything, WORLD, tmp_path_factory.mktemp("ranks"))


def test_global_scope_equals_one_process(ranks: list[Results]) -> None:
    trained = [rank.trained for rank in ranks]
    for backend in BACKENDS:
        for variant in ("paper", "released"):
            torch.manual_seed(0)
            net = Net().double()
            loss_fn = TALLoss(variant, queue_size=20, backend=backend).double()
            losses = train(net, loss_fn, slice(None))
            (losses0, weights0, queue0), (losses1, _, queue1) = (r[backend, variant] for r in trained)
            assert [(a + b) / 2 for a, b in zip(losses0, losses1, strict=True)] == pytest.approx(losses, rel=1e-10)
            for name, weight in net.state_dict().items():
                torch.testing.assert_close(weights0[name], weight, rtol=1e-9, atol=1e-11)
            for got, other, want in zip(queue0, queue1, loss_fn.queue.contents(), strict=True):
                assert torch.equal(got, other)
                torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


def test_global_scope_with_class_weights_equals_one_process(ranks: list[Results]) -> None:
    whole = weighted_losses(slice(None), "local")
    reductions = ["mean", "sum", "none"] * (len(whole) // 3)
    for reduction, (loss, grad), *parts in zip(reductions, whole, *(rank.weighted for rank in ranks), strict=True):
        losses, grads = (torch.cat([torch.atleast_1d(t) for t in values]) for values in zip(*parts, strict=True))
        if reduction == "mean":  # alone is rescaled, so that the ranks' mean is that of the batch
            losses, grads = losses / WORLD, grads / WORLD
        if reduction != "none":
            losses = losses.sum()
        torch.testing.assert_close(losses, loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(grads, grad, rtol=1e-9, atol=1e-12)


def test_global_push_is_deferred_until_the_queue_is_used(ranks: list[Results]) -> None:
    for rank in ranks:
        assert rank.entries == [(0, 2 * 6)] * 8


def test_local_queues_stay_apart_inside_ddp(ranks: list[Results]) -> None:
    for rank in ranks:
        inside, alone = rank.queues
        assert len(inside[0]) > 0
        assert torch.equal(inside[0], alone[0])
    assert not torch.equal(ranks[0].queues[0][0], ranks[1].queues[0][0])


def test_compiled_global_scope_equals_eager(ranks: list[Results]) -> None:
    for rank in ranks:
        compiled, eager = rank.losses
        assert compiled == pytest.approx(eager, rel=1e-6)


def test_unequal_rows_are_refused_on_every_rank(ranks: list[Results]) -> None:
    for rank in ranks:
        messages, entries = rank.unequal
        assert [m[:90] for m in messages[::2]] == [m[:90] for m in messages[1::2]]
        for message, (first, second) in zip(messages[::2], ((6, 5), (6, 0), (0, 6)), strict=True):
            assert f"rank 0 has {first} and rank 1 has {second}; fill up" in message
        assert entries == 2 * 2 * 2 * 6  # of the even steps, twice two of 6 rows


def test_global_scope_without_a_process_group_is_local() -> None:
    torch.manual_seed(1)
    logits, features, labels = torch.randn(8, 4), torch.rand(8, 6), torch.randint(4, (8,))
    a, b = TALLoss(queue_size=9, queue_scope="global"), TALLoss(queue_size=9)
    for _ in range(3):
        assert torch.equal(a(logits, features, labels), b(logits, features, labels))
