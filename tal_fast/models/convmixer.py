"""ConvMixer (Trockman & Kolter 2023, "Patches Are All You Need?")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MixerBlock(nn.Module):
    """Residual depthwise convolution and 1x1 convolution, each followed by GELU and BatchNorm (equations 2 and 3)."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.bn1 = nn.BatchNorm2d(width)
        self.pointwise = nn.Conv2d(width, width, 1)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        # An even kernel adds a row and a column; dropping the first ones is PyTorch's padding="same".
        y = self.depthwise(x)[:, :, -x.shape[2] :, -x.shape[3] :]
        x = x + self.bn1(F.gelu(y))
        return self.bn2(F.gelu(self.pointwise(x)))


class ConvMixer(nn.Module):
    """ConvMixer-``width``/``depth``.

    Args:
        width: number of channels, h in the paper.
        depth: number of blocks.
        kernel: side of the depthwise kernels.
        patch: side of a patch in pixels; pixels beyond the last whole patch are dropped.
    """

    def __init__(self, width: int, depth: int, kernel: int, patch: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, patch, patch)
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(MixerBlock(width, kernel) for _ in range(depth)))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_channels, H, W); H, W >= patch."""
        x = self.blocks(self.bn1(F.gelu(self.stem(images))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
