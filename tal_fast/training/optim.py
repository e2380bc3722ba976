"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from tal_fast.config.schema import OptimConfig
from tal_fast.models.blocks import block_numbers

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
"""Normalisation layers, whose parameters do not decay."""


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Fused SGD or AdamW over the parameters of a model, with the learning rate as a tensor on their device.

    With ``layer_decay`` each block of the network has a rate of its own, ``lr_scale`` times that of its head. Unless
    ``decay_all`` is on, there is no weight decay on biases, on the parameters of normalisation layers and on
    those that the model itself exempts through ``no_weight_decay``, as timm's models do.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    exempt = set() if config.decay_all else _exempt(model)
    device = named[0][1].device
    # A tensor: changing a number would recompile the step, and a CUDA graph would keep the captured rate.
    rate = torch.tensor(config.lr, dtype=torch.float32, device=device)
    numbers = {} if config.layer_decay is None else block_numbers(model)
    last = max(numbers.values(), default=0)
    groups: list[dict[str, Any]] = []
    for number, spared in sorted({(numbers.get(name, last), name in exempt) for name, _ in named}):
        parameters = [p for name, p in named if (numbers.get(name, last), name in exempt) == (number, spared)]
        groups.append({"params": parameters, "weight_decay": 0.0 if spared else config.weight_decay})
        if config.layer_decay is not None:
            groups[-1] |= {"lr": rate.clone(), "lr_scale": config.layer_decay ** (last - number)}
    # Fused kernels exist for float32 on the CPU and on CUDA GPUs, among others.
    fused = device.type in ("cpu", "cuda") and all(p.dtype == torch.float32 for _, p in named)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=fused)
    sgd = torch.optim.SGD(groups, lr=rate, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    if config.momentum:
        # The fused kernel reads uninitialised momentum if a gradient scaler skips the very first step (torch 2.14).
        # Zeros leave the first step as it is.
        for _, p in named:
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


def _exempt(model: nn.Module) -> set[str]:
    """Names of the parameters without weight decay."""
    names = {f"{path}.bias".lstrip(".") for path, module in model.named_modules() if hasattr(module, "bias")}
    for path, module in model.named_modules():
        if isinstance(module, _NORMS):
            names |= {f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
    exempted: Callable[[], Iterable[str]] | None = getattr(model, "no_weight_decay", None)
    return names | set(exempted() if exempted is not None else ())


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the head, and of others to ``lr_scale`` times it; does not wait for the device."""
    for group in optimizer.param_groups:
        group["lr"].fill_(rate * group.get("lr_scale", 1.0))


def learning_rate(config: OptimConfig, epochs: int, epoch: float) -> float:
    """Learning rate at a point of the run, a function of the epoch alone, so that resuming needs no scheduler state.

    ``epoch`` is the number of finished epochs with fractions; the trainer asks for the middle of a step.
    """
    if epoch < config.warmup_epochs:
        return config.lr * epoch / config.warmup_epochs
    if config.schedule == "cosine":
        done = (epoch - config.warmup_epochs) / max(epochs - config.warmup_epochs, 1e-9)
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if config.schedule == "step":
        return config.lr * config.step_factor ** int(epoch // config.step_size)
    if config.schedule == "multistep":
        return config.lr * config.step_factor ** sum(epoch >= at for at in config.step_epochs)
    return config.lr
