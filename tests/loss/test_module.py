"""TALLoss on every backend: golden data, error bounds, rules, and life inside PyTorch."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tal_fast import TALLoss
from tal_fast.loss import _extension, backends, functional
from tal_fast.loss.module import check_inputs
from tests.helpers.backends import (
    BACKENDS,
    DEVICE,
    NEEDS_EXTENSION,
    device_of,
    every_backend,
    every_variant,
)
from tests.helpers.loss_cases import CASES, exact, golden, options, random_batch, random_queue, relative, trace


def run(backend: str, logits: Tensor, features: Tensor, labels: Tensor, queue: Any = None, **kwargs: Any):
    """Loss, gradient and stats of one step, on the CPU."""
    device = device_of(backend)
    queue = queue if queue is not None else random_queue(500)
    leaf = logits.detach().to(device).requires_grad_()
    loss, stats = functional.tal_loss(
        leaf, features.to(device), labels.to(device), *(q.to(device) for q in queue), backend=backend, **kwargs
    )
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach().cpu(), grad.cpu(), type(stats)(*(s.cpu() for s in stats))


# ---- Golden data ----------------------------------------------------------------------------------------------------


@every_backend
@every_variant
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_golden_case(case: str, dtype: torch.dtype, variant: str, backend: str) -> None:
    g = golden(case)
    loss, grad, stats = run(
        backend,
        g["logits"].to(dtype),
        g["features"].to(dtype),
        g["labels"],
        (g["queue_mean"].to(dtype), g["queue_std"].to(dtype)),
        **options(g, variant),
        warmup=bool(g["warmup"]),
    )
    assert relative(loss, g[f"{variant}/loss"]) <= (1e-12 if dtype == torch.float64 else 1e-5)
    assert relative(grad, g[f"{variant}/grad"]) <= (1e-7 if dtype == torch.float64 else 1e-5)
    assert torch.equal(stats.right, g["correct"])


@every_backend
@every_variant
def test_golden_trace(variant: str, backend: str) -> None:
    t, device = trace(), device_of(backend)
    loss_fn = TALLoss(variant, queue_size=int(t["capacity"]), backend=backend).double().to(device)
    for step in range(len(t["logits"])):
        loss = loss_fn(
            t["logits"][step].double().to(device),
            t["features"][step].double().to(device),
            t["labels"][step].to(device),
            warmup=step < int(t["warmup_steps"]),
        )
        assert relative(loss.cpu(), t[f"loss_{variant}"][step]) <= 1e-12
        assert len(loss_fn.queue) == int(t["queue_len"][step])
    mean, std = loss_fn.queue.contents()
    torch.testing.assert_close(mean.cpu(), t["queue_mean"], rtol=1e-12, atol=0)
    torch.testing.assert_close(std.cpu(), t["queue_std"], rtol=1e-12, atol=0)


# ---- Error bounds ---------------------------------------------------------------------------------------------------

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def check_bounds(backend: str, logits: Tensor, features: Tensor, labels: Tensor, **kwargs: Any) -> None:
    """Loss and gradient, given the backend's own typicalness, are as near to float64 as eager PyTorch + tolerance."""
    queue = random_queue(500)
    tol = TOLERANCE[logits.dtype]
    loss, grad, stats = run(backend, logits, features, labels, queue, **kwargs)
    true_loss, true_grad = exact(logits, labels, stats.typicalness, **kwargs)
    eager_loss, eager_grad, eager_stats = run("reference", logits, features, labels, queue, **kwargs)
    eager_true = exact(logits, labels, eager_stats.typicalness, **kwargs)

    assert loss.dtype == torch.float32
    assert grad.dtype == logits.dtype
    assert relative(loss, true_loss) <= relative(eager_loss, eager_true[0]) + tol
    assert relative(grad, true_grad) <= relative(eager_grad, eager_true[1]) + tol
    assert torch.equal(stats.right, eager_stats.right)
    assert torch.equal(stats.accepted, eager_stats.accepted)
    # Statistics in a few ulp of float64, the distance exact for them.
    mean, std = functional.feature_statistics(features)
    distance = functional.nearest_distance(mean, std, *queue)
    torch.testing.assert_close(stats.distance, distance, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 10, 100, 1000, 1003, 21841])
@pytest.mark.parametrize("rows", [1, 2, 33])
@every_variant
@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.usefixtures("poison")
def test_bounds(backend: str, variant: str, rows: int, classes: int, dtype: torch.dtype) -> None:
    if backend == "triton" and DEVICE.type == "cpu" and rows * classes > 40_000:
        rows = 2  # the interpreter takes seconds a row; test_kernels.py has its own cases
    logits, features, labels = random_batch(rows, classes, width=129)
    check_bounds(backend, logits.to(dtype), features.to(dtype), labels, variant=variant)


