"""ResNets for small images, with a 3x3 stem and no pooling before the first stage (He et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tal_fast.models.initialize import he_initialize


class PaddedShortcut(nn.Module):
    """Shortcut without parameters: every ``stride``-th pixel, and zeros for new channels (He et al. 2016, option A).

    Half of the new channels precede the old ones, as in most public code, so that its weights fit.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        new = channels - in_channels
        self.padding = (0, 0, 0, 0, new // 2, new - new // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the first with the stride, and a shortcut (He et al. 2016, figure 2).

    A shortcut that changes the shape is a 1x1 convolution with BatchNorm (option B) with ``projection``, else a
    ``PaddedShortcut`` (option A).
    """

    def __init__(self, in_channels: int, channels: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride == 1 and in_channels == channels:
            return
        if projection:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        else:
            self.shortcut = PaddedShortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def residual_stages(
    block: Callable[[int, int, int], nn.Module], blocks: Sequence[int], channels: int, width: int
) -> nn.Sequential:
    """Stages of residual blocks; the channels, ``width`` in the first stage, double and the image halves at each stage.

    ``block`` makes a block from its input channels, output channels and stride; ``blocks`` has the number of blocks of
    each stage; ``channels`` are those of the input.
    """
    stages = []
    for stage, count in enumerate(blocks):
        parts = []
        for i in range(count):
            parts.append(block(channels, width * 2**stage, 2 if i == 0 and stage > 0 else 1))
            channels = width * 2**stage
        stages.append(nn.Sequential(*parts))
    return nn.Sequential(*stages)


class CifarResNet(nn.Module):
    """ResNet whose channels, ``width`` in the first stage, double and whose image halves from stage to stage.

    ``blocks`` has the number of blocks of each stage; ``projection`` is as in ``BasicBlock``.
    """

    def __init__(
        self, blocks: Sequence[int], width: int, num_classes: int, in_channels: int = 3, projection: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = residual_stages(partial(BasicBlock, projection=projection), blocks, width, width)
        self.fc = nn.Linear(width * 2 ** (len(blocks) - 1), num_classes)
        he_initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_channels, H, W); H, W >= 1."""
        x = F.relu(self.bn1(self.conv1(images)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.stages(x), 1), 1))
