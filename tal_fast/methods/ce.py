"""Cross-entropy, the baseline."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tal_fast.data.loader import IGNORED_LABEL
from tal_fast.methods.base import Method, Step


def mean_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy in float32 over the rows whose label is not ``IGNORED_LABEL``; 0, not NaN, without any."""
    total = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing, reduction="sum")
    return total / (labels != IGNORED_LABEL).sum().clamp(min=1)


class CrossEntropy(Method):
    """Cross-entropy, judged by the maximum softmax probability (Hendrycks and Gimpel, 2017)."""

    name = "ce"
    score = "msp"

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, indices: Tensor) -> Step:
        return Step(mean_cross_entropy(logits, labels, self.label_smoothing), {})
