"""Typicalness-Aware Learning as a training method; ``tal_fast.TALLoss`` is the loss."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from tal_fast.config.methods import TAL_OPTIONS, TALOptions
from tal_fast.config.schema import MethodConfig
from tal_fast.loss.module import TALLoss
from tal_fast.loss.resharding import reshard
from tal_fast.loss.watch import QueueWatch
from tal_fast.methods.base import Method, Step, Task

logger = logging.getLogger(__name__)

WARMUP_SHARE = 0.05
"""Share of the epochs in which the queue fills and typicalness is 1 (paper, section 4; released code)."""


class TAL(Method):
    """Typicalness-Aware Learning, judged by the cosine score; see ``tal_fast.TALLoss``."""

    name = "tal"
    score = "cosine"
    takes_class_weight = True
    Options: ClassVar[type] = TALOptions
    sample_names = ("typicalness", "temperature", "accepted")

    def __init__(self, config: MethodConfig, task: Task) -> None:
        super().__init__(config, task)
        options = self.options
        given = options.warmup_epochs
        self.warmup_epochs = int(WARMUP_SHARE * task.epochs) if given is None else given
        self.warmup = False
        loss_options = {name: getattr(options, name) for name in TAL_OPTIONS - {"warmup_epochs"}}
        self.loss_fn = TALLoss(**loss_options, label_smoothing=config.label_smoothing, class_weight=task.class_weight)
        self.watch = self.loss_fn.watch = QueueWatch("method.options.", logger.warning)
        temperatures = [t for t in (options.t_min, options.t_max, options.t_wrong) if t is not None]
        self.ranges = {"typicalness": (0.0, 1.0), "temperature": (min(temperatures), max(temperatures))}

    def start_epoch(self, epoch: int) -> None:
        self.warmup = epoch < self.warmup_epochs

    @property
    def phase(self) -> Hashable:
        return self.warmup

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, indices: Tensor) -> Step:
        push = not self.ascent_pass
        loss, stats = self.loss_fn(logits, features, labels, warmup=self.warmup, push=push, return_stats=True)
        return Step(loss, {name: getattr(stats, name) for name in self.sample_names})

    def epoch_metrics(self) -> dict[str, float]:
        return {"queue_length": len(self.loss_fn.queue)}

    def warning(self, row: Mapping[str, float]) -> str | None:
        threshold, correct, accepted = self.loss_fn.options.confidence_threshold, row["train_accuracy"], row["accepted"]
        if not correct and self.task.train_images < 100 * self.task.num_classes:
            return None  # by chance
        return self.watch.judge(correct, accepted, threshold, "of this epoch")

    def reshard(self, states: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        prefix = "loss_fn.queue."
        queues = [
            {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            for state in states
        ]
        queue = reshard(queues, rank, world_size, self.loss_fn.queue_scope == "global")
        return states[0] | {prefix + key: value for key, value in queue.items()}
