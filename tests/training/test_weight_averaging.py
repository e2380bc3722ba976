"""Stochastic weight averaging against the mean of the weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tal_fast.training.weight_averaging import StochasticAverage


def test_swa_is_the_mean_of_the_weights_with_its_own_batch_statistics() -> None:
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
        if epoch == 4:  # as when resumed: the weights alone are kept
            kept = copy.deepcopy(average.network.state_dict())
            average = StochasticAverage(network, first_epoch=2)
            average.network.load_state_dict(kept)
        average.update(network, epoch, iter(images))
        assert average.epochs_averaged(epoch) == max(0, epoch - 2)
    for p, *parts in zip(average.network.parameters(), *weights, strict=True):
        torch.testing.assert_close(p, torch.stack(parts).mean(0))
    hidden = torch.cat(images) @ average.network[0].weight.T + average.network[0].bias  # type: ignore[index]
    norm = average.network[1]  # type: ignore[index]
    torch.testing.assert_close(norm.running_mean, hidden.mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([h.var(0) for h in hidden.split(16)]).mean(0))
    assert norm.momentum == 0.1
    assert not average.network.training
