"""The project's own networks by name, for images of any small size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from tal_fast.models.convmixer import ConvMixer
from tal_fast.models.densenet import DenseNet
from tal_fast.models.resnet import CifarResNet
from tal_fast.models.vgg import VGG16
from tal_fast.models.wide_resnet import WideResNet

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "cifar_resnet8": partial(CifarResNet, blocks=(1, 1, 1), width=16),
    "cifar_resnet20": partial(CifarResNet, blocks=(3, 3, 3), width=16),
    "cifar_resnet110": partial(CifarResNet, blocks=(18, 18, 18), width=16, projection=False),
    "cifar_resnet18": partial(CifarResNet, blocks=(2, 2, 2, 2), width=64),
    # ResNet-110 in the public code of CRL, FMFP, OpenMix and TAL.
    "cifar_preact_resnet110": partial(WideResNet, blocks=(18, 18, 18), width=16),
    "cifar_wrn28_10": partial(WideResNet, blocks=(4, 4, 4), width=160),
    "cifar_densenet_bc_100_12": partial(DenseNet, layers=16, width=12),
    "cifar_vgg16_bn": partial(VGG16, width=64),
    # The authors' network for CIFAR-10, and that of FMFP and TAL.
    "cifar_convmixer": partial(ConvMixer, width=256, depth=8, kernel=5, patch=2),
    "cifar_convmixer_256_16": partial(ConvMixer, width=256, depth=16, kernel=8, patch=1),
}
"""Name -> constructor, which takes ``num_classes``, ``in_channels`` and optionally another ``width``."""
