"""``TALLoss`` within PyTorch: the step in one call, ``loss_and_gradient``, compilation, autocast and copies."""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint

from tal_fast import TALLoss
from tal_fast.loss import dispatch
from tal_fast.loss.backends import CppBackend
from tests.helpers.backends import NATIVE, NEEDS_EXTENSION, TRITON, device_of, every_backend, every_variant
from tests.helpers.loss_cases import random_batch, random_queue, relative


@every_backend
def test_queue_is_filled_in_training_mode_only(backend: str) -> None:
    device = device_of(backend)
    logits, features, _ = (t.to(device) for t in random_batch(8, 5))
    labels = logits.argmax(1)
    loss_fn = TALLoss(queue_size=100, backend=backend).to(device)
    loss_fn(logits, features, labels, push=False)
    loss_fn.eval()(logits, features, labels)
    assert len(loss_fn.queue) == 0
    loss_fn.train()(logits, features, labels)
    assert len(loss_fn.queue) == 8


def check_compiled(backend: str, variant: str, compiler: str) -> None:
    torch._dynamo.reset()
    device = device_of(backend)
    eager = TALLoss(variant, queue_size=30, backend=backend).to(device)
    inner = copy.deepcopy(eager)

    def step(z: Tensor, f: Tensor, y: Tensor) -> Tensor:
        return inner(z * 1.0, f, y)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for _ in range(2):
        logits, features, labels = (t.to(device) for t in random_batch(4, 10))
        a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        want, got = eager(a, features, labels), compiled(b, features, labels)
        (want * 3).backward()
        (got * 3).backward()
        assert relative(got.cpu(), want.detach().cpu()) <= 1e-6
        assert relative(b.grad.cpu(), a.grad.cpu()) <= 1e-5
        assert inner.queue.ring.cursor.tolist() == eager.queue.ring.cursor.tolist()
        torch.testing.assert_close(inner.queue.ring.mean, eager.queue.ring.mean)


@every_backend
@every_variant
def test_compiled_full_graph_equals_eager(backend: str, variant: str) -> None:
    check_compiled(backend, variant, "aot_eager")


@pytest.mark.parametrize(
    "backend",
    [
        NATIVE,
        pytest.param("triton", marks=[*TRITON.marks, pytest.mark.slow]),
        pytest.param("reference", marks=pytest.mark.slow),
    ],
)
def test_full_graph_compiled_by_inductor_equals_eager(backend: str) -> None:
    check_compiled(backend, "paper", "inductor")


@every_backend
def test_autocast(backend: str) -> None:
    device = device_of(backend)
    head = torch.nn.Linear(32, 10).to(device)
    features = torch.rand(4, 32, device=device)
    labels = torch.randint(10, (4,), device=device)
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


