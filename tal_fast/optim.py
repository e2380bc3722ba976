"""Optimizers, and the learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

import torch
from torch import nn

from tal_fast.config import OptimConfig


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW over a model's parameters; with ``decay_all`` off, biases and normalisation layers do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": parameters, "weight_decay": config.weight_decay}]
    if not config.decay_all:
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


def learning_rate(config: OptimConfig, epochs: int, epoch: float) -> float:
    """The learning rate at a point of the run.

    Args:
        config: peak, schedule and warm-up.
        epochs: of the whole run.
        epoch: epochs that have passed, fractions included; at half of a step, the rate is 0 at neither end.
    """
    if epoch < config.warmup_epochs:
        return config.lr * epoch / config.warmup_epochs
    if config.schedule == "cosine":
        done = (epoch - config.warmup_epochs) / max(epochs - config.warmup_epochs, 1e-9)
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if config.schedule == "step":
        return config.lr * config.step_factor ** sum(epoch >= at for at in config.step_epochs)
    return config.lr
