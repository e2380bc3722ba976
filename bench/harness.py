"""Shared parts of the benchmarks: environment, limits of the machine, timers, and the correctness gate."""

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
"""Runs in a turn. Only the first one meets the caches that another function left behind, which a p20 does not see."""

PEERS = ("triton", "numpy", "scipy", "faiss-cpu", "liger-kernel", "quack-kernels")


class CannotRun(Exception):
    """A peer is not installed or not made for this size."""


def environment() -> dict[str, Any]:
    """Environment of a measurement, with the CPU's vector instructions and the versions of the peers."""
    cpu_info = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    flags = next((line.split(":", 1)[1].split() for line in cpu_info if line.startswith("flags")), [])
    return {
        **env.environment(),
        "vectors": "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else platform.machine(),
        **{name: version_of(name) for name in PEERS},
    }


def version_of(package: str) -> str | None:
    """Installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def copy_bandwidth(device: torch.device, megabytes: int = 256) -> float:
    """Bytes read and written per second by a large copy on the device, with the threads in use.

    256 MB are eight times the largest cache of the measured CPUs and five times an H100's. On GPUs by a kernel: on an
    H200 that moves 4,270 GB/s, ``copy_``, which takes the copy engine, 2,740.
    """
    source = torch.ones(megabytes << 19, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        if device.type == "cuda":
            torch.mul(source, 2, out=target)
        else:
            target.copy_(source)

    taken = GraphTimer(device)([copy]) if device.type == "cuda" else clock(copy, 5, clock_of(torch.get_num_threads()))
    return 2 * source.nbytes / float(np.percentile(taken, 20))


def arithmetic_rate(device: torch.device, size: int = 1024) -> float:
    """Floating-point operations per second of a float32 matrix product, with the threads in use (no TF32 on GPUs)."""
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
    """Copy bandwidth and arithmetic rate, measured once per process and number of threads."""
    with threads_set_to(threads):
        return {
            "threads": threads,
            "copy_bytes_per_s": copy_bandwidth(device),
            "flop_per_s": arithmetic_rate(device),
        }


class threads_set_to:
    """Context manager that sets PyTorch's number of threads."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


def clock_of(threads: int) -> Callable[[], float]:
    """Clock for a number of threads: CPU time of the thread for one, the wall clock for more.

    Other processes do not lengthen CPU time; on the wall clock they lengthen a slow peer's runs more than a fast one's.
    """
    return time.perf_counter if threads > 1 else time.thread_time


def clock(run: Callable[[], object], repeats: int, timer: Callable[[], float] = time.perf_counter) -> list[float]:
    """Seconds of each run after one warm-up run."""
    run()
    taken = []
    for _ in range(repeats):
        start = timer()
        run()
        taken.append(timer() - start)
    return taken


class GraphTimer:
    """Device time of functions on a GPU by replaying a CUDA graph that runs all of them once.

    Give it the same work on several sets of inputs that together exceed the L2 cache three times
    (``sets_beyond_cache``): every launch then reads its inputs from device memory, as in training. A graph replay has
    no launches from Python, so only the device is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, calls: Sequence[Callable[[], object]], replays: int = 30) -> list[float]:
        """Seconds per call, one value per replay."""
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


def events(calls: Sequence[Callable[[], object]], repeats: int = 30) -> list[float]:
    """Seconds per call between two events on a GPU, the launches from Python included; one value per repeat."""
    taken = []
    for repeat in range(repeats + 1):  # the first warms up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        if repeat:
            taken.append(start.elapsed_time(end) / 1e3 / len(calls))
    return taken


def host_time(call: Callable[[], object], wait: Callable[[], object], repeats: int = 50, rounds: int = 5) -> float:
    """Least seconds, over rounds, that the host takes to enqueue a call; ``wait`` ends what a round has enqueued."""
    best = float("inf")
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - start) / repeats)
    wait()
    return best


def kernels_launched(call: Callable[[], object]) -> list[Any]:
    """Triton launches of a call (``kernels.launch.Launch`` with their tensors), in order; they run too."""
    from tal_fast.kernels.launch import Launch, replaced

    found, run = [], Launch.run

    def record(launch: Launch) -> None:
        found.append(launch)
        run(launch, *launch.tensors)

    with replaced(record):
        call()
    return found


def instruction_rate(device: torch.device) -> float | None:
    """Float32 instructions a second of all threads of an NVIDIA GPU at the clock it runs at; None for others."""
    if torch.version.hip is not None:
        return None
    p = torch.cuda.get_device_properties(device)
    lanes = 64 if (p.major, p.minor) == (8, 0) else 128  # of a multiprocessor, a clock
    busy = torch.rand(4096, 4096, device=device)
    for _ in range(20):  # an idle GPU clocks down; these take 50 ms on an H100, during which the clock is read
        torch.mm(busy, busy)
    try:
        clock_rate = 1e6 * torch.cuda.clock_rate(device)
    except Exception:  # it needs the package nvidia-ml-py
        clock_rate = 1e3 * getattr(p, "clock_rate", 1_755_000)
    return p.multi_processor_count * lanes * clock_rate


def sets_beyond_cache(device: torch.device, bytes_read: int) -> int:
    """Number of input sets (at most 512) that together exceed a GPU's L2 cache three times.

    1 on CPUs, where a step finds the logits in the cache because the last layer has just written them.
    """
    if device.type != "cuda":
        return 1
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(512, 1 + 3 * cache_bytes // max(1, bytes_read)))


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds, and the number of repeats."""
    p20, p50, p80 = np.percentile(np.asarray(seconds) * 1e3, [20, 50, 80])
    return {"p20_ms": float(p20), "p50_ms": float(p50), "p80_ms": float(p80), "repeats": len(seconds)}


def ratio_to_floor(seconds: Sequence[float], floor: Sequence[Sequence[float]]) -> dict[str, float]:
    """Ratio of the runs to a floor that ran in turns with them, with a 95% interval.

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


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative error ‖got − want‖ / ‖want‖ in float64."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))


def agree(what: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Correctness gate: a peer with a wrong result is not timed.

    Raises:
        AssertionError: the relative error exceeds the tolerance.
    """
    error = relative_error(got, want)
    if not error <= tolerance:
        raise AssertionError(f"{what} is off by {error:.2e} (limit {tolerance:.0e}); not timed")


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)
    print(f"wrote {path}")
