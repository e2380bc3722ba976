"""Runtime options: device, precision, compilation and memory order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tal_fast.config.schema import Config


@dataclass(frozen=True)
class Runtime:
    """Resolved runtime options."""

    device: torch.device
    dtype: torch.dtype | None  # of autocast; None for float32 without autocast
    compile: bool  # with torch.compile
    channels_last: bool  # memory order of images and weights

    @staticmethod
    def resolve(config: Config, device: torch.device, world_size: int = 1) -> Runtime:
        """Resolve runtime options: replace ``auto`` and None by values for a device, if the options fit each other."""
        on_gpu = device.type == "cuda"
        names = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if config.precision != "auto":
            dtype = names[config.precision]
        elif on_gpu:
            dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        else:
            dtype = None
        if config.cuda_graphs and not on_gpu:
            raise ValueError(f"cuda_graphs is on but the device is {device.type}; set cuda_graphs to false")
        if config.cuda_graphs and dtype is torch.float16:
            raise ValueError("cuda_graphs cannot skip steps as a float16 scaler must; use bfloat16 or float32")
        if config.cuda_graphs and world_size > 1:
            raise ValueError(f"cuda_graphs is for one GPU but there are {world_size} ranks; set it to false")
        if config.model.sync_batchnorm and not on_gpu:
            raise ValueError("model.sync_batchnorm works on GPUs only; set it to false")
        _check_batch_size(config, world_size)
        compile = on_gpu if config.model.compile is None else config.model.compile
        channels_last = on_gpu if config.model.channels_last is None else config.model.channels_last
        return Runtime(device, dtype, compile, channels_last)

    def autocast(self) -> torch.autocast:
        """Context in which the network runs."""
        return torch.autocast(self.device.type, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def arrange(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in the network's memory order; features (B, D) as they are."""
        ordered = self.channels_last and images.ndim == 4
        return images.contiguous(memory_format=torch.channels_last) if ordered else images

    def summary(self) -> str:
        """Precision, memory order and compilation in a few words."""
        words = [str(self.dtype or torch.float32).removeprefix("torch.")]
        if self.channels_last:
            words.append("channels last")
        if self.compile:
            words.append("compiled")
        return ", ".join(words)


def _check_batch_size(config: Config, world_size: int) -> None:
    if config.batch_size % world_size:
        raise ValueError(
            f"batch_size {config.batch_size} is for all ranks together but does not divide among {world_size}; "
            f"use {max(1, config.batch_size // world_size) * world_size}"
        )
    images, parts = config.batch_size // world_size, config.optim.accumulate
    if images % parts:
        raise ValueError(
            f"optim.accumulate is {parts} but a rank's {images} images do not divide into as many parts; "
            f"use a divisor of {images}"
        )
