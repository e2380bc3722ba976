"""Calibration metrics against plain loops, PyTorch, and a model that is calibrated by construction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.special
import torch

from tal_fast.metrics.calibration import calibration_metrics, expected_calibration_error
from tal_fast.metrics.curves import reliability

pytestmark = pytest.mark.filterwarnings("error")


def case(n: int = 300, classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    return 3 * rng.normal(size=(n, classes)), rng.integers(classes, size=n)


def test_against_loops() -> None:
    logits, labels = case()
    p = scipy.special.softmax(logits, axis=1)
    confidence, correct = p.max(1), p.argmax(1) == labels
    ece = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    brier = np.mean([sum((p[i, c] - (c == labels[i])) ** 2 for c in range(6)) for i in range(300)])
    nll = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item()
    assert calibration_metrics(logits, labels) == pytest.approx({"ece": ece, "nll": nll, "brier": brier}, rel=1e-10)


def test_worked_example() -> None:
    # (0, 0.5] holds 0.4 and 0.5, one correct: |1 - 0.9| / 4. (0.5, 1] holds 0.9 and 1, one correct: |1 - 1.9| / 4.
    assert expected_calibration_error([0.4, 0.5, 0.9, 1.0], [1, 0, 1, 0], bins=2) == pytest.approx(0.25)
    assert expected_calibration_error([0.0, 1.0], [0, 1]) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_of_any_type_and_with_gradients(dtype: torch.dtype) -> None:
    p = torch.rand(50).to(dtype).requires_grad_()
    correct = torch.rand(50) < p.detach()
    values = p.detach().double().numpy()
    assert expected_calibration_error(p, correct) == expected_calibration_error(values, correct.numpy())
    np.testing.assert_array_equal(reliability(p, correct), reliability(values, correct))
    logits = torch.randn(20, 3).to(dtype).requires_grad_()
    labels = torch.randint(3, (20,))
    assert calibration_metrics(logits, labels) == calibration_metrics(logits.detach().double().numpy(), labels.numpy())


def test_labels_drawn_from_the_softmax_are_calibrated() -> None:
    logits, _ = case(20_000)
    p = scipy.special.softmax(logits, axis=1)
    drawn = (p.cumsum(1) < np.random.default_rng(1).random((20_000, 1))).sum(1).clip(max=5)
    calibrated, sharper = calibration_metrics(logits, drawn), calibration_metrics(3 * logits, drawn)
    assert calibrated["ece"] < 0.02
    for key, value in calibrated.items():
        assert sharper[key] > value, key


def test_certain_predictions_correct_or_wrong() -> None:
    logits = np.array([[1000.0, 0.0], [1000.0, 0.0]])
    assert calibration_metrics(logits, [0, 0]) == {"ece": 0, "nll": 0, "brier": 0}
    assert calibration_metrics(logits, [1, 1]) == {"ece": 1, "nll": 1000, "brier": 2}


def test_no_samples() -> None:
    assert all(np.isnan(v) for v in calibration_metrics(np.zeros((0, 3)), np.zeros(0, int)).values())
    assert np.isnan(expected_calibration_error([], []))


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        (calibration_metrics, (np.zeros((2, 3)), [0]), "labels must be (n,)"),
        (calibration_metrics, (np.zeros((2, 3)), [0, 3]), "integers in 0..2"),
        (calibration_metrics, (np.zeros((2, 3)), [0, -1]), "integers in 0..2"),
        (calibration_metrics, (np.zeros((2, 3)), [0.0, 1.0]), "integers in 0..2"),
        (expected_calibration_error, ([0.5, 1.1], [0, 1]), "in [0, 1], not 1.1 (index 1)"),
        (expected_calibration_error, ([0.5, float("nan")], [0, 1]), "not nan (index 1)"),
        (expected_calibration_error, ([0.5], [0, 1]), "they must match"),
        (expected_calibration_error, ([0.5], [0], 0), "at least 1, not 0"),
    ],
)
def test_invalid_arguments_are_refused(function: Any, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        function(*args)
    assert message in str(refusal.value)
