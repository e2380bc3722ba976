"""TAL fused with the last Linear layer (``TALLinearLoss``): loss, and gradients by features, weight and bias.

The floor is the layer's three matrix products, results allocated, as its forward and backward pass make them. Peers:
the layer and ``TALLoss`` in two steps; torch's and Liger's fused linear cross-entropy, which do less. The gate is
two steps in float64. ``temporaries``: memory beyond parameters, features and gradients, as a share of the logits'.

``python -m bench.bench_linear 1024 1000000 512`` measures one size without the gate, for which float64 is too large.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from bench.batches import FreshFeatures, fill
from bench.bench_step import variant_of
from bench.harness import CannotRun, agree, clock, clock_of
from tal_fast import TALLinearLoss, TALLoss

QUEUE = 20_000
Layer = tuple[Tensor, Tensor, Tensor]  # leaves: features (B, D), weight (C, D), bias (C,)
Run = Callable[[], tuple[Tensor, ...]]  # -> loss, gradients by the layer


@dataclass(frozen=True)
class Case:
    peer: str
    B: int
    C: int
    D: int
    dtype: str = "float32"
    threads: int = 1

    def __str__(self) -> str:
        return f"{self.peer}-B{self.B}-C{self.C}-D{self.D}-{self.dtype}-{self.threads}t"


OURS = ("paper", "released")
PEERS = (*OURS, "paper_two_steps", "released_two_steps", "cross_entropy_torch", "cross_entropy_liger")
FULL = [
    *(Case(peer, *size) for size in ((1024, 21_841, 512), (256, 21_841, 2048)) for peer in PEERS),
    *(Case(peer, 1024, 131_072, 512) for peer in PEERS[:4]),  # torch's takes 20 s a run
]
SMOKE = [Case(peer, 256, 8192, 64) for peer in PEERS]
GPU = [Case(peer, *size, "bfloat16") for size in ((2048, 21_841, 2048), (4096, 131_072, 2048)) for peer in PEERS]


class Problem:
    """Leaves of a last layer and labels, of which two thirds are what it predicts."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        dtype = getattr(torch, case.dtype)
        features = FreshFeatures(case.B, case.D, device).features
        weight = torch.randn(case.C, case.D, device=device) * (3 / features.norm(dim=1).mean())
        bias = torch.randn(case.C, device=device)
        self.layer: Layer = tuple(t.to(dtype).requires_grad_() for t in (features, weight, bias))  # type: ignore[assignment]
        with torch.no_grad():
            parts = [F.linear(x, *self.layer[1:]).argmax(1) for x in self.layer[0].split(64)]
        self.labels = torch.cat(parts)
        self.labels[::3] = torch.randint(case.C, self.labels[::3].shape, device=device)

    def products(self) -> None:
        """The layer's three matrix products."""
        x, weight = self.layer[0].detach(), self.layer[1].detach()
        logits = torch.mm(x, weight.T)
        torch.mm(logits, weight)
        torch.mm(logits.T, x)


def make_loss(kind: type[TALLoss], variant: str, device: torch.device) -> TALLoss:
    torch.manual_seed(1)
    loss = kind(variant, queue_size=QUEUE).to(device)  # type: ignore[arg-type]
    fill(loss.queue.push, QUEUE, device)
    return loss


def make_run(peer: str, p: Problem) -> Run:
    """Step of a peer, which pushes nothing: every run finds the same queue."""
    x, weight, bias = p.layer
    if peer in OURS:
        fused = make_loss(TALLinearLoss, peer, x.device)
        loss_of: Callable[[], Tensor] = lambda: fused(x, weight, bias, p.labels, push=False)  # noqa: E731
    elif peer.endswith("_two_steps"):
        loss_fn = make_loss(TALLoss, variant_of(peer), x.device)
        loss_of = lambda: loss_fn(F.linear(x, weight, bias), x, p.labels, push=False)  # noqa: E731
    elif peer == "cross_entropy_torch":
        if not hasattr(F, "linear_cross_entropy"):
            raise CannotRun(f"torch {torch.__version__} has no F.linear_cross_entropy")
        chunked = {"options": torch.nn.LinearCrossEntropyOptions()}
        loss_of = lambda: F.linear_cross_entropy(x, weight, p.labels, linear_bias=bias, **chunked)  # noqa: E731
    else:
        if x.device.type != "cuda":
            raise CannotRun("Liger's kernels run on GPUs only")
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger
        except ImportError as error:
            raise CannotRun(f"Liger is not installed ({error})") from None
        loss_of = lambda: liger(x, weight, p.labels, bias)  # noqa: E731

    def run() -> tuple[Tensor, ...]:
        loss = loss_of()
        return loss.detach(), *torch.autograd.grad(loss, p.layer)

    return run


def gate(case: Case, run: Run, p: Problem) -> None:
    """Refuse a peer whose loss or gradients are wrong."""
    x, weight, bias = leaves = [t.detach().double().requires_grad_() for t in p.layer]
    logits = F.linear(x, weight, bias)
    if variant_of(case.peer) == "cross_entropy":
        want = F.cross_entropy(logits, p.labels)
    else:
        # Not in plain PyTorch, which would need a dozen tensors of the logits' size.
        judge = make_loss(TALLoss, variant_of(case.peer), x.device)
        want = judge(logits, x, p.labels, push=False)
    half = case.dtype != "float32"
    names = ("loss", "gradient by the features", "gradient by the weight", "gradient by the bias")
    for name, got, expected in zip(names, run(), (want.detach(), *torch.autograd.grad(want, leaves)), strict=True):
        # Eager float32 itself is 1e-4 to 3e-3 off where the queue is dense: typicalness amplifies rounding.
        agree(f"the {name} of {case}", got, expected, 5e-2 if half else 1e-2)


def temporaries(run: Run, p: Problem) -> float:
    """Largest memory of a step's tensors beyond its results, as a share of the logits'."""
    x, weight, _ = p.layer
    run()
    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        run()
        peak = torch.cuda.max_memory_allocated(x.device) - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        peak = max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    gradients = sum(t.nbytes for t in p.layer)
    return (peak - gradients) / (len(x) * len(weight) * x.element_size())


@pytest.mark.cases(FULL, SMOKE, gpu=GPU, group="linear")
def bench_linear(case: Case, measure: Callable[..., None], device: torch.device) -> None:
    p = Problem(case, device)
    run = make_run(case.peer, p)
    gate(case, run, p)
    facts = {
        "floor": "three matrix products",
        "operations": 6 * case.B * case.C * case.D,
        "temporaries": temporaries(run, p),
    }
    measure([run], p.products, case=case, facts=facts)


def main() -> None:
    rows, classes, width = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    p = Problem(Case("paper", rows, classes, width), torch.device("cpu"))
    floor = min(clock(p.products, 2, clock_of(1)))
    print(f"three matrix products {floor:.2f} s")
    for peer in OURS:
        run = make_run(peer, p)
        share = temporaries(run, p)
        seconds = min(clock(run, 2, clock_of(1)))
        print(f"{peer}: {seconds:.2f} s, {seconds / floor:.2f} of them; temporaries {share:.3f} of the logits")


if __name__ == "__main__":
    main()
