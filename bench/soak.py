"""Long run of the queue: ``python -m bench.soak --pushes 24000000``.

Random batches are pushed to two queues, one of the C++ extension with its index and one of plain PyTorch, and to a
model of them: an array that is cut to its newest entries. Batches are of no row up to more than the capacity, partly
rejected or not finite, from a distribution that drifts, jumps and repeats itself. Now and then a queue is reset, saved
and loaded, or copied. At random moments both must hold the model's entries, and the extension's distances must be those
of brute force, to the bit. The last of the runs has eight threads that push to one queue. The first difference ends the
run with an error; the result is written as JSON.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.harness import environment, write_json
from tal_fast import FeatureQueue

RUNS = ((50, torch.float32), (5_000, torch.float32), (30_000, torch.float64), (300_000, torch.float32))
"""Capacities and dtypes; the pushes are shared out equally among these runs and the one of the threads."""
THREADS = 8
CHECKS = 100  # of each run
QUERIES = 64
LARGEST_GROWTH = 32  # MiB from a tenth of the pushes to the end


class Failed(AssertionError):
    """The queues and the model differ."""


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise Failed(what)


class Entries:
    """Drifting source of batches.

    Args:
        rng: source of randomness.
        capacity: of the queue; sizes of batches go beyond it.
        dtype: of the entries.
    """

    def __init__(self, rng: np.random.Generator, capacity: int, dtype: torch.dtype) -> None:
        self.rng, self.capacity, self.dtype = rng, capacity, dtype
        self.center = np.array([0.5, 0.25])

    def draw(self, rows: int) -> Tensor:
        """(2, rows) means and deviations."""
        self.center += 1e-3 * self.rng.standard_normal(2)
        if self.rng.random() < 1e-3:
            self.center = self.rng.random(2) * 10.0 ** self.rng.integers(-3, 4)
        spread = 10.0 ** -self.rng.integers(0, 5)
        values = self.center[:, None] * (1 + spread * self.rng.standard_normal((2, rows)))
        if self.rng.random() < 0.1:
            values = values[:, :1].repeat(rows, 1) if rows else values
        return torch.from_numpy(values).to(self.dtype)

    def batch(self) -> tuple[Tensor, Tensor | None]:
        """(2, B) entries and their (B,) acceptance, or None for all."""
        kind = self.rng.random()
        most = 8 if kind < 0.1 else 512 if kind < 0.9 else 2048
        rows = int(self.rng.integers(0, most)) if kind < 0.999 else min(3 * self.capacity, 1_000_000)
        entries = self.draw(rows)
        if rows and self.rng.random() < 0.2:
            bad = torch.from_numpy(self.rng.integers(0, rows, 3))
            entries[int(self.rng.integers(2)), bad] = float(self.rng.choice([np.nan, np.inf, -np.inf]))
        if self.rng.random() < 0.3:
            return entries, None
        return entries, torch.from_numpy(self.rng.random(rows) < self.rng.random())


class Model:
    """Plain model of a queue: the newest entries of a growing array, which is cut now and then."""

    def __init__(self, capacity: int, dtype: torch.dtype) -> None:
        self.capacity = capacity
        self.held = torch.zeros(2, 2 * capacity + 4096, dtype=dtype)
        self.length = 0

    def push(self, entries: Tensor, accepted: Tensor | None) -> int:
        """Append the accepted entries that are finite; returns their number."""
        keep = entries.isfinite().all(0)
        kept = entries[:, keep if accepted is None else keep & accepted]
        count = kept.shape[1]
        kept = kept[:, -self.capacity :]
        if self.length + kept.shape[1] > self.held.shape[1]:
            newest = self.entries().clone()
            self.length = newest.shape[1]
            self.held[:, : self.length] = newest
        self.held[:, self.length : self.length + kept.shape[1]] = kept
        self.length += kept.shape[1]
        return count

    def entries(self) -> Tensor:
        """(2, n) entries, oldest first."""
        return self.held[:, max(0, self.length - self.capacity) : self.length]


def check(queues: dict[str, FeatureQueue], expected: Tensor, queries: Tensor) -> None:
    """Raise ``Failed`` unless the queues hold the expected entries and find the nearest ones."""
    for backend, queue in queues.items():
        expect(torch.equal(torch.stack(queue.contents()), expected), f"the {backend} queue holds other entries")
    squared = torch.full(queries.shape[1:], torch.inf, dtype=queries.dtype)
    for part in expected.split(16384, dim=1):
        squared = torch.minimum(squared, (queries[:, :, None] - part[:, None]).square().sum(0).amin(1))
    brute = torch.from_numpy(np.sqrt(squared.numpy()))  # correctly rounded, as torch.sqrt is not everywhere
    expect(torch.equal(queues["native"].nearest(*queries), brute), "the index finds another distance than brute force")
    torch.testing.assert_close(queues["reference"].nearest(*queries), brute, rtol=1e-6, atol=0)


def disturb(queues: dict[str, FeatureQueue], model: Model, rng: np.random.Generator) -> str:
    """Reset the queues, or replace them by a copy or one that loaded their state; returns which."""
    event = str(rng.choice(["reset", "saved and loaded", "copied"]))
    for backend, queue in queues.items():
        if event == "reset":
            queue.reset()
        elif event == "copied":
            queues[backend] = copy.deepcopy(queue)
        else:
            other = FeatureQueue(queue.capacity, dtype=queue.dtype, backend=backend)
            other.load_state_dict(copy.deepcopy(queue.state_dict()))
            queues[backend] = other
    if event == "reset":
        model.length = 0
    return event


def resident_mib() -> float:
    """Memory of this process in MiB, without what it has freed; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if statm.exists() else 0.0


