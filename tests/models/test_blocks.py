"""Blocks of networks, and freezing them."""

from __future__ import annotations

from collections import defaultdict

import pytest

from tal_fast.config.schema import ModelConfig
from tal_fast.models import build_model
from tal_fast.models.blocks import block_numbers, freeze, is_frozen


def blocks(name: str, width: int | None = None) -> list[set[str]]:
    """Parameters of each block, by the first parts of their names."""
    found = defaultdict(set)
    network = build_model(ModelConfig(name, width), 5, 3, 32)
    for parameter, number in block_numbers(network).items():
        found[number].add(parameter)
    assert list(found) == sorted(found) == list(range(len(found))) or name.startswith("cifar_densenet")
    assert found[len(found) - 1] >= {n for n, p in network.named_parameters() if len(p) == 5 and p.ndim < 3}
    return [{".".join(p.split(".")[: 2 if p.startswith(("stages", "features", "layers")) else 1]) for p in found[k]}
            for k in sorted(found)]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "width", "wanted"),
    [
        ("resnet18", None, [{"conv1", "bn1"}, {"layer1"}, {"layer2"}, {"layer3"}, {"layer4"}, {"fc"}]),
        ("cifar_resnet8", 4, [{"conv1", "bn1"}, {"stages.0"}, {"stages.1"}, {"stages.2"}, {"fc"}]),
        ("cifar_densenet_bc_100_12", 2, [
            {"conv1"}, {"stages.0", "transitions"}, {"stages.1", "transitions"}, {"stages.2", "bn1"}, {"fc"},
        ]),
        ("shufflenet_v2_x0_5", None, [{"conv1"}, {"stage2"}, {"stage3"}, {"stage4"}, {"conv5"}, {"fc"}]),
    ],
)  # fmt: skip
def test_blocks_of_a_networks_top_level(name: str, width: int | None, wanted: list[set[str]]) -> None:
    assert blocks(name, width) == wanted


def test_blocks_inside_of_the_one_module_with_layers() -> None:
    found = blocks("mobilenet_v3_small")
    assert found[:-1] == [{f"features.{number}"} for number in range(13)]
    encoder = block_numbers(build_model(ModelConfig("vit_b_32"), 5, 3, 32))
    assert [encoder[name] for name in ("class_token", "conv_proj.bias", "encoder.pos_embedding")] == [0, 0, 0]
    assert encoder["encoder.layers.encoder_layer_11.ln_1.bias"] == encoder["encoder.ln.bias"] == 12
    assert encoder["heads.head.bias"] == 13


def test_timm_says_what_its_blocks_and_stages_are() -> None:
    pytest.importorskip("timm")
    network = build_model(ModelConfig("timm/resnet10t"), 5, 3, 32)
    fine, coarse = block_numbers(network), block_numbers(network, stages=True)
    assert max(fine.values()) == max(coarse.values()) == 5  # one block a stage
    deeper = build_model(ModelConfig("timm/test_vit"), 5, 3, 32)
    assert block_numbers(deeper)["head.weight"] == 1 + len(deeper.blocks)


@pytest.mark.parametrize("amount", ["none", "backbone", 1, 3])
def test_freezing_leaves_the_rest(amount: int | str) -> None:
    network = build_model(ModelConfig("cifar_resnet8", 4), 5, 3, 32)
    freeze(network, amount)
    trains = {name.split(".")[0] + name.split(".")[1] for name, p in network.named_parameters() if p.requires_grad}
    frozen = {"none": 0, "backbone": 9, 1: 1, 3: 3}[amount]
    assert {f"stages{stage}" for stage in range(frozen, 3)} == {name for name in trains if name.startswith("stages")}
    assert ("conv1weight" in trains) == (amount == "none")
    assert {"fcweight", "fcbias"} <= trains
    assert is_frozen(network.stages[0]) == (amount != "none")


def test_more_stages_than_there_are_is_refused() -> None:
    network = build_model(ModelConfig("cifar_resnet8", 4), 5, 3, 32)
    with pytest.raises(ValueError, match=r"model\.freeze is 4 but the network has 3 stages before its head"):
        freeze(network, 4)
