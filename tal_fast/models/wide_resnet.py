"""Pre-activation ResNets for small images: Wide ResNets (Zagoruyko & Komodakis 2016) and thin ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tal_fast.models.initialize import he_initialize

STEM = 16
"""Channels of the first convolution, whatever the width."""


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU and 3x3 convolution, twice, and a shortcut (He et al. 2016b, figure 1b).

    Where the shape changes, the shortcut is a 1x1 convolution of what the first convolution sees too; elsewhere it is
    the block's input, as it is.
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
        """(B, in_channels, H, W) to (B, channels, ceil(H / stride), ceil(W / stride))."""
        active = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + self.shortcut(active if self.changes_shape else x)


class WideResNet(nn.Module):
    """WRN-d-k has ``blocks=[(d - 4) / 6] * 3`` and ``width=16 * k``; its papers' dropout is left out.

    Args:
        blocks: number of blocks of each stage; the channels double and the image halves from stage to stage.
        width: channels of the first stage.
        num_classes: number of logits.
        in_channels: of the images.
    """

    def __init__(self, blocks: Sequence[int], width: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, STEM, 3, 1, 1, bias=False)
        stages = []
        channels = STEM
        for stage, count in enumerate(blocks):
            parts = []
            for i in range(count):
                parts.append(PreActivationBlock(channels, width * 2**stage, 2 if i == 0 and stage > 0 else 1))
                channels = width * 2**stage
            stages.append(nn.Sequential(*parts))
        self.stages = nn.Sequential(*stages)
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        he_initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, num_classes) logits; H, W >= 1."""
        x = F.relu(self.bn1(self.stages(self.conv1(images))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
