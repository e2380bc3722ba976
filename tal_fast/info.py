"""What runs on this machine: ``python -m tal_fast.info``."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

import tal_fast
from tal_fast import _extension, backends

PACKAGES = ("torchvision", "triton", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "timm", "wandb")


def version_of(package: str) -> str:
    """The installed version, or 'not installed'."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[str]:
    """One line a device."""
    lines = [f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads in use"]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        lines.append(f"cuda:{i}: {p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    if len(lines) == 1:
        lines.append(f"no GPU: torch {torch.__version__} is built with CUDA {torch.version.cuda or 'no support'}")
    return lines


def main() -> None:
    """Print versions, devices, and for each device the backend that ``auto`` takes and why."""
    print(f"tal_fast {tal_fast.__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    for package in PACKAGES:
        print(f"  {package}: {version_of(package)}")
    for line in devices():
        print(line)
    usable, why = _extension.load()
    print(f"C++ extension: {'yes' if usable else 'no'}, {why}")
    kinds = [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else [])
    for device in kinds:
        problem = backends.triton_problem(device)
        print(f"Triton kernels on {device.type}: {'yes' if problem is None else f'no, {problem}'}")
        chosen = backends.for_loss("auto", device)
        print(f"backend 'auto' on {device.type}: {chosen.name}")


if __name__ == "__main__":
    main()