@every_variant
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.usefixtures("poison")
def test_bounds_of_confident_rows(backend: str, dtype: torch.dtype, smoothing: float, variant: str) -> None:
    logits, features, labels = random_batch(33, 100)
    logits[torch.arange(33), labels] += 30
    assert (logits.softmax(1).amax(1) > 0.999).all()
    check_bounds(
        backend, logits.to(dtype), features.to(dtype), labels, variant=variant, label_smoothing=smoothing, t_wrong=None
    )


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_gradient_of_the_true_class_of_a_confident_row(backend: str) -> None:
    # softmax - 1 in float32, as eager PyTorch has it, is 0 or a multiple of 6e-8 here; the truth is 1e-9 or so.
    logits = torch.zeros(4, 10)
    logits[:, 3] = torch.tensor([20.0, 22.0, 24.0, 26.0])
    labels = torch.full((4,), 3)
    features = torch.rand(4, 16)
    queue = (torch.tensor([0.5]), torch.tensor([0.3]))
    _loss, grad, stats = run(backend, logits, features, labels, queue, t_min=30.0, t_max=60.0)
    _, truth = exact(logits, labels, stats.typicalness, t_min=30.0, t_max=60.0)
    assert relative(grad, truth) <= 1e-5
    # atol: what the subtraction in the float64 truth itself leaves
    torch.testing.assert_close(grad[:, 3].double(), truth[:, 3], rtol=1e-4, atol=1e-16)


@every_backend
@every_variant
def test_rows_and_features_of_any_strides(backend: str, variant: str) -> None:
    logits, features, labels = random_batch(12, 30)
    queue = random_queue(50)
    want = run(backend, logits, features, labels, queue, variant=variant)
    wide = torch.randn(12, 60)
    wide[:, ::2] = logits
    for other in (logits.t().contiguous().t(), wide[:, ::2]):
        got = run(
            backend, other, features.t().contiguous().t(), labels.repeat_interleave(2)[::2], queue, variant=variant
        )
        assert relative(got[0], want[0]) <= 1e-6
        assert relative(got[1], want[1]) <= 1e-6
    row = torch.randn(1, 30)
    expanded = run(backend, row.expand(5, 30), features[:5], labels[:5], queue, variant=variant)
    copied = run(backend, row.repeat(5, 1), features[:5], labels[:5], queue, variant=variant)
    assert relative(expanded[1], copied[1]) <= 1e-6


# ---- Rules ----------------------------------------------------------------------------------------------------------


@every_backend
@every_variant
@pytest.mark.parametrize("upstream", [0.0, -2.5, 65536.0])
def test_upstream_gradient_is_used(backend: str, variant: str, upstream: float) -> None:
    logits, features, labels = (t.to(device_of(backend)) for t in random_batch(9, 7))
    queue = [q.to(logits.device) for q in random_queue(30)]
    logits.requires_grad_()
    loss, _ = functional.tal_loss(logits, features, labels, *queue, variant=variant, backend=backend)
    (plain,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, logits, torch.tensor(upstream, device=logits.device), retain_graph=True)
    assert relative(scaled, plain * upstream) <= 1e-6
    expanded = loss.expand(3).sum()  # a stride-0 upstream gradient
    assert relative(torch.autograd.grad(expanded, logits)[0], plain * 3) <= 1e-6


@every_backend
def test_float16_gradient_survives_a_gradient_scaler(backend: str) -> None:
    logits, features, labels = random_batch(64, 1000)
    device = device_of(backend)
    half = logits.half().to(device).requires_grad_()
    queue = [q.to(device) for q in random_queue(30)]
    loss, stats = functional.tal_loss(half, features.to(device), labels.to(device), *queue, backend=backend)
    (grad,) = torch.autograd.grad(loss * 65536, half)
    _, truth = exact(half.detach().cpu(), labels, stats.typicalness.cpu())
    assert relative(grad.cpu().double() / 65536, truth) <= 1e-3
    small = (truth.abs() < 3e-8) & (truth.abs() > 1e-9)  # float16 has nothing below 6e-8
    assert small.any()
    assert (grad.cpu()[small] != 0).all()


@every_backend
@every_variant
@pytest.mark.usefixtures("poison")
def test_ignored_rows_are_as_if_absent(backend: str, variant: str) -> None:
    logits, features, labels = random_batch(30, 12)
    queue = random_queue(40)
    ignored = torch.zeros(30, dtype=torch.bool)
    ignored[::4] = True
    logits[0], features[4] = torch.nan, torch.nan  # both in ignored rows
    features[8] = 1e6  # would be the farthest by far
    marked = labels.masked_fill(ignored, -100)
    loss, grad, stats = run(backend, logits, features, marked, queue, variant=variant)
    want_loss, want_grad, want = run(
        backend, logits[~ignored], features[~ignored], labels[~ignored], queue, variant=variant
    )
    assert relative(loss, want_loss) <= 1e-6
    assert relative(grad[~ignored], want_grad) <= 1e-6
    assert (grad[ignored] == 0).all()
    torch.testing.assert_close(stats.typicalness[~ignored], want.typicalness)
    assert not stats.right[ignored].any()
    assert not stats.accepted[ignored].any()
    assert (stats.weight[ignored] == 0).all()
    assert (stats.typicalness[ignored] == 1).all()


