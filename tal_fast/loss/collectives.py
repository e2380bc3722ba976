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


class EntriesOfAll:
    """The queue entries of all ranks' batches, on their way while other work goes on.

    Args:
        mean, std: (B,) floating point, of this rank; B is the same on all ranks.
        accepted: (B,) bool.
        group: the ranks.
    """

    def __init__(self, mean: Tensor, std: Tensor, accepted: Tensor, group: dist.ProcessGroup | None) -> None:
        own = torch.stack([mean, std, accepted.to(mean.dtype)])
        self._every = own.new_empty((dist.get_world_size(group) * 3, len(mean)))
        # torch.compile orders collectives itself and knows only the blocking form.
        apart = not torch.compiler.is_compiling()
        self._work = dist.all_gather_into_tensor(self._every, own, group=group, async_op=apart)

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, std, accepted) of all ranks' rows, in rank order, each (world · B,)."""
        if self._work is not None:
            self._work.wait()
        mean, std, flag = self._every.view(-1, 3, self._every.shape[1]).transpose(0, 1).reshape(3, -1)
        return mean, std, flag > 0
