"""The whole loss step: statistics, search, loss, gradient and push (``tal_fast.loss.TALLoss``).

Each gives the loss and its gradient by the logits in its own way: by autograd, or (``..._direct``) both at once, by
``TALLoss.loss_and_gradient``, which spares autograd's call. ``layer``: with a last layer's forward and backward, where
none is spared, as in training. Peers: the released algorithm's list queue, the plain PyTorch reference as it is and
compiled, F.cross_entropy as it is (the floor) and compiled. The gate is the reference in float64 for the released
variant's, and for ``paper``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.batches import FreshFeatures, fill, make_logits
from bench.harness import agree, sets_beyond_cache
from bench.list_queue import ListQueueTAL
from tal_fast import TALLoss

Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # leaf of logits, features, labels -> loss, gradient


@dataclass(frozen=True)
class Case:
    peer: str
    B: int
    C: int
    D: int
    N: int
    dtype: str = "float32"
    threads: int = 1
    layer: bool = False

    def __str__(self) -> str:
        last = "-layer" if self.layer else ""
        return f"{self.peer}-B{self.B}-C{self.C}-D{self.D}-N{self.N}-{self.dtype}-{self.threads}t{last}"

    @property
    def bytes(self) -> int:
        """Logits read and their gradient written once, features read once; the queue's share is the search's affair."""
        size = getattr(torch, self.dtype).itemsize
        return 2 * self.B * self.C * size + self.B * self.D * size


CIFAR, IMAGENET = (128, 100, 64, 30_000), (64, 1000, 2048, 880_880)
EAGER = ("list_queue", "reference", "released", "paper")
DIRECT = ("released_direct", "paper_direct")
COMPILED = ("reference_compiled", "cross_entropy_compiled")  # tens of seconds to compile: at two sizes
FULL = [
    *(
        Case(peer, *size, threads=threads)
        for size in (CIFAR, IMAGENET)
        for threads in (1, 2)
        for peer in EAGER + DIRECT
    ),
    *(
        Case(p, *CIFAR, threads=threads, layer=True)
        for threads in (1, 2)
        for p in ("list_queue", "released", "released_direct", "cross_entropy")
    ),
    *(Case(peer, *CIFAR) for peer in COMPILED),
    *(Case(peer, 256, 1000, 2048, 20_000) for peer in (*EAGER[1:], *COMPILED)),
    *(Case(peer, 256, 1000, 2048, 20_000, "bfloat16") for peer in EAGER[1:]),
    *(
        Case(peer, *size)
        for size in ((32, 100, 64, 30_000), (1024, 100, 64, 30_000), (128, 10, 512, 1_000))
        for peer in EAGER[2:]
    ),
    Case("released", 32, 1000, 512, 10_000_000),
]
SMOKE = [Case(peer, *CIFAR) for peer in (*EAGER, *DIRECT)]
GPU = [
    Case(peer, *size)
    for size in (CIFAR, (256, 1000, 2048, 880_880))
    # Not the list queue, which waits for the device and cannot be captured in a graph.
    for peer in (*EAGER[1:], *DIRECT, *COMPILED)
]


def differentiated(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor], layer: Layer | None = None) -> Step:
    """A loss, and its gradient by autograd."""

    def step(leaf: Tensor, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits, leaves = layer(leaf, features) if layer else (leaf, (leaf,))
        loss = loss_of(logits, features, labels)
        return loss, torch.autograd.grad(loss, leaves)[0]

    return step


def direct(loss_of: TALLoss, layer: Layer | None = None) -> Step:
    """A loss and its gradient at once; autograd goes on from there where there is a layer to go to."""

    def step(leaf: Tensor, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits, leaves = layer(leaf, features) if layer else (leaf, None)
        loss, gradient, _ = loss_of.loss_and_gradient(logits, features, labels)
        return loss, torch.autograd.grad(logits, leaves, gradient)[0] if leaves else gradient

    return step


class Layer:
    """A last layer of D to C whose weights are zero, so that it gives the logits it is given (as its bias, (B, C))."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.weight = torch.zeros(case.D, case.C, device=device, requires_grad=True)

    def __call__(self, leaf: Tensor, features: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The logits, and what their gradient is taken by."""
        return torch.addmm(leaf, features, self.weight), (leaf, self.weight)


def cross_entropy(logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)  # as under autocast


def make_step(case: Case, device: torch.device, backend: str = "auto") -> Step:
    """The peer, with a full queue that is the same for all; ``backend`` is this package's."""
    compiled = case.peer.endswith("_compiled")
    layer = Layer(case, device) if case.layer else None
    if case.peer.startswith("cross_entropy"):
        return differentiated(torch.compile(cross_entropy, dynamic=False) if compiled else cross_entropy, layer)
    torch.manual_seed(1)
    if case.peer == "list_queue":
        plain = ListQueueTAL(case.N)

        def push(mean: Tensor, std: Tensor) -> None:
            plain.means += mean.tolist()
            plain.stds += std.tolist()

        fill(push, case.N)
        return differentiated(plain, layer)
    loss = TALLoss(
        variant_of(case.peer),  # type: ignore[arg-type]
        queue_size=case.N,
        backend="reference" if case.peer.startswith("reference") else backend,  # type: ignore[arg-type]
    ).to(device)
    fill(loss.queue.push, case.N, device)
    if case.peer in DIRECT:
        return direct(loss, layer)
    return differentiated(torch.compile(loss, dynamic=False) if compiled else loss, layer)


def variant_of(peer: str) -> str:
    """The loss a peer computes."""
    name = peer.split("_")[0]
    return {"cross": "cross_entropy", "paper": "paper"}.get(name, "released")


@lru_cache(maxsize=4)
def expected(
    variant: str, B: int, C: int, D: int, N: int, dtype: str, device: torch.device
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """A batch, and its loss and gradient by the definition in float64."""
    torch.manual_seed(0)
    logits, labels = make_logits(B, C, getattr(torch, dtype), device)
    features = FreshFeatures(B, D, device).features.to(getattr(torch, dtype))
    leaf = logits.double().requires_grad_()
    if variant == "cross_entropy":
        loss = F.cross_entropy(leaf, labels)
    else:
        judge = TALLoss(variant, queue_size=N, backend="reference").to(device).double()  # type: ignore[arg-type]
        torch.manual_seed(1)
        fill(judge.queue.push, N, device)
        loss = judge(leaf, features.double(), labels)
    (grad,) = torch.autograd.grad(loss, leaf)
    return (logits, features, labels), loss.detach(), grad


def gate(case: Case, step: Step, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The batch, if the peer's loss and gradient on it are right."""
    batch, loss, grad = expected(variant_of(case.peer), case.B, case.C, case.D, case.N, case.dtype, device)
    leaf = batch[0].clone().requires_grad_()
    got, got_grad = step(leaf, *batch[1:])
    # Eager float32 itself is 1e-4 to 3e-3 off where the queue is dense: typicalness amplifies rounding.
    agree(f"the loss of {case}", got.detach(), loss, 1e-2)
    agree(f"the gradient of {case}", got_grad, grad, 2e-2)
    return batch


def make_inputs(
    case: Case, batch: tuple[Tensor, Tensor, Tensor], device: torch.device
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Callable[[], object]]:
    """Sets of (leaf of logits, features), the labels, and what gives the first set's features new statistics."""
    logits, _, labels = batch
    read = logits.nbytes + case.B * case.D * logits.element_size()
    fresh = [FreshFeatures(case.B, case.D, device) for _ in range(sets_beyond_cache(device, read))]
    features = [f.features.to(logits.dtype) for f in fresh]

    def renew() -> None:
        fresh[0].renew()
        if features[0] is not fresh[0].features:
            features[0].copy_(fresh[0].features)

    return [(logits.clone().requires_grad_(), f) for f in features], labels, renew


@pytest.mark.cases(FULL, SMOKE, gpu=GPU, group="step")
def bench_step(case: Case, measure: Callable[..., None], device: torch.device) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    step = make_step(case, device)
    inputs, labels, prepare = make_inputs(case, gate(case, step, device), device)
    calls = [partial(step, *each, labels) for each in inputs]
    floor = partial(make_step(replace(case, peer="cross_entropy"), device), *inputs[0], labels)
    facts = {"floor": "F.cross_entropy", "bytes": case.bytes}
    measure(calls, floor, case=case, facts=facts, prepare=prepare)
