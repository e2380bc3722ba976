"""Correctness Ranking Loss: confidences ordered by how often each sample was classified correctly."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tal_fast.config.methods import CRLOptions
from tal_fast.config.schema import MethodConfig
from tal_fast.data.loader import IGNORED_LABEL
from tal_fast.methods.base import Method, Step, Task, mean_cross_entropy


class CRL(Method):
    """CRL (Moon et al., "Confidence-Aware Learning for Deep Neural Networks", ICML 2020, equations 2 and 4).

    The correctness c_i is the share of the epochs so far in which training image i was classified correctly, shifted
    and scaled so that the smallest of all is 0. For neighbours i, j in the batch (the last one's neighbour is the
    first) with maximum softmax probability κ, the loss is
    CE + λ mean max(0, −sign(c_i − c_j)(κ_i − κ_j) + |c_i − c_j|). The method is judged by κ.

    Counts change between epochs, when all ranks add up theirs. An epoch sees each image once (those of a last, partial
    step not at all), so this differs from the released code, which counts within the epoch, in the smallest count
    alone. A run resumed with other images starts to count from 0.
    """

    name = "crl"
    score = "msp"
    once_an_epoch = True
    Options = CRLOptions

    def __init__(self, config: MethodConfig, task: Task) -> None:
        super().__init__(config, task)
        # Plain attributes, because DDP overwrites buffers with the first rank's; get_extra_state saves them.
        self._times_correct, self._correct_now, self._correctness = torch.zeros(3, task.train_images).unbind()
        self._epochs = 0

    def _apply(self, fn: Any, recurse: bool = True) -> CRL:
        super()._apply(fn, recurse)
        self._times_correct, self._correct_now, self._correctness = map(
            fn, (self._times_correct, self._correct_now, self._correctness)
        )
        return self

    def get_extra_state(self) -> dict[str, Any]:
        # Keys as in the checkpoints of version 0.1.0.
        return {"times_right": self._times_correct, "right_now": self._correct_now, "epochs": self._epochs}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state["times_right"].numel() == self._times_correct.numel():  # else ``resumed`` starts from 0
            self._times_correct.copy_(state["times_right"])
            self._correct_now.copy_(state["right_now"])
            self._epochs = state["epochs"]

    def resumed(self, epoch_start: bool, same_images: bool) -> None:
        if epoch_start or not same_images:
            self._correct_now.zero_()
        if not same_images:
            warnings.warn("CRL's counts are of other training images: counting starts from 0", stacklevel=2)
            self._times_correct.zero_()
            self._epochs = 0 if epoch_start else -1  # the rest of the epoch, at least its end, does not count

    def start_epoch(self, epoch: int) -> None:
        smallest = self._times_correct.min()
        # In place, because a CUDA graph holds this very tensor.
        self._correctness.copy_((self._times_correct - smallest) / (max(1, self._epochs) - smallest).clamp(min=1))

    def finish_epoch(self) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._correct_now)
        self._times_correct += self._correct_now
        self._correct_now.zero_()
        self._epochs += 1

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, indices: Tensor) -> Step:
        valid = labels != IGNORED_LABEL
        z = logits.float()
        confidence = (z.amax(1) - z.logsumexp(1)).exp()
        correctness = self._correctness[indices]
        margin, difference = correctness - correctness.roll(-1), confidence - confidence.roll(-1)
        pairs = valid & valid.roll(-1)
        loss = torch.relu(margin.abs() - margin.sign() * difference) * pairs
        with torch.no_grad():
            # The index of a row without an image may be another image's, so its count must not change.
            correct = (z.argmax(1) == labels).float()
            self._correct_now[indices] = torch.where(valid, correct, self._correct_now[indices])
        ranking = loss.sum() / pairs.sum().clamp(min=1)
        return Step(mean_cross_entropy(z, labels, self.label_smoothing) + self.options.weight * ranking, {})
