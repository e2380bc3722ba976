"""TAL as the released code computes it: the queue is two Python lists.

Written from the algorithm (variant ``released``), not copied: every step turns both lists into tensors, compares the
whole batch with the whole queue at once, and pushes the accepted samples one by one.
``tests/bench/test_bench.py`` checks it against the golden data.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class ListQueueTAL:
    """Loss step with list queues; arguments as in ``tal_fast.TALLoss``."""

    def __init__(self, queue_size: int, t_min: float = 10.0, t_max: float = 100.0, t_wrong: float = 20.0) -> None:
        self.queue_size, self.t_min, self.t_max, self.t_wrong = queue_size, t_min, t_max, t_wrong
        self.means: list[float] = []
        self.stds: list[float] = []

    def __call__(self, logits: Tensor, features: Tensor, labels: Tensor, warmup: bool = False) -> Tensor:
        f = features.detach()
        mean, std = f.mean(1), f.std(1)
        norm = logits.norm(dim=1, keepdim=True) + 1e-7
        unit = logits / norm
        with torch.no_grad():
            correct = logits.argmax(1) == labels
            accepted = correct & (unit.amax(1) > 0)
            typicalness = torch.ones_like(mean)
            if not warmup and self.means and not bool(accepted.all()):
                queue_mean = torch.tensor(self.means, dtype=mean.dtype, device=mean.device)
                queue_std = torch.tensor(self.stds, dtype=std.dtype, device=std.device)
                squared = (mean[:, None] - queue_mean) ** 2 + (std[:, None] - queue_std) ** 2
                distance = squared.sqrt().amin(1)
                typicalness = 1 - (distance - distance.min()) / (distance.max() - distance.min() + 1e-8)
            temperature = self.t_min + (1 - typicalness) * (self.t_max - self.t_min)
            temperature = torch.where(correct, temperature, torch.full_like(temperature, self.t_wrong))
            weight = torch.where(correct, typicalness, torch.ones_like(typicalness)).mean()
        loss = weight * F.cross_entropy(temperature[:, None] * unit, labels) + (1 - weight) * F.cross_entropy(
            logits, labels
        )
        for i in range(len(labels)):
            if bool(accepted[i]):
                self.means.append(mean[i].item())
                self.stds.append(std[i].item())
        del self.means[: -self.queue_size], self.stds[: -self.queue_size]
        return loss
