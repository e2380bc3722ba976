"""Ranks and devices of a distributed run, as torchrun starts it; a run of one process needs no process group."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tal_fast.utils.process import world_size as launched_processes

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Rank of this process over all machines, number of ranks, and the collectives between them."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0

    @staticmethod
    def start(device: str) -> Ranks:
        """Join the run that torchrun describes in the environment, if any.

        ``device`` is ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``; without torchrun, any device of PyTorch.
        Raises ValueError if it cannot be used, or there is no GPU for this rank.
        """
        world_size = launched_processes()
        rank = int(os.environ.get("RANK", "0"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if device not in ("auto", "cpu", "cuda"):
            if world_size > 1:
                raise ValueError(f"device is {device!r} but torchrun's processes choose theirs; use auto, cpu or cuda")
            return Ranks(0, 1, torch.device(choose_device(device)))
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device == "cuda" and gpus == 0:
            raise ValueError("device is 'cuda' but PyTorch sees no GPU here; use --device cpu or auto")
        on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
        if on_gpu and local_rank >= gpus:
            raise ValueError(
                f"there are {gpus} GPUs here but torchrun started a process number {local_rank + 1}; "
                f"use --nproc-per-node={gpus} or --device cpu"
            )
        chosen = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(chosen)
        if world_size > 1 and not dist.is_initialized():
            # gloo on GPUs too: stop flags and states are exchanged on the CPU without waiting for the GPU.
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            dist.init_process_group(backend, **_fresh_store(rank, world_size))
        return Ranks(rank, world_size, chosen)

    def stop(self) -> None:
        """Leave the process group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.max(0)

    def max(self, value: int) -> int:
        """Maximum over all ranks; waits for the other processes but not for a GPU."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Values of all ranks in rank order, on rank 0; an empty list elsewhere."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values)
        return values or []

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 and give its result, or the ValueError it raises, to every rank."""
        if self.world_size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except ValueError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, 0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Copy rank 0's buffers, such as the running statistics of BatchNorm, to every rank."""
        if self.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def average_buffers(self, module: nn.Module) -> None:
        """Average the floating-point buffers, such as BatchNorm's statistics, over all ranks."""
        if self.world_size > 1:
            for buffer in filter(torch.is_floating_point, module.buffers()):
                self.sum(buffer).div_(self.world_size)


def choose_device(name: str) -> str:
    """Name of a device, if it is usable: ``auto`` becomes cuda if there is a GPU, else cpu."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as problem:
        raise ValueError(f"the device {name!r} cannot be used: {str(problem).splitlines()[0]}") from None
    return name


def _fresh_store(rank: int, world_size: int) -> dict[str, Any]:
    """Arguments of ``init_process_group`` for processes that torchrun has restarted.

    torchrun's store, where ranks leave their addresses, outlives them, and restarted ranks would connect to those of
    the attempt before (pytorch issue 135712); a prefix for each attempt separates them.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return {"store": dist.PrefixStore(f"attempt-{attempt}", store), "rank": rank, "world_size": world_size}
