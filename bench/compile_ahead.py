"""Triton kernels compiled in parallel processes, into Triton's cache on disk, before a benchmark needs them.

``python -m bench.compile_ahead GROUPS`` does it for groups of ``bench.gpu``. A kernel takes seconds on one core.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch

from tal_fast import TALLoss
from tal_fast.kernels.launch import replaced

Job = Callable[[], object]


def compile_only(launch: Any) -> None:
    """Compile a launch instead of running it."""
    launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.constants, **launch.options)


def step_job(
    variant: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, features_dtype: torch.dtype, device: str
) -> None:
    """Whole step of a TALLoss, at the sizes (B, C, D, N)."""
    rows, classes, width, entries = sizes
    loss_fn = TALLoss(variant, queue_size=entries, backend="triton").to(device)  # type: ignore[arg-type]
    logits = torch.empty(rows, classes, dtype=dtype, device=device, requires_grad=True)
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    loss = loss_fn(logits, torch.empty(rows, width, dtype=features_dtype, device=device), labels)
    torch.autograd.grad(loss, logits)


def work(job: Job) -> str | None:
    """Compile what a job would launch; the error, if there is one."""
    try:
        with replaced(compile_only):
            job()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def compile_all(jobs: Sequence[Job]) -> list[str | None]:
    """Run the jobs, which must be picklable, with their launches compiled only; the errors."""
    processes = max(1, min(len(jobs), 12, (os.cpu_count() or 2) - 2))
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        return list(pool.map(work, jobs))


def main() -> None:
    from bench import bench_step, gpu

    only = sys.argv[1].split(",") if len(sys.argv) > 1 else gpu.GROUPS
    jobs: list[Job] = []
    if "step" in only:
        for peer, shape, name in gpu.STEPS:
            dtype = getattr(torch, name)
            jobs.append(partial(step_job, bench_step.variant_of(peer), shape, dtype, dtype, "cuda"))
    if "loss" in only:
        for dtype in (torch.bfloat16, torch.float32):
            for rows, classes in gpu.LOSS_SHAPES:
                for variant in ("paper", "released"):
                    jobs.append(partial(step_job, variant, (rows, classes, 16, 16), dtype, torch.float32, "cuda"))
    if "search" in only:
        for rows, width, entries in gpu.SEARCHES:
            jobs.append(partial(step_job, "paper", (rows, 16, width, entries), torch.float32, torch.float32, "cuda"))
    errors = [error for error in compile_all(jobs) if error]
    print(f"{len(jobs)} sizes compiled ahead, {len(errors)} with errors{': ' * bool(errors)}{'; '.join(errors[:3])}")


if __name__ == "__main__":
    main()
