"""Feature scores against independent formulas in float64: plain loops, SciPy, scikit-learn."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import scipy.spatial
import scipy.special
import torch
from sklearn.covariance import EmpiricalCovariance

from tal_fast.config.names import FEATURE_SCORES, SIRC_SCORES
from tal_fast.metrics.failure import failure_metrics
from tal_fast.scores import logits as scores
from tal_fast.scores import neighbours, training_statistics
from tal_fast.scores.features import FeatureScorer, Training, principal_dimensions
from tal_fast.utils import arrays
from tests.helpers.scores import CASE, CLASSES, WIDTH, Streamed

pytestmark = pytest.mark.filterwarnings("error")

ALL_SCORES = (*FEATURE_SCORES, *SIRC_SCORES)


def residual_norm(features: np.ndarray) -> np.ndarray:
    origin = -np.linalg.pinv(CASE.weight) @ CASE.bias
    # The right singular vectors of the shifted training features, largest first.
    principal = np.linalg.svd(CASE.train - origin, full_matrices=True)[2][: WIDTH // 2]
    shifted = features - origin
    return np.linalg.norm(shifted - shifted @ principal.T @ principal, axis=1)


def knn_score(features: np.ndarray) -> np.ndarray:
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (CASE.train, features))
    return -np.sort(np.square(test[:, None] - train).sum(2), axis=1)[:, 9]


SECOND: dict[str, Any] = {
    "feature_norm": lambda f: np.array([sum(abs(x) for x in row) for row in f]),
    "residual": lambda f: -residual_norm(f),
    "knn": knn_score,
}


@pytest.mark.parametrize("name", SECOND)
def test_scores_of_features_alone(name: str) -> None:
    np.testing.assert_allclose(CASE.score(name), SECOND[name](CASE.features), rtol=1e-9, atol=1e-12)


def test_gradnorm_is_its_formula_and_the_norm_of_a_gradient() -> None:
    p = scipy.special.softmax(CASE.logits, axis=1)
    want = np.abs(p - 1 / CLASSES).sum(1) * np.abs(CASE.features).sum(1)
    np.testing.assert_allclose(CASE.score("gradnorm"), want, rtol=1e-12)
    # Cross-entropy between the uniform distribution and the softmax, differentiated by the last layer's weight.
    weight = torch.tensor(CASE.weight, requires_grad=True)
    norms = []
    for row in torch.tensor(CASE.features[:5]):
        loss = -torch.log_softmax(weight @ row + torch.tensor(CASE.bias), 0).mean()
        norms.append(torch.autograd.grad(loss, weight)[0].abs().sum().item())
    np.testing.assert_allclose(CASE.score("gradnorm")[:5], norms, rtol=1e-9)


def test_mahalanobis() -> None:
    means = np.stack([CASE.train[CASE.labels == c].mean(0) for c in range(CLASSES)])
    tied = EmpiricalCovariance(assume_centered=True).fit(CASE.train - means[CASE.labels])
    want = -np.stack([tied.mahalanobis(CASE.features - mean) for mean in means]).min(0)
    np.testing.assert_allclose(CASE.score("mahalanobis"), want, rtol=1e-8)
    # Labels with gaps are classes all the same.
    np.testing.assert_array_equal(
        CASE.score("mahalanobis", Training(CASE.train, CASE.labels * 7 + 3)), CASE.score("mahalanobis")
    )


def test_mahalanobis_ignores_directions_without_variance() -> None:
    def widen(x: np.ndarray) -> np.ndarray:
        return np.concatenate((x, np.zeros((len(x), 3))), axis=1)

    scorer = FeatureScorer(Training(widen(CASE.train), CASE.labels))
    got = scorer.scores(["mahalanobis"], CASE.logits, widen(CASE.features))["mahalanobis"]
    np.testing.assert_allclose(got, CASE.score("mahalanobis"), rtol=1e-8)


def test_vim() -> None:
    largest = (CASE.train @ CASE.weight.T + CASE.bias).max(1).sum()
    scale = largest / residual_norm(CASE.train).sum()
    want = scipy.special.logsumexp(CASE.logits, axis=1) - scale * residual_norm(CASE.features)
    np.testing.assert_allclose(CASE.score("vim"), want, rtol=1e-9, atol=1e-9)


def test_vim_without_bias_is_about_the_origin() -> None:
    without, zero = (CASE.score("vim", Training(CASE.train, None, CASE.weight, b)) for b in (None, np.zeros(CLASSES)))
    np.testing.assert_array_equal(without, zero)


def test_training_logits_determine_the_scale_of_vim() -> None:
    logits = 3 * (CASE.train @ CASE.weight.T + CASE.bias)
    computed, given = (
        CASE.score("vim", Training(CASE.train, None, CASE.weight, CASE.bias, x)) - scores.energy(CASE.logits)
        for x in (None, logits)
    )
    np.testing.assert_allclose(given, 3 * computed, rtol=1e-9)


FIRST: dict[str, Any] = {
    "msp": (lambda p, z: p.max(1), 1),
    "doctor": (lambda p, z: (p**2).sum(1), 1),
    "cosine": (lambda p, z: z.max(1) / (np.linalg.norm(z, axis=1) + 1e-7), 1),
    "neg_entropy": (lambda p, z: (p * np.log(p)).sum(1), 0),
}


@pytest.mark.parametrize("name", SIRC_SCORES)
def test_sirc(name: str) -> None:
    first, second = SIRC_SCORES[name]
    s1_of, s1_max = FIRST[first]
    logits = CASE.logits / 10
    in_training, s2 = SECOND[second](CASE.train), SECOND[second](CASE.features)
    a, b = in_training.mean() - 3 * in_training.std(), 1 / in_training.std()
    s1 = s1_of(scipy.special.softmax(logits, axis=1), logits)
    want = -np.log(s1_max - s1) - np.log(1 + np.exp(-b * (s2 - a)))
    got = FeatureScorer(CASE.training).scores([name], logits, CASE.features)[name]
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9)


def test_sirc_ranks_where_the_softmax_is_one() -> None:
    logits = np.array([[50.0, 0.0, 0.0], [60.0, 0.0, 0.0], [900.0, 0.0, 0.0]])
    assert len(set(scores.msp(logits))) == 1
    features = np.repeat(CASE.features[:1], 3, axis=0)
    for name in ("sirc_msp_feature_norm", "sirc_doctor_residual", "sirc_neg_entropy_knn"):
        got = FeatureScorer(CASE.training).scores([name], logits, features)[name]
        assert np.all(np.diff(got) > 0), name


@pytest.mark.parametrize("name", ALL_SCORES)
def test_block_sizes_and_streams_do_not_change_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CASE.score(name)
    streamed = Training(Streamed(CASE.train), CASE.labels, CASE.weight, CASE.bias)
    np.testing.assert_allclose(CASE.score(name, streamed), whole, rtol=1e-9, atol=1e-9)
    monkeypatch.setattr(arrays, "BLOCK", 100)
    for module in (training_statistics, neighbours):
        monkeypatch.setattr(module, "ROWS", 37)
    np.testing.assert_allclose(CASE.score(name), whole, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ALL_SCORES)
def test_one_class_and_float32(name: str) -> None:
    training = Training(CASE.train.astype(np.float32), np.zeros(400, int), CASE.weight[:1], CASE.bias[:1])
    got = FeatureScorer(training).scores([name], CASE.logits[:, :1], CASE.features.astype(np.float32))[name]
    assert got.dtype == np.float64
    assert not np.isnan(got).any()


def test_ctm() -> None:
    means = np.stack([CASE.train[CASE.labels == c].mean(0) for c in range(CLASSES)])
    cosines = 1 - scipy.spatial.distance.cdist(CASE.features, means, "cosine")
    np.testing.assert_allclose(CASE.score("ctm"), cosines.max(1), rtol=1e-12)
    np.testing.assert_allclose(CASE.score("ctm", Training(3 * CASE.train, CASE.labels)), CASE.score("ctm"), rtol=1e-12)


def test_the_origin_of_a_layer_whose_rows_sum_to_nearly_0_is_near() -> None:
    # Softmax gradients sum to 0 over the classes, so the rows of a trained layer do but for rounding.
    weight = (CASE.weight - CASE.weight.mean(0)).astype(np.float32)
    bias = (CASE.bias - CASE.bias.mean() + 0.5).astype(np.float32)
    origin = -torch.linalg.pinv(torch.from_numpy(weight)).double().numpy() @ bias
    shifted = CASE.train - origin
    small = np.linalg.eigh(shifted.T @ shifted)[1][:, : WIDTH - WIDTH // 2]
    for given in (weight, weight.astype(np.float64)):
        got = CASE.score("residual", Training(CASE.train, None, given, bias))
        np.testing.assert_allclose(got, -np.linalg.norm((CASE.features - origin) @ small, axis=1), rtol=1e-4)


@pytest.mark.parametrize("name", ["mahalanobis", "residual", "vim"])
def test_far_samples_are_found(name: str) -> None:
    near = np.arange(80) < 40
    assert failure_metrics(CASE.score(name), near)["auroc"] > 0.8


def test_principal_dimensions() -> None:
    assert [principal_dimensions(d) for d in (2048, 4096, 2047, 768, 767, 64, 3, 1)] == [
        1000, 1000, 512, 512, 383, 32, 1, 0,
    ]  # fmt: skip


def test_passes_over_the_training_features() -> None:
    for names, passes in (
        (["mahalanobis", "residual", "sirc_msp_feature_norm"], 1),
        (["mahalanobis", "vim", "sirc_msp_residual", "sirc_msp_feature_norm"], 2),
        (["knn"], 1),
        (["feature_norm", "gradnorm"], 0),
    ):
        stream = Streamed(CASE.train)
        scorer = FeatureScorer(Training(stream, CASE.labels, CASE.weight, CASE.bias))
        assert scorer.undefined(names) == {}
        for _ in range(2):
            scorer.scores(names, CASE.logits, CASE.features)
        assert stream.passes == passes, names


def refusal(training: Training, name: str, logits: Any = CASE.logits, features: Any = CASE.features) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        FeatureScorer(training).scores([name], logits, features)
    return str(error.value)


def test_detectors_of_pytorch_ood_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_ood", None)
    (reason,) = FeatureScorer(CASE.training).undefined(["ood:ReAct"]).values()
    assert reason == "it needs pytorch-ood; install it with: pip install 'tal-fast[ood]'"


def test_scores_that_cannot_be_computed_are_refused_with_the_reason() -> None:
    bare = Training(CASE.train)
    assert "mahalanobis needs training labels" in refusal(bare, "mahalanobis")
    assert "ctm needs training labels" in refusal(bare, "ctm")
    assert "need the weight (C, D) of the last Linear layer" in refusal(bare, "vim")
    assert "unknown feature score 'relu'" in refusal(bare, "relu")
    assert "features are 3 wide but those in training 13" in refusal(bare, "knn", features=CASE.features[:, :3])
    assert "logits have 80 samples but features 4" in refusal(bare, "knn", features=CASE.features[:4])
    assert "the same for all training features" in refusal(Training(np.ones((20, WIDTH))), "sirc_msp_feature_norm")
    flat = Training(np.repeat(CASE.train[:2], 5, axis=0), np.repeat([0, 1], 5))
    assert "do not vary within any class" in refusal(flat, "mahalanobis")
    assert FeatureScorer(bare).undefined(["knn", "vim"]) == {
        "vim": "residual and vim need the weight (C, D) of the last Linear layer, and its bias"
    }
