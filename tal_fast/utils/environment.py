"""Hardware, package versions and commit of the environment."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tal_fast import __version__

PACKAGES = ("torchvision", "triton", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "timm", "wandb")
"""Packages whose versions ``describe`` lists."""


def version_of(package: str) -> str:
    """Installed version of a package, or ``not installed``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[str]:
    """One line for the CPU and for each GPU."""
    lines = [f"cpu: cores {os.cpu_count()}, threads in use {torch.get_num_threads()}"]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        lines.append(f"cuda:{i}: {p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    if len(lines) == 1:
        lines.append(f"no GPU: torch {torch.__version__} is built with CUDA {torch.version.cuda or 'no support'}")
    return lines


def environment() -> dict[str, Any]:
    """Hardware, versions, load and commit, to be stored with a measurement."""
    return {
        "cpu": _cpu_model() or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "tal_fast": __version__,
        "commit": commit(),
    }


def code_digest() -> str:
    """SHA-256 of the package's source files, as hexadecimal; takes 7 ms."""
    digest = hashlib.sha256()
    kernels = find_spec("tal_fast.kernels")  # lies elsewhere in an editable install
    for folder in (Path(__file__).parents[1], *map(Path, (kernels and kernels.submodule_search_locations) or ())):
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def describe(version: str) -> list[str]:
    """Versions of tal_fast, which is given, and of the packages, and the devices, one line each."""
    return [
        f"tal_fast {version}, Python {platform.python_version()}, torch {torch.__version__}",
        *(f"  {package}: {version_of(package)}" for package in PACKAGES),
        *devices(),
    ]


def _cpu_model() -> str | None:
    """Model name of the first CPU, where the system lists it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def commit() -> str | None:
    """Commit of the source tree, marked ``-dirty`` if it has changes; None outside a git repository."""
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
