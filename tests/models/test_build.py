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


@pytest.mark.parametrize(("name", "size"), [("efficientnet_b0", 32), ("timm/test_convnext", 32)])
def test_drop_path_sets_the_largest_rate(name: str, size: int) -> None:
    if "/" in name:
        pytest.importorskip("timm")
    network = build_model(ModelConfig(name, drop_path=0.3), 3, image_size=size)
    layers = [m for m in network.modules() if type(m).__name__ in ("StochasticDepth", "DropPath")]
    rates = [getattr(m, "p", None) or getattr(m, "drop_prob", 0.0) for m in layers]
    assert max(rates) == pytest.approx(0.3)
    assert rates == sorted(rates)
    assert build_model(ModelConfig(name), 3, image_size=size).state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet8", "timm/vgg11"])
def test_drop_path_is_refused_where_there_is_none(name: str) -> None:
    if "/" in name:
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=rf"model\.drop_path is 0\.1 but {name} has no stochastic depth"):
        build_model(ModelConfig(name, drop_path=0.1), 3)