@every_backend
@every_variant
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.usefixtures("poison")
def test_no_valid_row(backend: str, variant: str, rows: int) -> None:
    logits, features, _ = random_batch(rows, 5) if rows else (torch.empty(0, 5), torch.empty(0, 64), None)
    labels = torch.full((rows,), -1)
    loss_fn = TALLoss(variant, queue_size=10, ignore_index=-1, backend=backend).to(device_of(backend))
    loss_fn.queue.push(*(q.to(device_of(backend)) for q in random_queue(4)))
    leaf = logits.to(device_of(backend)).requires_grad_()
    loss = loss_fn(leaf, features.to(leaf.device), labels.to(leaf.device))
    loss.backward()
    assert loss.item() == 0
    assert leaf.grad.shape == logits.shape
    assert (leaf.grad == 0).all()
    assert len(loss_fn.queue) == 4


@every_backend
@every_variant
def test_features_that_are_not_finite(backend: str, variant: str) -> None:
    logits, features, labels = random_batch(20, 6)
    labels = logits.argmax(1)
    labels[0] = (labels[0] + 1) % 6
    bad = torch.tensor([2, 5, 9])
    features[2, 3], features[5, 0], features[9, 1] = torch.nan, torch.inf, -torch.inf
    queue = random_queue(40)
    _, _, stats = run(backend, logits, features, labels, queue, variant=variant)
    good = torch.ones(20, dtype=torch.bool)
    good[bad] = False
    assert (stats.typicalness[bad] == 1).all()
    assert not stats.distance[bad].isfinite().any()
    d = stats.distance[good]
    want = 1 - (d - d.min()) / (d.max() - d.min() + 1e-8)
    torch.testing.assert_close(stats.typicalness[good], want, rtol=1e-5, atol=1e-6)

    device = device_of(backend)
    loss_fn = TALLoss(variant, queue_size=50, backend=backend).to(device)
    loss_fn(logits.to(device), features.to(device), labels.to(device))
    assert len(loss_fn.queue) == int((good & stats.accepted).sum())
    assert loss_fn.queue.contents()[0].isfinite().all()


@every_backend
@every_variant
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite(backend: str, variant: str, value: float) -> None:
    logits, features, labels = random_batch(10, 6)
    labels = logits.argmax(1)
    logits[4, (int(labels[4]) + 1) % 6] = value
    loss, _, stats = run(backend, logits, features, labels, variant=variant, confidence_threshold=-1.0)
    assert not loss.isfinite()
    assert not stats.accepted[4]
    assert stats.accepted[torch.arange(10) != 4].all()


@every_backend
def test_a_norm_that_overflows_is_still_finite_where_cross_entropy_is(backend: str) -> None:
    logits, features, labels = random_batch(4, 6)
    logits[1] *= 1e19
    loss, grad, _ = run(backend, logits, features, labels)
    assert loss.isfinite()
    assert grad.isfinite().all()


@every_backend
def test_zero_logits(backend: str) -> None:
    _, features, labels = random_batch(4, 6)
    logits = torch.zeros(4, 6)
    _loss, grad, stats = run(backend, logits, features, labels)
    _, truth = exact(logits, labels, stats.typicalness)
    assert relative(grad, truth) <= 1e-5
    assert torch.equal(stats.right, labels == 0)  # ties go to the first class
    assert not stats.accepted.any()  # cosine 0 does not exceed the threshold 0


@every_backend
def test_ties_go_to_the_first_class(backend: str) -> None:
    logits = torch.randn(6, 40).clamp(max=1)
    logits[:, [7, 23, 39]] = 2.5
    labels = torch.tensor([7, 23, 39, 7, 7, 0])
    _, _, stats = run(backend, logits, torch.rand(6, 9), labels)
    assert stats.right.tolist() == [True, False, False, True, True, False]


@every_backend
def test_accepted_needs_the_threshold(backend: str) -> None:
    logits, features, _ = random_batch(50, 10)
    labels = logits.argmax(1)
    cosine = logits.amax(1) / (logits.norm(dim=1) + 1e-7)
    threshold = float(cosine.median()) + 1e-4
    _, _, stats = run(backend, logits, features, labels, confidence_threshold=threshold)
    assert torch.equal(stats.accepted, cosine > threshold)
    assert 0 < int(stats.accepted.sum()) < 50


