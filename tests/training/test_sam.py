"""Perturbation of the weights in sharpness-aware minimisation."""

from __future__ import annotations

import torch
from torch import nn

from tal_fast.training.sam import SAM


def test_sam_on_a_quadratic() -> None:
    scales = torch.tensor([1.0, 10.0, 0.5])  # f(w) = Σ s w² / 2, whose gradient is s w
    w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    start, sam = w.detach().clone(), SAM([w], 0.3)
    (scales * w.square() / 2).sum().backward()
    sam.perturb()
    g = scales * start
    torch.testing.assert_close(w.detach(), start + 0.3 * g / g.norm())
    w.grad = None
    (scales * w.square() / 2).sum().backward()
    sam.restore()
    assert torch.equal(w.detach(), start)
    torch.testing.assert_close(w.grad, scales * (start + 0.3 * g / g.norm()))


def test_weights_stay_where_a_scaled_gradient_is_infinite() -> None:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([1.0, float("inf")]), torch.ones(3)
    sam = SAM(parameters, 0.1)
    sam.perturb()
    assert all(torch.equal(p.detach(), torch.ones_like(p)) for p in parameters)
