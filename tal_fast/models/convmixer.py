"""ConvMixer (Trockman & Kolter 2023, "Patches Are All You Need?")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MixerBlock(nn.Module):
    """A depthwise convolution with a residual around it, then a 1x1 convolution; GELU and BatchNorm after each
    (the paper's equations 2 and 3)."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.bn1 = nn.BatchNorm2d(width)
        self.pointwise = nn.Conv2d(width, width, 1)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) to (B, width, H, W)."""
        # An even kernel makes a row and a column too many; without the first ones it is PyTorch's padding="same".
        y = self.depthwise(x)[:, :, -x.shape[2] :, -x.shape[3] :]
        x = x + self.bn1(F.gelu(y))
        return self.bn2(F.gelu(self.pointwise(x)))


class ConvMixer(nn.Module):
    """ConvMixer-``width``/``depth``: all blocks have the same channels and see the same grid of patches.

    Args:
        width: channels, the paper's h.
        depth: number of blocks.
        kernel: side of the depthwise convolutions' kernels.
        patch: side of a patch in pixels; pixels beyond the last whole patch are not seen.
        num_classes: number of logits.
        in_channels: of the images.
    """

    def __init__(self, width: int, depth: int, kernel: int, patch: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, patch, patch)
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(MixerBlock(width, kernel) for _ in range(depth)))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, num_classes) logits; H, W >= patch."""
        x = self.blocks(self.bn1(F.gelu(self.stem(images))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
