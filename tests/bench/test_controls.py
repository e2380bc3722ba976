"""Controls for TAL: TAL with other statistics."""

from __future__ import annotations

import pytest
import torch

from bench import controls
from tal_fast import TALLoss
from tal_fast.config.schema import MethodConfig
from tal_fast.methods import Task, build_method
from tal_fast.methods.tal import TAL

OPTIONS = {"t_min": 2, "t_max": 20, "t_wrong": 10, "queue_size": 64, "warmup_epochs": 0, "backend": "reference"}


@pytest.mark.parametrize("name", ["RandomTypicalness", "LogitStatistics", "UnitFeatures"])
def test_a_control_is_tal_with_other_features(name: str) -> None:
    method = build_method(MethodConfig(f"bench/controls.py:{name}", options=OPTIONS), Task(10, 5, 100, 0.1))
    assert method.score == "cosine"
    definition = TALLoss(**{key: value for key, value in OPTIONS.items() if key != "warmup_epochs"})
    for step in range(3):
        logits, features = 4 * torch.randn(33, 5), torch.rand(33, 7)
        labels = torch.randint(5, (33,))
        logits[::2, 0] += 9 * (labels[::2] == 0)
        torch.manual_seed(step)
        found = method(logits.requires_grad_(), features, labels, torch.arange(33)).loss
        torch.manual_seed(step)
        others = {
            "RandomTypicalness": torch.randn_like(features),
            "LogitStatistics": logits.detach(),
            "UnitFeatures": features / features.norm(dim=1, keepdim=True),
        }
        torch.testing.assert_close(found, definition(logits, others[name], labels))
        assert torch.isfinite(torch.autograd.grad(found, logits)[0]).all()
    assert len(definition.queue) > 0
    assert issubclass(getattr(controls, name), TAL)
