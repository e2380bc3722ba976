"""Launch parameters, kept apart from the launch so that the compile check compiles exactly what would run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, its arguments in order and its compile-time constants."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    max_registers: int | None = None  # per thread, NVIDIA only; None leaves the choice to the compiler

    def run(self) -> None:
        """Launch the kernel on the current stream of its arguments' device."""
        device = self.arguments[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.run()
        self.kernel[self.grid](*self.arguments, **self.constants, **self.options)
        return None

    @property
    def options(self) -> dict[str, int]:
        """Compiler options as keyword arguments of the launch."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, **limit}


@dataclass(frozen=True)
class Target:
    """Device properties that launch configurations depend on."""

    multiprocessors: int
    warp_size: int  # 32 on NVIDIA, 64 on AMD's data-center GPUs


def cdiv(a: int, b: int) -> int:
    """Ceiling division. Triton's own serves kernels too and takes microseconds on the host."""
    return -(-a // b)


@cache
def device_target(device: torch.device) -> Target:
    """Launch-relevant properties of a device.

    Devices other than GPUs (the interpreter's CPU, the compile check's meta device) get a small stand-in, so that the
    interpreter runs few programs.
    """
    if device.type != "cuda":
        return Target(4, 32)
    p = torch.cuda.get_device_properties(device)
    return Target(p.multi_processor_count, getattr(p, "warp_size", 32))


@cache
def device_constants(device: torch.device, *values: float) -> Tensor:
    """Float64 tensor of constants, made once per device.

    Kernel arguments would be rounded to float32, and compile-time constants would compile one kernel per value.
    """
    return torch.tensor(values, dtype=torch.float64, device=device)
