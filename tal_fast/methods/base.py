"""Interface of training methods: (logits, features, labels) -> loss, and what else a method adds to a step."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tal_fast.config.methods import MethodOptions, read_options
from tal_fast.config.schema import MethodConfig
from tal_fast.data.loader import IGNORED_LABEL
from tal_fast.scores.logits import SCORES


def mean_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy in float32 over the rows whose label is not ``IGNORED_LABEL``; 0, not NaN, without any.

    ``class_weight`` (C,) is as in ``F.cross_entropy``, whose mean divides by the weights of the labels. ``share`` (B,)
    are factors of the rows' losses that the mean does not divide by.
    """
    rows, reduction = logits.float(), "sum" if share is None else "none"
    total = F.cross_entropy(rows, labels, class_weight, label_smoothing=label_smoothing, reduction=reduction)
    if share is not None:
        total = (total * share).sum()
    valid = labels != IGNORED_LABEL
    if class_weight is None:
        return total / valid.sum().clamp(min=1)
    weights = (class_weight[labels.clamp(min=0)] * valid).sum()
    return total / torch.where(weights > 0, weights, 1.0)


@dataclass(frozen=True)
class Task:
    """Facts about a run that a method may need.

    Attributes:
        num_classes: number of classes of the data, without ``Method.extra_classes``.
        train_images: number of training images over all ranks.
        learning_rate: peak learning rate.
        class_weight: (C,) float32 ``method.class_weight``; None for none.
    """

    epochs: int
    num_classes: int
    train_images: int
    learning_rate: float
    class_weight: Tensor | None = None


class Step(NamedTuple):
    """Result of a method for one batch.

    Attributes:
        loss: scalar to backpropagate.
        samples: name -> (B,) values of the batch's samples, on the device. Epochs report their means, and their
            distributions if the method's ``ranges`` has the name.
    """

    loss: Tensor
    samples: dict[str, Tensor]


