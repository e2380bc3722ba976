"""Functions run by several processes of a gloo group."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes


def run_ranks(function: Callable[..., Any], world_size: int, folder: Path, *args: Any) -> list[Any]:
    """Results of ``function(rank, *args)``, a module's function, on each rank of a group of new processes."""
    # The server imports the packages once, and the processes are forked from it.
    multiprocessing.set_forkserver_preload(["torch", "tal_fast.loss", function.__module__])
    start_processes(_worker, (function, world_size, str(folder), args), world_size, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]


def _worker(rank: int, function: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, store=store, timeout=timedelta(seconds=60))
    torch.save(function(rank, *args), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
