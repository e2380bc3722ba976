"""Failure-detection metrics accumulated over batches: ``update``, ``compute``, ``reset``.

    metric = AURC()
    for images, labels in loader:
        logits = model(images)
        metric.update(tal_fast.scores.cosine(logits), logits.argmax(1) == labels)
    print(float(metric.compute()))

Under ``torch.distributed`` each rank updates with its own samples, any number of them, and ``compute``, which all ranks
must call, returns the metric of the samples of all ranks. The areas depend on the ranking of all samples, so that all
confidences and outcomes are kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tal_fast.metrics.failure import check_convention, failure_metrics
from tal_fast.metrics.ranking import as_correct, as_scores
from tal_fast.utils.arrays import Floats, Ints


def as_batch(confidence: Any, correct: Any) -> list[Tensor]:
    """Copies of confidence and correct (n,) as tensors without gradient; a ValueError if they are of other shapes."""
    batch = [torch.as_tensor(values).detach().clone() for values in (confidence, correct)]
    if batch[0].ndim != 1 or batch[0].shape != batch[1].shape:
        shapes = " and ".join(str(tuple(values.shape)) for values in batch)
        raise ValueError(f"confidence and correct must be vectors (n,) of the same length, not of shapes {shapes}")
    return batch


class FailureMetrics:
    """All metrics of ``tal_fast.metrics.METRICS``.

    Args:
        convention: one of ``tal_fast.metrics.CONVENTIONS``.
        group: process group whose samples belong together; None: all ranks, if ``torch.distributed`` is initialised.
    """

    def __init__(self, convention: str = "tal_fast", group: dist.ProcessGroup | None = None) -> None:
        self.convention = check_convention(convention)
        self.group = group
        self._confidence: list[Tensor] = []
        self._correct: list[Tensor] = []

    def update(self, confidence: Any, correct: Any) -> None:
        """Add a batch of n >= 0 samples. Tensors stay on their device until ``compute``, without synchronisation.

        Args:
            confidence: (n,) higher = more confident, of any floating or integer type.
            correct: (n,) 0/1 or bool.

        Raises:
            ValueError: not two vectors of the same length. Values are checked by ``compute``.
        """
        batch = as_batch(confidence, correct)
        self._confidence.append(batch[0])
        self._correct.append(batch[1])

    def reset(self) -> None:
        """Remove all samples."""
        self._confidence.clear()
        self._correct.clear()

    def samples(self) -> tuple[Floats, Ints]:
        """(n,) float64 confidences and (n,) int64 outcomes of all ranks, in the order of ranks and updates.

        Raises:
            ValueError: NaN confidences, or outcomes other than 0 and 1, on any rank; all ranks raise it.
        """
        local = tuple(
            torch.cat([values.cpu().double() for values in batches]) if batches else torch.zeros(0).double()
            for batches in (self._confidence, self._correct)
        )
        parts: list[Any] = [local]
        if dist.is_available() and dist.is_initialized():
            parts = [None] * dist.get_world_size(self.group)
            # Objects, because ranks may hold different numbers and types of values.
            dist.all_gather_object(parts, local, self.group)
        # Checked after the exchange, so that no rank waits for one that has raised.
        confidence, correct = (torch.cat(column) for column in zip(*parts, strict=True))
        return as_scores(confidence), as_correct(correct)

    def values(self) -> dict[str, float]:
        """Metric -> value over the samples of all ranks; NaN where undefined."""
        return failure_metrics(*self.samples(), self.convention)

    def compute(self) -> Any:
        """Metric -> float64 scalar tensor, over the samples of all ranks; NaN where undefined."""
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self.values().items()}


class _SingleMetric(FailureMetrics):
    name: str

    def compute(self) -> Tensor:
        """Metric of the samples of all ranks, a float64 scalar tensor; NaN where undefined."""
        value = failure_metrics(*self.samples(), self.convention, (self.name,))[self.name]
        return torch.tensor(value, dtype=torch.float64)


class AURC(_SingleMetric):
    """Area under the risk-coverage curve (Geifman and El-Yaniv, 2017); arguments as for ``FailureMetrics``."""

    name = "aurc"


class EAURC(_SingleMetric):
    """AURC minus its floor for n → ∞ (Geifman et al., 2019); arguments as for ``FailureMetrics``."""

    name = "eaurc"


class AUGRC(_SingleMetric):
    """Area under the generalised risk (Traub et al., 2024); arguments as for ``FailureMetrics``."""

    name = "augrc"


class FPR95(_SingleMetric):
    """Share of errors accepted where 95% of the successes are accepted; arguments as for ``FailureMetrics``."""

    name = "fpr95"


class AUROC(_SingleMetric):
    """P(a success has a higher score than an error), ties half; arguments as for ``FailureMetrics``."""

    name = "auroc"
