"""The loss against a queue given as tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tal_fast import TALLoss, functional
from tests.helpers.backends import device_of, every_backend, every_variant
from tests.helpers.loss_cases import random_batch, random_queue, run_step


@every_backend
@every_variant
def test_functional_loss_equals_the_module(backend: str, variant: str) -> None:
    device = device_of(backend)
    logits, features, labels = (t.to(device) for t in random_batch(6, 10))
    loss_fn = TALLoss(variant, queue_size=40, backend=backend).to(device)
    loss_fn.queue.push(*(q.to(device) for q in random_queue(30)))
    queue = loss_fn.queue.contents()
    loss, stats = functional.tal_loss(logits, features, labels, *queue, variant=variant, backend=backend)
    want, want_stats = loss_fn(logits, features, labels, return_stats=True)
    torch.testing.assert_close(loss, want)
    for got, expected in zip(stats, want_stats, strict=True):
        torch.testing.assert_close(got, expected)
    # The rows and the statistics that the module pushes are those the caller is told to push.
    mean, std = functional.feature_statistics(features)
    pushed = torch.stack([mean, std])[:, stats.accepted]
    torch.testing.assert_close(torch.stack(loss_fn.queue.contents())[:, 30:], pushed[:, :10])


def test_weight_0_gives_cross_entropy() -> None:
    """The farthest correct sample has the loss of plain cross-entropy, in value and gradient."""
    logits, features, _ = random_batch(2, 9)
    labels = logits.argmax(1)
    mean, std = functional.feature_statistics(features)
    queue = mean[:1], std[:1]  # row 0 is at distance 0, row 1 the farthest: weights 1 and 0
    _, grad, stats = run_step("reference", logits, features, labels, queue)
    assert stats.weight.tolist() == pytest.approx([1, 0], abs=1e-5)
    z = logits.clone().requires_grad_()
    F.cross_entropy(z[1:], labels[1:], reduction="sum").div(2).backward()
    torch.testing.assert_close(grad[1], z.grad[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("queue", "error", "message"),
    [
        ((torch.rand(3), torch.rand(4)), ValueError, r"must both be \(N,\), not \(3,\) and \(4,\)"),
        ((torch.rand(3, 1), torch.rand(3, 1)), ValueError, r"must both be \(N,\)"),
        ((torch.rand(3).half(), torch.rand(3).half()), TypeError, "queue dtype is torch.float16"),
    ],
)
def test_invalid_queue(queue: tuple[Tensor, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.tal_loss(*random_batch(4, 5), *queue)
