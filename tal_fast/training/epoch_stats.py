"""Statistics of an epoch: sums over its images on the device, and the means and histograms they give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tal_fast.data.loader import IGNORED_LABEL
from tal_fast.methods import Method

BINS = 50
"""Number of histogram bins; part of the checkpoint format, whose sums hold the counts."""

PERCENTILES = (10, 50, 90)
"""Percentiles of per-sample values that metrics.csv reports."""


def batch_sums(method: Method, loss: Tensor, samples: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    """Sums of one batch, for ``EpochSums``; does not wait for the device.

    Args:
        loss: scalar, the mean over the batch.
        samples: as in ``tal_fast.methods.Step``.
        logits: (B or more, C) floating point; the first B rows belong to the labels.

    Returns:
        (K,) float64: images, summed loss, correct predictions; then the sum of each per-sample value and, if it has a
        range, its histogram.
    """
    valid = labels != IGNORED_LABEL
    weight = valid.double()
    count = weight.sum()
    correct = (logits[: len(labels)].argmax(1) == labels).sum().double()
    parts = [torch.stack([count, torch.where(count > 0, loss.detach().double() * count, 0.0), correct])]
    for name in method.sample_names:
        value = samples[name].double()
        parts.append(torch.where(valid, value, 0.0).sum()[None])
        if name in method.ranges:
            low, high = method.ranges[name]
            bins = ((value - low) * (BINS / max(high - low, 1e-12))).clamp(0, BINS - 1).long()
            parts.append(weight.new_zeros(BINS).index_add(0, bins, weight))
    return torch.cat(parts)


class EpochSums:
    """Sums over the images of an epoch, on the device."""

    def __init__(self, method: Method, device: torch.device) -> None:
        self._ranges = method.ranges
        self._start: dict[str, int] = {}  # position of the sum of each per-sample value, before its histogram
        size = 3
        for name in method.sample_names:
            self._start[name] = size
            size += 1 + (BINS if name in method.ranges else 0)
        # Sums of this rank in the layout of ``batch_sums``; part of a checkpoint within an epoch.
        self.total = torch.zeros(size, dtype=torch.float64, device=device)
        on_gpu = device.type == "cuda"
        self._loss = torch.zeros((), dtype=torch.float64, pin_memory=on_gpu)  # copy of the summed loss on the CPU
        self._copied = torch.cuda.Event() if on_gpu else None  # whether it has arrived

    def add(self, sums: Tensor) -> None:
        """Add the sums of a batch; in place, because a CUDA graph holds this tensor."""
        self.total += sums

    def load(self, total: Tensor) -> None:
        """Copy saved sums; NaN for a per-sample value that an older version did not sum yet."""
        self.total.fill_(torch.nan)
        self.total[: len(total)] = total

    def finite(self) -> bool:
        """Whether the loss is finite so far; on a GPU, which it does not wait for, as of some steps ago."""
        if self._copied is None:
            return math.isfinite(self.total[1])
        if not self._copied.query():
            return True
        finite = math.isfinite(self._loss)
        self._loss.copy_(self.total[1], non_blocking=True)
        self._copied.record()
        return finite

    def means(self, total: Tensor) -> dict[str, float]:
        """Mean loss, accuracy and per-sample values from the sums of one or all ranks; waits for the device."""
        values = total.tolist()
        images = values[0] or float("nan")
        means = {"train_loss": values[1] / images, "train_accuracy": values[2] / images}
        return means | {name: values[start] / images for name, start in self._start.items()}

    def histograms(self, total: Tensor) -> dict[str, Histogram]:
        """Histograms of the per-sample values from the same sums; waits for the device."""
        return {
            name: Histogram(*self._ranges[name], total[start + 1 : start + 1 + BINS].tolist())
            for name, start in self._start.items()
            if name in self._ranges
        }


@dataclass(frozen=True)
class Histogram:
    """Counts in bins of equal width from ``low`` to ``high``."""

    low: float
    high: float
    counts: list[float]

    @property
    def edges(self) -> list[float]:
        """Ends of the bins, one more than there are bins."""
        width = (self.high - self.low) / len(self.counts)
        return [self.low + width * i for i in range(len(self.counts) + 1)]

    def quantile(self, share: float) -> float:
        """Quantile to within a bin; NaN without samples."""
        total, edges = sum(self.counts), self.edges
        if total == 0:
            return float("nan")
        below = 0.0
        for i, count in enumerate(self.counts):
            if count and below + count >= share * total:
                return edges[i] + (edges[i + 1] - edges[i]) * (share * total - below) / count
            below += count
        return self.high


def percentile_columns(histograms: Mapping[str, Histogram]) -> dict[str, float]:
    """Columns of metrics.csv such as ``typicalness_p10``."""
    return {
        f"{name}_p{percentile}": histogram.quantile(percentile / 100)
        for name, histogram in histograms.items()
        for percentile in PERCENTILES
    }
