"""Scores against pytorch-ood's detectors, which compute in float32 and where *lower* is surer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_ood import detector

from tal_fast import evaluate
from tal_fast.scores import logits as scores
from tal_fast.scores.features import FeatureScorer, Training, principal_dimensions

CLASSES, WIDTH, TRAINED = 6, 16, 600


class Case:
    """Features of Gaussian classes, and a linear layer over them."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        means = 2 * rng.normal(size=(CLASSES, WIDTH))
        self.labels = np.arange(TRAINED) % CLASSES
        mixing = rng.normal(size=(WIDTH, WIDTH)) / 3
        self.train = (means[self.labels] + rng.normal(size=(TRAINED, WIDTH)) @ mixing).astype(np.float32)
        self.weight = (means / 5).astype(np.float32)
        self.bias = rng.normal(size=CLASSES).astype(np.float32)
        self.features = (2 * rng.normal(size=(50, WIDTH))).astype(np.float32)
        self.logits = self.features @ self.weight.T + self.bias

    def ours(self, name: str) -> np.ndarray:
        scorer = FeatureScorer(Training(self.train, self.labels, self.weight, self.bias))
        return scorer.scores([name], self.logits, self.features)[name]

    def fitted(self, made: Any) -> np.ndarray:
        made.fit_features(torch.from_numpy(self.train), torch.from_numpy(self.labels))
        return np.asarray(made.predict_features(torch.from_numpy(self.features)))


CASE = Case()


@pytest.mark.parametrize(("ours", "theirs"), [(scores.msp, "MaxSoftmax"), (scores.energy, "EnergyBased")])
def test_over_logits(ours: Callable[[Any], np.ndarray], theirs: str) -> None:
    made = getattr(detector, theirs)(None)
    values = made.predict_logits(torch.from_numpy(CASE.logits))
    np.testing.assert_allclose(ours(CASE.logits), -np.asarray(values), rtol=1e-5, atol=1e-6)


def test_mahalanobis() -> None:
    # Theirs is half the squared distance, by a covariance that is not divided by the number of samples.
    theirs = 2 * TRAINED * CASE.fitted(detector.Mahalanobis(None))
    np.testing.assert_allclose(CASE.ours("mahalanobis"), -theirs, rtol=1e-3)


def test_vim() -> None:
    d = principal_dimensions(WIDTH)
    made = detector.ViM(None, d, torch.from_numpy(CASE.weight), torch.from_numpy(CASE.bias))
    np.testing.assert_allclose(CASE.ours("vim"), -CASE.fitted(made), rtol=1e-3, atol=1e-4)


def test_knn() -> None:
    # Theirs is the distance, not its square.
    theirs = CASE.fitted(detector.KNN(None, k=10)) ** 2
    np.testing.assert_allclose(CASE.ours("knn"), -theirs, rtol=1e-4, atol=1e-6)


def head(flat: bool = False) -> torch.nn.Module:
    """The case's last layer, of feature maps of 1 x 1 if ``flat``."""
    linear = torch.nn.Linear(WIDTH, CLASSES).requires_grad_(False)
    linear.weight.copy_(torch.from_numpy(CASE.weight))
    linear.bias.copy_(torch.from_numpy(CASE.bias))
    return torch.nn.Sequential(torch.nn.Flatten(), linear) if flat else linear


