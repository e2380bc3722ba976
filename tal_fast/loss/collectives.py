"""Collectives of ``queue_scope="global"``, with which k ranks act as one with the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

_rows_checked: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""Number of rows that all ranks of a group had when they were last compared."""

# The first name is that of newer PyTorch versions, which warn of the second.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Tensors of all ranks, stacked in rank order: (world, *shape). Their shapes must agree."""
    world = dist.get_world_size(group)
    out = tensor.new_empty((world * tensor.shape[0], *tensor.shape[1:]))
    _all_gather(out, tensor.contiguous(), group=group)
    return out.view(world, *tensor.shape)


def check_equal_rows(rows_of_all: Tensor, rows: int, group: dist.ProcessGroup | None) -> None:
    """Raise ValueError, on every rank alike, unless all ranks have this rank's number of rows.

    ``rows_of_all`` is (world,), from a collective. On GPUs, where reading it waits for the device, it is read when this
    rank's number of rows is new to the group: in the first step and where it changes.
    """
    group = group or dist.group.WORLD
    if torch.compiler.is_compiling() or (rows_of_all.device.type != "cpu" and _rows_checked.get(group) == rows):
        return
    found = [int(n) for n in rows_of_all.tolist()]
    others = [f"rank {rank} has {n}" for rank, n in enumerate(found) if n != found[0]]
    if others:
        raise ValueError(
            f"all ranks must have the same number of rows, but rank 0 has {found[0]} and {', '.join(others[:8])}; "
            "fill up with rows labelled ignore_index"
        )
    _rows_checked[group] = rows


def check_rows_once(rows: int, like: Tensor, group: dist.ProcessGroup) -> None:
    """``check_equal_rows`` in the group's first step, with a collective of its own, on the device of ``like``."""
    if group not in _rows_checked and not torch.compiler.is_compiling():
        check_equal_rows(gather(like.new_full((1,), rows, dtype=torch.int64), group).view(-1), rows, group)


def combine_summaries(summary: Tensor, rows: int, group: dist.ProcessGroup | None) -> Tensor:
    """``reference.batch_summary`` of all ranks' rows, its sums divided by the number of ranks.

    The number of rows of each rank travels along; raises ValueError, on every rank alike, if they differ.

    Dividing by the mean number of valid rows per rank (or of their class weights' sum) scales each rank's mean loss by
    world · valid_local / valid_all; DDP's averaging over the ranks then gives the gradient of the whole batch.
    """
    summaries = gather(torch.cat([summary, summary.new_full((1,), rows)]), group)
    check_equal_rows(summaries[:, -1], rows, group)
    return torch.cat([summaries[:, :1].amin(0), summaries[:, 1:2].amax(0), summaries[:, 2:-1].mean(0)])


def gather_entries(
    mean: Tensor, std: Tensor, accepted: Tensor, group: dist.ProcessGroup | None
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """Start gathering all ranks' queue entries (B,); B is the same on all ranks.

    The function returned waits for (mean, std, accepted) of all ranks' rows, in rank order, each (world · B,).
    """
    entries = torch.stack([mean, std, accepted.to(mean.dtype)])
    gathered = entries.new_empty((dist.get_world_size(group) * 3, len(mean)))
    # torch.compile orders collectives itself and knows only the blocking form.
    work = _all_gather(gathered, entries, group=group, async_op=not torch.compiler.is_compiling())

    def wait() -> tuple[Tensor, Tensor, Tensor]:
        if work is not None:
            work.wait()
        all_mean, all_std, flag = gathered.view(len(gathered) // 3, 3, len(mean)).transpose(0, 1).reshape(3, -1)
        return all_mean, all_std, flag > 0

    return wait
