"""TAL over the ranks of a distributed run (``queue_scope="global"``): k ranks act as one with the whole batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed(group: dist.ProcessGroup | None) -> bool:
    """Whether there is more than one rank to talk to."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Every rank's tensor, stacked in rank order: (world, *shape). Shapes must agree."""
    world = dist.get_world_size(group)
    out = tensor.new_empty((world * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(out, tensor.contiguous(), group=group)
    return out.view(world, *tensor.shape)


def combine_summaries(batch: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``reference.batch_summary`` of all ranks' rows, its sums divided by the number of ranks.

    Dividing by the mean number of valid rows a rank instead of the sum scales each rank's loss by
    world · valid_local / valid_all; DDP's averaging over the ranks then gives the gradient of the whole batch.
    """
    every = gather(batch, group)
    return torch.cat([every[:, :1].amin(0), every[:, 1:2].amax(0), every[:, 2:].mean(0)])


def gather_entries(
    mean: Tensor, std: Tensor, accepted: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The (mean, std, accepted) of all ranks, in rank order, in one collective."""
    every = gather(torch.stack([mean, std, accepted.to(mean.dtype)]), group)  # (world, 3, B)
    mean, std, flag = every.transpose(0, 1).reshape(3, -1)
    return mean, std, flag > 0
