"""Launches of kernels: planned once for a shape, and from the second time on without Triton's dispatch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel with its grid, the numbers that follow its tensors, and its compile-time constants."""

    kernel: Any
    grid: tuple[int, ...]
    numbers: tuple[int, ...]
    constants: dict[str, Any]
    num_warps: int
    max_registers: int | None = None  # per thread, NVIDIA only; None leaves the choice to the compiler
    tensors: tuple[Tensor, ...] = ()  # of a launch that was recorded
    compiled: dict[tuple[Any, ...], Callable[..., object]] = field(default_factory=dict)

    def run(self, *tensors: Tensor) -> None:
        """Launch the kernel on the current stream of its tensors' device.

        The compiled kernel is kept: Triton's dispatch takes 20 µs a launch on the host, launching it directly 5.
        """
        device = tensors[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.run(*tensors)
        # What Triton compiles another kernel for, beside numbers and constants.
        key = (device, *[t.dtype for t in tensors], *[t.data_ptr() % 16 for t in tensors])
        compiled = self.compiled.get(key)
        if compiled is not None:
            compiled(*tensors, *self.numbers, *self.constants.values())
            return None
        kernel = self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **self.options)
        # The interpreter compiles nothing; on AMD's GPUs the kernel also depends on the size of the tensors' storage.
        if hasattr(kernel, "packed_metadata") and torch.version.hip is None:
            self.compiled[key] = kernel[(*self.grid, 1, 1)[:3]]
        return None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Arguments of the kernel, of a launch that was recorded."""
        return *self.tensors, *self.numbers

    @property
    def options(self) -> dict[str, int]:
        """Compiler options as keyword arguments of the launch."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, **limit}


class Target(NamedTuple):
    """Device properties that launch configurations depend on."""

    multiprocessors: int
    warp_size: int  # 32 on NVIDIA, 64 on AMD's data-center GPUs
    architecture: str = ""  # such as sm_90 or gfx942; names the file of tuned options


_Planner = TypeVar("_Planner", bound=Callable[..., Launch])
_planners: list[Any] = []


def planner(plan: _Planner) -> _Planner:
    """Decorator of a function of numbers that plans a launch: it keeps the last 256 plans."""
    _planners.append(lru_cache(256)(plan))
    return _planners[-1]


def forget_plans() -> None:
    """Discard all plans, after a change of the tuned options."""
    for plan in _planners:
        plan.cache_clear()


@contextmanager
def replaced(run: Callable[[Launch], object]) -> Iterator[None]:
    """Context manager in which ``run`` takes the launches, with their tensors, which then do not run."""
    original = Launch.run
    Launch.run = lambda self, *tensors: run(replace(self, tensors=tensors))  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Launch.run = original  # type: ignore[method-assign]


@cache
def tuned(architecture: str) -> dict[str, list[dict[str, int]]]:
    """Options that ``bench.tune`` has chosen on an architecture: by kernel, entries in order of size."""
    file = Path(__file__).with_name("tuned") / f"{architecture}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def tuned_options(kernel: str, size: int, architecture: str) -> dict[str, int]:
    """Options of a kernel at a size; empty where the built-in rules serve."""
    for entry in tuned(architecture).get(kernel, ()):
        if size <= entry["at_most"]:
            return {name: value for name, value in entry.items() if name != "at_most"}
    return {}


def cdiv(a: int, b: int) -> int:
    """Ceiling division. Triton's own serves kernels too and takes microseconds on the host."""
    return -(-a // b)


_STAND_IN = Target(4, 32)  # for the interpreter, so that it runs few programs


@contextmanager
def planned_for(target: Target) -> Iterator[None]:
    """Context manager in which launches with tensors that are on no GPU are planned for a target."""
    global _STAND_IN
    before, _STAND_IN = _STAND_IN, target
    try:
        yield
    finally:
        _STAND_IN = before


def device_target(device: torch.device) -> Target:
    """Launch-relevant properties of a device; a stand-in for devices other than GPUs."""
    return _gpu_target(device) if device.type == "cuda" else _STAND_IN


@cache
def _gpu_target(device: torch.device) -> Target:
    p = torch.cuda.get_device_properties(device)
    architecture = p.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{p.major}{p.minor}"
    return Target(p.multi_processor_count, getattr(p, "warp_size", 32), architecture)


@cache
def device_constants(device: torch.device, *values: float) -> Tensor:
    """Float64 tensor of constants, made once per device.

    Kernel arguments would be rounded to float32, and compile-time constants would compile one kernel per value.
    """
    return torch.tensor(values, dtype=torch.float64, device=device)
