"""Class weights and reductions: ``F.cross_entropy``'s conventions in both losses, on every backend."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tal_fast import TALLoss
from tal_fast.loss import dispatch, functional, reference
from tal_fast.loss.autograd import NO_SECOND_DERIVATIVE
from tests.helpers.backends import (
    INTERPRETED,
    NEEDS_EXTENSION,
    device_of,
    every_backend,
    every_variant,
    kernel_backends,
)
from tests.helpers.loss_cases import exact, random_batch, random_queue, reference_loss, relative, run_step

every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
every_smoothing = pytest.mark.parametrize("smoothing", [0.0, 0.1])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def random_weights(classes: int) -> Tensor:
    """Class weights, a third of them 0; that of class 0 is not."""
    weights = torch.rand(classes) * (torch.rand(classes) < 0.7)
    weights[0] = 1.5
    return weights


def cross_entropy(z: Tensor, labels: Tensor, **given: Any) -> Tensor:
    return F.cross_entropy(z, labels, given.get("class_weight"), reduction=given["reduction"],
                           label_smoothing=given["label_smoothing"])  # fmt: skip


@every_smoothing
@every_reduction
@every_backend
@every_variant
def test_direction_loss_has_the_conventions_of_cross_entropy(
    variant: str, backend: str, reduction: str, smoothing: float
) -> None:
    """In warm-up, with one temperature, the loss is F.cross_entropy of the scaled unit-length logits."""
    logits, features, labels = random_batch(9, 13)
    labels[3:5] = torch.tensor([0, -100])
    for weights in (None, random_weights(13)):
        given: dict[str, Any] = {"class_weight": weights, "reduction": reduction, "label_smoothing": smoothing}
        loss, grad, _ = run_step(backend, logits, features, labels, variant=variant, warmup=True, t_wrong=10.0, **given)
        z = logits.clone().requires_grad_()
        want = cross_entropy(10 * reference.unit_length(z), labels, **given)
        assert loss.shape == want.shape
        torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), z)[0], rtol=1e-4, atol=1e-6)


@every_smoothing
@every_reduction
@every_variant
def test_magnitude_loss_has_the_conventions_of_cross_entropy(variant: str, reduction: str, smoothing: float) -> None:
    """Correct samples as far as the farthest of a larger batch have w = 0, which leaves F.cross_entropy."""
    logits, _, _ = random_batch(9, 13)
    logits = logits.double().requires_grad_()
    labels = logits.argmax(1)
    labels[4] = -100
    for weights in (None, random_weights(13).double()):
        weight_sum = 8.0 if weights is None else float(weights[labels[labels >= 0]].sum())
        summary = torch.tensor([0, 1, 8, 7, 0, 8, weight_sum], dtype=torch.float64)
        given: dict[str, Any] = {"class_weight": weights, "reduction": reduction, "label_smoothing": smoothing}
        distance = torch.ones(9, dtype=torch.float64)
        loss, _ = reference_loss(logits, labels, distance, variant=variant, summary=summary, **given)
        want = cross_entropy(logits, labels, **given)
        assert loss.shape == want.shape
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-7)  # w is 1e-8, not 0
        grads = [torch.autograd.grad(value.sum(), logits)[0] for value in (loss, want)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def random_rows(rows: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of which one is ignored, one confident, and one has the last class; the first has class 0."""
    logits, features, labels = random_batch(rows, classes, width=33)
    labels[0] = 0
    if rows > 3:
        labels[1] = -100
        logits[1] = torch.nan
        logits[2, labels[2]] += 30
        labels[3] = classes - 1
    return logits, features, labels


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (5, 7), (33, 100), (6, 1003)])
@every_smoothing
@every_backend
@every_variant
@pytest.mark.usefixtures("poison")
def test_error_bounds(
    variant: str, backend: str, smoothing: float, rows: int, classes: int, dtype: torch.dtype
) -> None:
    """Given the backend's own typicalness, as near to float64 as eager PyTorch + the tolerance of the dtype."""
    if backend == "triton" and INTERPRETED and rows > 6:
        pytest.skip("slow in Triton's interpreter")
    logits, features, labels = random_rows(rows, classes)
    logits, queue, weights = logits.to(dtype), random_queue(50), random_weights(classes)
    if rows > 3:
        weights[-1] = 0.0
    if dtype == torch.float64:
        features, queue, weights = features.double(), (queue[0].double(), queue[1].double()), weights.double()
    for weight, reduction in itertools.product((None, weights), ("mean", "sum", "none")):
        given: dict[str, Any] = {
            "variant": variant, "label_smoothing": smoothing, "class_weight": weight, "reduction": reduction
        }  # fmt: skip
        clean = logits.nan_to_num()
        results = [run_step(b, logits, features, labels, queue, **given) for b in (backend, "reference")]
        errors = []
        for loss, grad, stats in results:
            true_loss, true_grad = exact(clean, labels, stats.typicalness, **given)
            errors.append((relative(loss, true_loss), relative(grad, true_grad)))
        (loss, grad, _), _ = results
        assert loss.shape == ((rows,) if reduction == "none" else ())
        assert grad.dtype == dtype
        for own, eager in zip(*errors, strict=True):
            assert own <= eager + TOLERANCE[dtype]
        if rows > 3:
            assert (grad[1] == 0).all()


