"""Loss, gradient and statistics of every backend: golden data, error bounds, and the rules of the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tal_fast import TALLoss
from tal_fast.loss import functional
from tests.helpers.backends import (
    INTERPRETED,
    NATIVE,
    NEEDS_EXTENSION,
    TRITON,
    device_of,
    every_backend,
    every_variant,
    kernel_backends,
)
from tests.helpers.loss_cases import (
    CASES,
    exact,
    golden,
    options,
    random_batch,
    random_queue,
    relative,
    run_step,
    trace,
)


def golden_marks(case: str) -> list[pytest.MarkDecorator]:
    """Markers of a golden case for Triton, whose interpreter spends half of its time in those of 17 rows and more."""
    slow = INTERPRETED and len(golden(case)["labels"]) > 16
    return [*TRITON.marks, *([pytest.mark.slow] if slow else [])]


GOLDEN = [
    *(("reference", case) for case in CASES),
    *(pytest.param("native", case, marks=NEEDS_EXTENSION) for case in CASES),
    *(pytest.param("triton", case, marks=golden_marks(case)) for case in CASES),
]


@every_variant
@pytest.mark.parametrize(("backend", "case"), GOLDEN)
def test_golden_case(case: str, variant: str, backend: str) -> None:
    check_golden_case(case, torch.float32, variant, backend)


@every_variant
@pytest.mark.parametrize("backend", ["reference", NATIVE])  # the kernels' own tests have these cases in float64
@pytest.mark.parametrize("case", CASES)
def test_golden_case_in_float64(case: str, variant: str, backend: str) -> None:
    check_golden_case(case, torch.float64, variant, backend)


def check_golden_case(case: str, dtype: torch.dtype, variant: str, backend: str) -> None:
    g = golden(case)
    loss, grad, stats = run_step(
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
    assert torch.equal(stats.correct, g["correct"])


@every_backend
@every_variant
def test_golden_trace(variant: str, backend: str) -> None:
    t, device = trace(), device_of(backend)
    loss_fn = TALLoss(variant, queue_size=int(t["capacity"]), confidence_threshold=0.0, backend=backend)
    loss_fn = loss_fn.double().to(device)
    steps = len(t["logits"])
    if backend == "triton" and INTERPRETED:
        steps = 5  # the queue is full in the last one
    for step in range(steps):
        loss = loss_fn(
            t["logits"][step].double().to(device),
            t["features"][step].double().to(device),
            t["labels"][step].to(device),
            warmup=step < int(t["warmup_steps"]),
        )
        assert relative(loss.cpu(), t[f"loss_{variant}"][step]) <= 1e-12
        assert len(loss_fn.queue) == int(t["queue_len"][step])
    if steps == len(t["logits"]):
        mean, std = loss_fn.queue.contents()
        torch.testing.assert_close(mean.cpu(), t["queue_mean"], rtol=1e-12, atol=0)
        torch.testing.assert_close(std.cpu(), t["queue_std"], rtol=1e-12, atol=0)


TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def check_bounds(backend: str, logits: Tensor, features: Tensor, labels: Tensor, **kwargs: Any) -> None:
    """Loss and gradient, given the backend's own typicalness, are as near to float64 as eager PyTorch + tolerance."""
    queue = random_queue(500)
    tol = TOLERANCE[logits.dtype]
    loss, grad, stats = run_step(backend, logits, features, labels, queue, **kwargs)
    true_loss, true_grad = exact(logits, labels, stats.typicalness, **kwargs)
    eager_loss, eager_grad, eager_stats = run_step("reference", logits, features, labels, queue, **kwargs)
    eager_true = exact(logits, labels, eager_stats.typicalness, **kwargs)

    assert loss.dtype == torch.float32
    assert grad.dtype == logits.dtype
    assert relative(loss, true_loss) <= relative(eager_loss, eager_true[0]) + tol
    assert relative(grad, true_grad) <= relative(eager_grad, eager_true[1]) + tol
    assert torch.equal(stats.correct, eager_stats.correct)
    assert torch.equal(stats.accepted, eager_stats.accepted)
    # Statistics within a few ulp of float64, the distance exact for them.
    mean, std = functional.feature_statistics(features)
    distance = functional.nearest_distance(mean, std, *queue)
    torch.testing.assert_close(stats.distance, distance, rtol=2e-6, atol=1e-7)


