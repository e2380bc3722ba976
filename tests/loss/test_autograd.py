"""Gradients of the loss within PyTorch's autograd, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tal_fast import TALLoss
from tal_fast.loss import dispatch, functional
from tal_fast.loss.autograd import NO_SECOND_DERIVATIVE, NO_TRANSFORMS
from tests.helpers.backends import device_of, every_backend, every_variant, kernel_backends
from tests.helpers.loss_cases import exact, random_batch, random_queue, relative


def layer_output(logits: Tensor) -> Tensor:
    """Logits as a layer gives them: not a leaf."""
    return logits.detach().clone().requires_grad_() * 1.0


@every_backend
@every_variant
@pytest.mark.parametrize("upstream", [0.0, -2.5, 65536.0])
def test_gradient_is_scaled_by_the_upstream_one(backend: str, variant: str, upstream: float) -> None:
    logits, features, labels = (t.to(device_of(backend)) for t in random_batch(5, 7))
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
    logits, features, labels = random_batch(16, 1000)
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


@every_variant
@pytest.mark.parametrize(
    ("classes", "dtype"), [(7, torch.float64), (7, torch.float32), (1003, torch.float32), (1003, torch.bfloat16)]
)
@kernel_backends
def test_inplace_gradient_takes_the_logits_memory(backend: str, dtype: torch.dtype, classes: int, variant: str) -> None:
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(3, classes))
    logits, labels[2] = logits.to(dtype), -100
    queue = [q.to(device) for q in random_queue(30)]
    given = {"variant": variant, "label_smoothing": 0.1, "backend": backend}
    for upstream in (1.0, -2.5):
        plain, overwritten = layer_output(logits), layer_output(logits)
        memory = overwritten.data_ptr()
        want, want_stats = functional.tal_loss(plain, features, labels, *queue, **given)
        loss, stats = functional.tal_loss(overwritten, features, labels, *queue, inplace=True, **given)
        (want_grad,) = torch.autograd.grad(want * upstream, plain)
        (grad,) = torch.autograd.grad(loss * upstream, overwritten)
        assert grad.data_ptr() == memory
        assert torch.equal(loss, want)
        assert torch.equal(grad, want_grad)
        assert all(torch.equal(a, b) for a, b in zip(stats, want_stats, strict=True))


@kernel_backends
def test_inplace_backward_through_overwritten_logits_raises(backend: str) -> None:
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(6, 9))
    loss_fn = TALLoss(queue_size=9, inplace=True, backend=backend).to(device)
    z = layer_output(logits)
    saved = z.square().sum()
    total = loss_fn(z, features, labels) + saved
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    z = layer_output(logits)
    loss = loss_fn(z, features, labels)
    with torch.no_grad():
        z += 1  # the gradient itself
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@kernel_backends
def test_inplace_refuses_logits_that_cannot_hold_the_gradient(backend: str) -> None:
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(6, 9))
    loss_fn = TALLoss(queue_size=9, inplace=True, backend=backend).to(device)
    for bad, message in (
        (logits.clone().requires_grad_(), "overwrite a leaf"),
        (layer_output(logits.half()), "float16"),
        (layer_output(logits.t().contiguous()).t(), "needs contiguous logits"),
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


@kernel_backends
def test_inplace_loss_and_gradient_takes_the_logits_memory(backend: str) -> None:
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(6, 9))
    place, version = logits.data_ptr(), logits._version
    loss_fn = TALLoss(queue_size=9, inplace=True, backend=backend).to(device)
    _, gradient, _ = loss_fn.loss_and_gradient(logits, features, labels, push=False)
    assert gradient.data_ptr() == place
    assert torch.equal(logits, gradient)
    assert logits._version > version
    assert len(loss_fn.queue) == 0


@kernel_backends
def test_backward_keeps_the_gradient_of_a_retained_graph(backend: str) -> None:
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(6, 9))
    queue = [q.to(device) for q in random_queue(30)]
    z = logits.requires_grad_()
    loss, _ = functional.tal_loss(z, features, labels, *queue, backend=backend)
    first, second = (torch.autograd.grad(loss, z, torch.tensor(u, device=device), retain_graph=True)[0] for u in (3, 1))
    last = torch.autograd.grad(loss * 2, z)[0]
    assert relative(first.cpu(), 3 * second.detach().cpu()) <= 1e-6
    assert relative(last.cpu(), 2 * second.detach().cpu()) <= 1e-6


@pytest.mark.parametrize("parts", [False, True], ids=["one call", "parts"])
@kernel_backends
def test_second_derivatives_are_refused(backend: str, parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if parts:
        monkeypatch.setattr(dispatch, "runs_in_one_call", lambda *_: False)
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(4, 5))
    logits.requires_grad_()
    loss_fn = TALLoss(queue_size=5, backend=backend).to(device)
    loss = loss_fn(logits, features, labels) + logits.square().sum()  # the second term has a second derivative
    with pytest.raises(RuntimeError) as error:
        torch.autograd.grad(loss, logits, create_graph=True)
    assert str(error.value).splitlines()[0] == NO_SECOND_DERIVATIVE


def forward_mode(loss_of: Callable[[Tensor], Tensor], z: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss_of(forward_ad.make_dual(z, torch.ones_like(z)))).tangent


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "jvp": lambda loss_of, z: torch.func.jvp(loss_of, (z,), (torch.ones_like(z),))[1],
    "forward mode": forward_mode,
    "jacfwd": lambda loss_of, z: torch.func.jacfwd(loss_of)(z),
    "grad": lambda loss_of, z: torch.func.grad(loss_of)(z),
    "vmap": lambda loss_of, z: torch.func.vmap(loss_of)(z[None]),
}


IMPORTING_JVP = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")


@IMPORTING_JVP
@pytest.mark.parametrize("parts", [False, True], ids=["one call", "parts"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@kernel_backends
def test_transforms_do_not_lose_derivatives_in_silence(
    backend: str, transform: str, parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parts:
        monkeypatch.setattr(dispatch, "runs_in_one_call", lambda *_: False)
    logits, features, labels = (t.to(device_of(backend)) for t in random_batch(4, 5))
    loss_fn = TALLoss(queue_size=5, backend=backend).to(logits.device)
    for loss_of in (
        lambda z: loss_fn(z, features, labels),
        lambda z: loss_fn.loss_and_gradient(z, features, labels)[0],
    ):
        with pytest.raises(RuntimeError) as error:
            TRANSFORMS[transform](loss_of, logits)
        assert str(error.value).splitlines()[0] == NO_TRANSFORMS
    assert len(loss_fn.queue) == 0


@IMPORTING_JVP
def test_transforms_of_the_reference() -> None:
    logits, features, labels = random_batch(4, 5)
    loss_fn = TALLoss(queue_size=5, backend="reference").eval()
    leaf = logits.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss_fn(leaf, features, labels), leaf)
    results = {name: apply(lambda z: loss_fn(z, features, labels), logits) for name, apply in TRANSFORMS.items()}
    for name in ("jvp", "forward mode"):
        torch.testing.assert_close(results[name], want.sum())
    for name in ("grad", "jacfwd"):
        torch.testing.assert_close(results[name], want)
    for transform in ("jvp", "forward mode"):
        with pytest.raises(RuntimeError, match="nor through loss_and_gradient"):
            TRANSFORMS[transform](lambda z: loss_fn.loss_and_gradient(z, features, labels)[0], logits)


@every_backend
def test_loss_may_be_changed_in_place(backend: str) -> None:
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(6, 5))
    logits.requires_grad_()
    loss_fn = TALLoss(queue_size=9, backend=backend).to(device).eval()
    (want,) = torch.autograd.grad(loss_fn(logits, features, labels) / 4, logits)
    loss = loss_fn(logits, features, labels)
    loss += 2
    loss /= 4
    loss.backward()
    torch.testing.assert_close(logits.grad, want)


def test_no_gradient_is_computed_when_none_is_wanted() -> None:
    logits, features, labels = random_batch(4, 5)
    with torch.no_grad():
        loss = TALLoss(queue_size=5)(logits.requires_grad_(), features, labels)
    assert not loss.requires_grad


@every_backend
def test_loss_and_gradient_in_inference_mode(backend: str) -> None:
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(6, 9))
    loss_fn = TALLoss(queue_size=9, backend=backend).to(device)
    with torch.inference_mode():
        if backend == "reference":
            with pytest.raises(RuntimeError, match=r"inference mode switches off; use torch.no_grad\(\)"):
                loss_fn.loss_and_gradient(logits, features, labels)
            assert len(loss_fn.queue) == 0
        else:
            got = loss_fn.eval().loss_and_gradient(logits, features, labels)[1]
            assert torch.equal(got, loss_fn.loss_and_gradient(logits.clone(), features, labels)[1])
