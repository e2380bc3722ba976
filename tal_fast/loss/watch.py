"""Warnings about correct samples that do not enter TAL's queue, and about swapped logits and features."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tal_fast.loss.options import LossOptions
from tal_fast.loss.queue import FeatureQueue
from tal_fast.loss.reference import TALStats

INTERVAL = 500
"""Training steps between two looks."""

FEW = 8
"""Fewest correct samples of two looks by which a queue that moves is judged: fewer may all stay out by chance."""

LAUNCHES_SETTLE = 64
"""First step at which the labels copied half as many steps ago are read: a GPU is at most 1,024 launches behind."""


class QueueWatch:
    """Check, every ``INTERVAL`` training steps, that correct samples enter the queue; warns once if they do not.

    In the steps 1, 2, 4, 8, ... it checks whether logits and features are swapped. A check does not wait for a GPU: it
    uses what the one before has copied. There is none in CUDA graphs. Names of options in the warning begin with
    ``option``; ``report`` receives the warning, by default as a RuntimeWarning.
    """

    def __init__(self, option: str = "", report: Callable[[str], None] | None = None) -> None:
        self.option = option
        self.report = report or partial(warnings.warn, category=RuntimeWarning, stacklevel=6)
        self.steps = 0
        self.warned = False
        self._looks: list[Tensor] = []  # slot of the queue's next entry; the step's correct and accepted samples
        self._largest: Tensor | None = None  # largest of the labels looked at
        self._labels = 0  # how many these are

    def step(
        self, stats: TALStats, queue: FeatureQueue, options: LossOptions, inputs: tuple[Tensor, Tensor, Tensor] | None
    ) -> None:  # fmt: skip
        """Count a training step, after its push; ``inputs`` are logits, features and labels, or None."""
        self.steps += 1
        early, regular = not self.steps & (self.steps - 1), self.steps % INTERVAL == 0
        if self.warned or not (early or regular):
            return
        cursor = queue.ring.cursor
        if cursor.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if early and inputs is not None and (problem := self._swapped(*inputs, options.ignore_index)) is not None:
            self.warned = True
            self.report(f"{problem}: logits and features look swapped; call loss_fn(logits, features, labels)")
        if not regular:
            return
        look = torch.stack([cursor[0], stats.correct.sum(), stats.accepted.sum()]).to("cpu", non_blocking=True)
        self._looks = [*self._looks[-2:], look]
        finished = self._looks[:-1] if cursor.is_cuda else self._looks
        if len(finished) < 2:
            return
        (slot, *before), (new_slot, *now) = (look.tolist() for look in finished[-2:])
        correct, accepted = before[0] + now[0], before[1] + now[1]
        if correct < FEW and slot != new_slot:
            return
        where = f"of steps {self.steps - INTERVAL} and {self.steps}"
        if (problem := self.judge(correct, accepted, options.confidence_threshold, where)) is not None:
            self.report(problem)

    def _swapped(self, logits: Tensor, features: Tensor, labels: Tensor, ignore_index: int) -> str | None:
        """Reason to think that logits and features are swapped; None if there is none."""
        if torch.is_grad_enabled() and features.requires_grad and not logits.requires_grad:
            return "the features have a gradient and the logits have none"
        width, classes = features.shape[1], logits.shape[1]
        if width == classes or not len(labels):
            return None
        self._labels += len(labels)
        largest = torch.where(labels == ignore_index, -1, labels).max()
        if self._largest is not None:
            largest = torch.maximum(largest, self._largest.to(largest.device, non_blocking=True))
        before, self._largest = self._largest, largest.to("cpu", non_blocking=True)
        seen = before if labels.is_cuda else self._largest
        if seen is None or (labels.is_cuda and self.steps < LAUNCHES_SETTLE) or int(seen) != width - 1:
            return None
        if width < classes and self._labels * math.log(classes / width) < 10:  # by chance, at e^-10 or more
            return None
        return f"the labels go up to {int(seen)}, which fits the features' width {width}, not the logits' {classes}"

    def judge(self, correct: float, accepted: float, threshold: float, where: str) -> str | None:
        """Sentence about a queue that misses correct samples, with the remedy; None if it does not, or after the first.

        ``correct`` and ``accepted`` are numbers, or shares, of the samples ``where``, such as "of epoch 3", that are
        classified correctly and of those that enter the queue; ``threshold`` is the ``confidence_threshold`` in use.
        """
        if self.warned or not accepted <= 0.5 * correct:  # NaN: not counted
            return None
        self.warned = True
        if not correct:
            return (
                f"no sample {where} is classified correctly and nothing enters TAL's queue; lower the learning rate or "
                "clip the gradient's norm"
            )
        reason, remedy = "logits or features are not finite", "lower the learning rate or"
        if threshold > -1:
            name = f"{self.option}confidence_threshold"
            reason = f"cosine is not above {name} = {threshold:g}"
            remedy = f"set {name} to -1, which accepts them all, or lower {self.option}t_max and"
        return (
            f"only {accepted / correct:.0%} of the correctly classified samples {where} enter TAL's queue, as the "
            f"others' {reason}; typicalness then means little: {remedy} clip the gradient's norm"
        )