SHAPES = [
    pytest.param("native", rows, classes, marks=NEEDS_EXTENSION)
    for classes in (1, 2, 10, 100, 1000, 1003, 21841)
    for rows in (1, 2, 33)
] + [
    # One shape for each path of the kernels, whose own tests have more.
    pytest.param("triton", rows, classes, marks=TRITON.marks)
    for rows, classes in ((2, 1), (2, 100), (1, 1003))
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("backend", "rows", "classes"), SHAPES)
@every_variant
@pytest.mark.usefixtures("poison")
def test_error_bounds(backend: str, variant: str, rows: int, classes: int, dtype: torch.dtype) -> None:
    logits, features, labels = random_batch(rows, classes, width=129)
    check_bounds(backend, logits.to(dtype), features.to(dtype), labels, variant=variant)


@every_variant
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@kernel_backends
@pytest.mark.usefixtures("poison")
def test_error_bounds_of_confident_rows(backend: str, dtype: torch.dtype, smoothing: float, variant: str) -> None:
    rows = 2 if backend == "triton" and INTERPRETED else 33
    logits, features, labels = random_batch(rows, 100)
    logits[torch.arange(rows), labels] += 30
    assert (logits.softmax(1).amax(1) > 0.999).all()
    check_bounds(
        backend, logits.to(dtype), features.to(dtype), labels, variant=variant, label_smoothing=smoothing, t_wrong=None
    )


@kernel_backends
def test_gradient_of_the_true_class_of_a_confident_row(backend: str) -> None:
    # softmax - 1 in float32, as eager PyTorch has it, is 0 or a multiple of 6e-8 here; the truth is 1e-9 or so.
    logits = torch.zeros(4, 10)
    logits[:, 3] = torch.tensor([20.0, 22.0, 24.0, 26.0])
    labels = torch.full((4,), 3)
    features = torch.rand(4, 16)
    queue = (torch.tensor([0.5]), torch.tensor([0.3]))
    _loss, grad, stats = run_step(backend, logits, features, labels, queue, t_min=30.0, t_max=60.0)
    _, truth = exact(logits, labels, stats.typicalness, t_min=30.0, t_max=60.0)
    assert relative(grad, truth) <= 1e-5
    # atol: rounding of the subtraction in the float64 truth itself
    torch.testing.assert_close(grad[:, 3].double(), truth[:, 3], rtol=1e-4, atol=1e-16)


@every_backend
@every_variant
def test_logits_and_features_of_any_strides(backend: str, variant: str) -> None:
    logits, features, labels = random_batch(4, 30)
    queue = random_queue(50)
    want = run_step(backend, logits, features, labels, queue, variant=variant)
    wide = torch.randn(4, 60)
    wide[:, ::2] = logits
    for other in (logits.t().contiguous().t(), wide[:, ::2]):
        got = run_step(
            backend, other, features.t().contiguous().t(), labels.repeat_interleave(2)[::2], queue, variant=variant
        )
        assert relative(got[0], want[0]) <= 1e-6
        assert relative(got[1], want[1]) <= 1e-6
    row = torch.randn(1, 30)
    expanded = run_step(backend, row.expand(3, 30), features[:3], labels[:3], queue, variant=variant)
    copied = run_step(backend, row.repeat(3, 1), features[:3], labels[:3], queue, variant=variant)
    assert relative(expanded[1], copied[1]) <= 1e-6


