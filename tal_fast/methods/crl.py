"""CRL: confidences ordered as often as the samples were right."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tal_fast.config.schema import MethodConfig
from tal_fast.data.loader import IGNORED_LABEL
from tal_fast.methods.base import Method, Step, Task
from tal_fast.methods.ce import mean_cross_entropy


class CRL(Method):
    """Moon et al., "Confidence-Aware Learning for Deep Neural Networks", ICML 2020, equations 2 and 4.

    c_i is the share of the epochs so far in which training image i was predicted right, scaled so that the least of
    all is 0. For neighbours i, j in the batch (the last's is the first), κ = the maximum softmax probability:
    L = CE + λ mean max(0, −sign(c_i − c_j)(κ_i − κ_j) + |c_i − c_j|). Judged by κ.

    Counts change between epochs, when all ranks add up what they saw. An epoch sees each image once (those of a last,
    unfilled step not at all), so this differs from counting within it in the least count alone, which the released
    code takes anew at each step. A run that goes on with another number of images counts anew.
    """

    name = "crl"
    score = "msp"

    @dataclass
    class Options:
        """Of CRL.

        Attributes:
            weight: λ of the ranking loss.
        """

        weight: float = 1.0

    def __init__(self, config: MethodConfig, task: Task) -> None:
        super().__init__(config, task)
        if self.options.weight < 0:
            raise ValueError(f"method.options.weight is {self.options.weight} but must be at least 0")
        # Not buffers, which DDP would overwrite with the first rank's: ``get_extra_state`` saves them.
        self._times_right, self._right_now, self._often = torch.zeros(3, task.train_images).unbind()
        self._epochs = 0

    def _apply(self, fn: Any, recurse: bool = True) -> CRL:
        super()._apply(fn, recurse)
        self._times_right, self._right_now, self._often = map(fn, (self._times_right, self._right_now, self._often))
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """See ``torch.nn.Module``."""
        return {"times_right": self._times_right, "right_now": self._right_now, "epochs": self._epochs}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """See ``torch.nn.Module``."""
        counted, now = state["times_right"].numel(), self._times_right.numel()
        if counted != now:
            warnings.warn(f"CRL's counts are of {counted} training images, not {now}: it counts anew", stacklevel=2)
            self._times_right.zero_()
            self._right_now.zero_()
            self._epochs = 0
            return
        self._times_right.copy_(state["times_right"])
        self._right_now.copy_(state["right_now"])
        self._epochs = state["epochs"]

    def start_epoch(self, epoch: int) -> None:
        """See ``Method``."""
        least = self._times_right.min()
        # In place, for a CUDA graph knows this one tensor.
        self._often.copy_((self._times_right - least) / (max(1, self._epochs) - least).clamp(min=1))

    def finish_epoch(self) -> None:
        """See ``Method``."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._right_now)
        self._times_right += self._right_now
        self._right_now.zero_()
        self._epochs += 1

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, indices: Tensor) -> Step:
        """See ``Method``."""
        valid = labels != IGNORED_LABEL
        z = logits.float()
        confidence = (z.amax(1) - z.logsumexp(1)).exp()
        often = self._often[indices]
        apart, of = often - often.roll(-1), confidence - confidence.roll(-1)
        pairs = valid & valid.roll(-1)
        loss = torch.relu(apart.abs() - apart.sign() * of) * pairs
        with torch.no_grad():
            # Where there is no image, its place is another's for all we know: add nothing there.
            self._right_now[indices] = torch.where(valid, (z.argmax(1) == labels).float(), self._right_now[indices])
        ranking = loss.sum() / pairs.sum().clamp(min=1)
        return Step(mean_cross_entropy(z, labels, self.label_smoothing) + self.options.weight * ranking, {})

    def reshard(self, states: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        """See ``Method``: the counts of all are the same; what was seen of the unfinished epoch is seen again."""
        own = dict(states[0])
        extra = own["_extra_state"]
        own["_extra_state"] = extra | {"right_now": torch.zeros_like(extra["right_now"])}
        return own
