"""Synthetic batches and queues shared by all benchmarks.

Features of a sample are a + b·u with u uniform in [0, 1): after a ReLU and an average they are positive, and the mean
a + b/2 and the standard deviation b/√12 of samples fill a region of the plane, as those of a trained network do. A
queue holds the statistics of such samples, so that a new sample's nearest entry is near, as it is in training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SQRT_12 = 12**0.5


def make_logits(rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random (B, C) logits and (B,) labels; two thirds of the samples are classified correctly."""
    logits = (torch.randn(rows, classes, device=device) * 3).to(dtype)
    labels = logits.argmax(1)
    labels[::3] = torch.randint(classes, labels[::3].shape, device=device)
    return logits, labels


def statistics(count: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Random (N,) means and (N,) standard deviations of samples' features."""
    offset, spread = 0.5 * torch.rand(count, device=device), 0.5 + torch.rand(count, device=device)
    return offset + spread / 2, spread / SQRT_12


class FreshFeatures:
    """(B, D) features whose statistics ``renew`` changes in place.

    A step that meets features it has pushed before finds them at distance 0, where a search ends at once.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self._base = torch.rand(rows, width, device=device)
        self.features = torch.empty_like(self._base)
        self.renew()

    def renew(self) -> None:
        rows, device = self.features.shape[0], self.features.device
        offset, spread = 0.5 * torch.rand(rows, 1, device=device), 0.5 + torch.rand(rows, 1, device=device)
        torch.addcmul(offset, self._base, spread, out=self.features)


def fill(push: Callable[[Tensor, Tensor], object], entries: int, device: torch.device | None = None) -> None:
    """Push the statistics of ``entries`` random samples in chunks."""
    for start in range(0, entries, 1 << 17):
        push(*statistics(min(1 << 17, entries - start), device))
