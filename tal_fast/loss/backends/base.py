"""Interface of the backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tal_fast.loss.autograd import attach_gradient, wants_gradient
from tal_fast.loss.options import LossOptions
from tal_fast.loss.reference import TALStats
from tal_fast.loss.ring import RingBuffer


@dataclass
class LossInputs:
    """Arguments of the loss of a batch, all on one device; those not commented on are as in ``TALLoss``."""

    logits: Tensor
    labels: Tensor
    distance: Tensor  # (B,) distance to the queue
    summary: Tensor | None  # (7,) ``reference.batch_summary``, or None if the backend needs none
    tickets: Tensor | None  # ``BatchStatistics.tickets``
    options: LossOptions
    warmup: bool
    class_weight: Tensor | None = None  # (C,) in the dtype of the computation

    @property
    def needs_sums(self) -> bool:
        """Whether the loss of a row depends on other rows' logits, through the sums of the summary."""
        return self.options.variant == "released" and not self.warmup


class BatchStatistics(NamedTuple):
    """Feature statistics of a batch, its distances to the queue, and its summary as far as they give it."""

    mean: Tensor  # (B,)
    std: Tensor  # (B,)
    distance: Tensor  # (B,) distance to the queue
    summary: Tensor | None  # ``reference.batch_summary`` without what needs logits, or None if the backend needs none
    tickets: Tensor | None = None  # arrival counters of the kernels' launches in this step


class Backend(ABC):
    """One way to compute a training step."""

    name: str  # value of the option ``backend``

    @abstractmethod
    def statistics_distance(
        self, features: Tensor, labels: Tensor, ring: RingBuffer, ignore_index: int, class_weight: Tensor | None = None
    ) -> BatchStatistics:
        """Feature statistics of a batch and its distances to the queue."""

    @abstractmethod
    def complete_summary(self, inputs: LossInputs) -> Tensor:
        """Whole summary, given that of ``statistics_distance``, whose memory it may take."""

    @abstractmethod
    def loss(self, inputs: LossInputs) -> tuple[Tensor, TALStats]:
        """Loss, reduced as the options say and differentiable by the logits, and per-sample statistics."""

    @abstractmethod
    def loss_and_gradient(self, inputs: LossInputs) -> tuple[Tensor, Tensor, TALStats]:
        """Loss without a graph, its gradient (float32 for float16 logits), and per-sample statistics.

        With reduction "none" row i of the gradient is that of loss i.
        """

    @abstractmethod
    def push(self, ring: RingBuffer, mean: Tensor, std: Tensor, accepted: Tensor | None) -> None:
        """Append the accepted rows with finite statistics to the ring; all rows if ``accepted`` is None."""

    @abstractmethod
    def nearest(self, ring: RingBuffer, mean: Tensor, std: Tensor) -> Tensor:
        """Distance (B,) of each row to its nearest entry; inf if the ring is empty."""


class KernelBackend(Backend):
    """Backend whose kernels compute the loss and its gradient together."""

    @abstractmethod
    def forward(self, inputs: LossInputs, need_grad: bool) -> tuple[Tensor, Tensor, TALStats]:
        """``loss_and_gradient``, with an empty gradient unless ``need_grad``."""

    def loss(self, inputs: LossInputs) -> tuple[Tensor, TALStats]:
        need_grad = wants_gradient(inputs.logits)
        loss, grad, stats = self.forward(inputs, need_grad)
        if need_grad:
            loss = attach_gradient(inputs.logits, loss, grad, inputs.labels, inputs.options.ignore_index)
        return loss, stats

    def loss_and_gradient(self, inputs: LossInputs) -> tuple[Tensor, Tensor, TALStats]:
        return self.forward(inputs, need_grad=True)
