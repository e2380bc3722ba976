"""Timing and reporting shared by the benchmarks."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


def environment() -> dict[str, Any]:
    """Hardware, versions and commit of a measurement."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    triton: str | None
    try:
        import triton as triton_module

        triton = triton_module.__version__
    except ImportError:
        triton = None
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in (Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else [])
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "commit": commit.stdout.strip() or None,
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds, and how many repeats they rest on."""
    p20, p50, p80 = np.percentile(np.asarray(seconds) * 1e3, [20, 50, 80])
    return {"p20_ms": float(p20), "p50_ms": float(p50), "p80_ms": float(p80), "repeats": len(seconds)}


def time_side_by_side(
    functions: dict[str, Callable[[], object]], repeats: int, seconds: float, block: int = 10
) -> dict[str, dict[str, float]]:
    """Time several functions in turns, so that a change of the machine's load meets all of them.

    A turn is a block of consecutive runs, so that each is timed with its own caches and not with those that another,
    perhaps a thousand times larger, has left behind.

    Args:
        functions: name -> what to run once.
        repeats: most runs of each.
        seconds: most time spent on each, after which it is left out of further turns (but one block is always made).
        block: runs in a turn.
    """
    for run in functions.values():
        run()
        run()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(max(1, repeats // block)):
        for name, run in functions.items():
            if sum(taken[name]) > seconds:
                continue
            for _ in range(min(block, repeats)):
                start = time.perf_counter()
                run()
                taken[name].append(time.perf_counter() - start)
    return {name: percentiles(t) for name, t in taken.items()}


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)
    print(f"wrote {path}")
