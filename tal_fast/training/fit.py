"""Options that fit the data and the machine, for the presets of your own images: what is not given is chosen here."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tal_fast.config.parse import load_config, merged, nest
from tal_fast.config.schema import Config
from tal_fast.data.build import build_data
from tal_fast.models.pretrained import PRETRAINED, is_cached
from tal_fast.runs import checkpoint
from tal_fast.runs.folder import CONFIG_FILE
from tal_fast.utils.arrays import total_memory

SMALL_NETWORKS = (
    "efficientnet_b0", "mobilenet_v3_large", "resnet18", "timm/tf_efficientnet_lite0", "timm/mobilenetv3_large_100",
)  # fmt: skip
"""Networks whose features are good and cheap on a CPU, the first choice first."""
CHOSEN = (
    "model.name", "model.weights", "model.freeze", "model.cache_features", "model.head", "data.image_size", "optim.lr",
    "optim.weight_decay", "epochs", "batch_size", "method.options.t_min", "method.options.t_max",
    "method.options.t_wrong",
)  # fmt: skip
"""Options that ``choose`` may set."""
FEATURE_BYTES = 4 * 2048
"""Features of an image in memory, at most."""
CORE_SECONDS = 0.22
"""Seconds of a core for a training step of ResNet-18 per image of 224 pixels: 5.4 G multiplications at 25 G/s."""
HOURS = 2.0
"""Longest training from nothing that is chosen for a CPU."""
MANY_CLASSES = 50
"""Classes from which TAL takes the paper's temperatures; below, those that were better for ten classes."""


@dataclass(frozen=True)
class Facts:
    """Data and machine."""

    images: int  # training images
    classes: int
    side: int  # median shorter side of the images in pixels
    memory: float  # GiB of main memory
    cores: int
    gpu: float | None  # GiB of the GPU's memory
    network: str  # to train on a GPU, or that is given
    weights: str | None  # network whose weights are given or in the cache
    tal: bool  # whether the method has TAL's temperatures


def choose(facts: Facts) -> tuple[dict[str, Any], str]:
    """Options, of ``CHOSEN``, for data and a machine, and the reasons in a sentence or two."""
    about = f"{facts.images:,} images of {facts.classes} classes, {facts.side} pixels, "
    values: dict[str, Any] = {"batch_size": _batch_size(facts)}
    if facts.tal and facts.classes >= MANY_CLASSES:
        values |= {"method.options.t_min": 10.0, "method.options.t_max": 100.0, "method.options.t_wrong": 20.0}
    if facts.gpu is not None:
        about += f"a GPU with {facts.gpu:.0f} GiB: all of {facts.network} is trained, "
        if facts.weights is None:
            return values, f"{about}from random weights, as there are none in the cache, for 40 epochs"
        start = {"model.name": facts.weights, "model.weights": PRETRAINED, "data.image_size": None}
        return values | start | {"optim.lr": 0.02, "epochs": 20}, f"{about}from its pretrained weights, for 20 epochs"
    about += f"no GPU and {facts.cores} core{'s' * (facts.cores > 1)}: "
    if facts.weights is not None:
        values |= {
            "model.name": facts.weights, "model.weights": PRETRAINED, "model.freeze": "backbone", "model.head": "mlp",
            "data.image_size": None, "optim.lr": 0.01, "optim.weight_decay": 5e-4,
        }  # fmt: skip
        if facts.images * FEATURE_BYTES < facts.memory * 2**30 / 4:
            about += f"the pretrained {facts.weights} runs once over the images, and a head of two layers trains on "
            return values | {"model.cache_features": True, "epochs": 30}, f"{about}its features for 30 epochs"
        about += f"a head of two layers trains on the frozen pretrained {facts.weights} for 3 epochs, as the features "
        return values | {"epochs": 3}, f"{about}of so many images do not fit a quarter of {facts.memory:.0f} GiB"
    about += "there are no pretrained weights in the cache (--model.weights names some), so "
    for size in (224, 160, 128, 96):
        hours = facts.images * 40 * CORE_SECONDS * (size / 224) ** 2 / facts.cores / 3600
        if size <= facts.side and hours <= HOURS:
            return values | {"data.image_size": size}, f"{about}{facts.network} trains at {size} pixels for 40 epochs"
    size = min(64, facts.side)
    about += f"a small network trains at {size} pixels for 40 epochs; larger images "
    reason = "would have to be enlarged" if facts.side < 96 else f"would take more than {HOURS:.0f} hours"
    return values | {"model.name": "cifar_resnet20", "data.image_size": size}, about + reason


def _batch_size(facts: Facts) -> int:
    """A power of two: at least four steps an epoch, and what fits the GPU."""
    most = 64 if facts.gpu is not None and facts.gpu < 8 else 128
    return int(max(2, min(most, 2 ** int(np.log2(max(facts.images / 4, 2))))))


def look(config: Config, given: Collection[str], device: torch.device) -> Facts:
    """Facts about the data of a configuration and about this machine."""
    data = build_data(config.data)
    train = data.split("train")
    on_gpu = device.type == "cuda"
    fixed = {"model.name", "model.weights"} & set(given)
    candidates = (config.model.name,) if fixed or on_gpu else SMALL_NETWORKS
    known = config.model.name if "model.weights" in given and config.model.weights is not None else None
    return Facts(
        images=len(train),
        classes=data.num_classes,
        side=int(np.median(train.sizes.min(axis=1))),
        memory=total_memory() / 2**30,
        cores=torch.get_num_threads(),
        gpu=torch.cuda.get_device_properties(device).total_memory / 2**30 if on_gpu else None,
        network=config.model.name,
        weights=known if "model.weights" in given else next(filter(is_cached, candidates), None),
        tal="t_min" in config.method.options,
    )


def fit(config: Config, given: Collection[str], device: torch.device) -> tuple[dict[str, Any], str]:
    """Options for a run that are not given, and a paragraph about them; a run that is continued keeps its own."""
    output = Path(config.output) if config.resume in ("never", "auto") else Path(config.resume).absolute().parents[1]
    saved = output / CONFIG_FILE
    if checkpoint.exists(output / checkpoint.FOLDER) and saved.is_file():
        values, text = load_config(str(saved)).flat(), f"options that are not given are those of {saved}"
    else:
        values, text = choose(look(config, given, device))
        own = ", ".join(name for name in CHOSEN if name in given)
        text = f"plan: {text}. What you set wins{f' ({own})' * bool(own)}; the values are in config.yaml"
    return {name: values[name] for name in CHOSEN if name in values and name not in given}, text


def with_options(config: Config, values: dict[str, Any]) -> Config:
    """Configuration with other values of options, by their dotted names."""
    return Config.from_dict(merged(config.to_dict(), nest(values))).check()