W, B = torch.from_numpy(CASE.weight), torch.from_numpy(CASE.bias)
DIRECT: dict[str, tuple[str, Callable[[], Any]]] = {
    "ASH": ("feature_maps", lambda: detector.ASH(None, head(flat=True))),
    "DICE": ("features", lambda: detector.DICE(None, W, B, 0.9)),
    "EnergyBased": ("logits", lambda: detector.EnergyBased(None)),
    "Entropy": ("logits", lambda: detector.Entropy(None)),
    "fDBD": ("features", lambda: detector.fDBD(None, head())),
    "GEN": ("logits", lambda: detector.GEN(None)),
    "GMM": ("features", lambda: detector.GMM(None)),
    "KLMatching": ("logits", lambda: detector.KLMatching(None)),
    "KNN": ("features", lambda: detector.KNN(None)),
    "LTS": ("features", lambda: detector.LTS(None, head())),
    "Mahalanobis": ("features", lambda: detector.Mahalanobis(None)),
    "MaxLogit": ("logits", lambda: detector.MaxLogit(None)),
    "MaxSoftmax": ("logits", lambda: detector.MaxSoftmax(None)),
    "NCI": ("features", lambda: detector.NCI(None, head())),
    "NNGuide": ("features", lambda: detector.NNGuide(None, head())),
    "OpenMax": ("logits", lambda: detector.OpenMax(None)),
    "PNML": ("features", lambda: detector.PNML(None, head())),
    "ReAct": ("feature_maps", lambda: detector.ReAct(None, head(flat=True))),
    "RMD": ("features", lambda: detector.RMD(None)),
    "SCALE": ("feature_maps", lambda: detector.SCALE(None, head(flat=True))),
    "SHE": ("features", lambda: detector.SHE(None, head())),
    "TemperatureScaling": ("logits", lambda: detector.TemperatureScaling(None)),
    "ViM": ("features", lambda: detector.ViM(None, principal_dimensions(WIDTH), W, B)),
    "VRA": ("feature_maps", lambda: detector.VRA(None, head(flat=True))),
}
NETWORK = {
    "GradNorm", "GradUncertainty", "Gram", "MahalanobisODIN", "MCD", "MCM", "MultiMahalanobis", "NACUE", "ODIN",
    "RankFeat", "WeightedEBO",
}  # fmt: skip


@pytest.mark.parametrize("name", DIRECT)
def test_a_detector_through_the_adapter_is_the_detector_itself(name: str) -> None:
    part, make = DIRECT[name]
    made, train, labels = make(), torch.from_numpy(CASE.train), torch.from_numpy(CASE.labels)

    def given(x: torch.Tensor) -> torch.Tensor:
        return {"logits": lambda: head()(x), "features": lambda: x, "feature_maps": lambda: x[..., None, None]}[part]()

    getattr(made, f"fit_{part}")(given(train), labels)
    want = -np.asarray(getattr(made, f"predict_{part}")(given(torch.from_numpy(CASE.features))).detach())
    np.testing.assert_allclose(CASE.ours(f"ood:{name.lower()}"), want, rtol=2e-4, atol=1e-5)


def test_every_detector_is_served_or_refused_with_the_reason() -> None:
    names = {name for name in detector.__all__ if isinstance(getattr(detector, name), type)}
    assert names == {*DIRECT, *NETWORK}
    scorer = FeatureScorer(Training(CASE.train, CASE.labels, CASE.weight, CASE.bias))
    for name in NETWORK:
        assert "needs more than cached outputs" in scorer.undefined([f"ood:{name}"])[f"ood:{name}"]
    assert "has no such detector; it has ash, dice" in scorer.undefined(["ood:Oracle"])["ood:Oracle"]
    bare = FeatureScorer(Training(CASE.train)).undefined(["ood:SHE"])
    assert bare == {"ood:SHE": "ood:SHE needs training labels and the weight (C, D) of the last Linear layer"}
    few = FeatureScorer(Training(CASE.train[:6], CASE.labels[:6], CASE.weight)).undefined(["ood:NNGuide"])
    assert few["ood:NNGuide"].startswith("pytorch-ood cannot fit it (")


def test_detectors_are_evaluated_beside_other_scores(tmp_path: Path) -> None:
    arrays = {"logits": CASE.logits, "features": CASE.features, "labels": np.arange(50) % CLASSES}
    arrays |= {
        "train_features": CASE.train,
        "train_labels": CASE.labels,
        "fc_weight": CASE.weight,
        "fc_bias": CASE.bias,
    }
    np.savez(tmp_path / "a.npz", **arrays)
    assert evaluate.main(["--npz", str(tmp_path / "a.npz"), "--scores", "msp,ood:ReAct,ood:ODIN"]) == 0
    report = json.loads((tmp_path / "a-report" / "report.json").read_text())
    assert list(report["settings"]["old_fd"]) == ["msp", "ood:ReAct"]
    assert list(report["left_out"]) == ["ood:ODIN"]
