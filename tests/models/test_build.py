"""Networks by name."""

from __future__ import annotations

import pytest
import torch

from tal_fast.config.schema import ModelConfig
from tal_fast.models import build_model


def images(size: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size)


def test_width_channels_and_size() -> None:
    model = build_model(ModelConfig("cifar_resnet8", width=4), 3, in_channels=1, image_size=8)
    assert [o.shape for o in model(images(8, channels=1))] == [(2, 3), (2, 16)]
    model = build_model(ModelConfig("resnet18"), 3, in_channels=1)
    assert model.conv1.weight.shape == (64, 1, 7, 7)
    assert [o.shape for o in model(images(channels=1))] == [(2, 3), (2, 512)]


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "googlenet", "densenet121"])
def test_other_torchvision_classifiers_train(name: str) -> None:
    model = build_model(ModelConfig(name), 6).train()
    logits, features = model(images())
    assert logits.shape == (2, 6)
    logits.sum().backward()
    assert features.shape[0] == 2
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_unknown_names_and_widths_are_rejected() -> None:
    with pytest.raises(ValueError, match="no model 'resnet51'; did you mean resnet50"):
        build_model(ModelConfig("resnet51"), 5)
    with pytest.raises(ValueError, match="no model 'cifar_wrn_28_10'; did you mean cifar_wrn28_10"):
        build_model(ModelConfig("cifar_wrn_28_10"), 5)
    with pytest.raises(ValueError, match="no model 'xyzzy'; use torchvision's or cifar_resnet8"):
        build_model(ModelConfig("xyzzy"), 5)
    with pytest.raises(ValueError, match="resnet18 has a fixed width; leave it out"):
        build_model(ModelConfig("resnet18", width=3), 5)
