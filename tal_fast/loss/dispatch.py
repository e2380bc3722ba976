"""Choice of the backend that serves a device.

=============  ===================================  =======
Backend        Computes with                        Devices
=============  ===================================  =======
``reference``  plain PyTorch: the definition        all
``native``     the C++ extension                    CPU
``triton``     fused Triton kernels                 GPUs
=============  ===================================  =======

``auto`` takes ``triton`` on GPUs and ``native`` on CPUs, or ``reference`` where those do not run.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tal_fast.loss import _extension
from tal_fast.loss._extension import triton_problem
from tal_fast.loss.backends import Backend, CppBackend, PyTorchBackend, TritonBackend
from tal_fast.loss.options import LossOptions

NAMES = ("auto", "reference", "native", "triton")

_BACKENDS: dict[str, Backend] = {each.name: each for each in (PyTorchBackend(), CppBackend(), TritonBackend())}


def check_name(name: str) -> str:
    """Return ``name`` if it is one of ``NAMES``; raise ValueError otherwise."""
    if name not in NAMES:
        raise ValueError(f"backend is {name!r}; use one of {', '.join(map(repr, NAMES))}")
    return name


def for_device(name: str, device: torch.device) -> Backend:
    """Backend that serves a device; raises ValueError if the named one does not run there."""
    return _BACKENDS[_name_for(name, device)]


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
        lines.append(f"backend 'auto' on {device.type}: {for_device('auto', device).name}")
    return lines


# torch.compile takes the choice as a constant: a name, since a constant object cannot be guarded.
@torch.compiler.assume_constant_result
def _name_for(name: str, device: torch.device) -> str:
    return _choose(name, device)


@cache
def _choose(name: str, device: torch.device) -> str:
    """Name of the backend that serves a device."""
    if name == "reference":
        return "reference"
    if name == "native":
        usable, why = _extension.load()
        if not usable:
            raise ValueError(f"backend 'native' needs the C++ extension, which is {why}")
        if device.type != "cpu":
            raise ValueError(f"backend 'native' does not run on {device}; use backend='auto'")
        return "native"
    problem = triton_problem(device) if name == "triton" or device.type == "cuda" else "not a GPU"
    if problem is None:
        return "triton"
    if name == "triton":
        raise ValueError(f"backend 'triton' does not run on {device}: {problem}; use backend='auto'")
    if device.type == "cuda":
        _extension.warn_of_pytorch(f"tal_fast's Triton kernels do not run on {device}: {problem}")
        return "reference"
    if device.type == "cpu" and _extension.load()[0]:
        return "native"
    _extension.warn_if_missing()
    return "reference"
