"""Networks by name: the project's own, torchvision's and timm's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tal_fast.config.schema import ModelConfig
from tal_fast.config.typed import suggestion
from tal_fast.models.features import expose_features, replace_head
from tal_fast.models.registry import NETWORKS


def build_model(config: ModelConfig, num_classes: int, in_channels: int = 3, image_size: int = 64) -> nn.Module:
    """Build a network with random weights that returns ``(logits, features)``.

    Args:
        config: name and width. The name is searched for in the project's networks, torchvision's and timm's;
            ``timm/NAME`` is always timm's.
        num_classes: number of logits.
        in_channels: channels of the images; unless 3, a network of torchvision gets a new first convolution.
        image_size: side of the images in pixels, for networks that depend on it.

    Returns:
        Network of images (B, in_channels, S, S) to logits (B, num_classes) and features (B, D).

    Raises:
        ValueError: there is no network of that name, or it does not expose its features.
    """
    if config.name in NETWORKS:
        if config.drop_path is not None:
            raise ValueError(_no_drop_path(config))
        width = {} if config.width is None else {"width": config.width}
        model = NETWORKS[config.name](num_classes=num_classes, in_channels=in_channels, **width)
    elif (name := timm_name(config.name)) is not None:
        model = _timm(config, name, num_classes, in_channels, image_size)
    else:
        model = _torchvision(config, num_classes, image_size)
        if config.drop_path is not None:
            _set_drop_path(model, config)
        if in_channels != 3:
            _replace_stem(model, in_channels)
    model = expose_features(model, torch.zeros(2, in_channels, image_size, image_size))
    replace_head(model, config.head)
    return model


def timm_name(name: str) -> str | None:
    """timm's name of a network that is given as ``timm/NAME``, or that only timm has; None for other networks.

    Raises ValueError if timm is not installed or has no NAME.
    """
    explicit = name.startswith("timm/")
    name = name.removeprefix("timm/")
    if not explicit:
        from torchvision import models

        if name in models.list_models(module=models):
            return None
    try:
        import timm
    except ImportError:
        if explicit:
            raise ValueError(f"the model timm/{name} needs timm; install it with: pip install timm") from None
        return None
    if timm.is_model(name):
        return name
    if explicit:
        raise ValueError(f"timm has no model {name!r}{suggestion(name, timm.list_models())}")
    return None


def _timm(config: ModelConfig, name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    import timm

    if config.width is not None:
        raise ValueError(f"model.width is {config.width} but {config.name} has a fixed width; leave it out")
    options: dict[str, Any] = {"pretrained": False, "num_classes": num_classes, "in_chans": in_channels}
    if config.drop_path is not None:
        options["drop_path_rate"] = config.drop_path
    try:
        return timm.create_model(name, img_size=image_size, **options)
    except TypeError:  # convolutional networks take any size and have no such option
        pass
    try:
        return timm.create_model(name, **options)
    except TypeError as error:
        raise ValueError(_no_drop_path(config)) if "drop_path_rate" in str(error) else error from None


def _no_drop_path(config: ModelConfig) -> str:
    return f"model.drop_path is {config.drop_path} but {config.name} has no stochastic depth; leave it out"


def _torchvision(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if config.name not in known:
        hint = suggestion(config.name, [*NETWORKS, *known], f"use torchvision's or {', '.join(NETWORKS)}")
        raise ValueError(f"no model {config.name!r}{hint}")
    if config.width is not None:
        raise ValueError(f"model.width is {config.width} but {config.name} has a fixed width; leave it out")
    extra: dict[str, Any] = {}
    if config.name.startswith("vit_"):
        extra = {"image_size": image_size}
    elif config.name in ("googlenet", "inception_v3"):
        extra = {"aux_logits": False, "init_weights": True}  # otherwise several outputs in training
    return models.get_model(config.name, weights=None, num_classes=num_classes, **extra)


def _set_drop_path(model: nn.Module, config: ModelConfig) -> None:
    """Scale the rates of a network of torchvision, which rise with depth, to a largest one."""
    from torchvision.ops import StochasticDepth

    layers = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    largest = max((layer.p for layer in layers), default=0.0)
    if not largest:
        raise ValueError(_no_drop_path(config))
    for layer in layers:
        layer.p *= (config.drop_path or 0.0) / largest


def _replace_stem(model: nn.Module, in_channels: int) -> None:
    path, stem = next((p, m) for p, m in model.named_modules() if isinstance(m, nn.Conv2d))
    kept: dict[str, Any] = {name: getattr(stem, name) for name in ("out_channels", "kernel_size", "stride", "padding")}
    new = nn.Conv2d(in_channels, **kept, bias=stem.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    model.set_submodule(path, new)
