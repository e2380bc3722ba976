"""Initialization of weights."""

from __future__ import annotations

from torch import nn


def he_initialize(model: nn.Module) -> None:
    """Initialize convolutions in place: weights from N(0, 2 / (k·k·out_channels)), biases 0.

    This is the backward form of He et al. 2015 (equation 14), as in most code for CIFAR. Not for grouped convolutions.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
