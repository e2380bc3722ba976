"""The queues of a run that goes on with another number of ranks.

The rule: the old ranks' entries are put in one line by age, the newest of each rank last and entries of the same age
in rank order, and dealt out to the new ranks in turn. So no entry is lost or doubled except beyond a queue's capacity,
where the oldest leave, and going from k ranks to 2k and back gives the same queues. With ``queue_scope="global"`` all
ranks hold the same queue, and still do.
"""

from __future__ import annotations

from typing import Any

import torch

from tal_fast.loss.queue import newest_entries


def reshard(states: list[dict[str, Any]], rank: int, world_size: int, shared: bool) -> dict[str, Any]:
    """The queue of one of the new ranks.

    Args:
        states: the old ranks' ``FeatureQueue.state_dict()``, in rank order; their capacities agree.
        rank, world_size: the new rank and the number of new ranks.
        shared: all old queues are the same one, and the new ones shall be.

    Returns:
        A state for ``FeatureQueue.load_state_dict``.
    """
    if shared:
        return states[0]
    capacity = states[0]["mean"].numel()
    keys = ("mean", "std", "cursor")
    entries = [torch.stack(newest_entries(*(state[key].cpu() for key in keys))) for state in states]  # (2, n) each
    age = torch.cat([torch.arange(e.shape[1] - 1, -1, -1) for e in entries])
    line = torch.cat(entries, dim=1)[:, torch.argsort(-age, stable=True)]
    # Counted from the newest, so that what a rank holds of it does not depend on how far back the line goes.
    own = line.flip(1)[:, world_size - 1 - rank :: world_size].flip(1)[:, -capacity:]
    length = own.shape[1]
    rings = torch.zeros(2, capacity, dtype=line.dtype)
    rings[:, :length] = own
    return {"mean": rings[0], "std": rings[1], "cursor": torch.tensor([length % capacity, length])}
