"""Versions, devices and commit of the environment."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import tal_fast

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


def environment() -> dict[str, Any]:
    """Hardware, versions and commit, to lie beside a measurement."""
    cpu_info = Path("/proc/cpuinfo")
    models = (
        [line for line in cpu_info.read_text().splitlines() if line.startswith("model name")]
        if cpu_info.exists()
        else []
    )
    return {
        "cpu": models[0].split(":", 1)[1].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "tal_fast": tal_fast.__version__,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Of the source tree this runs from, marked if it has changes; None where it is installed without one."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        )
    except OSError:
        return None
    return git.stdout.strip() or None


def describe() -> list[str]:
    """Versions of the packages, and the devices, one line each."""
    return [
        f"tal_fast {tal_fast.__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        *(f"  {package}: {version_of(package)}" for package in PACKAGES),
        *devices(),
    ]
