"""Image classifiers of transformers return logits and features."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from tal_fast import TALLoss
from tal_fast.models import FeatureLinear, expose_features

SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8, "num_labels": 7}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_labels": 7}


def network(name: str) -> Any:
    options = {
        "ViT": {**SMALL, "hidden_size": 32, "image_size": 96},  # not the 64 px that are tried first
        "ConvNext": STAGES,
        "ResNet": {**STAGES, "embedding_size": 8, "num_channels": 1},
        "DeiT": {**SMALL, "hidden_size": 32, "image_size": 96},
    }[name]
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}ForImageClassification")(config)


@pytest.mark.parametrize("name", ["ViT", "ConvNext", "ResNet", "DeiT"])
def test_outputs_hold_logits_and_features(name: str) -> None:
    plain = network(name).eval()
    images = torch.randn(3, plain.config.num_channels, 96, 96)
    want = plain(images).logits
    keys = list(plain.state_dict())
    model = expose_features(copy.deepcopy(plain))
    logits, features = model(pixel_values=images).logits
    assert torch.equal(logits, want)
    last = next(module for module in model.modules() if isinstance(module, FeatureLinear))
    assert torch.equal(torch.nn.functional.linear(features, last.weight, last.bias), want)
    assert list(model.state_dict()) == keys
    TALLoss()(*model.train()(images).logits, torch.randint(7, (3,))).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_saved_models_are_plain_models_again(tmp_path: Any) -> None:
    model = expose_features(network("ViT")).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 96, 96)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(images).logits, model(images).logits[0])


def test_a_distilled_model_is_refused_with_the_reason() -> None:
    config = transformers.DeiTConfig(**SMALL, hidden_size=32, image_size=32)
    with pytest.raises(ValueError, match=r"two layers \(cls_classifier and distillation_classifier\)"):
        expose_features(transformers.DeiTForImageClassificationWithTeacher(config))
