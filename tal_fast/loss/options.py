"""Options of the loss, and checks of a step's arguments."""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tal_fast.config.methods import OWN_THRESHOLD

CHECK_LABELS_ON_GPU = os.environ.get("TAL_FAST_DEBUG") == "1"
"""Whether to check the labels' range on GPUs too, where every check waits for the device."""


@dataclass(frozen=True)
class LossOptions:
    """Options that define a TAL loss, apart from its queue; ``TALLoss`` describes them."""

    variant: str = "paper"
    t_min: float = 10.0
    t_max: float = 100.0
    t_wrong: float | None = 20.0
    confidence_threshold: Any = None  # a float; None becomes the variant's own
    ignore_index: int = -100
    label_smoothing: float = 0.0
    inplace: bool = False
    reduction: str = "mean"

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "released"):
            raise ValueError(f"variant is {self.variant!r}; use 'paper' or 'released'")
        threshold = OWN_THRESHOLD[self.variant] if self.confidence_threshold is None else self.confidence_threshold
        object.__setattr__(self, "confidence_threshold", float(threshold))  # frozen
        object.__setattr__(self, "ignore_index", whole_number("ignore_index", self.ignore_index))
        if not 0 < self.t_min <= self.t_max < float("inf"):
            raise ValueError(
                f"temperatures are t_min={self.t_min}, t_max={self.t_max}; they must satisfy 0 < t_min <= t_max"
            )
        if self.t_wrong is not None and not 0 < self.t_wrong < float("inf"):
            raise ValueError(f"t_wrong is {self.t_wrong}; it must be positive, or None for that of the typicalness")
        if not -1 <= self.confidence_threshold <= 1:
            raise ValueError(f"confidence_threshold is {self.confidence_threshold}; a cosine lies in [-1, 1]")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must lie in [0, 1]")
        if self.reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction is {self.reduction!r}; use 'mean', 'sum' or 'none'")


def whole_number(name: str, value: Any) -> int:
    """Return an integer option as an int; raise ValueError for anything else, such as 2.5."""
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)  # of NumPy and the like
    except TypeError:
        raise ValueError(f"{name} is {value!r} but must be a whole number") from None


def check_inputs(
    logits: Tensor, features: Tensor, labels: Tensor, ignore_index: int, class_sharded: bool = False,
    class_weight: Tensor | None = None,
) -> None:  # fmt: skip
    """Raise ValueError or TypeError unless a batch is as ``TALLoss.forward`` wants it.

    With ``class_sharded`` logits, this rank's columns of wider rows, C may be 0, and what no rank knows alone is not
    checked: the labels' range and the number of class weights.
    """
    if logits.dim() != 2 or (logits.shape[1] < 1 and not class_sharded):
        raise ValueError(f"logits are {tuple(logits.shape)} but must be (B, C) with C >= 1")
    if features.dim() != 2 or features.shape[0] != logits.shape[0]:
        raise ValueError(
            f"features are {tuple(features.shape)} but must be (B, D) with B = {logits.shape[0]} as the logits"
        )
    if features.shape[1] < 2:
        raise ValueError(
            f"features have {features.shape[1]} dimension but need at least 2 for a standard deviation; "
            "pass the input of the last Linear layer"
        )
    if labels.dim() == 2 and labels.shape == logits.shape:
        raise ValueError(
            f"labels are {tuple(labels.shape)}, soft as those of mixed images, but TAL judges images of one class; "
            "pass clean images with (B,) labels here, the mixed ones to F.cross_entropy, and add both losses"
        )
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels are {tuple(labels.shape)} but must be ({logits.shape[0]},) as the logits")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels are {labels.dtype} but must be torch.int64 class indices; use labels.long()")
    for name, tensor in (("logits", logits), ("features", features)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} are {tensor.dtype} but must be floating point; use {name}.float()")
    if not (logits.device == features.device == labels.device):
        raise ValueError(
            f"logits are on {logits.device}, features on {features.device} and labels on {labels.device}; "
            "move them to one device"
        )
    if class_weight is not None:
        if class_weight.device != logits.device:
            raise ValueError(
                f"class_weight is on {class_weight.device} but the logits are on {logits.device}; move it to theirs"
            )
        if not class_sharded:
            check_number_of_weights(class_weight, logits.shape[1])
    if not class_sharded and labels_are_checked(labels):
        check_label_range(labels, logits.shape[1], ignore_index, features.shape[1])


def check_class_weight(weight: Tensor) -> Tensor:
    """Return the weights without a graph; raise TypeError or ValueError unless they are as ``TALLoss`` wants them.

    Their values are read where those of labels are.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(
            f"class_weight is {found} but must be a floating-point tensor, such as torch.tensor([1.0, 2.0])"
        )
    if weight.dim() != 1:
        raise ValueError(f"class_weight is {tuple(weight.shape)} but must be (C,), one weight for each class")
    weight = weight.detach()
    if labels_are_checked(weight):
        wrong = ~(weight.isfinite() & (weight >= 0))
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise ValueError(f"class_weight[{at}] is {float(weight[at])} but must be finite and at least 0")
    return weight


def check_number_of_weights(weight: Tensor, num_classes: int) -> None:
    """Raise ValueError unless there is one class weight for each class."""
    if len(weight) != num_classes:
        raise ValueError(
            f"class_weight has {len(weight)} weights but the logits {num_classes} classes; give one for each"
        )


def labels_are_checked(labels: Tensor) -> bool:
    """Whether to read the labels' values: not where that waits for a GPU, nor while ``torch.compile`` traces."""
    return not torch.compiler.is_compiling() and (labels.device.type == "cpu" or CHECK_LABELS_ON_GPU)


def check_label_range(labels: Tensor, num_classes: int, ignore_index: int, width: int | None = None) -> None:
    """Raise ValueError if a label is neither in [0, num_classes) nor ``ignore_index``; waits for the device.

    If the labels fit ``width``, that of the features, the sentence says so.
    """
    valid = labels != ignore_index
    outside = valid & ((labels < 0) | (labels >= num_classes))
    if outside.any():
        row = int(outside.nonzero()[0])
        swapped = width is not None and int(torch.where(valid, labels, -1).max()) == width - 1
        raise ValueError(
            f"label {int(labels[row])} in row {row} is outside [0, {num_classes}); "
            f"give it a class or ignore_index = {ignore_index}"
            + (f", or swap logits and features: {width} features are one for each class" if swapped else "")
        )
