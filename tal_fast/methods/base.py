"""What a method is: (logits, features, labels) -> loss, and what else it adds to a training step."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tal_fast.config.schema import MethodConfig, read
from tal_fast.scores.logits import NORM_EPS


@dataclass(frozen=True)
class Task:
    """What a method may have to know of the run it serves.

    Attributes:
        epochs: of the whole run.
        num_classes: of the data.
        train_images: over all ranks.
        learning_rate: the peak.
    """

    epochs: int
    num_classes: int
    train_images: int
    learning_rate: float


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

    Only ``name``, ``score`` and ``forward`` must be given; docs/adding-a-method.md shows how.

    Args:
        config: the run's; ``config.options`` are read into ``Options``.
        task: the rest of the run.

    Attributes:
        name: as in the configuration: the module's, with hyphens.
        score: the confidence score a model trained with it is judged by; a key of ``tal_fast.scores.SCORES``.
        Options: a dataclass of the options of its own (``method.options``), with a default each.
        reads: fields of ``MethodConfig`` that change what it computes; a grid over others is refused.
        sample_names: keys of ``Step.samples``.
        ranges: of those, name -> (lowest, highest value) of the ones whose distribution is of interest.
        extra_classes: logits that the network has in training beyond the data's classes; validation and evaluation do
            without them.
        outliers: what ``tal_fast.data.ood.ood_set`` takes: images of no class, a batch of which
            ``inputs`` is given at each step; None: none.
        radius: ρ of sharpness-aware minimisation (``tal_fast.training.sam``); None: plain steps.
        averages_from: share of the epochs after which the weights are averaged epoch by epoch
            (``tal_fast.training.weight_averaging``); None: never.
        ascends: set by the trainer while the gradient is that of sharpness-aware minimisation's ascent, which must not
            change the method's state.

    Raises:
        ValueError: an option outside its range.
    """

    name: ClassVar[str]
    score: ClassVar[str]
    Options: ClassVar[type | None] = None
    reads: ClassVar[frozenset[str]] = frozenset({"name", "label_smoothing", "options"})
    sample_names: tuple[str, ...] = ()
    extra_classes: ClassVar[int] = 0
    outliers: str | None = None
    radius: float | None = None
    averages_from: float | None = None

    def __init__(self, config: MethodConfig, task: Task) -> None:
        super().__init__()
        self.task = task
        self.label_smoothing = config.label_smoothing
        self.ranges: dict[str, tuple[float, float]] = {}
        self.ascends = False
        if self.Options is None and config.options:
            raise ValueError(
                f"method.options has {next(iter(config.options))!r} but {self.name} has no options of its own"
            )
        self.options: Any = None if self.Options is None else read(self.Options, config.options, "method.options")

    def start_epoch(self, epoch: int) -> None:
        """Called before each epoch, which counts from 0, and when one is resumed."""

    def finish_epoch(self) -> None:
        """Called after each epoch on all ranks, which may speak to each other here."""

    @property
    def phase(self) -> Hashable:
        """What ``forward`` depends on besides its arguments and its state; a CUDA graph is captured anew for each."""
        return None

    def learning_rate(self, rate: float, epoch: float) -> float:
        """The learning rate of a step, from the scheduled one; ``epoch`` as for ``tal_fast.training.optim.learning_rate``."""
        return rate

    def confidence(self, logits: Tensor) -> Tensor:
        """The score the method is judged by, (B, C) logits -> (B,) float64, on the device of the logits."""
        return CONFIDENCES[self.score](logits.double())

    def inputs(self, images: Tensor, outliers: Tensor | None) -> Tensor:
        """What the network sees of a batch, on the device.

        Args:
            images: (B, C, H, W).
            outliers: (B, C, H, W), if ``outliers`` names any.

        Returns:
            (B or more, C, H, W); the first B are the batch's own.
        """
        return images

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, indices: Tensor) -> Step:
        """The loss of a training batch; nothing here may wait for the device.

        Args:
            logits: (B, C + ``extra_classes``) floating point; more rows if ``inputs`` gave more images.
            features: (rows of the logits, D) floating point, the input of the last Linear layer.
            labels: (B,) int64; ``tal_fast.data.loader.IGNORED_LABEL`` where there is no image to learn from.
            indices: (B,) int64, places of the images among the training images.
        """
        raise NotImplementedError

    def epoch_metrics(self) -> dict[str, float]:
        """What is worth a column at an epoch's end; may wait for the device."""
        return {}

    def reshard(self, states: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        """This rank's state, made of those that another number of ranks had, for the start of an epoch."""
        return states[rank % len(states)]


def _cosine(z: Tensor) -> Tensor:
    return z.amax(1) / (torch.linalg.vector_norm(z, dim=1) + NORM_EPS)


def _msp(z: Tensor) -> Tensor:
    return (z.amax(1) - z.logsumexp(1)).exp()


CONFIDENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "msp": _msp,
    "cosine": _cosine,
    "max_logit": lambda z: z.amax(1),
    "energy": lambda z: z.logsumexp(1),
    "neg_entropy": lambda z: -torch.special.entr(z.softmax(1)).sum(1),
    "doctor": lambda z: z.softmax(1).square().sum(1),
}
"""``tal_fast.scores.SCORES`` on the device: (B, C) float64 logits -> (B,)."""
