"""Choice of the backend that serves a device.

=============  =====================================================================  ===========
Backend        Computes with                                                          Devices
=============  =====================================================================  ===========
``reference``  plain PyTorch: the definition                                          all
``native``     the C++ extension: the whole step on CPUs, only the queue on GPUs      CPU, CUDA
``triton``     fused Triton kernels                                                   GPUs
=============  =====================================================================  ===========

``auto`` takes ``triton`` on GPUs and ``native`` on CPUs, or ``reference`` where those do not run.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tal_fast.loss import _extension
from tal_fast.loss._extension import triton_problem
from tal_fast.loss.backends import Backend, CppBackend, CppCudaBackend, PyTorchBackend, TritonBackend
from tal_fast.loss.options import LossOptions

NAMES = ("auto", "reference", "native", "triton")

_BACKENDS: dict[tuple[str, bool], Backend] = {
    ("reference", False): PyTorchBackend(),
    ("native", False): CppBackend(),
    ("native", True): CppCudaBackend(),
    ("triton", False): TritonBackend(),
}
"""Backend by name, and by whether it runs on GPUs where that makes a difference."""


def check_name(name: str) -> str:
    """Return ``name`` if it is one of ``NAMES``; raise ValueError otherwise."""
    if name not in NAMES:
        raise ValueError(f"backend is {name!r}; use one of {', '.join(map(repr, NAMES))}")
    return name


def for_loss(name: str, device: torch.device) -> Backend:
    """Backend that computes the loss on this device; raises ValueError if the named one does not run there."""
    return _backend(_name_for_loss(name, device), device)


def for_queue(name: str, device: torch.device) -> Backend:
    """Backend of a queue used alone: as for the loss, but on GPUs the CUDA kernels come before Triton's."""
    return _backend(_name_for_queue(name, device), device)


def runs_in_one_call(name: str, logits: Tensor, options: LossOptions) -> bool:
    """Whether ``cpp.step`` computes this loss in one call; ``torch.compile`` takes the parts, which it can trace."""
    if options.inplace or not logits.is_cpu or torch.compiler.is_compiling():
        return False
    return _choose(name, logits.device) == "native"


def describe() -> list[str]:
    """Which backends run on this machine, and which one ``auto`` takes, one line each."""
    usable, why = _extension.load()
    lines = [f"C++ extension: {'yes' if usable else 'no'}, {why}"]
    for device in [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else []):
        problem = triton_problem(device)
        lines.append(f"Triton kernels on {device.type}: {'yes' if problem is None else f'no, {problem}'}")
        lines.append(f"backend 'auto' on {device.type}: {for_loss('auto', device).name}")
    return lines


def _backend(name: str, device: torch.device) -> Backend:
    return _BACKENDS[name, name == "native" and device.type != "cpu"]


# torch.compile takes the choice as a constant: a name, since a constant object cannot be guarded.
@torch.compiler.assume_constant_result
def _name_for_loss(name: str, device: torch.device) -> str:
    return _choose(name, device)


@torch.compiler.assume_constant_result
def _name_for_queue(name: str, device: torch.device) -> str:
    return "native" if name == "auto" and _extension.available_for(device) else _choose(name, device)


@cache
def _choose(name: str, device: torch.device) -> str:
    """Name of the backend that serves a device."""
    if name == "reference":
        return "reference"
    if name == "native":
        usable, why = _extension.load()
        if not usable:
            raise ValueError(f"backend 'native' needs the C++ extension, which is {why}")
        if not _extension.available_for(device):
            raise ValueError(f"backend 'native' does not run on {device}; use backend='auto'")
        return "native"
    problem = triton_problem(device) if name == "triton" or device.type == "cuda" else "not a GPU"
    if problem is None:
        return "triton"
    if name == "triton":
        raise ValueError(f"backend 'triton' does not run on {device}: {problem}; use backend='auto'")
    if device.type == "cpu" and _extension.load()[0]:
        return "native"
    _extension.warn_if_missing()
    return "reference"
