"""Options of the network: section ``model`` of a run's configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from tal_fast.config.typed import check_at_least, check_range


@dataclass
class ModelConfig:
    """Network and its weights.

    Attributes:
        name: one of the project's networks for small images, or a classifier of torchvision or timm. The project's are
            ``cifar_resnet8``, ``cifar_resnet20``, ``cifar_resnet110``, ``cifar_resnet18``, ``cifar_preact_resnet110``,
            ``cifar_wrn28_10``, ``cifar_densenet_bc_100_12``, ``cifar_vgg16_bn``, ``cifar_convmixer`` and
            ``cifar_convmixer_256_16``; ``resnet50`` is torchvision's, ``timm/deit_small_patch16_224`` timm's.
        width: width of one of the project's networks; by default that of its paper. It is the number of channels of the
            first stage, of ConvMixer's blocks, or a DenseNet's growth rate.
        weights: weights to start from, ``pretrained`` for torchvision's or timm's own, a file, or the folder of a run;
            by default random. A file may be a state dict, safetensors or a checkpoint, also of another trainer.
        weights_key: key of the weights in a checkpoint, with dots where it is nested; by default averaged weights, if
            there are any.
        freeze: part that keeps its weights, ``none``, ``backbone`` (all but the head), or a number N for the stem and
            the first N stages (of a transformer, blocks). It runs as in validation, BatchNorm and dropout included.
        drop_path: largest rate of stochastic depth of a network of timm or torchvision; by default the network's own.
        head: classifier on top of the network; ``mlp`` has a hidden layer as wide as the network's features,
            and ``cosine`` takes 8 times the cosine of features and weights as logits, as SURE does.
        cache_features: freeze the network but for the head, run it once over the training and validation images without
            random augmentation, keep its features on disk, and train the head on them. The result is the whole network.
        compile: compile the network and the loss with ``torch.compile``; by default on GPUs.
        channels_last: keep images and weights in channels-last memory order; by default on GPUs. On CPUs it makes the
            small ResNets a quarter faster, but without AVX-512, convolutions of stride 2 with fewer than 7 channels
            write out of bounds in that order (oneDNN of torch 2.14).
        sync_batchnorm: compute BatchNorm statistics over all ranks, on GPUs.
    """

    name: str = "resnet50"
    width: int | None = None
    weights: str | None = None
    weights_key: str | None = None
    freeze: int | Literal["none", "backbone"] = "none"
    drop_path: float | None = None
    head: Literal["linear", "mlp", "cosine"] = "linear"
    cache_features: bool = False
    compile: bool | None = None
    channels_last: bool | None = None
    sync_batchnorm: bool = False

    def __post_init__(self) -> None:
        if self.weights not in (None, "pretrained"):
            self.weights = os.path.abspath(os.path.expanduser(self.weights))

    def check(self) -> None:
        """Raise ValueError for a value outside its range."""
        check_at_least("model.width", self.width, 1)
        if self.weights_key is not None and self.weights is None:
            raise ValueError(f"model.weights_key is {self.weights_key!r} but there is no file; set model.weights too")
        if isinstance(self.freeze, int):
            check_at_least("model.freeze", self.freeze, 1)
        check_range("model.drop_path", self.drop_path, "[0, 1)")
