"""``TALLinearLoss``: equal to ``TALLoss`` of the last layer's logits, without holding them."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tal_fast import TALLinearLoss, TALLoss
from tal_fast.functional import linear_tal_loss, tal_loss
from tal_fast.loss import linear_chunks
from tests.helpers.backends import (
    NATIVE,
    NEEDS_EXTENSION,
    TRITON,
    device_of,
    every_backend,
    every_variant,
    kernel_backends,
)
from tests.helpers.loss_cases import CASES, golden, options, random_queue, relative
from tests.helpers.ranks import run_ranks

Layer = tuple[Tensor, Tensor, Tensor | None]  # features (B, D), weight (C, D), bias (C,)


def random_layer(rows: int, classes: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Layer, Tensor]:
    """Leaves of features, weight and bias, and labels: about 60% correct, every fifth ignored."""
    features = torch.rand(rows, width) * (0.5 + torch.rand(rows, 1))
    weight, bias = torch.randn(classes, width) * 3 / width**0.5, torch.randn(classes)
    top = F.linear(features, weight, bias).argmax(1)
    labels = torch.where(torch.rand(rows) < 0.6, top, torch.randint(classes, (rows,)))
    labels[4::5] = -100
    return tuple(t.to(dtype).requires_grad_() for t in (features, weight, bias)), labels  # type: ignore[return-value]


def run(
    loss_fn: TALLoss, layer: Layer, labels: Tensor, upstream: float = 1.0, **kwargs: Any
) -> tuple[Tensor, list[Tensor]]:
    """Loss of a fused or of a separate last layer, and the gradients by the layer's tensors, on the CPU."""
    device = loss_fn.queue.device
    leaves = [None if t is None else t.detach().to(device).requires_grad_(t.requires_grad) for t in layer]
    features, weight, bias = leaves
    if isinstance(loss_fn, TALLinearLoss):
        loss = loss_fn(features, weight, bias, labels.to(device), **kwargs)
    else:
        loss = loss_fn(F.linear(features, weight, bias), features.detach(), labels.to(device), **kwargs)
    (loss * upstream).backward()
    return loss.detach().cpu(), [t.grad.cpu() for t in leaves if t is not None and t.requires_grad]


def pair(backend: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[TALLinearLoss, TALLoss]:
    """A fused and a separate loss with the same queue."""
    device = device_of(backend)
    fused, separate = (kind(queue_size=60, backend=backend, **kwargs).to(device) for kind in (TALLinearLoss, TALLoss))
    if dtype == torch.float64:
        fused, separate = fused.double(), separate.double()
    separate.queue.push(*(q.to(device) for q in random_queue(50)))
    fused.load_state_dict(separate.state_dict())
    return fused, separate


def same_queues(a: TALLoss, b: TALLoss) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.queue.contents(), b.queue.contents(), strict=True))


ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6}
"""Largest relative difference (norms) from the separate layer: sums of products in another order."""

SHAPES = [
    # backend, rows, classes, rows of a chunk
    *(pytest.param("native", 33, 1003, n, marks=NEEDS_EXTENSION) for n in (1, 16, 32, 33, 512)),
    *(pytest.param("native", *shape, 4, marks=NEEDS_EXTENSION) for shape in ((1, 7), (4, 1), (9, 100))),
    pytest.param("reference", 9, 100, 4),
    *(pytest.param("triton", *shape, marks=TRITON.marks) for shape in ((3, 100, 2), (1, 7, 4))),
]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("backend", "rows", "classes", "chunk"), SHAPES)
@every_variant
@pytest.mark.usefixtures("poison")
def test_equals_the_separate_layer(
    backend: str, variant: str, rows: int, classes: int, chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_chunks, "CHUNK_ROWS", chunk)
    for has_bias, smoothing in ((True, 0.0), (False, 0.1)):
        (features, weight, bias), labels = random_layer(rows, classes, 37, dtype)
        layer = features, weight, bias if has_bias else None
        fused, separate = pair(backend, dtype, variant=variant, label_smoothing=smoothing)
        for warmup in (True, False):
            loss, gradients = run(fused, layer, labels, upstream=3.0, warmup=warmup)
            want, wanted = run(separate, layer, labels, upstream=3.0, warmup=warmup)
            assert loss.dtype == want.dtype
            assert relative(loss, want) <= ROUNDING[dtype]
            assert len(gradients) == len(wanted) == 2 + has_bias
            for gradient, expected in zip(gradients, wanted, strict=True):
                assert gradient.dtype == expected.dtype
                assert relative(gradient, expected) <= ROUNDING[dtype]
            assert same_queues(fused, separate)