@every_smoothing
@every_reduction
@every_variant
def test_reference_passes_gradcheck(variant: str, reduction: str, smoothing: float) -> None:
    logits, features, labels = random_batch(6, 5, scale=1.0)
    labels[2] = -100
    mean, std = reference.feature_statistics(features.double())
    distance = reference.nearest_distance(mean, std, *(q.double() for q in random_queue(30)))
    given: dict[str, Any] = {"class_weight": random_weights(5), "reduction": reduction, "label_smoothing": smoothing}
    assert torch.autograd.gradcheck(
        lambda z: reference_loss(z, labels, distance, variant=variant, t_min=2.0, t_max=5.0, t_wrong=3.0, **given)[0],
        logits.double().requires_grad_(),
    )


@every_smoothing
@every_backend
@every_variant
def test_reductions_agree(variant: str, backend: str, smoothing: float) -> None:
    logits, features, labels = random_rows(6, 17)
    queue, weights = random_queue(30), random_weights(17)
    for weight in (None, weights):
        given: dict[str, Any] = {"variant": variant, "label_smoothing": smoothing, "class_weight": weight}
        results = {
            reduction: run_step(backend, logits, features, labels, queue, reduction=reduction, **given)
            for reduction in ("mean", "sum", "none")
        }
        valid = labels >= 0
        weight_sum = valid.sum() if weight is None else weight[labels[valid]].sum()
        rows, row_grads, stats = results["none"]
        assert (rows[~valid] == 0).all()
        for reduction, divisor in (("sum", 1.0), ("mean", weight_sum)):
            loss, grad, others = results[reduction]
            assert relative(loss, rows.sum() / divisor) <= 1e-6
            assert relative(grad, row_grads / divisor) <= 1e-6
            assert all(torch.equal(a, b) for a, b in zip(stats, others, strict=True))


