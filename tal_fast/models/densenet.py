"""DenseNet-BC for small images (Huang et al. 2017)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tal_fast.models.initialize import he_initialize


class DenseLayer(nn.Module):
    """Bottleneck layer: a 1x1 convolution to ``4 * growth`` channels and a 3x3 to ``growth``, appended to the input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(F.relu(self.bn2(y)))], 1)


class Transition(nn.Module):
    """Transition between dense blocks, which halves the channels (θ = 0.5, the C of BC) and the image, rounded up."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2, ceil_mode=True)


class DenseNet(nn.Module):
    """DenseNet-BC with three dense blocks; depth L has ``layers = (L - 4) / 6``.

    Args:
        layers: number of layers of each dense block.
        width: channels added by a layer, the growth rate k of the paper; the stem has 2k.
    """

    def __init__(self, layers: int, width: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        channels = 2 * width
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)
        stages, transitions = [], []
        for stage in range(3):
            if stage > 0:
                transitions.append(Transition(channels, channels // 2))
                channels //= 2
            stages.append(nn.Sequential(*(DenseLayer(channels + i * width, width) for i in range(layers))))
            channels += layers * width
        self.stages = nn.ModuleList(stages)
        self.transitions = nn.ModuleList(transitions)
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        he_initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_channels, H, W); H, W >= 1."""
        x = self.stages[0](self.conv1(images))
        for transition, stage in zip(self.transitions, self.stages[1:], strict=True):
            x = stage(transition(x))
        x = F.relu(self.bn1(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
