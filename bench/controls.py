"""Controls for TAL: what its typicalness is worth, and what it is measured on.

Methods of an experiment, such as ``name: bench/controls.py:RandomTypicalness``. Each is TAL with its loss,
queue and options; only the features that it takes the mean and the standard deviation of are others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tal_fast.methods.base import Step
from tal_fast.methods.tal import TAL


class RandomTypicalness(TAL):
    """TAL with noise in place of the features: typicalness says nothing about the image."""

    name = "random-typicalness"

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, indices: Tensor) -> Step:
        return super().forward(logits, torch.randn_like(features.detach()), labels, indices)


class LogitStatistics(TAL):
    """TAL with the mean and the standard deviation of the logits in place of the features'."""

    name = "logit-statistics"

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, indices: Tensor) -> Step:
        return super().forward(logits, logits.detach(), labels, indices)


class UnitFeatures(TAL):
    """TAL with features of unit length, whose statistics no longer depend on their norm."""

    name = "unit-features"

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, indices: Tensor) -> Step:
        return super().forward(logits, torch.nn.functional.normalize(features.detach(), dim=1), labels, indices)