def soak(capacity: int, dtype: torch.dtype, pushes: int, seed: int = 0) -> dict[str, Any]:
    """Push at least so many entries to both queues and the model; counts of what was done."""
    rng = np.random.default_rng(seed)
    source, model = Entries(rng, capacity, dtype), Model(capacity, dtype)
    queues = {name: FeatureQueue(capacity, dtype=dtype, backend=name) for name in ("native", "reference")}
    done, calls, counts, memory = 0, 0, Counter[str](), 0.0
    seconds = dict.fromkeys(queues, 0.0)
    next_check = 0.0
    while done < pushes:
        entries, accepted = source.batch()
        for name, queue in queues.items():
            start = time.perf_counter()
            queue.push(*entries, accepted)
            seconds[name] += time.perf_counter() - start
        done += model.push(entries, accepted)
        calls += 1
        if done >= next_check:
            queries = torch.cat([source.draw(QUERIES // 2), model.entries()[:, : QUERIES // 2]], dim=1)
            check(queues, model.entries(), queries)
            counts["checks"] += 1
            next_check = done + pushes / CHECKS * 2 * rng.random()
            if rng.random() < 0.2:
                counts[disturb(queues, model, rng)] += 1
        if not memory and done >= pushes / 10:
            memory = resident_mib()
    check(queues, model.entries(), source.draw(QUERIES))
    del entries, accepted
    growth = resident_mib() - memory
    expect(growth < LARGEST_GROWTH, f"memory grew by {growth:.0f} MiB")
    return {
        "capacity": capacity, "dtype": str(dtype).removeprefix("torch."), "pushes": done, "calls": calls,
        "checks": counts.pop("checks") + 1, **counts,
        **{f"{name}_us_per_call": 1e6 * spent / calls for name, spent in seconds.items()},
        "memory_growth_mib": growth,
    }  # fmt: skip


def soak_threads(capacity: int, pushes: int) -> dict[str, Any]:
    """Push from several threads to one queue, whose entries all have a deviation of their mean + 1."""
    queue = FeatureQueue(capacity, backend="native")
    rows = 500
    steps = -(-pushes // (rows * THREADS))

    def push(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            mean = torch.rand(rows, generator=generator)
            queue.push(mean, mean + 1)
            expect(bool(queue.nearest(mean[:9], mean[:9] + 1).isfinite().all()), "a thread found no entry")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(push, range(THREADS)))
    done = THREADS * steps * rows
    mean, std = queue.contents()
    expect(torch.equal(std, mean + 1), "an entry has another's deviation")
    expect(int(queue.ring.cursor[0]) == done % capacity and len(queue) == min(done, capacity), "a push was lost")
    queries = torch.rand(2, QUERIES)
    twin = FeatureQueue(capacity, backend="reference")
    twin.push(mean, std)
    check({"native": queue, "reference": twin}, torch.stack([mean, std]), queries)
    return {"capacity": capacity, "dtype": "float32", "threads": THREADS, "pushes": done, "calls": THREADS * steps}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 if the queues and the model agree to the end."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pushes", type=int, default=24_000_000, help="entries pushed in all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the batches (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.perf_counter()
    share = -(-args.pushes // (len(RUNS) + 1))
    runs = []
    for capacity, dtype in RUNS:
        runs.append(soak(capacity, dtype, share, args.seed))
        print(runs[-1], flush=True)
    runs.append(soak_threads(RUNS[-1][0], share))
    print(runs[-1], flush=True)
    if args.out is not None:
        total = {"pushes": sum(run["pushes"] for run in runs), "seconds": time.perf_counter() - started}
        write_json(args.out, {"environment": environment(), "seed": args.seed, **total, "runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
