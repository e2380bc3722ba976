"""LogitNorm: cross-entropy of logits of constant norm."""

from __future__ import annotations

from torch import Tensor

from tal_fast.config.methods import LogitNormOptions
from tal_fast.loss.reference import scaled_with_norm
from tal_fast.methods.base import Method, Step, mean_cross_entropy


class LogitNorm(Method):
    """LogitNorm (Wei et al., "Mitigating Neural Network Overconfidence with Logit Normalization", ICML 2022).

    The loss is CE(z / (τ‖z‖), y), equation 5, judged by the maximum softmax probability of z as in the paper.
    """

    name = "logitnorm"
    score = "msp"
    mixes = "alone"
    takes_class_weight = True
    Options = LogitNormOptions

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, indices: Tensor) -> Step:
        z = self._normalised(logits)
        return Step(mean_cross_entropy(z, labels, self.label_smoothing, self.class_weight), {})

    def mixed_loss(self, logits: Tensor, pairs: Tensor, share: Tensor) -> Tensor:
        return super().mixed_loss(self._normalised(logits), pairs, share)

    def _normalised(self, logits: Tensor) -> Tensor:
        z, norm = scaled_with_norm(logits.float())
        return z / (self.options.tau * norm)
