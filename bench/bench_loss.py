"""Loss and gradient from logits and distances (``tal_fast.loss.backends``), beside cross-entropy.

The fewest bytes: each logit read once, each gradient element written once, 2·B·C·size. The gate is the reference in
float64. Liger's and quack's cross-entropy, which need a GPU, are the best known of what does less than TAL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.batches import make_logits
from bench.harness import CannotRun, agree, sets_beyond_cache
from tal_fast.loss import dispatch, reference
from tal_fast.loss.backends import Backend, LossInputs
from tal_fast.loss.options import LossOptions
from tal_fast.loss.queue import FeatureQueue

Run = Callable[[Tensor], tuple[Tensor, Tensor]]  # a leaf of logits -> loss, gradient


@dataclass(frozen=True)
class Case:
    peer: str
    B: int
    C: int
    dtype: str = "float32"
    threads: int = 1

    def __str__(self) -> str:
        return f"{self.peer}-B{self.B}-C{self.C}-{self.dtype}-{self.threads}t"

    @property
    def bytes(self) -> int:
        return 2 * self.B * self.C * getattr(torch, self.dtype).itemsize


TAL = ("paper", "released")
PEERS = (*TAL, "reference", "reference_compiled", "cross_entropy_compiled", "liger", "quack")
SIZES = [(128, c) for c in (10, 100, 1000, 21_841)] + [(32, 131_072)] + [(b, 1000) for b in (32, 1024, 16_384)]
FULL = [
    Case(peer, *size, dtype, threads)
    for size in SIZES
    for dtype in ("float32", "bfloat16")
    for threads in (1, 2)
    for peer in PEERS[:5]
    # Compiling takes seconds: where both are worth it. More threads: where there is work for them.
    if ("compiled" not in peer or size in ((128, 100), (1024, 1000)))
    and (threads == 1 or (size in ((128, 1000), (16_384, 1000), (128, 21_841)) and dtype == "float32"))
]
SMOKE = [Case(peer, *size) for size in ((128, 100), (128, 1000)) for peer in (*TAL, "reference")]
GPU_SIZES = [(256, 1000), (16_384, 1000), (4096, 21_841), (4096, 131_072)]
GPU = [Case(peer, *size, dtype) for size in GPU_SIZES for dtype in ("bfloat16", "float32") for peer in PEERS]


class Problem:
    """Logits, labels, the distances to the queue, and what the loss and gradient are."""

    def __init__(self, B: int, C: int, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.logits, self.labels = make_logits(B, C, dtype, device)
        self.distance = 0.01 * torch.rand(B, device=device)
        self.device = device

    @lru_cache(maxsize=3)  # noqa: B019 - problems are few and end with the process
    def expected(self, variant: str) -> tuple[Tensor, Tensor]:
        """Loss and gradient by the definition, in float64 (float32 for logits that would need 10 GB and more)."""
        leaf = self.logits.to(torch.float64 if self.logits.numel() <= 1 << 26 else torch.float32).requires_grad_()
        if variant == "cross_entropy":
            loss = F.cross_entropy(leaf, self.labels)
        else:
            loss, _ = reference.tal_loss(leaf, self.labels, self.distance.to(leaf.dtype), LossOptions(variant))
        (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), grad.to(torch.promote_types(self.logits.dtype, torch.float32))


@lru_cache(maxsize=1)
def problem(B: int, C: int, dtype: str, device: torch.device) -> Problem:
    return Problem(B, C, getattr(torch, dtype), device)


def differentiated(loss_of: Callable[[Tensor], Tensor]) -> Run:
    """Loss and gradient, in one function."""

    def run(leaf: Tensor) -> tuple[Tensor, Tensor]:
        loss = loss_of(leaf)
        (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), grad

    return run


def cross_entropy(p: Problem) -> Run:
    """The floor: in float32, as under autocast."""
    return differentiated(lambda z: F.cross_entropy(z.float(), p.labels))


def tickets_of(backend: Backend, p: Problem) -> Tensor | None:
    """Arrival counters for the launches of a step, as its first part gives them."""
    features, queue = torch.rand(len(p.labels), 2, device=p.device), FeatureQueue(1, device=p.device)
    return backend.statistics_distance(features, p.labels, queue.ring, -100).tickets


def make_peer(name: str, p: Problem) -> tuple[Run, str]:
    """The peer, and the variant whose loss it computes.

    Raises:
        CannotRun: it is not installed, or not for this device.
    """
    if name in TAL:
        backend = dispatch.for_device("auto", p.device)
        summary, tickets = reference.batch_summary(p.logits, p.labels, p.distance), tickets_of(backend, p)

        def tal(z: Tensor) -> Tensor:
            inputs = LossInputs(z, p.labels, p.distance, summary, tickets, LossOptions(name), warmup=False)
            if name == "released":  # its mean weight needs the logits once more, which is part of its cost
                inputs.summary = backend.complete_summary(inputs)
            return backend.loss(inputs)[0]

        return differentiated(tal), name
    if name.startswith("reference"):

        def plain(z: Tensor) -> Tensor:
            return reference.tal_loss(z, p.labels, p.distance)[0]

        return differentiated(torch.compile(plain, dynamic=False) if name.endswith("compiled") else plain), "paper"
    if name == "cross_entropy_compiled":
        compiled = torch.compile(lambda z: F.cross_entropy(z.float(), p.labels), dynamic=False)
        return differentiated(compiled), "cross_entropy"
    if p.device.type != "cuda":
        raise CannotRun(f"{name} runs on GPUs only")
    try:
        if name == "liger":
            from liger_kernel.transformers.functional import liger_cross_entropy

            # It writes the gradient over the logits; the time is the same whatever they hold.
            return differentiated(lambda z: liger_cross_entropy(z, p.labels)), "cross_entropy"
        from quack.cross_entropy import cross_entropy as quack_cross_entropy

        return differentiated(lambda z: quack_cross_entropy(z, p.labels)), "cross_entropy"
    except ImportError as error:
        raise CannotRun(f"{name} is not installed ({error})") from None


def gate(what: object, run: Run, p: Problem, variant: str) -> None:
    """Refuse a peer whose loss or gradient is wrong."""
    loss, grad = run(p.logits.clone().requires_grad_())
    want_loss, want_grad = p.expected(variant)
    half = p.logits.dtype != torch.float32
    agree(f"the loss of {what}", loss, want_loss, 1e-3 if half else 1e-5)
    agree(f"the gradient of {what}", grad, want_grad, 1e-2 if half else 1e-4)
    # One wrong row of thousands is little of the norm.
    furthest = float((grad - want_grad).abs().max() / want_grad.abs().max())
    if not furthest <= 1e-2:
        raise AssertionError(f"an element of the gradient of {what} is off by {furthest:.2e} (limit 1e-02); not timed")


@pytest.mark.cases(FULL, SMOKE, gpu=GPU, group="loss")
def bench_loss(case: Case, measure: Callable[..., None], device: torch.device) -> None:
    torch._dynamo.reset()
    p = problem(case.B, case.C, case.dtype, device)
    run, variant = make_peer(case.peer, p)
    gate(case, run, p, variant)
    leaves = [p.logits.clone().requires_grad_() for _ in range(sets_beyond_cache(device, case.bytes // 2))]
    floor = cross_entropy(p)
    measure(
        [lambda z=leaf: run(z) for leaf in leaves],
        lambda: floor(leaves[0]),
        case=case,
        facts={"floor": "F.cross_entropy", "bytes": case.bytes},
    )