@every_backend
@every_variant
def test_typicalness_and_queue_do_not_depend_on_class_weights(variant: str, backend: str) -> None:
    device = device_of(backend)
    losses = [
        TALLoss(variant, queue_size=40, backend=backend, class_weight=weight).to(device)
        for weight in (None, random_weights(11))
    ]
    for _ in range(3):
        batch = [t.to(device) for t in random_batch(7, 11)]
        (_, plain), (_, weighted) = (loss_fn(*batch, return_stats=True) for loss_fn in losses)
        assert all(torch.equal(a, b) for a, b in zip(plain, weighted, strict=True))
    assert torch.equal(*(loss_fn.queue.contents()[0] for loss_fn in losses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@every_backend
@every_variant
def test_each_row_is_scaled_by_its_own_upstream_gradient(
    variant: str, backend: str, inplace: bool, dtype: torch.dtype
) -> None:
    if inplace and dtype == torch.float16:
        pytest.skip("refused")
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(6, 17))
    labels[4] = -100
    logits = logits.to(dtype)
    queue = [q.to(device) for q in random_queue(30)]
    given: dict[str, Any] = {"variant": variant, "class_weight": random_weights(17).to(device), "backend": backend}
    truth = functional.tal_loss(logits, features, labels, *queue, reduction="none", **given)[1]
    row_grads = exact(logits.cpu(), labels.cpu(), truth.typicalness.cpu(), variant=variant, reduction="none",
                      class_weight=given["class_weight"].cpu())[1]  # fmt: skip
    upstream = torch.randn(6, device=device) * 300
    upstream[4] = torch.inf  # such as that of the logarithm of the ignored row's loss of 0
    leaf = logits.clone().requires_grad_()
    loss, _ = functional.tal_loss(leaf * 1, features, labels, *queue, reduction="none", inplace=inplace, **given)
    (kept,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, leaf, upstream)
    assert torch.equal(kept, grad)
    assert grad.dtype == dtype
    upstream[4] = 0
    assert relative(grad.cpu(), upstream.cpu()[:, None].double() * row_grads) <= 10 * TOLERANCE[dtype]
    assert (grad[4] == 0).all()


@NEEDS_EXTENSION
@every_smoothing
@every_reduction
@every_variant
def test_step_in_one_call_equals_its_parts(
    variant: str, reduction: str, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"reduction": reduction, "class_weight": random_weights(19), "label_smoothing": smoothing}
    losses = [TALLoss(variant, queue_size=50, **given) for _ in range(2)]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        logits, features, labels = random_batch(8, 19)
        labels[::5], labels[1] = -100, 0
        results = []
        for loss_fn in losses:
            leaf = logits.to(dtype).requires_grad_()
            with monkeypatch.context() as patched:
                if loss_fn is losses[1]:
                    patched.setattr(dispatch, "runs_in_one_call", lambda *_: False)
                loss = loss_fn(leaf, features, labels)
                upstream = loss.new_tensor(3.0)
                if reduction == "none":
                    upstream = torch.linspace(-2, 3, 8).to(loss.dtype)
                    upstream[labels == -100] = torch.inf  # must not reach an ignored row
                results.append((loss, torch.autograd.grad(loss, leaf, upstream)[0]))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_reduction
@every_backend
@every_variant
def test_loss_and_gradient_equals_forward_and_backward(variant: str, backend: str, reduction: str) -> None:
    device = device_of(backend)
    weight = random_weights(9)
    loss_fn = TALLoss(variant, queue_size=30, backend=backend, reduction=reduction, class_weight=weight).to(device)  # type: ignore[arg-type]
    loss_fn.queue.push(*(q.to(device) for q in random_queue(30)))
    logits, features, labels = (t.to(device) for t in random_batch(6, 9))
    labels[:3] = torch.tensor([0, 1, -100])
    leaf = logits.clone().requires_grad_()
    want = loss_fn(leaf, features, labels, push=False)
    loss, gradient, _ = loss_fn.loss_and_gradient(logits, features, labels, push=False)
    assert not loss.requires_grad
    assert torch.equal(loss, want)
    assert torch.equal(gradient, torch.autograd.grad(want.sum(), leaf)[0])


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)  # the fakes' shapes, and Inductor's strides
@every_reduction
@every_backend
def test_compiled_full_graph_equals_eager(backend: str, reduction: str, compiler: str) -> None:
    torch._dynamo.reset()
    device = device_of(backend)
    weight = random_weights(10)
    given: dict[str, Any] = {"reduction": reduction, "class_weight": weight, "label_smoothing": 0.1, "backend": backend}
    eager = TALLoss("released", queue_size=30, **given).to(device)
    inner = copy.deepcopy(eager)
    compiled = torch.compile(lambda z, f, y: inner(z * 1.0, f, y), fullgraph=True, backend=compiler)
    for _ in range(2):
        logits, features, labels = (t.to(device) for t in random_batch(4, 10))
        labels[:2] = torch.tensor([0, -100])
        a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        want, got = eager(a, features, labels), compiled(b, features, labels)
        upstream = torch.randn_like(want)
        want.backward(upstream)
        got.backward(upstream)
        assert got.shape == want.shape
        assert relative(got.cpu(), want.detach().cpu()) <= 1e-6
        assert relative(b.grad.cpu(), a.grad.cpu()) <= 1e-5


