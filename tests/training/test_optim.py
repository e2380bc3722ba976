"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tal_fast.config.schema import ModelConfig, OptimConfig
from tal_fast.models import build_model
from tal_fast.training.optim import build_optimizer, learning_rate, set_learning_rate


def test_learning_rate_schedules() -> None:
    cosine = OptimConfig(lr=0.4, warmup_epochs=2)
    got = [learning_rate(cosine, 10, e) for e in (0.5, 1.0, 2.0, 4.0, 6.0, 10.0)]
    want = [0.1, 0.2, 0.4, 0.2 * (1 + math.sqrt(0.5)), 0.2, 0.0]
    assert got == pytest.approx(want, abs=1e-12)
    steps = OptimConfig(lr=1.0, schedule="multistep", step_epochs=[3, 6], step_factor=0.1)
    assert [learning_rate(steps, 10, e) for e in (0.1, 2.99, 3.0, 5.9, 6.1)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    step = OptimConfig(lr=1.0, schedule="step", step_size=30, step_factor=0.1)
    assert [learning_rate(step, 90, e) for e in (0.0, 29.99, 30.0, 60.5)] == pytest.approx([1, 1, 0.1, 0.01])
    assert learning_rate(OptimConfig(lr=0.3, schedule="constant"), 10, 9.9) == 0.3


def test_normalisation_layers_biases_and_exempted_parameters_do_not_decay() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)
            self.norm = torch.nn.LayerNorm([4, 2, 2])  # its weight has three dimensions
            self.token = torch.nn.Parameter(torch.zeros(1, 1, 4))
            self.scale = torch.nn.Parameter(torch.zeros(4))

        def no_weight_decay(self) -> set[str]:
            return {"token"}

    model = Net()
    groups = build_optimizer(OptimConfig(weight_decay=0.5, decay_all=False), model).param_groups
    assert {id(p) for p in groups[0]["params"]} == {id(model.conv.weight), id(model.scale)}
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(2, 0.5), (4, 0.0)]
    (group,) = build_optimizer(OptimConfig(weight_decay=0.5, decay_all=True), model).param_groups
    assert (len(group["params"]), group["weight_decay"]) == (6, 0.5)


def test_learning_rates_decay_from_the_head_to_the_stem() -> None:
    network = build_model(ModelConfig("cifar_resnet8", 4), 5, 3, 16)
    optimizer = build_optimizer(OptimConfig(lr=0.4, layer_decay=0.5, weight_decay=0.1), network)
    set_learning_rate(optimizer, 0.2)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        group = found.pop(id(parameter))
        distance = {"fc": 0, "stages.2": 1, "stages.1": 2, "stages.0": 3}
        blocks = next((n for block, n in distance.items() if name.startswith(block)), 4)
        assert float(group["lr"]) == pytest.approx(0.2 * 0.5**blocks), name
        assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0), name
    assert not found


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_fused_optimizer_equals_the_plain_one(name: Any) -> None:
    networks = [torch.nn.Linear(5, 4) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    fused = build_optimizer(OptimConfig(name, weight_decay=0.01, decay_all=True), networks[0])
    plain = (
        torch.optim.SGD(networks[1].parameters(), 0.1, 0.9, weight_decay=0.01, nesterov=True)
        if name == "sgd"
        else torch.optim.AdamW(networks[1].parameters(), 0.1, weight_decay=0.01)
    )
    for step in range(6):
        x = torch.randn(7, 5)
        set_learning_rate(fused, 0.1 / (step + 1))
        plain.param_groups[0]["lr"] = 0.1 / (step + 1)
        for network, optimizer in zip(networks, (fused, plain), strict=True):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(networks[0].weight, networks[1].weight)
