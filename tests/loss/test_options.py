"""Checks of the options and of a step's arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tal_fast import FeatureQueue, TALLoss
from tal_fast.loss import options
from tal_fast.loss.options import LossOptions, check_inputs, check_label_range


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"variant": "typical"}, "variant is 'typical'"),
        ({"t_min": 0.0}, "0 < t_min"),
        ({"t_min": 20.0, "t_max": 10.0}, "0 < t_min <= t_max"),
        ({"t_max": float("inf")}, "t_max=inf"),
        ({"t_wrong": -1.0}, "t_wrong is -1.0"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"confidence_threshold": 2.0}, "confidence_threshold is 2.0"),
    ],
)
def test_options_out_of_range(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossOptions(**kwargs)


@pytest.mark.parametrize("value", [2.5, 3.0, "7", None, torch.tensor([2.0, 1.0])])
def test_options_that_count_must_be_whole_numbers(value: Any) -> None:
    for name, call in {
        "queue_size": lambda: TALLoss(queue_size=value),
        "queue capacity": lambda: FeatureQueue(value),
        "ignore_index": lambda: TALLoss(ignore_index=value),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name} is .* but must be a whole number$"):
            call()


def test_whole_numbers_of_numpy_and_torch_are_taken() -> None:
    loss_fn = TALLoss(queue_size=np.int32(7), ignore_index=torch.tensor(-1))
    assert (loss_fn.queue.capacity, loss_fn.options.ignore_index) == (7, -1)
    assert (type(loss_fn.queue.capacity), type(loss_fn.options.ignore_index)) == (int, int)


def test_devices_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match="labels on meta"):
        check_inputs(torch.randn(2, 3), torch.rand(2, 4), torch.zeros(2, dtype=torch.int64, device="meta"), -100)


def test_columns_of_sharded_rows_may_be_none_and_their_labels_anything() -> None:
    logits, features, labels = torch.randn(2, 0), torch.rand(2, 4), torch.tensor([0, 7])
    check_inputs(logits, features, labels, -100, class_sharded=True)
    with pytest.raises(ValueError, match="C >= 1"):
        check_inputs(logits, features, labels, -100)


def test_ignored_labels_are_in_range() -> None:
    labels = torch.tensor([0, -1, 4])
    check_label_range(labels, 5, ignore_index=-1)
    with pytest.raises(ValueError, match=r"label -1 in row 1 is outside \[0, 5\); .* ignore_index = -2"):
        check_label_range(labels, 5, ignore_index=-2)


def test_labels_that_fit_the_features_speak_for_swapped_arguments() -> None:
    labels = torch.tensor([6, -100, 2])
    with pytest.raises(ValueError, match="label 6 in row 0 .*, or swap logits and features: 7 features are one for"):
        check_inputs(torch.rand(3, 5), torch.randn(3, 7), labels, -100)
    with pytest.raises(ValueError, match=r"ignore_index = -100$"):
        check_inputs(torch.rand(3, 5), torch.randn(3, 8), labels, -100)


def test_labels_on_gpus_are_checked_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.zeros(2, dtype=torch.int64, device="meta")  # in place of a GPU's
    assert not options.labels_are_checked(labels)
    monkeypatch.setattr(options, "CHECK_LABELS_ON_GPU", True)
    assert options.labels_are_checked(labels)
    assert options.labels_are_checked(labels.new_zeros(2, device="cpu"))


@pytest.mark.parametrize(("variant", "own"), [("paper", -1.0), ("released", 0.0)])
def test_the_default_threshold_is_the_variants_own(variant: str, own: float) -> None:
    assert LossOptions(variant).confidence_threshold == own
    assert LossOptions(variant, confidence_threshold=0.5).confidence_threshold == 0.5
    assert f"confidence_threshold={own}" in repr(TALLoss(variant, queue_size=2))  # type: ignore[arg-type]