@every_backend
def test_released_is_inactive_when_all_are_accepted(backend: str) -> None:
    logits, features, _ = random_batch(16, 10)
    labels = logits.argmax(1)
    _, _, released = run(backend, logits, features, labels, variant="released")
    assert (released.typicalness == 1).all()
    assert (released.temperature == 10).all()
    _, _, paper = run(backend, logits, features, labels, variant="paper")
    assert paper.typicalness.min() < 0.01
    labels[3] = (labels[3] + 1) % 10
    _, _, released = run(backend, logits, features, labels, variant="released")
    assert released.typicalness.min() < 0.01


@every_backend
@every_variant
def test_warmup_and_empty_queue_are_inactive(backend: str, variant: str) -> None:
    logits, features, labels = random_batch(16, 10)
    empty = torch.empty(0), torch.empty(0)
    for queue, warmup in ((random_queue(20), True), (empty, False)):
        loss, grad, stats = run(backend, logits, features, labels, queue, variant=variant, warmup=warmup)
        true_loss, true_grad = exact(logits, labels, torch.ones(16), variant=variant)
        assert (stats.typicalness == 1).all()
        assert relative(loss, true_loss) <= 1e-5
        assert relative(grad, true_grad) <= 1e-5


@every_backend
def test_one_row_is_typical(backend: str) -> None:
    logits, features, labels = random_batch(1, 10)
    _, _, stats = run(backend, logits, features, labels)
    assert stats.typicalness.item() == 1


# ---- The gradient in place of the logits -----------------------------------------------------------------------------


def layer(logits: Tensor) -> Tensor:
    """Logits as a layer gives them: not a leaf."""
    return logits.detach().clone().requires_grad_() * 1.0


@every_variant
@pytest.mark.parametrize("classes", [7, 1003])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_inplace_gradient_takes_the_logits_memory(backend: str, dtype: torch.dtype, classes: int, variant: str) -> None:
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(6, classes))
    logits, labels[2] = logits.to(dtype), -100
    queue = [q.to(device) for q in random_queue(30)]
    given = {"variant": variant, "label_smoothing": 0.1, "backend": backend}
    for upstream in (1.0, -2.5):
        plain, overwritten = layer(logits), layer(logits)
        memory = overwritten.data_ptr()
        want, want_stats = functional.tal_loss(plain, features, labels, *queue, **given)
        loss, stats = functional.tal_loss(overwritten, features, labels, *queue, inplace=True, **given)
        (want_grad,) = torch.autograd.grad(want * upstream, plain)
        (grad,) = torch.autograd.grad(loss * upstream, overwritten)
        assert grad.data_ptr() == memory
        assert torch.equal(loss, want)
        assert torch.equal(grad, want_grad)
        assert all(torch.equal(a, b) for a, b in zip(stats, want_stats, strict=True))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_what_autograd_saved_of_overwritten_logits_raises(backend: str) -> None:
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(6, 9))
    loss_fn = TALLoss(queue_size=9, inplace=True, backend=backend).to(device)
    z = layer(logits)
    saved = z.square().sum()
    total = loss_fn(z, features, labels) + saved
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    z = layer(logits)
    loss = loss_fn(z, features, labels)
    with torch.no_grad():
        z += 1  # the gradient itself
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_inplace_refuses_what_cannot_hold_the_gradient(backend: str) -> None:
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(6, 9))
    loss_fn = TALLoss(queue_size=9, inplace=True, backend=backend).to(device)
    for bad, message in (
        (logits.clone().requires_grad_(), "overwrite a leaf"),
        (layer(logits.half()), "float16"),
        (layer(logits.t().contiguous()).t(), "needs contiguous logits"),
    ):
        before = bad.detach().clone()
        for call in (loss_fn, loss_fn.loss_and_gradient):
            with pytest.raises(ValueError, match=message):
                call(bad, features, labels)
        assert torch.equal(bad, before)
    assert len(loss_fn.queue) == 0
    with torch.no_grad():  # no gradient, nothing overwritten
        kept = logits.clone()
        loss_fn(kept, features, labels)
        assert torch.equal(kept, logits)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_backward_neither_copies_the_gradient_nor_spoils_a_kept_graph(backend: str) -> None:
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(6, 9))
    queue = [q.to(device) for q in random_queue(30)]
    z = logits.requires_grad_()
    loss, _ = functional.tal_loss(z, features, labels, *queue, backend=backend)
    first, second = (torch.autograd.grad(loss, z, torch.tensor(u, device=device), retain_graph=True)[0] for u in (3, 1))
    last = torch.autograd.grad(loss * 2, z)[0]
    assert relative(first.cpu(), 3 * second.detach().cpu()) <= 1e-6
    assert relative(last.cpu(), 2 * second.detach().cpu()) <= 1e-6


# ---- Life inside PyTorch --------------------------------------------------------------------------------------------


@every_backend
def test_eval_and_push_false_leave_the_queue_alone(backend: str) -> None:
    device = device_of(backend)
    logits, features, _ = (t.to(device) for t in random_batch(8, 5))
    labels = logits.argmax(1)
    loss_fn = TALLoss(queue_size=100, backend=backend).to(device)
    loss_fn(logits, features, labels, push=False)
    loss_fn.eval()(logits, features, labels)
    assert len(loss_fn.queue) == 0
    loss_fn.train()(logits, features, labels)
    assert len(loss_fn.queue) == 8


