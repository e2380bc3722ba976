"""LogitNorm: cross-entropy of logits of constant norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tal_fast.methods.base import Method, Step
from tal_fast.methods.ce import mean_cross_entropy
from tal_fast.scores.logits import NORM_EPS


class LogitNorm(Method):
    """CE(z / (τ‖z‖), y) (Wei et al., "Mitigating Neural Network Overconfidence with Logit Normalization", ICML 2022,
    equation 5), judged by the maximum softmax probability of z as in the paper.
    """

    name = "logitnorm"
    score = "msp"

    @dataclass
    class Options:
        """Of LogitNorm.

        Attributes:
            tau: temperature τ the normalised logits are divided by; the paper's 0.04 is for CIFAR-10.
        """

        tau: float = 0.04

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        if self.options.tau <= 0:
            raise ValueError(f"method.options.tau is {self.options.tau} but must be above 0, such as 0.04")

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, indices: Tensor) -> Step:
        """See ``Method``."""
        z = logits.float()
        norm = torch.linalg.vector_norm(z, dim=1, keepdim=True) + NORM_EPS
        return Step(mean_cross_entropy(z / (self.options.tau * norm), labels, self.label_smoothing), {})
