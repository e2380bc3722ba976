"""VGG-16 with BatchNorm for small images (Simonyan & Zisserman 2015, configuration D)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tal_fast.models.initialize import he_initialize

_STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))
"""Convolutions of each stage, and its channels as a multiple of the first stage's."""


class VGG16(nn.Module):
    """VGG-16 with thirteen 3x3 convolutions in five stages, and one Linear instead of the paper's three.

    The convolutions have biases and the names of torchvision's ``vgg16_bn().features``, so that its weights and those
    of public code for CIFAR fit. ``width`` is the number of channels of the first stage.
    """

    def __init__(self, width: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        channels = in_channels
        for count, factor in _STAGES:
            for _ in range(count):
                parts += [nn.Conv2d(channels, width * factor, 3, 1, 1), nn.BatchNorm2d(width * factor), nn.ReLU()]
                channels = width * factor
            # Rounding up keeps at least one pixel of images smaller than 32 pixels.
            parts.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*parts)
        self.fc = nn.Linear(channels, num_classes)
        he_initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_channels, H, W); H, W >= 1."""
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.features(images), 1), 1))
