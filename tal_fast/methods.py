"""What a run trains with, behind one interface: (logits, features, labels) -> loss."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tal_fast.config import MethodConfig
from tal_fast.data.loaders import IGNORED_LABEL
from tal_fast.loss import TALLoss
from tal_fast.resharding import reshard
from tal_fast.scores import NORM_EPS

WARMUP_SHARE = 0.05
"""Of the epochs, while the queue fills and typicalness is 1 (paper, section 4; released code)."""


class Step(NamedTuple):
    """What a method makes of a batch.

    Attributes:
        loss: scalar, to go backward from.
        samples: name -> (B,) values of the batch's samples, on the device; epochs report their mean, and their
            distribution where the method's ``ranges`` names them.
    """

    loss: Tensor
    samples: dict[str, Tensor]


class Method(nn.Module):
    """A loss with whatever state it keeps, which is each rank's own: not in buffers, which DDP would overwrite.

    Attributes:
        name: as in the configuration.
        score: the confidence score a model trained with it is judged by; a key of ``tal_fast.scores.SCORES``.
        sample_names: keys of ``Step.samples``.
        ranges: of those, name -> (lowest, highest value) of the ones whose distribution is of interest.
    """

    name: str
    score: str
    sample_names: tuple[str, ...] = ()
    ranges: dict[str, tuple[float, float]]

    def __init__(self) -> None:
        super().__init__()
        self.ranges = {}

    def start_epoch(self, epoch: int) -> None:
        """Called before each epoch, which counts from 0."""

    @property
    def phase(self) -> Hashable:
        """What ``forward`` depends on besides its arguments and its state; a CUDA graph is captured anew for each."""
        return None

    def confidence(self, logits: Tensor) -> Tensor:
        """The score the method is judged by, (B, C) logits -> (B,) float64, on the device of the logits."""
        raise NotImplementedError

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor) -> Step:
        """The loss of a training batch.

        Args:
            logits: (B, C) floating point.
            features: (B, D) floating point, the input of the last Linear layer.
            labels: (B,) int64; ``tal_fast.data.loaders.IGNORED_LABEL`` where there is no image to learn from.
        """
        raise NotImplementedError

    def epoch_metrics(self) -> dict[str, float]:
        """What is worth a column at an epoch's end; may wait for the device."""
        return {}

    def reshard(self, states: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        """This rank's state, made of those that another number of ranks had."""
        return states[rank % len(states)]


class CrossEntropy(Method):
    """Cross-entropy, judged by the maximum softmax probability."""

    name = "ce"
    score = "msp"

    def __init__(self, config: MethodConfig) -> None:
        super().__init__()
        self.label_smoothing = config.label_smoothing

    def confidence(self, logits: Tensor) -> Tensor:
        """See ``Method``."""
        z = logits.double()
        return (z - z.logsumexp(1, keepdim=True)).exp().amax(1)

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor) -> Step:
        """See ``Method``."""
        total = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing, reduction="sum")
        # Not its mean, which is NaN for a batch without an image to learn from.
        return Step(total / (labels != IGNORED_LABEL).sum().clamp(min=1), {})


class TAL(Method):
    """Typicalness-Aware Learning, judged by the cosine score; see ``tal_fast.TALLoss``."""

    name = "tal"
    score = "cosine"
    sample_names = ("typicalness", "temperature")

    def __init__(self, config: MethodConfig, epochs: int) -> None:
        super().__init__()
        self.warmup_epochs = int(WARMUP_SHARE * epochs) if config.warmup_epochs is None else config.warmup_epochs
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

    def confidence(self, logits: Tensor) -> Tensor:
        """See ``Method``."""
        z = logits.double()
        return z.amax(1) / (torch.linalg.vector_norm(z, dim=1) + NORM_EPS)

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor) -> Step:
        """See ``Method``."""
        loss, stats = self.loss_fn(logits, features, labels, warmup=self.warmup, return_stats=True)
        return Step(loss, {"typicalness": stats.typicalness, "temperature": stats.temperature})

    def epoch_metrics(self) -> dict[str, float]:
        """See ``Method``."""
        return {"queue_length": len(self.loss_fn.queue)}

    def reshard(self, states: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        """See ``Method``; the rule is ``tal_fast.resharding``'s."""
        prefix = "loss_fn.queue."
        queues = [
            {key.removeprefix(prefix): value for key, value in s.items() if key.startswith(prefix)} for s in states
        ]
        own = states[0] | {
            prefix + key: value
            for key, value in reshard(queues, rank, world_size, self.loss_fn.queue_scope == "global").items()
        }
        return own


def build_method(config: MethodConfig, epochs: int) -> Method:
    """The method of a run of ``epochs`` epochs.

    Raises:
        ValueError: an option outside its range.
    """
    config.check()
    return CrossEntropy(config) if config.name == "ce" else TAL(config, epochs)


SCORE_OF = {"ce": CrossEntropy.score, "tal": TAL.score}
"""Method -> the score it is judged by."""
