"""OpenMix: an extra class for mixtures of the classes' images with outliers."""

from __future__ import annotations

import torch
from torch import Tensor

from tal_fast.config.methods import OpenMixOptions
from tal_fast.config.schema import MethodConfig
from tal_fast.data.loader import IGNORED_LABEL
from tal_fast.methods.base import Method, Step, Task, mean_cross_entropy


class OpenMix(Method):
    """OpenMix (Zhu et al., "OpenMix: Exploring Outlier Samples for Misclassification Detection", CVPR 2023).

    Each step sees B images x with labels y and B mixtures λx + (1 − λ)x_o with outliers, labelled y with weight λ and
    the extra class with weight 1 − λ (equations 4 to 6): loss = CE(x, y) + γ (λ CE(mixed, y) + (1 − λ) CE(mixed,
    extra)). Judged by the maximum softmax probability over the data's classes.
    """

    name = "openmix"
    score = "msp"
    mixes = "never"
    Options = OpenMixOptions
    extra_classes = 1

    def __init__(self, config: MethodConfig, task: Task) -> None:
        super().__init__(config, task)
        self.outliers = self.options.outliers
        self._share = torch.ones(())

    def inputs(self, images: Tensor, outliers: Tensor | None) -> Tensor:
        assert outliers is not None
        alpha = torch.full((), self.options.alpha, device=images.device)
        self._share = torch.distributions.Beta(alpha, alpha, validate_args=False).sample()
        return torch.cat([images, self._share * images + (1 - self._share) * outliers])

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, indices: Tensor) -> Step:
        rows = len(labels)
        plain, mixed = logits[:rows], logits[rows:].float()
        extra = torch.where(labels == IGNORED_LABEL, IGNORED_LABEL, logits.shape[1] - 1)
        share = self._share
        mixture = share * mean_cross_entropy(mixed, labels) + (1 - share) * mean_cross_entropy(mixed, extra)
        loss = mean_cross_entropy(plain, labels, self.label_smoothing)
        return Step(loss + self.options.gamma * mixture, {})
