"""Weight averages against their formulas."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tal_fast.training.weight_averaging import MovingAverage, StochasticAverage


def test_the_moving_average_follows_its_formula() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average = MovingAverage(network, 0.9)
    want = [p.detach().clone() for p in network.parameters()]
    for _ in range(5):
        network(torch.randn(8, 3))
        with torch.no_grad():
            for w, p in zip(want, network.parameters(), strict=True):
                p.add_(torch.randn_like(p))
                w.mul_(0.9).add_(p, alpha=0.1)
        average.update_after_step(network)
    for w, got in zip(want, average.network.parameters(), strict=True):
        torch.testing.assert_close(got, w)
    assert torch.equal(average.network[1].running_mean, network[1].running_mean)  # type: ignore[arg-type,index]
    assert average.in_use(0)


def test_swa_is_the_mean_of_the_weights_with_its_own_statistics() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    average = StochasticAverage(network, first_epoch=2)
    images = [torch.randn(16, 3) + 2 for _ in range(3)]
    weights = []
    for epoch in range(1, 6):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p))
        if epoch > 2:
            weights.append([p.detach().clone() for p in network.parameters()])
        if epoch == 4:  # as when resumed, where only the weights are saved
            saved = copy.deepcopy(average.network.state_dict())
            average = StochasticAverage(network, first_epoch=2)
            average.network.load_state_dict(saved)
        average.update_after_epoch(network, epoch, iter(images))
        assert average.in_use(epoch) == (epoch > 2)
    for got, *parts in zip(average.network.parameters(), *weights, strict=True):
        torch.testing.assert_close(got, torch.stack(parts).mean(0))
    hidden = torch.cat(images) @ average.network[0].weight.T + average.network[0].bias  # type: ignore[index]
    norm = average.network[1]  # type: ignore[index]
    torch.testing.assert_close(norm.running_mean, hidden.mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([h.var(0) for h in hidden.split(16)]).mean(0))
    assert norm.momentum == 0.1
    assert not average.network.training
