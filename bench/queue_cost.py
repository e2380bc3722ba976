"""What the queue costs on the CPU as it grows: ``python -m bench.queue_cost``.

Search of a batch by the index and by brute force, and push of a batch, the index's merges included: the mean over at
least a tenth of the queue, because merges are rare and long.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from bench.harness import environment, time_side_by_side, write_json
from tal_fast import FeatureQueue

ROWS = 128
SIZES = (20_000, 30_000, 880_880, 10_000_000)


def entries(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return 0.4 + 0.2 * torch.rand(count), 0.2 + 0.1 * torch.rand(count)


def measure(size: int) -> dict[str, Any]:
    """Milliseconds a batch at one queue size."""
    queue = FeatureQueue(size, backend="native")
    for start in range(0, size, 100_000):
        queue.push(*entries(min(100_000, size - start)))
    mean, std = entries(ROWS)
    ring = queue.mean_ring, queue.std_ring, queue.cursor
    brute = torch.ops.tal_fast.nearest(*ring, mean, std, None)
    if not torch.equal(queue.nearest(mean, std), brute):
        raise SystemExit(f"the index disagrees with brute force at N = {size}; not timed")
    times = time_side_by_side(
        {
            "search": lambda: queue.nearest(mean, std),
            "brute force": lambda: torch.ops.tal_fast.nearest(*ring, mean, std, None),
        },
        repeats=200,
        seconds=3.0,
    )
    batches = [entries(ROWS) for _ in range(64)]
    pushes = max(2000, size // 10 // ROWS)
    start_time = time.perf_counter()
    for i in range(pushes):
        queue.push(*batches[i % 64])
    push = (time.perf_counter() - start_time) / pushes * 1e3
    return {"N": size, "B": ROWS, "times": times, "push_mean_ms": push, "pushes": pushes * ROWS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one small queue, to see that it runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result: dict[str, Any] = {"what": "queue on the CPU", "environment": environment(), "threads": args.threads}
    result["results"] = []
    for size in (5_000,) if args.smoke else SIZES:
        row = measure(size)
        search, brute = (row["times"][name]["p20_ms"] for name in ("search", "brute force"))
        print(
            f"N {size:10,}  search {search * 1e3:7.1f} us  brute force {brute * 1e3:9.1f} us"
            f"  push {row['push_mean_ms'] * 1e3:6.1f} us  search + push {(search + row['push_mean_ms']) * 1e3:7.1f} us"
        )
        result["results"].append(row)
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
