"""Cross-entropy, the baseline."""

from __future__ import annotations

from torch import Tensor

from tal_fast.methods.base import Method, Step, mean_cross_entropy


class CrossEntropy(Method):
    """Cross-entropy, judged by the maximum softmax probability (Hendrycks and Gimpel, 2017)."""

    name = "ce"
    score = "msp"
    mixes = "alone"
    takes_class_weight = True

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, indices: Tensor) -> Step:
        return Step(mean_cross_entropy(logits, labels, self.label_smoothing, self.class_weight), {})
