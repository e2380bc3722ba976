"""The project's networks: parameters, other implementations, and training steps."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from tal_fast.config.schema import ModelConfig
from tal_fast.models import build_model
from tal_fast.models.registry import NETWORKS
from tal_fast.models.resnet import BasicBlock
from tal_fast.models.wide_resnet import WideResNet


def images(size: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size)


def conv(inputs: int, outputs: int, kernel: int = 3) -> int:
    """Parameters of a convolution without biases and of a BatchNorm on its output."""
    return inputs * outputs * kernel**2 + 2 * outputs


def residual_stages(blocks: int, stages: int, width: int, stem: int) -> int:
    """Parameters of the 3x3 convolutions of basic blocks, each with a BatchNorm on its output."""
    firsts = conv(stem, width) + sum(conv(width * 2 ** (s - 1), width * 2**s) for s in range(1, stages))
    return firsts + sum((2 * blocks - 1) * conv(width * 2**s, width * 2**s) for s in range(stages))


def resnet_parameters(blocks: int, stages: int, width: int, classes: int, projection: bool) -> int:
    total = conv(3, width) + residual_stages(blocks, stages, width, width)
    if projection:
        total += sum(conv(width * 2 ** (s - 1), width * 2**s, 1) for s in range(1, stages))
    return total + (width * 2 ** (stages - 1) + 1) * classes


def wide_resnet_parameters(blocks: int, width: int, classes: int) -> int:
    # BatchNorms come before their convolutions: each but the last is on what the convolution before it made, or on its
    # sum with the shortcut, which is as wide. So there is one for each convolution, the stem's included.
    total = conv(3, 16) + residual_stages(blocks, 3, width, 16) + (4 * width + 1) * classes
    return total + (16 * width if width != 16 else 0) + width * 2 * width + 2 * width * 4 * width


def densenet_parameters(layers: int, growth: int, classes: int) -> int:
    channels, total = 2 * growth, 27 * 2 * growth
    for block in range(3):
        # Layer i: BatchNorm and 1x1 on channels + i * growth, BatchNorm and 3x3 on 4 * growth.
        inputs = layers * channels + growth * layers * (layers - 1) // 2
        total += inputs * (2 + 4 * growth) + layers * (2 * 4 * growth + 9 * 4 * growth * growth)
        channels += layers * growth
        if block < 2:
            total += 2 * channels + channels * (channels // 2)
            channels //= 2
    return total + 2 * channels + (channels + 1) * classes


def vgg16_parameters(classes: int) -> int:
    widths = [64, 64, 128, 128, *[256] * 3, *[512] * 6]
    # Weights, bias, BatchNorm's scale and shift.
    return sum(9 * i * o + 3 * o for i, o in zip([3, *widths], widths, strict=False)) + 513 * classes


def convmixer_parameters(width: int, depth: int, kernel: int, patch: int, classes: int) -> int:
    # The paper's section 2: weights, biases and BatchNorm of the patches' and the blocks' two convolutions.
    block = width * kernel**2 + width**2 + 6 * width
    return width * 3 * patch**2 + 3 * width + depth * block + (width + 1) * classes


# (name, classes, formula, parameters, millions as published). Published in: He et al. 2016, table 6; Zagoruyko &
# Komodakis 2016, tables 1 and 4; Huang et al. 2017, table 2; for ResNet-18, VGG-16 and ConvMixer no paper has these.
PARAMETERS = [
    ("cifar_resnet8", 10, resnet_parameters(1, 3, 16, 10, True), 78_042, None),
    ("cifar_resnet20", 10, resnet_parameters(3, 3, 16, 10, True), 272_474, "0.27"),
    ("cifar_resnet110", 10, resnet_parameters(18, 3, 16, 10, False), 1_727_962, "1.7"),
    ("cifar_resnet110", 100, resnet_parameters(18, 3, 16, 100, False), 1_733_812, None),
    ("cifar_resnet18", 10, resnet_parameters(2, 4, 64, 10, True), 11_173_962, None),
    ("cifar_preact_resnet110", 10, wide_resnet_parameters(18, 16, 10), 1_730_522, "1.7"),
    ("cifar_wrn28_10", 10, wide_resnet_parameters(4, 160, 10), 36_479_194, "36.5"),
    ("cifar_wrn28_10", 100, wide_resnet_parameters(4, 160, 100), 36_536_884, "36.5"),
    ("cifar_densenet_bc_100_12", 10, densenet_parameters(16, 12, 10), 769_162, "0.8"),
    ("cifar_densenet_bc_100_12", 100, densenet_parameters(16, 12, 100), 800_032, "0.8"),
    ("cifar_vgg16_bn", 10, vgg16_parameters(10), 14_728_266, None),
    ("cifar_convmixer", 10, convmixer_parameters(256, 8, 5, 2, 10), 594_186, None),
    ("cifar_convmixer_256_16", 10, convmixer_parameters(256, 16, 8, 1, 10), 1_339_402, None),
]


@pytest.mark.parametrize(("name", "classes", "formula", "parameters", "published"), PARAMETERS)
def test_parameters(name: str, classes: int, formula: int, parameters: int, published: str | None) -> None:
    with torch.device("meta"):
        model = NETWORKS[name](num_classes=classes, in_channels=3)
    assert sum(p.numel() for p in model.parameters()) == formula == parameters
    if published is not None:
        assert f"{parameters / 1e6:.{len(published.partition('.')[2])}f}" == published


def test_parameters_of_all_networks_are_tested_and_documented() -> None:
    assert {name for name, *_ in PARAMETERS} == set(NETWORKS)
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    for name, classes, _, parameters, _ in PARAMETERS:
        assert f"`{name}`" in page
        assert classes != 10 or f"{parameters:,}" in page
        assert f"``{name}``" in ModelConfig.__doc__  # type: ignore[operator]


def test_parameters_of_deit() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    d, patches = 384, 196
    layer = 4 * d + (d + 1) * 3 * d + (d + 1) * d + (d + 1) * 4 * d + (4 * d + 1) * d
    formula = (16**2 * 3 + 1) * d + d + (patches + 1) * d + 12 * layer + 2 * d + (d + 1) * 1000
    assert sum(p.numel() for p in model.parameters()) == formula == 22_050_664  # 22M: Touvron et al. 2021, table 1


def small(name: str) -> int:
    """Width of a small version of a network."""
    return 16 if name == "cifar_wrn28_10" else 4


def give_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers by their order, with random changes to the initial values."""

    def order(name: str) -> int:  # torchvision's DenseNet has its transitions between the dense blocks, ours after them
        return 2 if "norm5" in name or "classifier" in name else int(".transition" in name)

    theirs, ours = source.state_dict(), target.state_dict()
    with torch.no_grad():
        for name, value in zip(sorted(theirs, key=order), ours.values(), strict=True):
            if value.is_floating_point():
                theirs[name].add_(torch.empty(value.shape).uniform_(-0.05, 0.05))
            value.copy_(theirs[name])


