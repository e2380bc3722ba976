"""Pre-activation ResNets for small images, such as Wide ResNets (Zagoruyko & Komodakis 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tal_fast.models.initialize import he_initialize
from tal_fast.models.resnet import residual_stages

STEM = 16
"""Channels of the first convolution."""


class PreActivationBlock(nn.Module):
    """Pre-activation block: BatchNorm, ReLU and 3x3 convolution, twice, and a shortcut (He et al. 2016b, figure 1b).

    If the shape changes, the shortcut is a 1x1 convolution of the first activation, otherwise the block's input.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.changes_shape = stride != 1 or in_channels != channels
        self.shortcut: nn.Module = nn.Identity()
        if self.changes_shape:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + self.shortcut(active if self.changes_shape else x)


class WideResNet(nn.Module):
    """Wide ResNet without dropout; WRN-d-k has ``blocks=[(d - 4) / 6] * 3`` and ``width=16 * k``.

    ``blocks`` has the number of blocks of each stage. The channels, ``width`` in the first stage, double and the image
    halves from stage to stage.
    """

    def __init__(self, blocks: Sequence[int], width: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, STEM, 3, 1, 1, bias=False)
        channels = width * 2 ** (len(blocks) - 1)
        self.stages = residual_stages(PreActivationBlock, blocks, STEM, width)
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        he_initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_channels, H, W); H, W >= 1."""
        x = F.relu(self.bn1(self.stages(self.conv1(images))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
