"""OpenMix: mixtures with outliers and the extra class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tal_fast.config.schema import MethodConfig
from tal_fast.data.loader import IGNORED_LABEL
from tal_fast.models import build_model, keep_classes
from tal_fast.training.trainer import Trainer
from tests.helpers.training import config, labelled_batch, step_of
from tests.helpers.training import method as make_method


def test_openmix_labels_mixtures_with_both_classes() -> None:
    method = make_method(MethodConfig("openmix", options={"outliers": "uniform", "gamma": 0.6}), classes=4)
    images, outliers = torch.rand(9, 1, 5, 5), torch.rand(9, 1, 5, 5)
    inputs = method.inputs(images, outliers)
    assert torch.equal(inputs[:9], images)
    share = float(((inputs[9:] - outliers) / (images - outliers)).median())
    torch.testing.assert_close(inputs[9:], share * images + (1 - share) * outliers)
    logits, features, labels = torch.randn(18, 5), torch.rand(18, 6), labelled_batch()[2]
    valid = labels != IGNORED_LABEL
    target = torch.zeros(9, 5)
    target[valid, labels[valid]] = share
    target[valid, 4] = 1 - share
    mixed = -(target * logits[9:].log_softmax(1)).sum(1)[valid].mean()
    torch.testing.assert_close(
        step_of(method, logits, features, labels).loss, F.cross_entropy(logits[:9], labels) + 0.6 * mixed
    )


def test_the_share_of_a_mixture_is_beta_distributed() -> None:
    method = make_method(MethodConfig("openmix", options={"outliers": "uniform"}))
    shares = [float(method.inputs(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))[1]) for _ in range(2000)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.01)
    assert np.var(shares) == pytest.approx(1 / 84, rel=0.15)  # Beta(10, 10)


def test_the_extra_class_is_removed_after_training(tmp_path: Path) -> None:
    model = build_model(config(tmp_path).model, 11, 1, 8).eval()
    images = torch.randn(3, 1, 8, 8)
    logits, features = model(images)
    keep_classes(model, 10)
    torch.testing.assert_close(model(images)[0], logits[:, :10])
    torch.testing.assert_close(model(images)[1], features)


def test_too_few_outliers_are_refused_by_name(tmp_path: Path) -> None:
    options = {"outliers": "uniform:50"}
    with pytest.raises(ValueError, match="the outliers uniform:50: a step takes 64 images .* there are only 50"):
        Trainer(config(tmp_path, "openmix", batch_size=64, method_options=options))
