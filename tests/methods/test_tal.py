"""TAL as a method: its options, its warm-up and what it reports."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tal_fast.config.schema import MethodConfig
from tests.helpers.training import method as make_method
from tests.helpers.training import step_of


@pytest.mark.parametrize(
    ("epochs", "given", "warmup"), [(19, None, 0), (20, None, 1), (24, None, 1), (90, None, 4), (90, 7, 7), (90, 0, 0)]
)
def test_typicalness_is_1_for_a_twentieth_of_the_epochs(epochs: int, given: int | None, warmup: int) -> None:
    method = make_method(MethodConfig("tal", options={"warmup_epochs": given}), epochs)
    logits, features, labels = torch.eye(8)[:, :5] * 9, torch.rand(8, 6), torch.arange(8) % 5
    step_of(method, logits, features, labels)
    typicalness = []
    for epoch in range(10):
        method.start_epoch(epoch)
        typicalness.append(float(step_of(method, logits, torch.rand(8, 6), labels).samples["typicalness"].mean()))
    assert [value == 1.0 for value in typicalness] == [epoch < warmup for epoch in range(10)]


def test_tal_passes_its_options_to_the_loss_and_reports_its_queue() -> None:
    options = {"t_min": 2.0, "t_max": 20.0, "variant": "released", "queue_size": 7}
    method = make_method(MethodConfig("tal", 0.1, options))
    loss_options = method.loss_fn.options
    assert (loss_options.t_min, loss_options.t_max, loss_options.t_wrong) == (2.0, 20.0, 20.0)
    assert (loss_options.variant, loss_options.label_smoothing) == ("released", 0.1)
    labels = torch.arange(5)
    step_of(method, torch.eye(5) * 9, torch.rand(5, 6), labels)
    assert method.epoch_metrics() == {"queue_length": 5}
    step_of(method, torch.eye(5) * 9, torch.rand(5, 6), labels)
    assert method.epoch_metrics() == {"queue_length": 7}


def test_a_warning_is_not_given_for_few_images_of_which_none_is_correct_by_chance() -> None:
    method = make_method(MethodConfig("tal", options={"confidence_threshold": 0.5}))
    assert method.warning({"train_accuracy": 0.0, "accepted": 0.0}) is None
    assert "confidence_threshold = 0.5" in str(method.warning({"train_accuracy": 0.2, "accepted": 0.05}))
    assert method.warning({"train_accuracy": 0.2, "accepted": 0.05}) is None  # once
    method = make_method(MethodConfig("tal"))
    assert method.warning({"train_accuracy": 0.2, "accepted": 0.15}) is None
    method.task = dataclasses.replace(method.task, train_images=10**6)
    assert "no sample of this epoch" in str(method.warning({"train_accuracy": 0.0, "accepted": 0.0}))
    assert make_method(MethodConfig("ce")).warning({}) is None


@pytest.mark.parametrize(("t_wrong", "limits"), [(20.0, (5.0, 50.0)), (2.0, (2.0, 50.0)), (90.0, (5.0, 90.0))])
def test_temperatures_are_reported_over_their_whole_range(t_wrong: float, limits: tuple[float, float]) -> None:
    method = make_method(MethodConfig("tal", options={"t_min": 5.0, "t_max": 50.0, "t_wrong": t_wrong}))
    assert method.ranges == {"typicalness": (0.0, 1.0), "temperature": limits}


def test_an_impossible_range_of_temperatures_is_refused() -> None:
    with pytest.raises(ValueError, match="temperatures are t_min=50"):
        make_method(MethodConfig("tal", options={"t_min": 50.0, "t_max": 20.0}))
