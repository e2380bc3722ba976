"""What every benchmark here rests on: the machine's description and limits, clocks, and the correctness gate."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tal_fast.utils import environment as env

BLOCK = 10
"""Runs in a turn: each function is timed with its own caches and not with those that another, perhaps a thousand times
larger, has left behind. The first run of a block meets them, which a p20 does not see."""

PEERS = ("triton", "numpy", "scipy", "faiss-cpu", "liger-kernel", "quack-kernels")


class CannotRun(Exception):
    """A peer is not installed here or not made for this size; the message says which."""


# ---- The machine ----------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """``tal_fast.utils.environment.environment``, and what only benchmarks ask: vector instructions, versions of the peers."""
    cpu_info = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    flags = next((line.split(":", 1)[1].split() for line in cpu_info if line.startswith("flags")), [])
    return {
        **env.environment(),
        "vectors": "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else platform.machine(),
        **{name: version_of(name) for name in PEERS},
    }


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def copy_bandwidth(device: torch.device, megabytes: int = 256) -> float:
    """Bytes read and written a second by a large copy on the device, with the threads in use: the limit of whatever
    is bound by memory. 256 MB are eight times the largest cache of the CPUs at hand, 20 times an H100's."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    taken = GraphTimer(device)([copy]) if device.type == "cuda" else clock(copy, 5, clock_of(torch.get_num_threads()))
    return 2 * source.numel() / float(np.percentile(taken, 20))


def arithmetic_rate(device: torch.device, size: int = 1024) -> float:
    """Floating-point operations a second of a float32 matrix product, with the threads in use: the limit of whatever
    is bound by arithmetic. (On GPUs without TF32, so that it is the plain units' rate.)"""
    a, b = torch.rand(size, size, device=device), torch.rand(size, size, device=device)
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, b, out=out)

    if device.type == "cuda":
        taken = GraphTimer(device)([product] * 10)
    else:
        taken = clock(product, 10, clock_of(torch.get_num_threads()))
    return 2 * size**3 / float(np.percentile(taken, 20))


@cache
def limits(device: torch.device, threads: int) -> dict[str, float]:
    """Both limits, measured once a process for each number of threads."""
    with threads_set_to(threads):
        return {
            "threads": threads,
            "copy_bytes_per_s": copy_bandwidth(device),
            "flop_per_s": arithmetic_rate(device),
        }


class threads_set_to:
    """PyTorch's threads within a block."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


# ---- Clocks ---------------------------------------------------------------------------------------------------------


def clock_of(threads: int) -> Callable[[], float]:
    """CPU time where one thread does the work: other processes do not lengthen it, and they would lengthen a slow
    peer's runs, which they always interrupt, more than a fast one's. The wall clock where more threads do."""
    return time.perf_counter if threads > 1 else time.thread_time


def clock(run: Callable[[], object], repeats: int, timer: Callable[[], float] = time.perf_counter) -> list[float]:
    """Seconds of each run, after one that is not counted."""
    run()
    taken = []
    for _ in range(repeats):
        start = timer()
        run()
        taken.append(timer() - start)
    return taken


class GraphTimer:
    """Device time of functions on a GPU, by replaying a CUDA graph that runs all of them once.

    To be given the same work on several sets of inputs, together at least three times the L2 cache
    (``sets_beyond_cache``): every launch then reads its inputs from device memory, as it does in training. A graph
    replay costs no launch from Python, so that what is timed is the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, calls: Sequence[Callable[[], object]], replays: int = 30) -> list[float]:
        """Seconds of one call, one figure a replay."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in list(calls[:2]) * 2:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]  # outputs stay alive, so that no launch reuses another's memory
        graph.replay()
        taken = []
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3 / len(calls))
        del kept, graph
        return taken


def sets_beyond_cache(device: torch.device, bytes_read: int) -> int:
    """How many sets of inputs together exceed three times a GPU's L2 cache (at most 512); 1 on CPUs, where a step finds
    the logits in the cache, for the last layer has just written them."""
    if device.type != "cuda":
        return 1
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(512, 1 + 3 * cache_bytes // max(1, bytes_read)))


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds, and how many repeats they rest on."""
    p20, p50, p80 = np.percentile(np.asarray(seconds) * 1e3, [20, 50, 80])
    return {"p20_ms": float(p20), "p50_ms": float(p50), "p80_ms": float(p80), "repeats": len(seconds)}


def ratio_to_floor(seconds: Sequence[float], floor: Sequence[Sequence[float]]) -> dict[str, float]:
    """How many times longer than the floor, which ran in turns with it, and a 95% interval.

    Each block of ``BLOCK`` runs is divided by the mean of the blocks of the floor before and after it (medians all), so
    that a change of the machine's load meets both; the interval is a percentile bootstrap of the median over blocks.

    Args:
        seconds: runs, in order.
        floor: blocks of runs of the floor; the i-th came before runs i·BLOCK to (i + 1)·BLOCK, the last after all.
    """
    floors = np.array([np.median(block) for block in floor])
    blocks = [np.median(seconds[i : i + BLOCK]) for i in range(0, len(seconds), BLOCK)]
    ratios = np.array(blocks) / (0.5 * (floors[:-1] + floors[1:]))[: len(blocks)]
    draws = np.random.default_rng(0).choice(ratios, (1000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"ratio": float(np.median(ratios)), "ratio_low": float(low), "ratio_high": float(high)}


# ---- The gate and the file ------------------------------------------------------------------------------------------


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖, in float64."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))


def agree(what: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """The correctness gate: nothing is timed whose result is off.

    Raises:
        AssertionError: naming what, how far, and the limit.
    """
    error = relative_error(got, want)
    if not error <= tolerance:
        raise AssertionError(f"{what} is off by {error:.2e} (limit {tolerance:.0e}); not timed")


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)
    print(f"wrote {path}")
