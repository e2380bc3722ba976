"""Typicalness-Aware Learning as a method of training; the loss itself is ``tal_fast.TALLoss``."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

from torch import Tensor

from tal_fast.config.schema import MethodConfig
from tal_fast.loss.module import TALLoss
from tal_fast.loss.resharding import reshard
from tal_fast.methods.base import Method, Step, Task

WARMUP_SHARE = 0.05
"""Of the epochs, while the queue fills and typicalness is 1 (paper, section 4; released code)."""


class TAL(Method):
    """Typicalness-Aware Learning, judged by the cosine score; see ``tal_fast.TALLoss``."""

    name = "tal"
    score = "cosine"
    reads = frozenset(field.name for field in dataclasses.fields(MethodConfig))
    sample_names = ("typicalness", "temperature")

    def __init__(self, config: MethodConfig, task: Task) -> None:
        super().__init__(config, task)
        given = config.warmup_epochs
        self.warmup_epochs = int(WARMUP_SHARE * task.epochs) if given is None else given
        self.warmup = False
        self.loss_fn = TALLoss(
            variant=config.variant,
            queue_size=config.queue_size,
            t_min=config.t_min,
            t_max=config.t_max,
            t_wrong=config.t_wrong,
            confidence_threshold=config.confidence_threshold,
            label_smoothing=config.label_smoothing,
            queue_scope=config.queue_scope,
            backend=config.backend,
        )
        lowest = min(config.t_min, config.t_max if config.t_wrong is None else config.t_wrong)
        highest = max(config.t_max, config.t_min if config.t_wrong is None else config.t_wrong)
        self.ranges = {"typicalness": (0.0, 1.0), "temperature": (lowest, highest)}

    def start_epoch(self, epoch: int) -> None:
        """See ``Method``."""
        self.warmup = epoch < self.warmup_epochs

    @property
    def phase(self) -> Hashable:
        """See ``Method``."""
        return self.warmup

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, indices: Tensor) -> Step:
        """See ``Method``."""
        push = not self.ascends
        loss, stats = self.loss_fn(logits, features, labels, warmup=self.warmup, push=push, return_stats=True)
        return Step(loss, {"typicalness": stats.typicalness, "temperature": stats.temperature})

    def epoch_metrics(self) -> dict[str, float]:
        """See ``Method``."""
        return {"queue_length": len(self.loss_fn.queue)}

    def reshard(self, states: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        """See ``Method``; the rule is ``tal_fast.loss.resharding``'s."""
        prefix = "loss_fn.queue."
        queues = [
            {key.removeprefix(prefix): value for key, value in s.items() if key.startswith(prefix)} for s in states
        ]
        own = states[0] | {
            prefix + key: value
            for key, value in reshard(queues, rank, world_size, self.loss_fn.queue_scope == "global").items()
        }
        return own
