"""Network and method as one module: what DDP wraps and ``torch.compile`` sees as one graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tal_fast.data.loader import IGNORED_LABEL
from tal_fast.methods import Method
from tal_fast.training.runtime import Execution

BINS = 50
"""Of the histograms of per-sample values."""


class TrainStep(nn.Module):
    """From images and labels to the loss, and to the sums an epoch's numbers are made of.

    Args:
        network: images -> (logits, features).
        method: the loss.
        execution: how the network runs.
    """

    def __init__(self, network: nn.Module, method: Method, execution: Execution) -> None:
        super().__init__()
        self.network = network
        self.method = method
        self._execution = execution

    def forward(
        self, images: Tensor, labels: Tensor, indices: Tensor, outliers: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss of a batch; nothing here waits for the device.

        Args:
            images: (B, C, H, W) float32.
            labels: (B,) int64, ``IGNORED_LABEL`` where there is no image.
            indices: (B,) int64, places of the images among the training images.
            outliers: (B, C, H, W) float32, for a method that has some.

        Returns:
            loss, a scalar; and (K,) float64, no gradient: what ``EpochSums`` adds up.
        """
        with self._execution.autocast():
            logits, features = self.network(self.method.inputs(images, outliers))
        loss, samples = self.method(logits, features, labels, indices)
        with torch.no_grad():
            valid = labels != IGNORED_LABEL
            weight = valid.double()
            count = weight.sum()
            right = (logits[: len(labels)].argmax(1) == labels).sum().double()
            parts = [torch.stack([count, torch.where(count > 0, loss.detach().double() * count, 0.0), right])]
            for name in self.method.sample_names:
                value = samples[name].double()
                parts.append(torch.where(valid, value, 0.0).sum()[None])
                if name in self.method.ranges:
                    low, high = self.method.ranges[name]
                    place = ((value - low) * (BINS / max(high - low, 1e-12))).clamp(0, BINS - 1).long()
                    parts.append(weight.new_zeros(BINS).index_add(0, place, weight))
            return loss, torch.cat(parts)


class EpochSums:
    """Sums over the images of an epoch, on the device.

    Args:
        method: whose samples' values are summed beside the loss.
        device: where.

    Attributes:
        total: (K,) float64, of this rank; part of a checkpoint inside an epoch.
    """

    def __init__(self, method: Method, device: torch.device) -> None:
        self._names = method.sample_names
        self._ranges = method.ranges
        size = 3 + sum(1 + (BINS if name in method.ranges else 0) for name in method.sample_names)
        self.total = torch.zeros(size, dtype=torch.float64, device=device)

    def add(self, part: Tensor) -> None:
        """Add a batch's, as ``TrainStep`` gives them; in place, for a CUDA graph knows this one tensor."""
        self.total += part

    def reset(self) -> None:
        """Begin an epoch."""
        self.total.zero_()

    def means(self, total: Tensor) -> dict[str, float]:
        """Loss, accuracy and the samples' mean values from sums, this rank's or those of all; waits for the device."""
        values = total.tolist()
        images = values[0] or float("nan")
        means = {"train_loss": values[1] / images, "train_accuracy": values[2] / images}
        at = 3
        for name in self._names:
            means[name] = values[at] / images
            at += 1 + (BINS if name in self._ranges else 0)
        return means

    def histograms(self, total: Tensor) -> dict[str, Histogram]:
        """The samples' distributions from the same sums; waits for the device."""
        made = {}
        at = 3
        for name in self._names:
            at += 1
            if name in self._ranges:
                made[name] = Histogram(*self._ranges[name], total[at : at + BINS].tolist())
                at += BINS
        return made


class Histogram:
    """Counts in equal bins.

    Args:
        low, high: ends of the range.
        counts: of each bin.
    """

    def __init__(self, low: float, high: float, counts: list[float]) -> None:
        self.low, self.high, self.counts = low, high, counts

    @property
    def edges(self) -> list[float]:
        """Ends of the bins, one more than there are bins."""
        width = (self.high - self.low) / len(self.counts)
        return [self.low + width * i for i in range(len(self.counts) + 1)]

    def quantile(self, share: float) -> float:
        """The value below which this share of the samples lies, to within a bin; NaN without samples."""
        total, edges = sum(self.counts), self.edges
        if total == 0:
            return float("nan")
        below = 0.0
        for i, count in enumerate(self.counts):
            if count and below + count >= share * total:
                return edges[i] + (edges[i + 1] - edges[i]) * (share * total - below) / count
            below += count
        return self.high
