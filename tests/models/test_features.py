"""Models that return logits and features."""

from __future__ import annotations

import types
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from tal_fast.config.schema import ModelConfig
from tal_fast.models import FeatureLinear, build_model, expose_features


def images(size: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size)


def test_torchvision_resnet_is_unchanged_but_for_its_features() -> None:
    plain = torchvision.models.resnet18(num_classes=7).eval()
    x = images()
    want = plain(x)
    pooled: list[torch.Tensor] = []
    plain.avgpool.register_forward_hook(lambda module, args, out: pooled.append(out.flatten(1)))
    plain(x)
    keys = list(plain.state_dict())
    weight = plain.fc.weight
    model = expose_features(plain)
    logits, features = model(x)
    assert model is plain
    assert torch.equal(logits, want)
    assert torch.equal(features, pooled[0])
    assert list(model.state_dict()) == keys
    assert model.fc.weight is weight
    assert isinstance(model.fc, FeatureLinear)
    assert expose_features(model) is model  # once is enough


def test_weights_load_from_and_into_the_plain_network() -> None:
    plain = torchvision.models.resnet18(num_classes=5)
    model = build_model(ModelConfig("resnet18"), 5)
    model.load_state_dict(plain.state_dict())
    x = images()
    assert torch.equal(model.eval()(x)[0], plain.eval()(x))
    plain.load_state_dict(model.state_dict())


def test_testing_a_model_does_not_change_it() -> None:
    model = torchvision.models.resnet18(num_classes=5).train()
    model.layer1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expose_features(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (model.training, model.layer1.training, model.fc.training) == (True, False, True)


class Wrapped(nn.Module):
    def __init__(self, end: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 9), nn.ReLU())
        self.head = nn.Linear(9, 4)
        self.end = end

    def forward(self, x: torch.Tensor) -> Any:
        return self.end(self.head(self.body(x)))


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        (lambda out: {"logits": out}, "it returns dict"),
        (lambda out: types.SimpleNamespace(logits=out[0]), "it returns Tensor"),
        (lambda out: out[0], "it returns Tensor"),
        (lambda out: (2 * out[0], out[1]) if isinstance(out, tuple) else 2 * out, "its logits are not that layer's"),
        (lambda out: (out[0].softmax(1)[:, :2], out[1]), "it returns shapes"),
        (lambda out: out.softmax(1), "AttributeError"),
    ],
)
def test_models_that_change_the_logits_are_rejected(end: Any, sentence: str) -> None:
    model = Wrapped(end)
    with pytest.raises(ValueError, match=f"Wrapped does not return the output of its last nn.Linear .*{sentence}"):
        expose_features(model)
    assert type(model.head) is nn.Linear  # as it was


def test_an_object_with_logits_holds_both() -> None:
    model = expose_features(Wrapped(lambda out: types.SimpleNamespace(loss=None, logits=out)))
    logits, features = model(images()).logits
    assert torch.equal(logits, model.head(features)[0])
    assert features.shape == (2, 9)


@pytest.mark.parametrize(
    "network",
    [
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=5, depth=1),
        lambda: torchvision.models.VisionTransformer(96, 32, 1, 2, 32, 64, num_classes=5),
    ],
    ids=["timm", "torchvision"],
)
def test_networks_of_one_image_size_are_tried_with_it(network: Any) -> None:
    assert isinstance(list(expose_features(network()).modules())[-1], FeatureLinear)
    with pytest.raises(ValueError, match=r"tried on images \(2, 3, 40, 40\): .*; give images of the size it expects"):
        expose_features(network(), torch.randn(2, 3, 40, 40))


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s"])
def test_distilled_networks_are_refused_with_the_reason(name: str) -> None:
    model = timm.create_model(name, num_classes=5)
    with pytest.raises(ValueError, match=r"averages the logits of two layers \(head(\.linear)? and head_dist"):
        expose_features(model)
    assert not any(isinstance(module, FeatureLinear) for module in model.modules())


def test_models_without_a_last_linear_are_rejected() -> None:
    with pytest.raises(ValueError, match="SqueezeNet has no nn.Linear layer whose input could be the features"):
        build_model(ModelConfig("squeezenet1_1"), 5)
    with pytest.raises(ValueError, match="the model is a single nn.Linear; put it into an nn.Sequential"):
        expose_features(nn.Linear(3, 2))
    model = expose_features(Wrapped(lambda out: out))
    assert [o.shape for o in model(images())] == [(2, 4), (2, 9)]
