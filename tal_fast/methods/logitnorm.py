"""LogitNorm: cross-entropy of logits of constant norm."""

from __future__ import annotations

from torch import Tensor

from tal_fast.config.methods import LogitNormOptions
from tal_fast.loss.reference import scaled_with_norm
from tal_fast.methods.base import Method, Step
from tal_fast.methods.ce import mean_cross_entropy


class LogitNorm(Method):
    """LogitNorm (Wei et al., "Mitigating Neural Network Overconfidence with Logit Normalization", ICML 2022).

    The loss is CE(z / (τ‖z‖), y), equation 5, judged by the maximum softmax probability of z as in the paper.
    """

    name = "logitnorm"
    score = "msp"
    Options = LogitNormOptions

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, indices: Tensor) -> Step:
        z, norm = scaled_with_norm(logits.float())
        return Step(mean_cross_entropy(z / (self.options.tau * norm), labels, self.label_smoothing), {})
