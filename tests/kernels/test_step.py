"""The kernels together, as a step of TALLoss launches them."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.helpers.backends import every_variant
from tests.helpers.kernels import AVAILABLE, DEVICE, NAN_WARNINGS, REASON, gpu_too, on_device
from tests.helpers.loss_cases import random_batch, random_queue, relative, trace

if not AVAILABLE:
    pytest.skip(REASON, allow_module_level=True)

from tal_fast import TALLoss
from tal_fast.kernels import launch

pytestmark = [pytest.mark.usefixtures("poison"), *NAN_WARNINGS]


class Allocations(TorchDispatchMode):
    """Number of elements of every tensor storage allocated, by address."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.sizes[out.untyped_storage().data_ptr()] = out.untyped_storage().nbytes() // out.element_size()
        return out


@pytest.mark.parametrize(("variant", "expected"), [("paper", 4), ("released", 5)])
def test_number_of_launches_and_memory_of_a_step(
    variant: Literal["paper", "released"], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step launches statistics, search, loss and push, and for ``released`` the sums; backward on a GPU launches one
    more, which multiplies by the upstream gradient. The gradient is the only tensor of B x C, and none is of B x N."""
    rows, classes, entries = 12, 50, 600
    launched: list[str] = []
    run = launch.Launch.run

    def counted(self: launch.Launch, *tensors: Tensor) -> None:
        launched.append(self.kernel.__name__)
        with _disable_current_modes():  # the interpreter copies arguments
            run(self, *tensors)

    loss_fn = TALLoss(variant, queue_size=entries, backend="triton").to(DEVICE)
    loss_fn.queue.push(*on_device(*random_queue(entries)))
    logits, features, labels = on_device(*random_batch(rows, classes, width=4))
    z = logits.requires_grad_() * 1.0
    loss_fn(z, features, labels)
    monkeypatch.setattr(launch.Launch, "run", counted)
    with Allocations() as allocations:
        value = loss_fn(z, features, labels)
    assert len(launched) == expected
    sizes = [size for pointer, size in allocations.sizes.items() if pointer != z.data_ptr()]
    assert sum(size >= rows * classes for size in sizes) == 1
    assert max(sizes) == rows * classes
    value.backward()
    # The interpreter's CPU compares the factor with 1 without a launch.
    assert len(launched) == expected + (DEVICE.type == "cuda")
    launched.clear()
    loss_fn(logits.detach(), features, labels, warmup=True)
    assert len(launched) == 4  # no loss then depends on other rows' logits


@pytest.mark.slow
@gpu_too
def test_golden_trace_in_float32() -> None:
    """40 steps, the queue wrapped several times: float32 keeps the same samples and stays close."""
    t = trace()
    loss_fn = TALLoss("released", queue_size=int(t["capacity"]), backend="triton").to(DEVICE)
    for step in range(len(t["logits"])):
        logits, features = (t[key][step].float().to(DEVICE) for key in ("logits", "features"))
        value = loss_fn(logits, features, t["labels"][step].to(DEVICE), warmup=step < int(t["warmup_steps"]))
        assert relative(value.cpu(), t["loss_released"][step]) <= 1e-3
        assert len(loss_fn.queue) == int(t["queue_len"][step])
    mean, std = loss_fn.queue.contents()
    torch.testing.assert_close(mean.cpu().double(), t["queue_mean"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(std.cpu().double(), t["queue_std"], rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@every_variant
def test_step_in_a_cuda_graph(variant: Literal["paper", "released"]) -> None:
    """Statistics, loss, gradient and push, captured once and replayed on new data."""
    steps = [[t.to(DEVICE) for t in random_batch(64, 100)] for _ in range(6)]
    eager = TALLoss(variant, queue_size=150, backend="triton").to(DEVICE)
    graphed = TALLoss(variant, queue_size=150, backend="triton").to(DEVICE)
    logits, features, labels = (t.clone() for t in steps[0])
    logits.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        value = graphed(logits, features, labels)
        return value.detach(), torch.autograd.grad(value, logits)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graphed.queue.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, grad = step()
    graphed.queue.reset()
    for z, f, y in steps:
        with torch.no_grad():
            logits.copy_(z)
            features.copy_(f)
            labels.copy_(y)
        graph.replay()
        leaf = z.clone().requires_grad_()
        expected = eager(leaf, f, y)
        assert torch.equal(value, expected.detach())
        assert torch.equal(grad, torch.autograd.grad(expected, leaf)[0])
        assert torch.equal(graphed.queue.ring.cursor, eager.queue.ring.cursor)
        assert torch.equal(graphed.queue.ring.mean, eager.queue.ring.mean)


@pytest.mark.gpu
def test_step_does_not_wait_for_the_gpu() -> None:
    logits, features, labels = (t.to(DEVICE) for t in random_batch(32, 10))
    variants: tuple[Literal["paper", "released"], ...] = ("paper", "released")
    for variant in variants:
        loss_fn = TALLoss(variant, queue_size=50, backend="triton").to(DEVICE)
        loss_fn(logits.requires_grad_(), features, labels).backward()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss_fn(logits, features, labels).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