@every_backend
@every_variant
def test_compiled_fullgraph_equals_eager(backend: str, variant: str) -> None:
    torch._dynamo.reset()
    device = device_of(backend)
    eager = TALLoss(variant, queue_size=30, backend=backend).to(device)
    inner = copy.deepcopy(eager)

    def step(z: Tensor, f: Tensor, y: Tensor) -> Tensor:
        return inner(z * 1.0, f, y)

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if variant == "paper" else "aot_eager")
    for _ in range(4):
        logits, features, labels = (t.to(device) for t in random_batch(16, 10))
        a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        want, got = eager(a, features, labels), compiled(b, features, labels)
        (want * 3).backward()
        (got * 3).backward()
        assert relative(got.cpu(), want.detach().cpu()) <= 1e-6
        assert relative(b.grad.cpu(), a.grad.cpu()) <= 1e-5
        assert inner.queue.cursor.tolist() == eager.queue.cursor.tolist()
        torch.testing.assert_close(inner.queue.mean_ring, eager.queue.mean_ring)


@every_backend
def test_autocast(backend: str) -> None:
    device = device_of(backend)
    head = torch.nn.Linear(32, 10).to(device)
    features = torch.rand(16, 32, device=device)
    labels = torch.randint(10, (16,), device=device)
    loss_fn = TALLoss(queue_size=100, backend=backend).to(device)
    loss_fn.queue.push(*(q.to(device) for q in random_queue(50)))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logits = head(features)
        loss = loss_fn(logits, features, labels)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert head.weight.grad.isfinite().all()


@every_backend
def test_deepcopy_and_pickle_carry_the_queue(backend: str) -> None:
    loss_fn = TALLoss("released", queue_size=7, backend=backend)
    loss_fn.queue.push(*random_queue(12))
    for twin in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        assert torch.equal(twin.queue.contents()[0], loss_fn.queue.contents()[0])
        assert twin.options == loss_fn.options
        twin.queue.reset()
        assert len(loss_fn.queue) == 7


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_second_derivatives_are_refused(backend: str, parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if parts:
        in_parts(monkeypatch)
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(4, 5))
    logits.requires_grad_()
    loss_fn = TALLoss(queue_size=5, backend=backend).to(device)  # type: ignore[arg-type]
    loss = loss_fn(logits, features, labels) + logits.square().sum()  # whose own second derivative is there
    with pytest.raises(RuntimeError, match=r"second derivative \(create_graph=True\) would miss terms; use backend="):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_no_gradient_is_computed_when_none_is_wanted() -> None:
    logits, features, labels = random_batch(4, 5)
    with torch.no_grad():
        loss = TALLoss(queue_size=5)(logits.requires_grad_(), features, labels)
    assert not loss.requires_grad


# ---- The step in one call -------------------------------------------------------------------------------------------


def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "has_step", lambda *_: False)


