"""Cosine classifier."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tal_fast.config.schema import ModelConfig
from tal_fast.models import build_model
from tal_fast.models.features import COSINE_SCALE, last_layer
from tal_fast.models.pretrained import read_weights, start_from


def test_logits_are_scaled_cosines() -> None:
    model = build_model(ModelConfig("cifar_resnet8", head="cosine"), 5, image_size=16).eval()
    logits, features = model(torch.randn(7, 3, 16, 16))
    weight = model.fc.weight  # type: ignore[union-attr]
    expected = torch.cosine_similarity(features[:, None], weight[None], dim=2)  # type: ignore[index]
    torch.testing.assert_close(logits, COSINE_SCALE * expected)
    own, bias = last_layer(model)
    assert bias is None
    units = features / features.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(units.detach().double().numpy() @ own.T, logits.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("theirs", "ours"), [("linear", "cosine"), ("cosine", "linear"), ("mlp", "cosine")])
def test_another_kind_of_head_is_new(tmp_path: Path, caplog: pytest.LogCaptureFixture, theirs: str, ours: str) -> None:
    source = build_model(ModelConfig("cifar_resnet8", head=theirs), 5, image_size=16)  # type: ignore[arg-type]
    torch.save(source.state_dict(), tmp_path / "w.pt")
    model = build_model(ModelConfig("cifar_resnet8", head=ours), 5, image_size=16)  # type: ignore[arg-type]
    head = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("fc.")}
    with caplog.at_level("INFO"):
        start_from(model, read_weights(str(tmp_path / "w.pt"), "cifar_resnet8"), ["a", "b", "c", "d", "e"])
    assert "the head, for 5 classes, is new" in caplog.text
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in head.items())
    assert torch.equal(state["conv1.weight"], source.state_dict()["conv1.weight"])