@pytest.mark.parametrize("parts", [False, True], ids=["one call", "parts"])
@kernel_backends
def test_second_derivatives_of_row_losses_are_refused(
    backend: str, parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parts:
        monkeypatch.setattr(dispatch, "runs_in_one_call", lambda *_: False)
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(4, 5))
    loss = TALLoss(queue_size=5, backend=backend, reduction="none").to(device)(
        logits.requires_grad_(), features, labels
    )
    with pytest.raises(RuntimeError) as error:
        torch.autograd.grad(loss, logits, torch.ones_like(loss), create_graph=True)
    assert str(error.value).splitlines()[0] == NO_SECOND_DERIVATIVE


@every_smoothing
@every_backend
@every_variant
def test_class_weights_of_any_strides(variant: str, backend: str, smoothing: float) -> None:
    logits, features, labels = random_batch(6, 9)
    weights = random_weights(9)
    apart = torch.stack([weights, torch.full((9,), torch.nan)], 1)[:, 0]
    given: dict[str, Any] = {"queue": random_queue(50), "variant": variant, "label_smoothing": smoothing}
    loss, grad, _ = run_step(backend, logits, features, labels, class_weight=weights, **given)
    same_loss, same_grad, _ = run_step(backend, logits, features, labels, class_weight=apart, **given)
    assert torch.equal(loss, same_loss)
    assert torch.equal(grad, same_grad)


@every_smoothing
@every_backend
def test_weights_that_sum_to_0(backend: str, smoothing: float) -> None:
    """The mean is NaN as that of F.cross_entropy, even where the other classes' smoothing has a weight."""
    logits, features, _ = random_batch(4, 5)
    labels = torch.tensor([2, 2, -100, 2])
    for weights in (torch.zeros(5), torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5])):
        want = F.cross_entropy(10 * reference.unit_length(logits), labels, weights, label_smoothing=smoothing)
        given: dict[str, Any] = {"class_weight": weights, "label_smoothing": smoothing, "warmup": True, "t_wrong": 10.0}
        loss, grad, _ = run_step(backend, logits, features, labels, **given)
        assert loss.isnan()
        torch.testing.assert_close(loss, want, equal_nan=True)
        assert not grad[0].isfinite().any()
        assert (grad[2] == 0).all()
        rows, grad, _ = run_step(backend, logits, features, labels, reduction="none", **given)
        want = F.cross_entropy(
            10 * reference.unit_length(logits), labels, weights, label_smoothing=smoothing, reduction="none"
        )
        torch.testing.assert_close(rows, want, rtol=1e-5, atol=1e-6)
        assert grad.isfinite().all()


@every_reduction
@every_backend
@every_variant
@pytest.mark.parametrize("rows", [0, 3])
def test_no_valid_row(variant: str, backend: str, reduction: str, rows: int) -> None:
    logits, features, labels = torch.randn(rows, 5), torch.rand(rows, 9), torch.full((rows,), -100)
    given: dict[str, Any] = {"variant": variant, "reduction": reduction, "class_weight": torch.zeros(5)}
    loss, grad, _ = run_step(backend, logits, features, labels, **given)
    assert loss.shape == ((rows,) if reduction == "none" else ())
    assert (loss == 0).all()
    assert (grad == 0).all()


