"""ResNets for small images: a 3x3 stem and no pooling before the first stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A stage for each entry of ``blocks``; the channels double and the image halves from stage to stage.

    Args:
        blocks: number of blocks of each stage.
        width: channels of the first stage.
        num_classes: number of logits.
        in_channels: of the images.
    """

    def __init__(self, blocks: Sequence[int], width: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages = []
        channels = width
        for stage, count in enumerate(blocks):
            out = width * 2**stage
            stages.append(
                nn.Sequential(
                    *(
                        BasicBlock(channels if i == 0 else out, out, 2 if i == 0 and stage > 0 else 1)
                        for i in range(count)
                    )
                )
            )
            channels = out
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, num_classes) logits; H, W >= 1."""
        x = F.relu(self.bn1(self.conv1(images)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.stages(x), 1), 1))


# name -> (blocks of each stage, channels of the first)
CIFAR_RESNETS = {
    "cifar_resnet8": ((1, 1, 1), 16),
    "cifar_resnet20": ((3, 3, 3), 16),
    "cifar_resnet110": ((18, 18, 18), 16),
    "cifar_resnet18": ((2, 2, 2, 2), 64),
}