@NEEDS_EXTENSION
@every_variant
@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_step_in_one_call_is_its_parts(
    dtype: torch.dtype, queue_dtype: torch.dtype, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    losses = [TALLoss(variant, queue_size=5000, label_smoothing=0.1, t_min=7) for _ in range(2)]
    for loss_fn in losses:
        loss_fn.queue.to(queue_dtype)
    for step in range(12):
        rows, classes = 1 + 13 * step, 3 + 7 * step
        logits, features, labels = random_batch(rows, classes)
        labels[::5] = -100
        wide = torch.cat([logits, logits], 1).to(dtype)[:, ::2] if step % 3 == 0 else logits.to(dtype)
        results = []
        for loss_fn in losses:
            loss_fn.train(step != 7)
            leaf = wide.detach().requires_grad_()
            with monkeypatch.context() as patched:
                if loss_fn is losses[1]:
                    in_parts(patched)
                loss, stats = loss_fn(
                    leaf, features.to(dtype), labels, warmup=step == 2, push=step != 4, return_stats=True
                )
            results += [(loss, torch.autograd.grad(loss * 3, leaf)[0], *stats)]
        for one, parts in zip(*results, strict=True):
            assert one.dtype == parts.dtype
            assert torch.equal(one, parts)
    state, want = (loss_fn.state_dict() for loss_fn in losses)
    assert all(torch.equal(state[key], want[key]) for key in want)
    assert 0 < len(losses[0].queue) < 5000


@NEEDS_EXTENSION
def test_the_step_in_one_call_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, features, labels = random_batch(4, 5)
    monkeypatch.setattr(backends.Native, "statistics_distance", None)  # of the parts
    TALLoss(queue_size=5)(logits.requires_grad_(), features, labels).backward()
    with torch.no_grad():
        assert not TALLoss(queue_size=5)(logits, features, labels).requires_grad
    with torch.inference_mode():
        TALLoss(queue_size=5)(logits, features, labels)
    with pytest.raises(TypeError):  # what one call does not do
        TALLoss(queue_size=5, inplace=True)(logits * 1, features, labels)


@NEEDS_EXTENSION
def test_gradients_of_the_step_in_one_call_accumulate_and_are_kept() -> None:
    logits, features, labels = random_batch(6, 5)
    logits.requires_grad_()
    loss_fn = TALLoss(queue_size=9).eval()
    (want,) = torch.autograd.grad(loss_fn(logits, features, labels), logits)
    loss = loss_fn(logits, features, labels)
    loss.backward(retain_graph=True)
    first = logits.grad
    assert first is not None
    first.zero_()  # a gradient that shared the saved one's memory would be lost
    loss.backward()
    assert torch.equal(logits.grad, want)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    tripled = 3 * loss_fn(logits, features, labels)
    for _ in range(2):  # nor one that is scaled in its memory
        (grad,) = torch.autograd.grad(tripled, logits, retain_graph=True)
        assert torch.equal(grad, 3 * want)


@NEEDS_EXTENSION
def test_the_step_in_one_call_pushes_once_where_it_is_computed_twice() -> None:
    logits, features, labels = random_batch(6, 5)
    loss_fn = TALLoss(queue_size=90)
    loss = checkpoint(loss_fn, logits.requires_grad_(), features, labels, use_reentrant=False)
    entries = len(loss_fn.queue)
    loss.backward()
    assert len(loss_fn.queue) == entries > 0


@NEEDS_EXTENSION
def test_what_the_dispatcher_does_is_done_in_one_call_too() -> None:
    logits, features, labels = random_batch(6, 5)

    def negated(x: Tensor) -> Tensor:  # equal to x, as -x and a bit that says so
        lazy = torch.complex(torch.zeros_like(x), -x).conj().imag
        assert lazy.is_neg()
        return lazy

    losses, leaves = [TALLoss(queue_size=9) for _ in range(2)], [logits.clone().requires_grad_() for _ in range(2)]
    for loss_fn, leaf, f in zip(losses, leaves, (negated, Tensor.clone), strict=True):
        loss_fn(f(leaf), f(features), labels).backward()
    assert torch.equal(*(leaf.grad for leaf in leaves))
    assert torch.equal(*(loss_fn.queue.contents()[0] for loss_fn in losses))


@every_backend
def test_the_loss_may_be_changed_in_place(backend: str) -> None:
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(6, 5))
    logits.requires_grad_()
    loss_fn = TALLoss(queue_size=9, backend=backend).to(device).eval()  # type: ignore[arg-type]
    (want,) = torch.autograd.grad(loss_fn(logits, features, labels) / 4, logits)
    loss = loss_fn(logits, features, labels)
    loss += 2
    loss /= 4
    loss.backward()
    torch.testing.assert_close(logits.grad, want)


@NEEDS_EXTENSION
def test_the_step_in_one_call_pushes_nothing_when_it_refuses() -> None:
    logits, features, labels = random_batch(4, 5)
    loss_fn = TALLoss(queue_size=9)
    for wrong, words in ((5, r"label 5 in row 2 is outside \[0, 5\)"), (-1, "label -1 in row 2")):
        labels[2] = wrong
        with pytest.raises(ValueError, match=words):
            loss_fn(logits, features, labels)
    with pytest.raises(TypeError, match=r"labels are torch.int32 but must be torch.int64 class indices"):
        loss_fn(logits, features, labels.int())
    with pytest.raises(ValueError, match=r"features are \(3, \d+\) but must be \(B, D\) with B = 4"):
        loss_fn(logits, features[:3], labels)
    assert len(loss_fn.queue) == 0


@NEEDS_EXTENSION
def test_compiled_autograd_goes_through_the_step_in_one_call() -> None:
    logits, features, labels = random_batch(6, 5)
    loss_fn = TALLoss(queue_size=9).eval()
    grads = []
    for compiled in (False, True):
        for dtype in (torch.float32, torch.float16):
            leaf = logits.to(dtype, copy=True).requires_grad_()
            loss = 3 * loss_fn(leaf, features, labels)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # compiled autograd's own
                with compiled_autograd._enable(torch.compile(backend="eager")) if compiled else nullcontext():
                    loss.backward()
            grads.append(leaf.grad)
    assert all(torch.equal(a, b) for a, b in zip(grads[:2], grads[2:], strict=True))


@NEEDS_EXTENSION
def test_a_loss_that_gets_no_gradient_gives_none() -> None:
    class Swallow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, upstream: Tensor) -> None:
            return None

    logits, features, labels = random_batch(6, 5)
    loss = TALLoss(queue_size=9)(logits.requires_grad_(), features, labels)
    Swallow.apply(loss).backward()
    assert logits.grad is None or not logits.grad.any()


