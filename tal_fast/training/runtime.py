"""How a configuration runs on a device: what is ``auto`` or None in it, decided."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tal_fast.config.schema import Config


@dataclass(frozen=True)
class Execution:
    """Decided options of speed.

    Attributes:
        device: of the network.
        dtype: autocast's, or None for float32.
        compile: ``torch.compile`` the step.
        channels_last: memory order of images and weights.
    """

    device: torch.device
    dtype: torch.dtype | None
    compile: bool
    channels_last: bool

    @staticmethod
    def of(config: Config, device: torch.device) -> Execution:
        """What a configuration means on a device.

        Raises:
            ValueError: options that do not go together, or not with the device.
        """
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
            raise ValueError(
                "cuda_graphs cannot skip the steps a float16 scaler wants skipped; use bfloat16 or float32"
            )
        if config.model.sync_batchnorm and not on_gpu:
            raise ValueError("model.sync_batchnorm works on GPUs only; set it to false")
        compile = on_gpu if config.model.compile is None else config.model.compile
        channels_last = on_gpu if config.model.channels_last is None else config.model.channels_last
        return Execution(device, dtype, compile, channels_last)

    @property
    def scales_gradients(self) -> bool:
        """Whether gradients need a scaler, for they would vanish in float16."""
        return self.dtype is torch.float16

    def autocast(self) -> torch.autocast:
        """Context in which the network runs."""
        return torch.autocast(self.device.type, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def arrange(self, images: Tensor) -> Tensor:
        """(B, C, H, W) images in the network's memory order."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def summary(self) -> str:
        """In a few words."""
        words = [str(self.dtype or torch.float32).removeprefix("torch.")]
        if self.channels_last:
            words.append("channels last")
        if self.compile:
            words.append("compiled")
        return ", ".join(words)