@every_backend
@every_variant
@pytest.mark.usefixtures("poison")
def test_ignored_rows_are_as_if_absent(backend: str, variant: str) -> None:
    logits, features, labels = random_batch(9, 12)
    queue = random_queue(40)
    ignored = torch.zeros(9, dtype=torch.bool)
    ignored[::3] = True
    logits[0], features[3] = torch.nan, torch.nan  # both in ignored rows
    features[6] = 1e6  # would be the farthest by far
    marked = labels.masked_fill(ignored, -100)
    loss, grad, stats = run_step(backend, logits, features, marked, queue, variant=variant)
    want_loss, want_grad, want = run_step(
        backend, logits[~ignored], features[~ignored], labels[~ignored], queue, variant=variant
    )
    assert relative(loss, want_loss) <= 1e-6
    assert relative(grad[~ignored], want_grad) <= 1e-6
    assert (grad[ignored] == 0).all()
    torch.testing.assert_close(stats.typicalness[~ignored], want.typicalness)
    assert not stats.correct[ignored].any()
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
    logits, features, labels = random_batch(10, 6)
    labels = logits.argmax(1)
    labels[0] = (labels[0] + 1) % 6
    bad = torch.tensor([2, 5, 9])
    features[2, 3], features[5, 0], features[9, 1] = torch.nan, torch.inf, -torch.inf
    queue = random_queue(40)
    _, _, stats = run_step(backend, logits, features, labels, queue, variant=variant)
    good = torch.ones(10, dtype=torch.bool)
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
    logits, features, labels = random_batch(3, 6)
    labels = logits.argmax(1)
    logits[1, (int(labels[1]) + 1) % 6] = value
    loss, _, stats = run_step(backend, logits, features, labels, variant=variant, confidence_threshold=-1.0)
    assert not loss.isfinite()
    assert stats.accepted.tolist() == [True, False, True]


@every_backend
def test_logits_whose_squares_overflow_have_a_loss_or_nan(backend: str) -> None:
    logits, features, labels = random_batch(4, 6)
    logits[1] *= 1e19
    queue = random_queue(100)
    loss, grad, _ = run_step(backend, logits, features, labels, queue)
    if backend == "triton":  # says so, rather than leave the row's direction out
        assert loss.isnan()
        return
    reference_loss, reference_grad, _ = run_step("reference", logits, features, labels, queue)
    torch.testing.assert_close(loss, reference_loss)
    torch.testing.assert_close(grad, reference_grad)


@every_backend
def test_zero_logits(backend: str) -> None:
    _, features, labels = random_batch(4, 6)
    logits = torch.zeros(4, 6)
    _loss, grad, stats = run_step(backend, logits, features, labels, confidence_threshold=0.0)
    _, truth = exact(logits, labels, stats.typicalness)
    assert relative(grad, truth) <= 1e-5
    assert torch.equal(stats.correct, labels == 0)  # ties go to the first class
    assert not stats.accepted.any()  # cosine 0 does not exceed the threshold 0


@every_backend
def test_ties_go_to_the_first_class(backend: str) -> None:
    logits = torch.randn(6, 40).clamp(max=1)
    logits[:, [7, 23, 39]] = 2.5
    labels = torch.tensor([7, 23, 39, 7, 7, 0])
    _, _, stats = run_step(backend, logits, torch.rand(6, 9), labels)
    assert stats.correct.tolist() == [True, False, False, True, True, False]


@every_backend
def test_accepted_samples_exceed_the_confidence_threshold(backend: str) -> None:
    logits, features, _ = random_batch(10, 10)
    labels = logits.argmax(1)
    cosine = logits.amax(1) / (logits.norm(dim=1) + 1e-7)
    threshold = float(cosine.median()) + 1e-4
    _, _, stats = run_step(backend, logits, features, labels, confidence_threshold=threshold)
    assert torch.equal(stats.accepted, cosine > threshold)
    assert 0 < int(stats.accepted.sum()) < 10


