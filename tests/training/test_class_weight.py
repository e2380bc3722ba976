"""Class weights of the training methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tal_fast import TALLoss
from tal_fast.config.parse import parse_training
from tal_fast.config.schema import Config, MethodConfig
from tal_fast.data.loader import IGNORED_LABEL
from tal_fast.methods import Task, build_method
from tal_fast.training.trainer import Trainer
from tests.helpers.training import assert_same_end, config, labelled_batch, step_of

WEIGHT = torch.tensor([0.5, 2.0, 0.0, 3.0])


def weighted(name: str, smoothing: float = 0.1, **options: Any) -> Any:
    return build_method(MethodConfig(name, smoothing, options=options), Task(10, 4, 100, 0.1, WEIGHT))


def with_class(run: Config, weight: Any) -> Config:
    run.method.class_weight = weight
    return run


@pytest.mark.parametrize("name", ["ce", "fmfp", "logitnorm"])
def test_the_loss_is_that_of_cross_entropy_with_weights(name: str) -> None:
    logits, features, labels = labelled_batch(30)
    scaled = F.normalize(logits) / 0.04 if name == "logitnorm" else logits
    expected = F.cross_entropy(scaled, labels, WEIGHT, label_smoothing=0.1)
    method = weighted(name)
    torch.testing.assert_close(step_of(method, logits, features, labels).loss, expected)
    partner, share = labels.roll(1), torch.full((30,), 0.3)
    pairs = torch.stack([labels, partner], 1)
    pairs[(pairs == IGNORED_LABEL).any(1)] = IGNORED_LABEL
    first, second = (F.cross_entropy(scaled, column, WEIGHT, label_smoothing=0.1) for column in pairs.unbind(1))
    torch.testing.assert_close(method.mixed_loss(logits, pairs, share), 0.3 * first + 0.7 * second)
    alone = torch.full((30,), 2)  # all of weight 0: no loss, not NaN
    assert step_of(build_method(MethodConfig(name), method.task), logits, features, alone).loss == 0


def test_tal_passes_the_weights_to_its_loss() -> None:
    logits, features, labels = labelled_batch(30)
    method, loss = weighted("tal", queue_size=50), TALLoss(queue_size=50, label_smoothing=0.1, class_weight=WEIGHT)
    for _ in range(2):
        torch.testing.assert_close(step_of(method, logits, features, labels).loss, loss(logits, features, labels))
    assert "class_weight" not in "".join(method.state_dict())


def test_balanced_weights_are_the_inverse_of_the_frequencies(tmp_path: Path) -> None:
    trainer = Trainer(with_class(config(tmp_path, "ce"), "balanced"))
    counts = np.bincount(trainer.data.split("train").labels)
    assert trainer.method.class_weight is not None
    assert trainer.method.class_weight.tolist() == pytest.approx((200 / (10 * counts)).tolist())


def test_weights_are_refused_where_they_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method.class_weight has 3 numbers but the data 10 classes"):
        Trainer(with_class(config(tmp_path, "ce"), [1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="balanced but class '.' has no training image; list the weights"):
        Trainer(with_class(config(tmp_path, "ce", batch_size=4, data_options={"train_limit": 9}), "balanced"))
    for name, options in (("crl", {}), ("openmix", {"outliers": "uniform:70"})):
        with pytest.raises(ValueError, match=f"method.class_weight is set but {name} has no class weights"):
            Trainer(with_class(config(tmp_path, name, method_options=options), "balanced"))


def test_the_command_line_takes_names_and_lists(tmp_path: Path) -> None:
    for text, value in (("balanced", "balanced"), ("[1, 2.5]", [1.0, 2.5]), ("none", "none")):
        parsed = parse_training(["--config", "digits-ce", "--method.class-weight", text])[0]
        assert parsed.method.class_weight == value
        parsed.save(tmp_path / "config.yaml")
        assert parse_training(["--config", str(tmp_path / "config.yaml")])[0] == parsed


def test_a_weighted_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 2}
    Trainer(with_class(config(tmp_path / "straight", **options), "balanced")).fit()
    Trainer(with_class(config(tmp_path / "parts", **options), "balanced")).fit(until=1)
    Trainer(with_class(config(tmp_path / "parts", **options, resume="auto"), "balanced")).fit()
    assert_same_end(tmp_path / "straight", tmp_path / "parts")
