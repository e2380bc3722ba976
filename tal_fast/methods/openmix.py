"""OpenMix: a class of its own for what lies between the classes and outliers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tal_fast.config.schema import MethodConfig
from tal_fast.data.loader import IGNORED_LABEL
from tal_fast.methods.base import Method, Step, Task
from tal_fast.methods.ce import mean_cross_entropy


class OpenMix(Method):
    """Zhu et al., "OpenMix: Exploring Outlier Samples for Misclassification Detection", CVPR 2023, equations 4 to 6.

    Each step sees B images x with labels y and B mixtures λx + (1 − λ)x_o with outliers, whose label is y with weight
    λ and an extra class with weight 1 − λ: loss = CE(x, y) + γ (λ CE(mixed, y) + (1 − λ) CE(mixed, extra)). Judged by
    the maximum softmax probability over the data's own classes.
    """

    name = "openmix"
    score = "msp"

    @dataclass
    class Options:
        """Of OpenMix.

        Attributes:
            outliers: images of none of the classes: a folder, or another set that ``--ood`` of the evaluation takes
                (``npy:300K_random_images.npy`` in the paper). Not the set it will be judged on.
            alpha: of λ ~ Beta(α, α), drawn once a step.
            gamma: weight of the mixed images' loss.
        """

        outliers: str = ""
        alpha: float = 10.0
        gamma: float = 1.0

    extra_classes = 1

    def __init__(self, config: MethodConfig, task: Task) -> None:
        super().__init__(config, task)
        options = self.options
        if not options.outliers:
            raise ValueError(
                "method.options.outliers is not set; name a folder of images that belong to none of the classes, or "
                "another set such as patches or npy:FILE.npy"
            )
        for name in ("alpha", "gamma"):
            if getattr(options, name) <= 0:
                raise ValueError(f"method.options.{name} is {getattr(options, name)} but must be above 0")
        self.outliers = options.outliers
        self._share = torch.ones(())

    def inputs(self, images: Tensor, outliers: Tensor | None) -> Tensor:
        """See ``Method``."""
        assert outliers is not None
        alpha = torch.full((), self.options.alpha, device=images.device)
        self._share = torch.distributions.Beta(alpha, alpha, validate_args=False).sample()
        return torch.cat([images, self._share * images + (1 - self._share) * outliers])

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, indices: Tensor) -> Step:
        """See ``Method``; the second half of the rows are the mixtures."""
        rows = len(labels)
        own, mixed = logits[:rows], logits[rows:].float()
        extra = torch.where(labels == IGNORED_LABEL, IGNORED_LABEL, logits.shape[1] - 1)
        share = self._share
        mixture = share * mean_cross_entropy(mixed, labels) + (1 - share) * mean_cross_entropy(mixed, extra)
        plain = mean_cross_entropy(own, labels, self.label_smoothing)
        return Step(plain + self.options.gamma * mixture, {})
