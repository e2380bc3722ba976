"""Weight averages against their formulas."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tal_fast.training.trainer import Trainer
from tal_fast.training.weight_averaging import MovingAverage, StochasticAverage
from tests.helpers.training import config


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
    assert average.epochs == math.inf  # in use from the start


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
        if epoch == 4:
            saved, averaged = copy.deepcopy(average.network.state_dict()), average.epochs
            average = StochasticAverage(network, first_epoch=2)
            average.network.load_state_dict(saved)
            average.resume(epoch - 1, averaged)
        average.update_after_epoch(network, epoch, iter(images))
        assert average.epochs == max(0, epoch - 2)
    for got, *parts in zip(average.network.parameters(), *weights, strict=True):
        torch.testing.assert_close(got, torch.stack(parts).mean(0))
    hidden = torch.cat(images) @ average.network[0].weight.T + average.network[0].bias  # type: ignore[index]
    norm = average.network[1]  # type: ignore[index]
    torch.testing.assert_close(norm.running_mean, hidden.mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([h.var(0) for h in hidden.split(16)]).mean(0))
    assert norm.momentum == 0.1
    assert not average.network.training


@pytest.mark.parametrize(
    ("finished", "averaged", "first_epoch", "counts"),
    [
        (5, 0, 3, 0),  # averaging would have begun two epochs ago, but did not
        (10, 4, 8, 4),  # begun earlier than it would now
        (10, 4, 12, 0),  # begins anew
        (10, 4, 6, 4),
        (10, None, 6, 4),  # checkpoint without the number
    ],
)
def test_a_resumed_average_counts_the_networks_in_it(
    finished: int, averaged: int | None, first_epoch: int, counts: int
) -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 2.0)
    average = StochasticAverage(network, first_epoch)
    average.resume(finished, averaged)
    assert average.epochs == counts
    nn.init.constant_(network.weight, 7.0)
    average.update_after_epoch(network, max(finished, first_epoch) + 1, iter([]))
    assert float(average.network.weight) == pytest.approx((2.0 * counts + 7.0) / (counts + 1))  # type: ignore[arg-type]


def test_no_initial_weights_are_averaged_when_a_run_is_resumed_with_fewer_epochs(tmp_path: Path) -> None:
    options = {"swa_from": 0.6}
    stopped = Trainer(config(tmp_path, "fmfp", epochs=10, method_options=options))
    stopped.fit(until=3)
    shorter = Trainer(config(tmp_path, "fmfp", epochs=4, method_options=options, allow=["epochs"], resume="auto"))
    assert shorter.state.averaged is None  # averages from epoch 2 of 4 on, of which none has been averaged
    shorter.fit()
    assert shorter.state.average is not None
    assert shorter.state.average.epochs == 1
    pairs = zip(shorter.network.parameters(), shorter.state.average.network.parameters(), strict=True)
    assert all(torch.equal(weights, averaged) for weights, averaged in pairs)
