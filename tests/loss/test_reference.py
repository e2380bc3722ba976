"""The reference against the golden data and against formulas written independently of it."""

from __future__ import annotations

import pytest
import torch

from tal_fast.loss import reference
from tests.helpers.backends import every_variant
from tests.helpers.loss_cases import (
    CASES,
    exact,
    golden,
    options,
    random_batch,
    random_queue,
    reference_loss,
    relative,
    trace,
)

TOLERANCE = {torch.float64: (1e-12, 1e-7), torch.float32: (1e-5, 1e-5)}  # loss; gradient (golden: stored in float32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@every_variant
@pytest.mark.parametrize("case", CASES)
def test_golden_case(case: str, variant: str, dtype: torch.dtype) -> None:
    g = golden(case)
    logits = g["logits"].to(dtype).requires_grad_()
    mean, std = reference.feature_statistics(g["features"].to(dtype))
    distance = reference.nearest_distance(mean, std, g["queue_mean"].to(dtype), g["queue_std"].to(dtype))
    loss, stats = reference_loss(logits, g["labels"], distance, **options(g, variant), warmup=bool(g["warmup"]))
    (grad,) = torch.autograd.grad(loss, logits)

    loss_tol, grad_tol = TOLERANCE[dtype]
    assert loss.dtype == dtype
    assert relative(loss, g[f"{variant}/loss"]) <= loss_tol
    assert relative(grad, g[f"{variant}/grad"]) <= grad_tol
    assert torch.equal(stats.correct, g["correct"])
    if dtype == torch.float64:
        if len(g["queue_mean"]):
            assert relative(distance, g["distance"]) <= 1e-12
        else:
            assert distance.isposinf().all()
        for field in ("typicalness", "weight", "temperature"):
            torch.testing.assert_close(getattr(stats, field), g[f"{variant}/{field}"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_golden_push(case: str) -> None:
    g = golden(case)
    mean, std = reference.feature_statistics(g["features"].double())
    queue = reference.push(
        g["queue_mean"].double(), g["queue_std"].double(), mean, std, g["correct"], int(g["capacity"])
    )
    for got, key in zip(queue, ("queue_mean_after", "queue_std_after"), strict=True):
        torch.testing.assert_close(got, g[key].double(), rtol=1e-7, atol=0)


@every_variant
def test_golden_trace(variant: str) -> None:
    t = trace()
    queue = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
    for step in range(len(t["logits"])):
        mean, std = reference.feature_statistics(t["features"][step].double())
        distance = reference.nearest_distance(mean, std, *queue)
        loss, stats = reference_loss(
            t["logits"][step].double(),
            t["labels"][step],
            distance,
            variant=variant,
            confidence_threshold=0.0,
            warmup=step < int(t["warmup_steps"]),
        )
        assert relative(loss, t[f"loss_{variant}"][step]) <= 1e-12
        queue = reference.push(*queue, mean, std, stats.accepted, int(t["capacity"]))
        assert len(queue[0]) == int(t["queue_len"][step])
    torch.testing.assert_close(queue[0], t["queue_mean"], rtol=1e-12, atol=0)
    torch.testing.assert_close(queue[1], t["queue_std"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("t_wrong", [20.0, None])
@every_variant
def test_loss_and_gradient_equal_the_closed_form(variant: str, t_wrong: float | None, smoothing: float) -> None:
    logits, features, labels = random_batch(40, 17)
    labels[3] = labels[11] = -100
    logits = logits.double().requires_grad_()
    mean, std = reference.feature_statistics(features.double())
    distance = reference.nearest_distance(mean, std, *(q.double() for q in random_queue(200)))
    kwargs = {"variant": variant, "t_wrong": t_wrong, "label_smoothing": smoothing}
    loss, stats = reference_loss(logits, labels, distance, **kwargs)
    (grad,) = torch.autograd.grad(loss, logits)
    true_loss, true_grad = exact(logits, labels, stats.typicalness, **kwargs)
    assert relative(loss, true_loss) <= 1e-12
    assert relative(grad, true_grad) <= 1e-12


@every_variant
def test_summary_of_the_batch_itself_gives_the_same_loss(variant: str) -> None:
    logits, features, labels = random_batch(64, 10)
    labels[5] = -100
    mean, std = reference.feature_statistics(features.double())
    distance = reference.nearest_distance(mean, std, *(q.double() for q in random_queue(300)))
    summary = reference.batch_summary(logits.double(), labels, distance)
    alone, _ = reference_loss(logits.double(), labels, distance, variant=variant)
    given, _ = reference_loss(logits.double(), labels, distance, variant=variant, summary=summary)
    assert relative(given, alone) <= 1e-12


def test_statistics_are_rounded_once() -> None:
    # Features far from zero: a sum of squares in float32 would lose the deviation altogether.
    features = (1000 + torch.rand(50, 257)).float()
    mean, std = reference.feature_statistics(features)
    wide = features.double()
    assert torch.equal(mean, wide.mean(1).float())
    assert torch.equal(std, wide.std(1).float())


def test_only_the_first_entries_of_the_queue_count() -> None:
    mean, std = torch.rand(9), torch.rand(9)
    queue_mean, queue_std = random_queue(70_000)  # more than one chunk
    for length in (0, 1, 69_999):
        got = reference.nearest_distance(mean, std, queue_mean, queue_std, torch.tensor(length))
        want = reference.nearest_distance(mean, std, queue_mean[:length], queue_std[:length])
        assert torch.equal(got, want)
