"""Failure-detection metrics for torchmetrics and Lightning; needs the extra ``torchmetrics``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tal_fast.metrics.failure import HIGHER_IS_BETTER, check_convention, check_metrics, failure_metrics
from tal_fast.metrics.streaming import as_batch

try:
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat
except ImportError:
    raise ImportError("tal_fast.metrics.torchmetrics needs pip install 'tal-fast[torchmetrics]'") from None


class FailureMetric(Metric):
    """One metric of ``tal_fast.metrics.METRICS`` over all batches and ranks, NaN where undefined.

    All samples are kept, in float64 and so in one type on all ranks: 16 bytes each.

    Args:
        metric, convention: names from ``tal_fast.metrics.METRICS`` and ``CONVENTIONS``.
        options: of ``torchmetrics.Metric``.
    """

    confidence: list[Tensor]
    correct: list[Tensor]
    is_differentiable = full_state_update = False
    higher_is_better = property(lambda self: HIGHER_IS_BETTER[self.metric])

    def __init__(self, metric: str, convention: str = "tal_fast", **options: Any) -> None:
        super().__init__(**options)
        (self.metric,), self.convention = check_metrics([metric]), check_convention(convention)
        self.set_dtype(torch.float64)
        for state in ("confidence", "correct"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, confidence: Any, correct: Any) -> None:
        """Add a batch; arguments as for ``tal_fast.metrics.streaming.FailureMetrics.update``."""
        for state, values in zip((self.confidence, self.correct), as_batch(confidence, correct), strict=True):
            state.append(values.to(self.device, self.dtype))

    def compute(self) -> Tensor:
        """Metric of all samples, a float64 scalar."""
        confidence, correct = (dim_zero_cat(x) if len(x) else torch.zeros(0) for x in (self.confidence, self.correct))
        value = failure_metrics(confidence, correct, self.convention, [self.metric])[self.metric]
        return torch.tensor(value, dtype=self.dtype, device=self.device)
