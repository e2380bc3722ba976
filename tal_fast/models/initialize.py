"""Initial weights."""

from __future__ import annotations

from torch import nn


def he_initialize(model: nn.Module) -> None:
    """Draw the convolutions' weights, in place, from N(0, 2 / (k·k·out_channels)), as He et al. 2015 in their backward
    form (equation 14) and as code for CIFAR does; biases, if any, become 0. Not for grouped convolutions."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
