"""Collectives of ``queue_scope="global"``, with which k ranks act as one with the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# The first name is that of newer PyTorch versions, which warn of the second.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def is_distributed(group: dist.ProcessGroup | None) -> bool:
    """Whether the group has more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Tensors of all ranks, stacked in rank order: (world, *shape). Their shapes must agree."""
    world = dist.get_world_size(group)
    out = tensor.new_empty((world * tensor.shape[0], *tensor.shape[1:]))
    _all_gather(out, tensor.contiguous(), group=group)
    return out.view(world, *tensor.shape)


def combine_summaries(summary: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``reference.batch_summary`` of all ranks' rows, its sums divided by the number of ranks.

    Dividing by the mean number of valid rows per rank scales each rank's loss by world · valid_local / valid_all;
    DDP's averaging over the ranks then gives the gradient of the whole batch.
    """
    summaries = gather(summary, group)
    return torch.cat([summaries[:, :1].amin(0), summaries[:, 1:2].amax(0), summaries[:, 2:].mean(0)])


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
        all_mean, all_std, flag = gathered.view(-1, 3, len(mean)).transpose(0, 1).reshape(3, -1)
        return all_mean, all_std, flag > 0

    return wait