class Method(nn.Module):
    """Base class of training methods: a loss with its state.

    State is each rank's own and must not be in buffers, which DDP overwrites with the first rank's. Subclasses must
    define ``name``, ``score`` and ``forward``; docs/adding-a-method.md has an example.

    Attributes:
        name: name in the configuration: the module's name, with hyphens.
        score: confidence score that models trained with the method are judged by; a key of ``tal_fast.scores.SCORES``.
        Options: dataclass of the method's options, with a default for each. Those of the built-in methods are in
            ``tal_fast.config.methods``, for the help of the command line.
        options: instance of ``Options``.
        class_weight: that of the task, on the method's device.
        sample_names: keys of ``Step.samples``.
        ranges: name -> (lowest, highest value) of those whose distribution is reported.
        extra_classes: number of the network's logits beyond the data's classes in training; validation and evaluation
            leave them out.
        outliers: description of a set of outliers, as ``tal_fast.data.ood.ood_set`` takes it; each step passes a batch
            of it to ``inputs``. None: no outliers.
        radius: radius ρ of sharpness-aware minimisation (``tal_fast.training.sam``); None: ordinary steps.
        mixes: whether it trains on mixed images (``tal_fast.training.mixing``): ``alone``, in place of the clean ones,
            which needs ``sample_names`` to be empty; ``beside`` the clean ones; or ``never``.
        takes_class_weight: whether its loss is weighted by ``class_weight``; otherwise they are refused.
        once_an_epoch: whether it relies on seeing each training image at most once an epoch.
        averages_from: share of the epochs after which weights are averaged once an epoch
            (``tal_fast.training.weight_averaging``); None: never.
        ascent_pass: True in the first pass of sharpness-aware minimisation, whose gradient only perturbs the weights
            and which must not change the method's state. Set by the trainer.

    Raises:
        ValueError: an unknown option, a value of the wrong type, or one that the options' ``check`` refuses.
    """

    name: ClassVar[str]
    score: ClassVar[str]
    Options: ClassVar[type] = MethodOptions
    sample_names: tuple[str, ...] = ()
    extra_classes: ClassVar[int] = 0
    mixes: ClassVar[Literal["alone", "beside", "never"]] = "beside"
    takes_class_weight: ClassVar[bool] = False
    once_an_epoch: ClassVar[bool] = False
    outliers: str | None = None
    radius: float | None = None
    averages_from: float | None = None

    def __init__(self, config: MethodConfig, task: Task) -> None:
        super().__init__()
        self.task = task
        self.label_smoothing = config.label_smoothing
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", task.class_weight, persistent=False)
        self.ranges: dict[str, tuple[float, float]] = {}
        self.ascent_pass = False
        self.options: Any = read_options(self.name, self.Options, config.options)
        if hasattr(self.options, "check"):
            self.options.check()

    def start_epoch(self, epoch: int) -> None:
        """Called before each epoch, which counts from 0, and when an epoch is resumed."""

    def finish_epoch(self) -> None:
        """Called after each epoch on all ranks, which may communicate here."""

    def resumed(self, epoch_start: bool, same_images: bool) -> None:
        """Called after a saved state was loaded.

        Args:
            epoch_start: whether the run goes on from the start of an epoch, whose steps until then do not count.
            same_images: whether the training images are those of the saved state.
        """

    @property
    def phase(self) -> Hashable:
        """State that changes what ``forward`` computes; a CUDA graph is captured for each value."""
        return None

    def learning_rate(self, rate: float, epoch: float) -> float:
        """Learning rate of a step, given the schedule's and the number of finished epochs, with fractions."""
        return rate

    def confidence(self, logits: Tensor) -> Tensor:
        """Confidence by the method's score: (B, C) logits -> (B,) float64, on the same device."""
        return SCORES[self.score](logits)

    def inputs(self, images: Tensor, outliers: Tensor | None) -> Tensor:
        """Images that the network sees in a training step.

        Args:
            images: (B, C, H, W), on the device.
            outliers: (B, C, H, W) if the method's ``outliers`` is set, else None.

        Returns:
            (B or more, C, H, W), of which the first B belong to the batch's labels.
        """
        return images

    def forward(self, logits: Tensor, features: Tensor, labels: Tensor, indices: Tensor) -> Step:
        """Loss of a training batch; must not wait for the device.

        Args:
            logits: (B, C + ``extra_classes``) floating point; more rows if ``inputs`` returned more images.
            features: (rows of the logits, D) floating point, the input of the last Linear layer.
            labels: (B,) int64; ``tal_fast.data.loader.IGNORED_LABEL`` for rows without an image to learn from.
            indices: (B,) int64, positions of the images among the training images.
        """
        raise NotImplementedError

    def mixed_loss(self, logits: Tensor, pairs: Tensor, share: Tensor) -> Tensor:
        """Loss of mixed images: here the cross-entropy of both labels, by their shares.

        Args:
            logits: (B, C + ``extra_classes``) floating point.
            pairs: (B, 2) int64 labels of the two images; both ``IGNORED_LABEL`` where one has no image to learn from.
            share: (B,) float32 share λ of the first image in [0, 1].

        Returns:
            Scalar, the mean of λ L(x, y) + (1 - λ) L(x, y') over the rows with labels.
        """
        loss = partial(mean_cross_entropy, logits, label_smoothing=self.label_smoothing, class_weight=self.class_weight)
        return loss(pairs[:, 0], share=share) + loss(pairs[:, 1], share=1 - share)

    def epoch_metrics(self) -> dict[str, float]:
        """Further columns of metrics.csv at the end of an epoch; may wait for the device."""
        return {}

    def warning(self, row: Mapping[str, float]) -> str | None:
        """Sentence about an epoch's columns of metrics.csv that shows that training goes wrong, or None."""
        return None

    def reshard(self, states: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        """State of a rank at the start of an epoch after the number of ranks has changed, given those of all former."""
        return states[rank % len(states)]