@every_backend
@every_variant
def test_every_correct_sample_is_accepted_but_by_the_released_variant(variant: str, backend: str) -> None:
    # A shift of all logits changes neither the predictions nor softmax, but the sign of the cosine.
    logits, labels, features = torch.zeros(8, 10), torch.arange(8), torch.rand(8, 16)
    logits[torch.arange(8), labels] = torch.arange(2.0, 10.0)
    for shift, above in ((0.0, 8), (-5.5, 4), (-20.0, 0)):
        _, _, stats = run_step(backend, logits + shift, features, labels, variant=variant)
        assert int(stats.correct.sum()) == 8
        assert int(stats.accepted.sum()) == (8 if variant == "paper" else above)


@every_backend
def test_released_typicalness_is_1_when_all_samples_are_accepted(backend: str) -> None:
    logits, features, _ = random_batch(6, 10)
    labels = logits.argmax(1)
    _, _, released = run_step(backend, logits, features, labels, variant="released")
    assert (released.typicalness == 1).all()
    assert (released.temperature == 10).all()
    _, _, paper = run_step(backend, logits, features, labels, variant="paper")
    assert paper.typicalness.min() < 0.01
    labels[3] = (labels[3] + 1) % 10
    _, _, released = run_step(backend, logits, features, labels, variant="released")
    assert released.typicalness.min() < 0.01


@every_backend
@every_variant
def test_typicalness_is_1_during_warmup_and_with_an_empty_queue(backend: str, variant: str) -> None:
    logits, features, labels = random_batch(6, 10)
    empty = torch.empty(0), torch.empty(0)
    for queue, warmup in ((random_queue(20), True), (empty, False)):
        loss, grad, stats = run_step(backend, logits, features, labels, queue, variant=variant, warmup=warmup)
        true_loss, true_grad = exact(logits, labels, torch.ones(6), variant=variant)
        assert (stats.typicalness == 1).all()
        assert relative(loss, true_loss) <= 1e-5
        assert relative(grad, true_grad) <= 1e-5


@every_backend
def test_single_row_is_typical(backend: str) -> None:
    logits, features, labels = random_batch(1, 10)
    _, _, stats = run_step(backend, logits, features, labels)
    assert stats.typicalness.item() == 1


HUGE = {torch.float32: 1e20, torch.bfloat16: 1e20, torch.float64: 1e170}


@every_variant
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "size"), [*HUGE.items(), (torch.float32, 1e35), (torch.float32, 1e16)], ids=str)
@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_huge_logits_have_a_direction(
    backend: str, dtype: torch.dtype, size: float, smoothing: float, variant: str
) -> None:
    """Squares of the logits overflow, the norm does not: the direction loss is that of smaller logits."""
    logits, features, labels = random_batch(6, 40)
    labels[:4] = logits[:4].argmax(1)
    logits = logits.to(dtype)
    given = {"variant": variant, "label_smoothing": smoothing, "warmup": True}  # w = 1: the direction loss alone
    loss, grad, stats = run_step(backend, logits * size, features, labels, **given)
    scaled = (logits * size).double() / size  # rounded as the logits were
    small_loss, small_grad, small = run_step("reference", 1e12 * scaled, features, labels, **given)  # no trace of 1e-7
    tol = TOLERANCE.get(dtype, 1e-10)
    assert relative(loss, small_loss) <= tol
    assert relative(grad.double() * size, small_grad * 1e12) <= tol
    assert torch.equal(stats.accepted, small.accepted)
    assert stats.accepted.sum() >= 4


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_huge_logits_of_both_losses(backend: str) -> None:
    logits, features, labels = random_batch(6, 40)
    logits *= 1e20
    loss, grad, stats = run_step(backend, logits, features, labels, label_smoothing=0.1)
    assert (stats.weight < 1).any()
    want_loss, want_grad = exact(logits, labels, stats.typicalness, label_smoothing=0.1)
    assert relative(loss, want_loss) <= 1e-5
    assert relative(grad, want_grad) <= 1e-5