@every_backend
def test_a_row_of_weight_0_that_is_not_finite_is_noticed(backend: str) -> None:
    logits, features, labels = random_batch(3, 6)
    labels[1] = 2
    logits[1, 4] = torch.inf
    weights = torch.ones(6)
    weights[2] = 0
    loss, _, _ = run_step(backend, logits, features, labels, class_weight=weights)
    assert loss.isnan()
    rows, _, _ = run_step(backend, logits, features, labels, class_weight=weights, reduction="none")
    assert rows.isnan().tolist() == [False, True, False]


@every_backend
@pytest.mark.parametrize("size", [1e16, 1e20])
def test_huge_logits_with_class_weights(backend: str, size: float) -> None:
    if backend == "triton":
        pytest.skip("says NaN")
    logits, features, labels = random_batch(6, 40)
    weights = random_weights(40)
    weights[labels[0]] = 0
    given: dict[str, Any] = {"class_weight": weights, "label_smoothing": 0.1, "reduction": "none"}
    loss, grad, stats = run_step(backend, logits * size, features, labels, **given)
    want_loss, want_grad = exact(logits * size, labels, stats.typicalness, **given)
    assert relative(loss, want_loss) <= 1e-5
    assert relative(grad, want_grad) <= 1e-5


def test_class_weights_are_an_option_and_not_state() -> None:
    weight = torch.tensor([0.1, 1.0, 3.0])
    loss_fn = TALLoss(queue_size=5, class_weight=weight.requires_grad_())
    assert "class_weight" not in " ".join(loss_fn.state_dict())
    assert "class_weight of 3 classes" in repr(loss_fn)
    for twin in (loss_fn.bfloat16(), loss_fn.double(), copy.deepcopy(loss_fn), loss_fn.to_empty(device="cpu")):
        assert torch.equal(twin.class_weight, weight)
        assert twin.class_weight.dtype == torch.float32
        assert not twin.class_weight.requires_grad


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "class_weight is list but must be a floating-point tensor"),
        (torch.tensor([1, 2]), TypeError, "class_weight is torch.int64 but must be a floating-point tensor"),
        (torch.rand(2, 1), ValueError, r"class_weight is \(2, 1\) but must be \(C,\)"),
        (torch.tensor([1.0, -0.5]), ValueError, r"class_weight\[1\] is -0.5 but must be finite and at least 0"),
        (torch.tensor([torch.inf, 1.0]), ValueError, r"class_weight\[0\] is inf but"),
        (torch.tensor([torch.nan, 1.0]), ValueError, r"class_weight\[0\] is nan but"),
    ],
)
def test_invalid_class_weights(weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TALLoss(class_weight=weight)
    with pytest.raises(error, match=message):
        functional.tal_loss(*random_batch(4, 2), *random_queue(3), class_weight=weight)


@every_backend
@pytest.mark.parametrize("method", ["forward", "loss_and_gradient"])
def test_class_weights_must_fit_the_logits(backend: str, method: str) -> None:
    device = device_of(backend)
    batch = [t.to(device) for t in random_batch(4, 5)]
    loss_fn = TALLoss(queue_size=5, class_weight=torch.ones(6), backend=backend).to(device)
    with pytest.raises(ValueError, match="class_weight has 6 weights but the logits 5 classes; give one for each"):
        getattr(loss_fn, method)(*batch)
    assert len(loss_fn.queue) == 0
    with pytest.raises(ValueError, match="class_weight is on meta but the logits are on"):
        functional.tal_loss(
            *batch, *(q.to(device) for q in random_queue(3)), class_weight=torch.ones(5, device="meta"), backend=backend
        )


def test_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="reduction is 'avg'; use 'mean', 'sum' or 'none'"):
        TALLoss(reduction="avg")  # type: ignore[arg-type]