def torchvision_resnet() -> nn.Module:
    plain = torchvision.models.resnet18(num_classes=10)
    plain.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    plain.maxpool = nn.Identity()
    return plain


def torchvision_densenet() -> nn.Module:
    plain = torchvision.models.DenseNet(12, (16, 16, 16), num_init_features=24, num_classes=10)
    plain.features.conv0 = nn.Conv2d(3, 24, 3, 1, 1, bias=False)
    # The stem's BatchNorm is for ImageNet's pooling; the first layer has its own.
    plain.features.norm0 = plain.features.relu0 = plain.features.pool0 = nn.Identity()
    return plain


def torchvision_vgg() -> nn.Module:
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], batch_norm=True)
    return nn.Sequential(features, nn.Flatten(), nn.Linear(512, 10))


def timm_convmixer(depth: int, kernel: int, patch: int) -> nn.Module:
    mixer = pytest.importorskip("timm.models.convmixer")
    return mixer.ConvMixer(256, depth, kernel_size=kernel, patch_size=patch, num_classes=10)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("cifar_resnet18", torchvision_resnet),
        ("cifar_densenet_bc_100_12", torchvision_densenet),
        ("cifar_vgg16_bn", torchvision_vgg),
        ("cifar_convmixer", lambda: timm_convmixer(8, 5, 2)),
        ("cifar_convmixer_256_16", lambda: timm_convmixer(16, 8, 1)),
    ],
)
def test_networks_equal_other_implementations(name: str, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    other, model = make(), build_model(ModelConfig(name), 10, image_size=32).train()
    give_parameters(other, model)
    x = images(32)
    # In training mode: with initial BatchNorm statistics the outputs for all images are nearly equal.
    with torch.no_grad():
        logits, want = model(x)[0], other(x)
        assert (want[0] - want[1]).abs().max() > 0.1
        torch.testing.assert_close(logits, want, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(model.eval()(x)[0], other.eval()(x), rtol=1e-3, atol=1e-3)


def test_pre_activation() -> None:
    # He et al. 2016b, equations 1 and 2 with pre-activation, written out with the weights of the smallest network.
    torch.manual_seed(0)
    model = WideResNet((1, 2), 8, 10).eval()
    give_parameters(model, model)
    state = model.state_dict()

    def active(x: torch.Tensor, name: str) -> torch.Tensor:
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *parts))

    def residual(x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        y = F.conv2d(active(x, f"{name}.bn1"), state[f"{name}.conv1.weight"], stride=stride, padding=1)
        return F.conv2d(active(y, f"{name}.bn2"), state[f"{name}.conv2.weight"], padding=1)

    x = images(8)
    h = F.conv2d(x, state["conv1.weight"], padding=1)
    for name, stride in (("stages.0.0", 1), ("stages.1.0", 2)):
        straight = F.conv2d(active(h, f"{name}.bn1"), state[f"{name}.shortcut.0.weight"], stride=stride)
        h = straight + residual(h, name, stride)
    h = h + residual(h, "stages.1.1", 1)
    features = active(h, "bn1").mean((2, 3))
    torch.testing.assert_close(model(x), F.linear(features, state["fc.weight"], state["fc.bias"]))


@pytest.mark.parametrize("side", [1, 4, 7])
def test_shortcuts_without_parameters(side: int) -> None:
    block = BasicBlock(4, 8, 2, projection=False).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, side, side)
    want = torch.zeros(2, 8, (side + 1) // 2, (side + 1) // 2)
    for i in range(want.shape[2]):
        for j in range(want.shape[3]):
            want[:, 2:6, i, j] = x[:, :, 2 * i, 2 * j]
    assert torch.equal(block(x), want)
    assert not list(block.shortcut.parameters())


def check_outputs(model: nn.Module, x: torch.Tensor, classes: int) -> None:
    """Check the shapes, and that the features are the input of the last Linear layer."""
    model.eval()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    taken: list[torch.Tensor] = []
    hook = last.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    with torch.no_grad():
        logits, features = model(x)
        hook.remove()
        again = model(x)
    assert logits.shape == (len(x), classes)
    assert features.shape == (len(x), last.in_features)
    assert torch.equal(features, taken[0])
    torch.testing.assert_close(logits, features @ last.weight.T + last.bias)
    assert torch.equal(again[0], logits)
    assert torch.equal(again[1], features)


@pytest.mark.parametrize(
    "name", [*NETWORKS, "resnet18", "mobilenet_v3_small", "timm/deit_tiny_patch16_224", "timm/mobilenetv3_small_050"]
)
def test_a_step_of_every_network(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model = build_model(ModelConfig(name), 10, image_size=32)
    x = images(32)
    check_outputs(model, x, 10)
    weights = {path: p for path, p in model.named_parameters() if p.ndim > 1}
    before = {path: p.detach().clone() for path, p in weights.items()}
    logits, _ = model.train()(x)
    assert (logits[0] - logits[1]).abs().max() > 0.01
    F.cross_entropy(logits, torch.tensor([1, 7])).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert all(p.grad is not None and p.isfinite().all() for p in model.parameters())
    assert not [path for path, p in weights.items() if torch.equal(p, before[path])]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_small_grayscale_images(name: str) -> None:
    config = ModelConfig(name, width=small(name))
    torch.manual_seed(0)
    model = build_model(config, 7, in_channels=1, image_size=28)
    for size in (28, 19, 8, 2):
        check_outputs(model, images(size, channels=1), 7)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    other = build_model(config, 7, in_channels=1, image_size=28).eval()
    x = images(28, channels=1)
    with torch.no_grad():
        assert not torch.equal(other(x)[0], model(x)[0])
        other.load_state_dict(torch.load(saved, weights_only=True))
        assert torch.equal(other(x)[0], model(x)[0])