# ---- The gradient without autograd ----------------------------------------------------------------------------------


@every_backend
@every_variant
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "t_wrong": None}, {"inplace": True}], ids=str)
def test_loss_and_gradient_is_forward_and_backward(backend: str, variant: str, options: dict[str, Any]) -> None:
    torch.manual_seed(4)
    device = device_of(backend)
    losses = [TALLoss(variant, queue_size=20, backend=backend, **options).to(device) for _ in range(2)]  # type: ignore[arg-type]
    for step, dtype in enumerate((torch.float32, torch.float64, torch.bfloat16, torch.float32)):
        logits, features, labels = (t.to(device) for t in random_batch(11 + 2 * step, 9 + 4 * step, 17))
        labels[::5] = -100
        for loss_fn in losses:
            loss_fn.train(step != 2)
        leaf = logits.to(dtype).requires_grad_()
        want, want_stats = losses[0](leaf * 1, features, labels, warmup=step == 1, return_stats=True)
        (want_gradient,) = torch.autograd.grad(want, leaf)
        given = logits.to(dtype).requires_grad_(step != 3)
        with torch.no_grad() if step == 1 else nullcontext():
            loss, gradient, stats = losses[1].loss_and_gradient(given.clone(), features, labels, warmup=step == 1)
        assert not loss.requires_grad
        assert not gradient.requires_grad
        assert gradient.dtype == dtype
        for got, expected in zip((loss, gradient, *stats), (want, want_gradient, *want_stats), strict=True):
            assert torch.equal(got, expected)
    state, expected = (loss_fn.state_dict() for loss_fn in losses)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert len(losses[1].queue) == 20


@every_backend
def test_loss_and_gradient_of_float16_is_float32(backend: str) -> None:
    """1e-3 of a batch of 64 is below float16's smallest normal number."""
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(64, 500))
    loss_fn = TALLoss(queue_size=9, backend=backend).to(device).eval()  # type: ignore[arg-type]
    half = logits.half()
    loss, gradient, _ = loss_fn.loss_and_gradient(half, features, labels)
    want, want_gradient, _ = loss_fn.loss_and_gradient(half.float(), features, labels)
    assert gradient.dtype == torch.float32
    assert torch.equal(loss, want)
    assert torch.equal(gradient, want_gradient)


@every_backend
def test_a_network_goes_on_from_loss_and_gradient(backend: str) -> None:
    device = device_of(backend)
    head = torch.nn.Linear(16, 10).to(device)
    features, labels = torch.rand(12, 16, device=device), torch.randint(10, (12,), device=device)
    grads = []
    for direct in (False, True):
        loss_fn = TALLoss(queue_size=50, backend=backend).to(device)  # type: ignore[arg-type]
        head.zero_grad()
        logits = head(features)
        if direct:
            _, gradient, _ = loss_fn.loss_and_gradient(logits, features, labels)
            logits.backward(gradient)
        else:
            loss_fn(logits, features, labels).backward()
        grads.append(head.weight.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_inplace_loss_and_gradient_takes_the_logits_memory(backend: str) -> None:
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(6, 9))
    place, version = logits.data_ptr(), logits._version
    loss_fn = TALLoss(queue_size=9, inplace=True, backend=backend).to(device)  # type: ignore[arg-type]
    _, gradient, _ = loss_fn.loss_and_gradient(logits, features, labels, push=False)
    assert gradient.data_ptr() == place
    assert torch.equal(logits, gradient)
    assert logits._version > version
    assert len(loss_fn.queue) == 0


@every_backend
def test_loss_and_gradient_in_inference_mode(backend: str) -> None:
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(6, 9))
    loss_fn = TALLoss(queue_size=9, backend=backend).to(device)  # type: ignore[arg-type]
    with torch.inference_mode():
        if backend == "reference":
            with pytest.raises(RuntimeError, match=r"inference mode switches off; use torch.no_grad\(\)"):
                loss_fn.loss_and_gradient(logits, features, labels)
            assert len(loss_fn.queue) == 0
        else:
            got = loss_fn.eval().loss_and_gradient(logits, features, labels)[1]
            assert torch.equal(got, loss_fn.loss_and_gradient(logits.clone(), features, labels)[1])


@every_backend
def test_loss_and_gradient_is_part_of_a_compiled_graph(backend: str) -> None:
    """In plain PyTorch it leaves the graph."""
    torch._dynamo.reset()
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(16, 10))
    losses = [TALLoss("released", queue_size=90, backend=backend).to(device) for _ in range(2)]  # type: ignore[arg-type]
    compiled = torch.compile(losses[0].loss_and_gradient, fullgraph=backend != "reference", backend="aot_eager")
    for _ in range(2):
        got, want = compiled(logits, features, labels), losses[1].loss_and_gradient(logits, features, labels)
        for one, other in zip((*got[:2], *got[2]), (*want[:2], *want[2]), strict=True):
            torch.testing.assert_close(one, other)
    assert losses[0].queue.cursor.tolist() == losses[1].queue.cursor.tolist()


