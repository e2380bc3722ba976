"""ResNets for small images: a 3x3 stem and no pooling before the first stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tal_fast.models.initialize import he_initialize


class PaddedShortcut(nn.Module):
    """A shortcut without parameters: every ``stride``-th pixel, zeros for the new channels (He et al. 2016, option A).

    Half of the new channels come before the old ones and half after, as in most public code, so that its weights fit.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        new = channels - in_channels
        self.padding = (0, 0, 0, 0, new // 2, new - new // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, ceil(H / stride), ceil(W / stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 2).

    Args:
        in_channels, channels, stride: of the block; its first convolution has the stride.
        projection: a shortcut that changes the shape is a 1x1 convolution with BatchNorm (option B) instead of a
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
        """(B, in_channels, H, W) to (B, channels, ceil(H / stride), ceil(W / stride))."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A stage for each entry of ``blocks``; the channels double and the image halves from stage to stage.

    Args:
        blocks: number of blocks of each stage.
        width: channels of the first stage.
        num_classes: number of logits.
        in_channels: of the images.
        projection: see ``BasicBlock``.
    """

    def __init__(
        self, blocks: Sequence[int], width: int, num_classes: int, in_channels: int = 3, projection: bool = True
    ) -> None:
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
                        BasicBlock(channels if i == 0 else out, out, 2 if i == 0 and stage > 0 else 1, projection)
                        for i in range(count)
                    )
                )
            )
            channels = out
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)
        he_initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, num_classes) logits; H, W >= 1."""
        x = F.relu(self.bn1(self.conv1(images)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.stages(x), 1), 1))