def use_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the step computed from its parts instead of in one call."""
    monkeypatch.setattr(dispatch, "runs_in_one_call", lambda *_: False)


@NEEDS_EXTENSION
@every_variant
@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_step_in_one_call_equals_its_parts(
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
                    use_parts(patched)
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
def test_cpus_run_the_step_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, features, labels = random_batch(4, 5)
    monkeypatch.setattr(CppBackend, "statistics_distance", None)  # the first of the parts
    TALLoss(queue_size=5)(logits.requires_grad_(), features, labels).backward()
    with torch.no_grad():
        assert not TALLoss(queue_size=5)(logits, features, labels).requires_grad
    with torch.inference_mode():
        TALLoss(queue_size=5)(logits, features, labels)
    with pytest.raises(TypeError):  # in place, the parts run
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
    assert torch.equal(logits.grad, want)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    tripled = 3 * loss_fn(logits, features, labels)
    for _ in range(2):  # nor one that is scaled in its memory
        (grad,) = torch.autograd.grad(tripled, logits, retain_graph=True)
        assert torch.equal(grad, 3 * want)


@NEEDS_EXTENSION
def test_step_in_one_call_pushes_once_under_activation_checkpointing() -> None:
    logits, features, labels = random_batch(6, 5)
    loss_fn = TALLoss(queue_size=90)
    loss = checkpoint(loss_fn, logits.requires_grad_(), features, labels, use_reentrant=False)
    entries = len(loss_fn.queue)
    loss.backward()
    assert len(loss_fn.queue) == entries > 0


@NEEDS_EXTENSION
def test_step_in_one_call_resolves_lazily_negated_tensors() -> None:
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
def test_step_in_one_call_accepts_an_undefined_upstream_gradient() -> None:
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


@every_backend
@every_variant
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "t_wrong": None}, {"inplace": True}], ids=str)
def test_loss_and_gradient_equals_forward_and_backward(backend: str, variant: str, options: dict[str, Any]) -> None:
    torch.manual_seed(4)
    device = device_of(backend)
    losses = [TALLoss(variant, queue_size=3, backend=backend, **options).to(device) for _ in range(2)]
    for step, dtype in enumerate((torch.float32, torch.float64, torch.bfloat16, torch.float32)):
        logits, features, labels = (t.to(device) for t in random_batch(3 + step, 9 + 4 * step, 17))
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
    assert len(losses[1].queue) == 3


@every_backend
def test_loss_and_gradient_of_float16_is_float32(backend: str) -> None:
    """A thousandth of a batch's gradient is below float16's smallest normal number."""
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(8, 500))
    loss_fn = TALLoss(queue_size=9, backend=backend).to(device).eval()
    half = logits.half()
    loss, gradient, _ = loss_fn.loss_and_gradient(half, features, labels)
    want, want_gradient, _ = loss_fn.loss_and_gradient(half.float(), features, labels)
    assert gradient.dtype == torch.float32
    # Triton's kernels add other vectors first where logits have another size.
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-5, atol=1e-10)


@every_backend
def test_backward_continues_from_loss_and_gradient(backend: str) -> None:
    device = device_of(backend)
    head = torch.nn.Linear(16, 10).to(device)
    features, labels = torch.rand(6, 16, device=device), torch.randint(10, (6,), device=device)
    grads = []
    for direct in (False, True):
        loss_fn = TALLoss(queue_size=50, backend=backend).to(device)
        head.zero_grad()
        logits = head(features)
        if direct:
            _, gradient, _ = loss_fn.loss_and_gradient(logits, features, labels)
            logits.backward(gradient)
        else:
            loss_fn(logits, features, labels).backward()
        grads.append(head.weight.grad)
    assert torch.equal(*grads)


@every_backend
def test_loss_and_gradient_is_part_of_a_compiled_graph(backend: str) -> None:
    torch._dynamo.reset()
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(6, 10))
    losses = [TALLoss("released", queue_size=90, backend=backend).to(device) for _ in range(2)]
    fullgraph = backend != "reference"  # plain PyTorch breaks the graph
    compiled = torch.compile(losses[0].loss_and_gradient, fullgraph=fullgraph, backend="aot_eager")
    for _ in range(2):
        got, want = compiled(logits, features, labels), losses[1].loss_and_gradient(logits, features, labels)
        for one, other in zip((*got[:2], *got[2]), (*want[:2], *want[2]), strict=True):
            torch.testing.assert_close(one, other)
    assert losses[0].queue.ring.cursor.tolist() == losses[1].queue.ring.cursor.tolist()


@every_backend
@pytest.mark.parametrize("method", ["forward", "loss_and_gradient"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.randn(4)}, ValueError, r"must be \(B, C\)"),
        ({"logits": torch.randn(4, 0)}, ValueError, "C >= 1"),
        ({"features": torch.rand(3, 8)}, ValueError, r"features are \(3, 8\) but must be \(B, D\) with B = 4"),
        ({"features": torch.rand(4, 1)}, ValueError, "at least 2"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels are"),
        ({"labels": torch.zeros(4, dtype=torch.int32)}, TypeError, "labels are torch.int32 but must be torch.int64"),
        ({"labels": torch.tensor([0, 1, 5, 2])}, ValueError, r"label 5 in row 2 is outside \[0, 5\)"),
        ({"labels": torch.tensor([0, -1, 1, 2])}, ValueError, "label -1 in row 1 is outside"),
        ({"logits": torch.zeros(4, 5, dtype=torch.int64)}, TypeError, "logits are torch.int64"),
    ],
)
def test_invalid_input_leaves_the_queue_alone(
    backend: str, change: dict[str, Tensor], error: type[Exception], message: str, method: str
) -> None:
    given = {"logits": torch.randn(4, 5), "features": torch.rand(4, 8), "labels": torch.tensor([0, 1, 2, 3])}
    loss_fn = TALLoss(queue_size=10, backend=backend)
    with pytest.raises(error, match=message):
        getattr(loss_fn, method)(**{**given, **change})
    assert len(loss_fn.queue) == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"queue_size": 0}, "capacity is 0"),
        ({"queue_scope": "world"}, "queue_scope is 'world'"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"variant": "typical"}, "variant is 'typical'"),
    ],
)
def test_invalid_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TALLoss(**kwargs)


def test_queue_and_logits_must_be_on_one_device() -> None:
    logits, features, labels = (t.to("meta") for t in random_batch(4, 5))
    with pytest.raises(ValueError, match=r"the queue is on cpu but the logits are on meta; move the loss with .to\("):
        TALLoss(queue_size=5, backend="reference")(logits, features, labels)