@every_backend
def test_loss_and_gradient_refuses_as_forward_does(backend: str) -> None:
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(4, 5))
    loss_fn = TALLoss(queue_size=9, backend=backend).to(device)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"features are \(3, \d+\) but must be \(B, D\) with B = 4"):
        loss_fn.loss_and_gradient(logits, features[:3], labels)
    with pytest.raises(TypeError, match=r"labels are torch.int32 but must be torch.int64 class indices"):
        loss_fn.loss_and_gradient(logits, features, labels.int())
    assert len(loss_fn.queue) == 0


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"variant": "typical"}, "variant is 'typical'"),
        ({"t_min": 0.0}, "0 < t_min"),
        ({"t_min": 20.0, "t_max": 10.0}, "0 < t_min <= t_max"),
        ({"t_wrong": -1.0}, "t_wrong is -1.0"),
        ({"queue_size": 0}, "capacity is 0"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"confidence_threshold": 2.0}, "confidence_threshold is 2.0"),
        ({"queue_scope": "world"}, "queue_scope is 'world'"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_bad_options(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TALLoss(**kwargs)


@every_backend
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.randn(4)}, ValueError, r"must be \(B, C\)"),
        ({"logits": torch.randn(4, 0)}, ValueError, "C >= 1"),
        ({"features": torch.rand(3, 8)}, ValueError, "features are"),
        ({"features": torch.rand(4, 1)}, ValueError, "at least 2"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels are"),
        ({"labels": torch.zeros(4)}, TypeError, "labels are torch.float32"),
        ({"labels": torch.tensor([0, 1, 5, 2])}, ValueError, "label 5 in row 2 is outside"),
        ({"labels": torch.tensor([0, -1, 1, 2])}, ValueError, "label -1 in row 1 is outside"),
        ({"logits": torch.zeros(4, 5, dtype=torch.int64)}, TypeError, "logits are torch.int64"),
    ],
)
def test_bad_input_leaves_the_queue_alone(
    backend: str, change: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    given = {"logits": torch.randn(4, 5), "features": torch.rand(4, 8), "labels": torch.tensor([0, 1, 2, 3])}
    loss_fn = TALLoss(queue_size=10, backend=backend)
    with pytest.raises(error, match=message):
        loss_fn(**{**given, **change})
    assert len(loss_fn.queue) == 0


def test_devices_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match="labels on meta"):
        check_inputs(torch.randn(2, 3), torch.rand(2, 4), torch.zeros(2, dtype=torch.int64, device="meta"), -100)


def test_without_the_extension_plain_pytorch_serves(tmp_path: Any) -> None:
    """A fresh process with the extension switched off: one warning, the same loss."""
    import subprocess
    import sys

    code = """
import warnings, torch
from tal_fast import TALLoss
torch.manual_seed(0)
z, f, y = torch.randn(8, 5), torch.rand(8, 6), torch.randint(5, (8,))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loss_fn = TALLoss(queue_size=20)
    losses = [float(loss_fn(z, f, y)) for _ in range(3)]
ours = [str(w.message) for w in caught if "tal_fast" in str(w.message)]
print(len(ours), *losses)
assert "TAL_FAST_NO_EXTENSION" in ours[0]
"""
    env = {**os.environ, "TAL_FAST_NO_EXTENSION": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    count, *losses = done.stdout.split()
    assert count == "1"
    torch.manual_seed(0)
    z, f, y = torch.randn(8, 5), torch.rand(8, 6), torch.randint(5, (8,))
    loss_fn = TALLoss(queue_size=20)
    want = [float(loss_fn(z, f, y)) for _ in range(3)]
    assert [float(x) for x in losses] == pytest.approx(want, rel=1e-5)


def test_cross_entropy_is_the_limit_of_weight_zero() -> None:
    """With every sample untypical and right, TAL is plain cross-entropy, in value and gradient."""
    logits, features, _ = random_batch(2, 9)
    labels = logits.argmax(1)
    mean, std = functional.feature_statistics(features)
    queue = mean[:1], std[:1]  # row 0 is at distance 0, row 1 the farthest: weights 1 and 0
    _, grad, stats = run("reference", logits, features, labels, queue)
    assert stats.weight.tolist() == pytest.approx([1, 0], abs=1e-5)
    z = logits.clone().requires_grad_()
    F.cross_entropy(z[1:], labels[1:], reduction="sum").div(2).backward()
    torch.testing.assert_close(grad[1], z.grad[1], rtol=1e-4, atol=1e-6)


def test_backend_names_are_all_reachable() -> None:
    assert set(backends.NAMES) == {"auto", "reference", "native", "triton"}
    with pytest.raises(ValueError, match="does not run on"):
        backends.for_loss("native" if _extension.load()[0] else "triton", torch.device("meta"))
