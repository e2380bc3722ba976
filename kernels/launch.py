"""What a launcher decides, apart from the launch itself: so that a check can compile exactly what would be launched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, its arguments in order, and its compile-time constants."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    max_registers: int | None = None  # a thread may have, on NVIDIA's GPUs

    def run(self) -> None:
        """Put it on the current stream of the current device."""
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options)

    @property
    def options(self) -> dict[str, int]:
        """The compiler's, as keyword arguments."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, **limit}


@dataclass(frozen=True)
class Target:
    """The part of a device that launch configurations depend on."""

    multiprocessors: int
    warp_size: int  # 32 on NVIDIA, 64 on AMD's data-center GPUs
    holds_wide_rows: bool  # whether a row of 16,384 logits fits in a program's registers; see loss.loss_config


@cache
def target_of(device: torch.device) -> Target:
    """Of a GPU; on other devices (the interpreter, the compile check's meta tensors) a small stand-in, so that few
    programs are run one after the other."""
    if device.type != "cuda":
        return Target(4, 32, True)
    p = torch.cuda.get_device_properties(device)
    return Target(p.multi_processor_count, getattr(p, "warp_size", 32), torch.version.hip is None and p.major < 10)


@cache
def constants_on(device: torch.device, *values: float) -> Tensor:
    """Floats as a float64 tensor, made once for each device: as kernel arguments they would be rounded to float32, and
    as compile-time constants each value would be a kernel of its own."""
    return torch.tensor(values, dtype=torch.float64, device=device)
