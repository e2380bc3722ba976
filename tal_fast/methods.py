"""What a run trains with, behind one interface: (logits, features, labels, epoch) -> loss."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from tal_fast.config import MethodConfig
from tal_fast.loss import TALLoss

WARMUP_SHARE = 0.05
"""Of the epochs, while the queue fills and typicalness is 1 (paper, section 4; released code)."""


class Step(NamedTuple):
    """What a method makes of a batch.

    Attributes:
        loss: scalar, to go backward from.
        metrics: name -> mean over the batch, a scalar on the device; epochs average them by images.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Method(nn.Module):
    """A loss with whatever state it keeps. It stays outside DDP: its state is each rank's own.

    Attributes:
        name: as in the configuration.
        score: the confidence score a model trained with it is judged by; a key of ``tal_fast.scores.SCORES``.
    """

    name: str
    score: str

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, epoch: int) -> Step:
        """The loss of a training batch.

        Args:
            logits: (B, C) floating point.
            features: (B, D) floating point, the input of the last Linear layer.
            labels: (B,) int64.
            epoch: from 0.
        """
        raise NotImplementedError

    def epoch_metrics(self) -> dict[str, float]:
        """What is worth a column at an epoch's end; may wait for the device."""
        return {}


class CrossEntropy(Method):
    """Cross-entropy, judged by the maximum softmax probability."""

    name = "ce"
    score = "msp"

    def __init__(self, config: MethodConfig) -> None:
        super().__init__()
        self.label_smoothing = config.label_smoothing

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, epoch: int) -> Step:
        """See ``Method``."""
        return Step(F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing), {})


class TAL(Method):
    """Typicalness-Aware Learning, judged by the cosine score.

    Args:
        config: its options.
        epochs: of the whole run; the first 5% are warm-up unless ``config.warmup_epochs`` says otherwise.
    """

    name = "tal"
    score = "cosine"

    def __init__(self, config: MethodConfig, epochs: int) -> None:
        super().__init__()
        self.warmup_epochs = int(WARMUP_SHARE * epochs) if config.warmup_epochs is None else config.warmup_epochs
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

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, epoch: int) -> Step:
        """See ``Method``."""
        warmup = epoch < self.warmup_epochs
        loss, stats = self.loss_fn(logits, features, labels, warmup=warmup, return_stats=True)
        return Step(loss, {"typicalness": stats.typicalness.mean(), "temperature": stats.temperature.mean()})

    def epoch_metrics(self) -> dict[str, float]:
        """See ``Method``."""
        return {"queue_length": len(self.loss_fn.queue)}


def build_method(config: MethodConfig, epochs: int) -> Method:
    """The method of a run of ``epochs`` epochs.

    Raises:
        ValueError: an option outside its range.
    """
    config.check()
    return CrossEntropy(config) if config.name == "ce" else TAL(config, epochs)


SCORE_OF = {"ce": CrossEntropy.score, "tal": TAL.score}
"""Method -> the score it is judged by."""
