"""Metrics against those of other libraries, by their own code."""

import numpy as np
import pytest
import torch

from tal_fast.metrics import failure_metrics


def random_case(seed: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores that float32 holds exactly, and outcomes with both classes."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 400))
    correct = (rng.random(n) < rng.uniform(0.1, 0.95)).astype(int)
    correct[:2] = 0, 1
    return rng.permutation(levels)[:n] / 512 if levels > n else rng.integers(0, levels, n) / 512, correct


@pytest.mark.parametrize("seed", range(40))
def test_torch_uncertainty(seed: int) -> None:
    from torch_uncertainty.metrics.classification import AUGRC, AURC, FPR95

    scores, correct = random_case(seed, 500)  # fewer than 512 levels, so that probabilities are exact; no ties
    values = failure_metrics(scores, correct, "torch-uncertainty")
    probs = torch.tensor(np.stack([0.5 + scores / 2, 0.5 - scores / 2], axis=1), dtype=torch.float64)
    for metric, name in ((AURC(), "aurc"), (AUGRC(), "augrc")):
        metric.update(probs, torch.tensor(1 - correct))
        assert float(metric.compute()) == pytest.approx(values[name], abs=1e-6)
    for levels in (500, 5):
        scores, correct = random_case(seed, levels)
        values = failure_metrics(scores, correct, "torch-uncertainty")
        metric = FPR95(pos_label=1)
        metric.update(torch.tensor(-scores, dtype=torch.float32), torch.tensor(1 - correct))
        assert float(metric.compute()) == pytest.approx(values["fpr95"], abs=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_torchmetrics(seed: int) -> None:
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision

    for levels in (500, 5):
        scores, correct = random_case(seed, levels)
        values = failure_metrics(scores, correct)
        probs, target = torch.tensor(scores, dtype=torch.float64), torch.tensor(correct)
        assert float(binary_auroc(probs, target)) == pytest.approx(values["auroc"], abs=1e-6)
        assert float(binary_average_precision(probs, target)) == pytest.approx(values["aupr_success"], abs=1e-6)
        assert float(binary_average_precision(1 - probs, 1 - target)) == pytest.approx(values["aupr_error"], abs=1e-6)


def test_undefined_values_of_torch_uncertainty() -> None:
    from torch_uncertainty.metrics.classification import AURC, FPR95

    for target in (torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)):
        metric = FPR95(pos_label=1)
        metric.update(torch.tensor([0.1, 0.2, 0.3]), target)
        assert metric.compute().isnan()
    metric = AURC()
    metric.update(torch.tensor([[0.9, 0.1]]), torch.tensor([0]))
    assert metric.compute().isnan()
