"""Redistribution of the ranks' queues when a run resumes with another number of ranks.

The old ranks' entries are sorted by age, those of the same age in rank order, and dealt out to the new ranks in turn.
No entry is lost or doubled, except that the oldest leave where a queue is full; going from k ranks to 2k and back gives
the same queues. With ``queue_scope="global"`` all ranks hold the same queue, and still do.
"""

from __future__ import annotations

from typing import Any

import torch

from tal_fast.loss.ring import newest_entries


def reshard(states: list[dict[str, Any]], rank: int, world_size: int, shared: bool) -> dict[str, Any]:
    """``FeatureQueue.state_dict()`` of one of the new ranks, given those of the old ones in rank order.

    Their capacities agree; ``shared`` says whether all ranks hold the same queue.
    """
    if shared:
        return states[0]
    capacity = states[0]["mean"].numel()
    keys = ("mean", "std", "cursor")
    entries = [torch.stack(newest_entries(*(state[key].cpu() for key in keys))) for state in states]  # (2, n) each
    age = torch.cat([torch.arange(e.shape[1] - 1, -1, -1) for e in entries])
    by_age = torch.cat(entries, dim=1)[:, torch.argsort(-age, stable=True)]  # oldest first
    # Dealt from the newest, so that a rank's newest entries do not depend on the number of old ones.
    kept = by_age.flip(1)[:, world_size - 1 - rank :: world_size].flip(1)[:, -capacity:]
    length = kept.shape[1]
    rings = torch.zeros(2, capacity, dtype=by_age.dtype)
    rings[:, :length] = kept
    return {"mean": rings[0], "std": rings[1], "cursor": torch.tensor([length % capacity, length])}