@every_backend
@every_variant
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.usefixtures("poison")
def test_class_weights_and_reductions(
    backend: str, variant: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_chunks, "CHUNK_ROWS", 4)
    for dtype in [torch.float32] if backend == "triton" else ROUNDING:
        layer, labels = random_layer(9, 20, 37, dtype)
        class_weight = torch.rand(20).to(device_of(backend))
        class_weight[labels[0]] = 0
        fused, separate = pair(
            backend, dtype, variant=variant, label_smoothing=0.1, reduction=reduction, class_weight=class_weight
        )
        loss, gradients = run(fused, layer, labels)
        want, wanted = run(separate, layer, labels)
        assert relative(loss, want) <= ROUNDING[dtype]
        for gradient, expected in zip(gradients, wanted, strict=True):
            assert relative(gradient, expected) <= ROUNDING[dtype]
        arguments = [t.detach().to(device_of(backend)) for t in (*layer, labels)]  # type: ignore[union-attr]
        functional, _ = linear_tal_loss(
            *arguments, *random_queue(5), variant=variant, label_smoothing=0.1, reduction=reduction,
            class_weight=class_weight, warmup=True, backend=backend,
        )  # fmt: skip
        assert torch.equal(functional, fused(*arguments, warmup=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["reference", NATIVE])
@every_variant
def test_golden_case(case: str, variant: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_chunks, "CHUNK_ROWS", 7)
    g = golden(case)
    features = g["features"].double()
    weight = (torch.linalg.pinv(features) @ g["logits"].double()).T  # the layer that gives these logits
    leaves = [features.clone().requires_grad_(), weight.requires_grad_()]
    queue = g["queue_mean"].double(), g["queue_std"].double()
    loss, stats = linear_tal_loss(
        *leaves,
        None,
        g["labels"],
        *queue,
        **options(g, variant),
        warmup=bool(g["warmup"]),
        backend=backend,
    )
    by_features, by_weight = torch.autograd.grad(loss, leaves)
    grad = g[f"{variant}/grad"].double()
    assert relative(loss, g[f"{variant}/loss"]) <= 1e-10
    assert relative(by_features, grad @ weight.detach()) <= 1e-6
    assert relative(by_weight, grad.T @ features) <= 1e-6
    assert torch.equal(stats.correct, g["correct"])


@every_backend
def test_functional_form_equals_the_module(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_chunks, "CHUNK_ROWS", 2)
    (features, weight, bias), labels = random_layer(5, 20, 16)
    device = device_of(backend)
    fused, _ = pair(backend)
    queue = fused.queue.contents()
    arguments = [t.detach().to(device) for t in (features, weight, bias, labels)]  # type: ignore[union-attr]
    want, want_stats = fused(*arguments, return_stats=True)
    loss, stats = linear_tal_loss(*arguments, *queue, backend=backend)
    assert torch.equal(loss, want)
    assert all(torch.equal(a, b) for a, b in zip(stats, want_stats, strict=True))
    two_steps, want_stats = tal_loss(F.linear(*arguments[:3]), arguments[0], arguments[3], *queue, backend=backend)
    assert relative(loss.cpu(), two_steps.cpu()) <= ROUNDING[torch.float32]
    for got, expected in zip(stats, want_stats, strict=True):
        torch.testing.assert_close(got, expected)


def weight_gradient_error(dtype: torch.dtype) -> float:
    """Relative error of the weight's gradient under autocast, against float64 for the same logits."""
    features = torch.rand(512, 24)
    head = nn.Linear(24, 50)
    labels = head(features).argmax(1)
    fused = TALLinearLoss("paper", backend="native")
    with torch.autocast("cpu", dtype):
        fused(features, head.weight, head.bias, labels, warmup=True).backward()
    got = head.weight.grad.clone()  # type: ignore[union-attr]
    head.zero_grad()
    weight, bias = (t.detach().to(dtype).double() for t in (head.weight, head.bias))
    logits = F.linear(features.to(dtype).double(), weight, bias).to(dtype).double()
    exact = logits.requires_grad_()
    TALLoss("paper", backend="reference").double()(exact, features.double(), labels, warmup=True).backward()
    assert exact.grad is not None
    return relative(got, exact.grad.T @ features.double())


@NEEDS_EXTENSION
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradient_of_the_weight_is_summed_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_chunks, "CHUNK_ROWS", 4)  # 128 chunks: 128 roundings if their sum were in half precision
    limit = torch.finfo(dtype).eps / 8
    assert weight_gradient_error(dtype) <= limit

    def add_in_half_precision(total: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
        before = total.to(a.dtype) if beta else torch.zeros_like(total, dtype=a.dtype)
        total.copy_(before + a @ b)

    monkeypatch.setattr(linear_chunks, "_add_product", add_in_half_precision)
    assert weight_gradient_error(dtype) > limit


@pytest.mark.parametrize("sizes", [(1e-8, 1e-8), (1e-6, 1e6), (1e6, 1e-6), (0.0, 1e-8), (1e6, 0.0)], ids=str)
def test_float16_keeps_small_and_large_gradients(sizes: tuple[float, float]) -> None:
    """float16 has nothing between 0 and 6e-8, nor beyond 65,504; ``sizes`` are those of the two chunks."""
    x, weight = torch.rand(8, 16).half(), torch.rand(30, 16).half()
    gradient = torch.rand(8, 30) * torch.tensor(sizes).repeat_interleave(torch.tensor([5, 3]))[:, None]
    gradients = linear_chunks._Gradients(x, weight, [True, True, True])
    gradients.add(slice(0, 5), gradient[:5].clone())
    gradients.add(slice(5, 8), gradient[5:].clone())
    wanted = gradient @ weight.float(), gradient.T @ x.float(), gradient.sum(0)
    for got, want in zip(gradients.finish(), wanted, strict=True):
        assert relative(got, want) <= 1e-3


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_gradients_of_few_or_heavy_rows(backend: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither ignored rows, class weights nor short logits make the gradients of the others overflow."""
    monkeypatch.setattr(linear_chunks, "CHUNK_ROWS", 16)
    features, labels = torch.rand(64, 8), torch.full((64,), -100)
    labels[:3] = torch.tensor([0, 1, 2])
    layer = features.half().requires_grad_(), (0.02 * torch.randn(20, 8)).half().requires_grad_()
    weights = torch.linspace(1e-6, 1, 20).flip(0)
    fused, separate = pair(backend, reduction=reduction, class_weight=weights, t_wrong=None)
    results = (run(loss_fn, (*layer, None), labels)[1] for loss_fn in (fused, separate))
    for gradient, expected in zip(*results, strict=True):
        assert gradient.isfinite().all()
        assert relative(gradient, expected) <= 1e-2


@every_backend
@every_variant
def test_autocast(backend: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_chunks, "CHUNK_ROWS", 4)
    layer, labels = random_layer(7, 30, 16)
    fused, separate = pair(backend, variant=variant)
    with torch.autocast(device_of(backend).type, torch.bfloat16):
        loss, gradients = run(fused, layer, labels)
        want, wanted = run(separate, layer, labels)
    assert relative(loss, want) <= 1e-5  # of the same bfloat16 logits, but for their rounding in another order
    for gradient, expected in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.float32
        assert relative(gradient, expected) <= 1e-2
    assert same_queues(fused, separate)


@every_backend
@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 2)], ids=str)
def test_only_wanted_gradients(backend: str, frozen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_chunks, "CHUNK_ROWS", 2)
    layer, labels = random_layer(5, 20, 16)
    for i in frozen:
        layer[i].requires_grad_(False)  # type: ignore[union-attr]
    fused, separate = pair(backend)
    for gradient, expected in zip(run(fused, layer, labels)[1], run(separate, layer, labels)[1], strict=True):
        assert relative(gradient, expected) <= ROUNDING[torch.float32]


@kernel_backends
def test_no_gradient_is_computed_when_none_is_wanted(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, labels = random_layer(5, 20, 16)
    fused, _ = pair(backend)
    device = device_of(backend)
    arguments = [t.to(device) for t in (*layer, labels)]  # type: ignore[union-attr]
    want = fused(*arguments, push=False)

    def refuse(*_: Any) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(linear_chunks._Gradients, "add", refuse)
    with pytest.raises(AssertionError, match="a gradient was computed"):
        fused(*arguments, push=False)
    entries = len(fused.queue)
    with torch.no_grad():
        assert torch.equal(fused(*arguments, push=False), want.detach())
        fused.eval()(*arguments)
    assert len(fused.queue) == entries


@every_backend
def test_backward_twice(backend: str) -> None:
    (features, weight, bias), labels = random_layer(5, 20, 16)
    device = device_of(backend)
    leaves = [t.detach().to(device).requires_grad_() for t in (features, weight, bias)]  # type: ignore[union-attr]
    loss = pair(backend)[0](*leaves, labels.to(device))
    first = torch.autograd.grad(loss * 5, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for five, one in zip(first, second, strict=True):
        assert relative(five.cpu(), 5 * one.cpu()) <= 1e-6


@every_backend
@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.usefixtures("poison")
def test_no_valid_row(backend: str, rows: int) -> None:
    layer, _ = random_layer(rows, 20, 16)
    for variant in ("paper", "released"):
        fused, _ = pair(backend, variant=variant)
        loss, gradients = run(fused, layer, torch.full((rows,), -100))
        assert loss == 0
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def check_compiled(backend: str, variant: str, compiler: str) -> None:
    torch._dynamo.reset()
    device = device_of(backend)
    weighted = {"class_weight": torch.rand(10), "reduction": "sum"} if backend == "native" else {}
    eager, _ = pair(backend, variant=variant, **weighted)
    inner = copy.deepcopy(eager)

    def step(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return inner(features * 1.0, weight, bias, labels)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for rows in (4, 4, 7):
        (features, weight, bias), labels = random_layer(rows, 10, 16)
        leaves = [t.detach().to(device).requires_grad_() for t in (features, weight, bias)]  # type: ignore[union-attr]
        want, got = (f(*leaves, labels.to(device)) for f in (eager, compiled))
        assert relative(got.cpu(), want.detach().cpu()) <= 1e-6
        for a, b in zip(torch.autograd.grad(got * 3, leaves), torch.autograd.grad(want * 3, leaves), strict=True):
            assert relative(a.cpu(), b.cpu()) <= 1e-5
        assert same_queues(inner, eager)


@every_backend
@every_variant
def test_compiled_full_graph_equals_eager(backend: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_chunks, "CHUNK_ROWS", 3)
    check_compiled(backend, variant, "aot_eager")


@NEEDS_EXTENSION
def test_full_graph_compiled_by_inductor_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_chunks, "CHUNK_ROWS", 3)
    check_compiled("native", "released", "inductor")


WORLD, ROWS, CLASSES = 2, 12, 6


class Net(nn.Module):
    """Network whose last layer is the loss's affair."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 24), nn.ReLU())
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Trained(NamedTuple):
    losses: list[float]
    parameters: dict[str, Tensor]
    queue: tuple[Tensor, Tensor]


def train(model: nn.Module, net: Net, loss_fn: TALLoss, part: slice, *, compiling: bool) -> Trained:
    """Six steps, some with ignored rows, the last two compiled."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(3)
    losses = []
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    for step in range(6):
        x = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64)
        y = torch.randint(CLASSES, (ROWS,), generator=generator)
        if step % 2:
            y[:4] = -100
        features = model(x[part])
        optimizer.zero_grad()
        loss_fn.queue.flush()  # torch.compile does not trace the end of an eager step's collective
        loss = (compiled if compiling and step > 3 else loss_fn)(features, net.head.weight, net.head.bias, y[part])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return Trained(losses, net.state_dict(), loss_fn.queue.contents())


def train_ranks(rank: int) -> dict[tuple[str, str], Trained]:
    linear_chunks.CHUNK_ROWS = 4
    results = {}
    for backend in ("reference", "native"):
        for variant in ("paper", "released"):
            torch.manual_seed(0)
            net = Net().double()
            loss_fn = TALLinearLoss(variant, queue_size=20, queue_scope="global", backend=backend).double()
            part = slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)
            # The last layer is not called within DDP's forward; its gradients come from the loss all the same.
            compiling = (backend, variant) == ("native", "released")
            results[backend, variant] = train(DistributedDataParallel(net), net, loss_fn, part, compiling=compiling)
    return results


@NEEDS_EXTENSION
def test_ranks_with_parts_of_a_batch_equal_one_rank(tmp_path: Path) -> None:
    ranks = run_ranks(train_ranks, WORLD, tmp_path)
    for backend, variant in ranks[0]:
        torch.manual_seed(0)
        net = Net().double()
        loss_fn = TALLinearLoss(variant, queue_size=20, backend=backend).double()
        want = train(net, net, loss_fn, slice(None), compiling=False)
        found = [rank[backend, variant] for rank in ranks]
        mean = [sum(losses) / WORLD for losses in zip(*(f.losses for f in found), strict=True)]
        assert mean == pytest.approx(want.losses, rel=1e-10), (backend, variant)
        for one in found:
            torch.testing.assert_close(one.parameters, want.parameters, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(one.queue, want.queue, rtol=1e-10, atol=0)


MEMORY = """
import resource, sys, torch
from torch.nn import functional as F
from tal_fast import TALLinearLoss, TALLoss
from tal_fast.loss import linear_chunks
torch.set_num_threads(1)
linear_chunks.CHUNK_BYTES = 1  # a ninth of the rows, as for millions of classes
rows, classes, width = 1152, int(sys.argv[2]), 16

def step(rows, classes):
    features = torch.rand(rows, width, requires_grad=True)
    weight, bias = torch.rand(classes, width, requires_grad=True), torch.zeros(classes, requires_grad=True)
    labels = torch.randint(classes, (rows,))
    for variant in ("paper", "released"):
        if sys.argv[1] == "fused":
            loss = TALLinearLoss(variant, queue_size=100)(features, weight, bias, labels)
        else:
            loss = TALLoss(variant, queue_size=100)(F.linear(features, weight, bias), features, labels)
        torch.autograd.grad(loss, (features, weight, bias))

step(8, 10)
ballast = torch.ones(60_000_000)  # above all that the imports took for a time
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(rows, classes)
kept = 4 * 2 * (classes * width + classes + rows * width)  # the layer, the features, and their gradients
print((1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) - kept) / (4 * rows * classes))
"""


@pytest.mark.slow
@NEEDS_EXTENSION
def test_temporaries_take_less_than_an_eighth_of_the_logits() -> None:
    share = {}
    for loss, classes in (("fused", 120_000), ("separate", 60_000)):
        command = [sys.executable, "-c", MEMORY, loss, str(classes)]
        share[loss] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert share["fused"] < 1 / 8
    assert share["separate"] > 0.5  # so that the measurement sees the logits: 0.96 to 2 of them, with their gradient


@pytest.mark.parametrize("rows", [1, 8, 9, 500, 1000, 1024, 100_000])
@pytest.mark.parametrize("classes", [1, 1000, 131_072, 1_000_000, 50_000_000])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_chunks_are_small(rows: int, classes: int, size: int) -> None:
    chunk = linear_chunks.rows_per_chunk(rows, classes, size)
    assert 1 <= chunk <= min(rows, linear_chunks.CHUNK_ROWS)
    assert chunk * classes * size <= linear_chunks.CHUNK_BYTES or chunk <= -(-rows // 9)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": torch.rand(4, 5)}, ValueError, r"features are \(4, 5\) and the weight \(3, 6\)"),
        ({"weight": torch.rand(6)}, ValueError, r"the weight \(6,\)"),
        ({"bias": torch.rand(4)}, ValueError, r"bias is \(4,\) but must be \(3,\)"),
        ({"weight": torch.rand(3, 6).double()}, TypeError, "features are torch.float32, weight torch.float64"),
        ({"bias": torch.rand(3, device="meta")}, ValueError, "features are on cpu, bias on meta"),
        ({"labels": torch.tensor([0, 1, 3, 0])}, ValueError, "label 3 in row 2"),
        ({"labels": torch.zeros(3).long()}, ValueError, "labels are"),
        ({"weight": torch.nn.Linear(6, 3)}, TypeError, "weight must be a floating-point tensor, not Linear"),
        ({"bias": torch.zeros(3).long()}, TypeError, "bias must be a floating-point tensor, not torch.int64"),
        ({"features": torch.rand(4, 1), "weight": torch.rand(3, 1)}, ValueError, "features have 1 dimension"),
    ],
)
def test_invalid_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"features": torch.rand(4, 6), "weight": torch.rand(3, 6), "bias": torch.rand(3)}
    arguments["labels"] = torch.zeros(4).long()
    TALLinearLoss()(**arguments)
    with pytest.raises(error, match=message):
        TALLinearLoss()(**(arguments | changes))
    queue = torch.rand(5), torch.rand(5)
    with pytest.raises(error, match=message):
        linear_tal_loss(**(arguments | changes), queue_mean=queue[0], queue_std=queue[1])
    with pytest.raises(ValueError, match="queue_mean and queue_std must both be"):
        linear_tal_loss(**arguments, queue_mean=queue[0], queue_std=torch.rand(6))


def test_what_it_does_not_do_is_refused() -> None:
    with pytest.raises(ValueError, match="class_group is for logits"):
        TALLinearLoss(class_group=object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction is 'none'"):
        TALLinearLoss(reduction="none")
    with pytest.raises(ValueError, match="reduction is 'none'"):
        linear_tal_loss(*(torch.rand(2, 2),) * 2, None, torch.tensor([0, 1]), *random_queue(5), reduction="none")
    with pytest.raises(NotImplementedError, match="has no gradient of logits"):
        TALLinearLoss().loss_and_gradient(torch.rand(2, 3), torch.rand(2, 4), torch.tensor([0, 1]))


@NEEDS_EXTENSION
def test_second_derivatives_and_transforms_are_refused() -> None:
    (features, weight, bias), labels = random_layer(5, 20, 16)
    loss_fn = TALLinearLoss(backend="native")
    with pytest.raises(RuntimeError, match="a second derivative"):
        torch.autograd.grad(loss_fn(features, weight, bias, labels), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="torch.func transforms"):
        torch.func.grad(lambda w: loss_fn(features, w, bias, labels))(weight.detach())
    reference = TALLinearLoss(backend="reference")
    (grad,) = torch.autograd.grad(reference(features, weight, bias, labels), weight, create_graph=True)
    assert grad.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@every_variant
def test_large_layer_on_a_gpu(variant: str, dtype: torch.dtype) -> None:
    """Chunks, half-precision products added to float32, and memory, at a size that only a GPU computes in a test."""
    rows, classes, width = 2048, 50_000, 256
    layer, labels = random_layer(rows, classes, width, dtype)
    fused, separate = pair("triton", variant=variant)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, gradients = run(fused, layer, labels)
    kept = 3 * classes * width * 4
    assert torch.cuda.max_memory_allocated() - before - kept < 0.5 * rows * classes * dtype.itemsize
    want, wanted = run(separate, layer, labels)
    assert relative(loss, want) <= 1e-2
    for gradient, expected in zip(gradients, wanted, strict=True):
        assert relative(gradient, expected) <= {torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 2e-2}[dtype]
