"""Ranks and devices of a distributed run, as torchrun starts it; a run of one process needs no process group."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from reprlib import repr as short
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tal_fast.utils.process import world_size as launched_processes

T = TypeVar("T")

START_TIMEOUT = timedelta(minutes=30)
"""Longest wait for another rank before training: compiling and listing a million files take minutes."""

GRACE_S = 5.0
"""Seconds between the ranks' noticing that one is late: how far apart they began to wait."""


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
            dist.init_process_group(backend, timeout=START_TIMEOUT, **_fresh_store(rank, world_size))
        return Ranks(rank, world_size, chosen)

    def stop(self) -> None:
        """Leave the process group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def limit_waiting(self, seconds: float) -> None:
        """Let the CPU's collectives fail from now on when another rank is this late.

        NCCL's keep ``START_TIMEOUT``: their watchdog would abort the process without a word, and the CPU's, which the
        ranks exchange before every step, notice the same rank.
        """
        if self.world_size > 1:
            group: Any = dist.group.WORLD
            backend = group._get_backend(torch.device("cpu"))
            backend = getattr(backend, "wrapped_pg", backend)  # with TORCH_DISTRIBUTED_DEBUG=DETAIL
            backend._set_default_timeout(timedelta(seconds=seconds))

    def check_same(self, values: dict[str, Any]) -> None:
        """Raise ValueError on every rank if the values of one differ from rank 0's; the message names rank and values.

        Ranks that compute differently would train to other numbers than one configuration's, or wait for each other.
        """
        if self.world_size == 1:
            return
        everyone: list[dict[str, Any]] = [{}] * self.world_size
        dist.all_gather_object(everyone, values)
        for rank, theirs in enumerate(everyone):
            names = [name for name in {**everyone[0], **theirs} if everyone[0].get(name) != theirs.get(name)]
            if names:
                told = "; ".join(f"{n} is {short(theirs.get(n))}, not {short(everyone[0].get(n))}" for n in names[:5])
                raise ValueError(f"rank {rank} differs from rank 0 ({told}); start all ranks with the same command")

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
        """Call a function on rank 0 and give its result, or the ValueError or OSError it raises, to every rank."""
        if self.world_size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except (ValueError, OSError) as error:
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


def name_lost_ranks(error: Exception) -> str | None:
    """Line of stderr that names the ranks that a failed collective waited for; None for any other error.

    The ranks that fail in it, which they do at the same time, say so in the store; the others are those that were lost.
    The first of them gets the line and the others an empty one.
    """
    text = str(error)
    if not dist.is_initialized() or not (isinstance(error, dist.DistError) or "/gloo/" in text):
        return None
    late = "imed out" in text or "imeout" in text
    rank, ranks = dist.get_rank(), set(range(dist.get_world_size()))
    here, grace = {rank}, GRACE_S if late else 1.0

    def ask() -> None:
        store: Any = dist.distributed_c10d._get_default_store()
        end = time.monotonic() + grace
        with contextlib.suppress(RuntimeError):  # the store may be on the machine that was lost
            store.set(f"failed/{rank}", "")
            while here < ranks and time.monotonic() < end:
                here.update([other for other in ranks - here if store.check([f"failed/{other}"])])
                time.sleep(0.02)

    thread = threading.Thread(target=ask, daemon=True)  # a store that hangs too must not hold this process
    thread.start()
    thread.join(2 * grace)
    if rank != min(here):
        return ""
    lost = sorted(ranks - here)
    who = f"rank{'s' * (len(lost) > 1)} {', '.join(map(str, lost))}" if lost else "the connection between the ranks"
    waited = re.search(r"(\d+) ?ms", text)
    within = f"within {int(waited[1]) / 1000:g} s" if waited else "in time"
    what = f"did not answer {within} and may hang" if late else "was lost"
    where = f" (rank {rank})" if rank else ""
    again = "run the same command again (training: with --resume auto), unless torchrun does"
    return f"error{where}: {who} {what}; {again}\n"


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
