"""Scores over features against independent formulas in float64: plain loops, SciPy, scikit-learn, mpmath."""

from __future__ import annotations

from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import scipy.special
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors

from tal_fast import feature_scores, scores
from tal_fast.feature_scores import FEATURE_SCORES, SIRC, FeatureScorer, Training, principal_dimensions
from tal_fast.metrics import failure_metrics

pytestmark = pytest.mark.filterwarnings("error")
CLASSES, WIDTH = 5, 13


class Case:
    """A linear classifier on Gaussian classes: training data, and test data half of which is far away."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.weight, self.bias = rng.normal(size=(CLASSES, WIDTH)), rng.normal(size=CLASSES)
        means = 2 * rng.normal(size=(CLASSES, WIDTH))
        mixing = rng.normal(size=(WIDTH, WIDTH)) / 3
        self.labels = rng.integers(CLASSES, size=400)
        self.train = means[self.labels] + rng.normal(size=(400, WIDTH)) @ mixing
        self.features = np.concatenate((
            means[rng.integers(CLASSES, size=40)] + rng.normal(size=(40, WIDTH)) @ mixing,
            4 * rng.normal(size=(40, WIDTH)),
        ))  # fmt: skip
        self.logits = self.features @ self.weight.T + self.bias
        self.training = Training(self.train, self.labels, self.weight, self.bias)

    def score(self, name: str) -> np.ndarray:
        return FeatureScorer(self.training).scores([name], self.logits, self.features)[name]


CASE = Case()


def residual_norm(features: np.ndarray) -> np.ndarray:
    origin = -np.linalg.pinv(CASE.weight) @ CASE.bias
    # The right singular vectors of the shifted training features, largest first.
    principal = np.linalg.svd(CASE.train - origin, full_matrices=True)[2][: WIDTH // 2]
    shifted = features - origin
    return np.linalg.norm(shifted - shifted @ principal.T @ principal, axis=1)


def knn_score(features: np.ndarray) -> np.ndarray:
    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    distance, _ = NearestNeighbors(n_neighbors=10, algorithm="brute").fit(unit(CASE.train)).kneighbors(unit(features))
    return -(distance[:, 9] ** 2)


SECOND: dict[str, Any] = {
    "feature_norm": lambda f: np.array([sum(abs(x) for x in row) for row in f]),
    "residual": lambda f: -residual_norm(f),
    "knn": knn_score,
}


@pytest.mark.parametrize("name", SECOND)
def test_scores_of_features_alone(name: str) -> None:
    np.testing.assert_allclose(CASE.score(name), SECOND[name](CASE.features), rtol=1e-9, atol=1e-12)


def test_gradnorm() -> None:
    p = scipy.special.softmax(CASE.logits, axis=1)
    want = np.abs(p - 1 / CLASSES).sum(1) * np.abs(CASE.features).sum(1)
    np.testing.assert_allclose(CASE.score("gradnorm"), want, rtol=1e-12)


def test_gradnorm_is_the_norm_of_a_gradient() -> None:
    # Of the cross-entropy between the uniform distribution and the softmax, with regard to the last layer's weight.
    torch = pytest.importorskip("torch")
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


def test_mahalanobis_passes_over_directions_without_variance() -> None:
    def widen(x: np.ndarray) -> np.ndarray:
        return np.concatenate((x, np.zeros((len(x), 3))), axis=1)

    scorer = FeatureScorer(Training(widen(CASE.train), CASE.labels))
    got = scorer.scores(["mahalanobis"], CASE.logits, widen(CASE.features))["mahalanobis"]
    np.testing.assert_allclose(got, CASE.score("mahalanobis"), rtol=1e-8)


def test_mahalanobis_of_labels_with_gaps() -> None:
    scorer = FeatureScorer(Training(CASE.train, CASE.labels * 7 + 3))
    got = scorer.scores(["mahalanobis"], CASE.logits, CASE.features)["mahalanobis"]
    np.testing.assert_array_equal(got, CASE.score("mahalanobis"))


def test_vim() -> None:
    largest = (CASE.train @ CASE.weight.T + CASE.bias).max(1).sum()
    scale = largest / residual_norm(CASE.train).sum()
    want = scipy.special.logsumexp(CASE.logits, axis=1) - scale * residual_norm(CASE.features)
    np.testing.assert_allclose(CASE.score("vim"), want, rtol=1e-9, atol=1e-9)


def test_vim_without_bias_is_about_the_origin() -> None:
    both = [
        FeatureScorer(Training(CASE.train, weight=CASE.weight, bias=bias)).scores(["vim"], CASE.logits, CASE.features)
        for bias in (None, np.zeros(CLASSES))
    ]
    np.testing.assert_array_equal(both[0]["vim"], both[1]["vim"])


FIRST: dict[str, Any] = {
    "msp": (lambda p, z: p.max(1), 1),
    "doctor": (lambda p, z: (p**2).sum(1), 1),
    "cosine": (lambda p, z: z.max(1) / (np.linalg.norm(z, axis=1) + 1e-7), 1),
    "neg_entropy": (lambda p, z: (p * np.log(p)).sum(1), 0),
}


@pytest.mark.parametrize("name", SIRC)
def test_sirc(name: str) -> None:
    first, second = SIRC[name]
    s1_of, s1_max = FIRST[first]
    logits = CASE.logits / 10
    in_training, s2 = SECOND[second](CASE.train), SECOND[second](CASE.features)
    if second == "knn":
        in_training = FeatureScorer(CASE.training).scores(["knn"], np.zeros((400, 1)), CASE.train)["knn"]
    a, b = in_training.mean() - 3 * in_training.std(), 1 / in_training.std()
    s1 = s1_of(scipy.special.softmax(logits, axis=1), logits)
    want = -np.log(s1_max - s1) - np.log(1 + np.exp(-b * (s2 - a)))
    got = FeatureScorer(CASE.training).scores([name], logits, CASE.features)[name]
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9)


def exact_log_gap(first: str, row: np.ndarray) -> float:
    """log(s1_max − s1) with 2,000 digits."""
    with mpmath.workdps(2000):
        z = [mpmath.mpf(float(x)) for x in row]
        total = mpmath.fsum(mpmath.exp(x) for x in z)
        p = [mpmath.exp(x) / total for x in z]
        gap = {
            "msp": lambda: 1 - max(p),
            "doctor": lambda: 1 - mpmath.fsum(x**2 for x in p),
            "cosine": lambda: 1 - max(z) / (mpmath.sqrt(mpmath.fsum(x**2 for x in z)) + mpmath.mpf("1e-7")),
            "neg_entropy": lambda: -mpmath.fsum(x * mpmath.log(x) for x in p),
        }[first]()
        return float(mpmath.log(gap))


@pytest.mark.parametrize("first", FIRST)
def test_sirc_never_loses_what_is_missing_to_a_perfect_score(first: str) -> None:
    rng = np.random.default_rng(1)
    rows = [rng.normal(size=4) * scale for scale in (1e-3, 1, 10, 100, 1000)]
    rows += [np.array([gap, 0.0, 0.0, 0.0]) for gap in (5.0, 15.0, 19.9, 20.1, 25.0, 36.0, 40.0, 800.0, 1500.0)]
    rows += [np.array([-3.0, -4.0, -5.0, -6.0]), np.array([2.0, 2.0, 2.0, 2.0]), np.array([1.0, 1e-9, 0.0, 0.0])]
    got = feature_scores._LOG_GAP[first](np.array(rows))
    np.testing.assert_allclose(got, [exact_log_gap(first, row) for row in rows], rtol=1e-12, atol=1e-12)


def test_sirc_ranks_where_the_softmax_is_one() -> None:
    logits = np.array([[50.0, 0.0, 0.0], [60.0, 0.0, 0.0], [900.0, 0.0, 0.0]])
    assert len(set(scores.msp(logits))) == 1
    features = np.repeat(CASE.features[:1], 3, axis=0)
    for name in ("sirc_msp_feature_norm", "sirc_doctor_residual", "sirc_neg_entropy_knn"):
        got = FeatureScorer(CASE.training).scores([name], logits, features)[name]
        assert np.all(np.diff(got) > 0), name


@pytest.mark.parametrize("name", FEATURE_SCORES)
def test_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CASE.score(name)
    monkeypatch.setattr(scores, "_BLOCK", 100)
    monkeypatch.setattr(feature_scores, "_ROWS", 37)
    np.testing.assert_allclose(CASE.score(name), whole, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", FEATURE_SCORES)
def test_one_class_and_float32(name: str) -> None:
    training = Training(CASE.train.astype(np.float32), np.zeros(400, int), CASE.weight[:1], CASE.bias[:1])
    got = FeatureScorer(training).scores([name], CASE.logits[:, :1], CASE.features.astype(np.float32))[name]
    assert got.dtype == np.float64
    assert not np.isnan(got).any()


@pytest.mark.parametrize("name", ["mahalanobis", "residual", "vim"])
def test_far_samples_are_found(name: str) -> None:
    near = np.arange(80) < 40
    assert failure_metrics(CASE.score(name), near)["auroc"] > 0.8


def test_a_zero_feature_has_neighbours() -> None:
    features = np.zeros((1, WIDTH))
    got = FeatureScorer(CASE.training).scores(["knn"], np.zeros((1, CLASSES)), features)["knn"]
    np.testing.assert_allclose(got, [-1.0], rtol=1e-12)


def test_principal_dimensions() -> None:
    assert [principal_dimensions(d) for d in (2048, 4096, 2047, 768, 767, 64, 3, 1)] == [
        1000, 1000, 512, 512, 383, 32, 1, 0,
    ]  # fmt: skip


def refused(training: Training, name: str, logits: Any = CASE.logits, features: Any = CASE.features) -> str:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        FeatureScorer(training).scores([name], logits, features)
    return str(refusal.value)


def test_refusals() -> None:
    bare = Training(CASE.train)
    assert "mahalanobis needs training labels" in refused(bare, "mahalanobis")
    assert "need the weight (C, D) of the last Linear layer" in refused(bare, "vim")
    assert "10th nearest training feature but there are 9" in refused(Training(CASE.train[:9]), "knn")
    assert "unknown feature score 'relu'" in refused(bare, "relu")
    assert "features are 3 wide but those in training 13" in refused(bare, "knn", features=CASE.features[:, :3])
    assert "logits have 80 samples but features 4" in refused(bare, "knn", features=CASE.features[:4])
    assert "the same for all training features" in refused(Training(np.ones((20, WIDTH))), "sirc_msp_feature_norm")
    flat = Training(np.repeat(CASE.train[:2], 5, axis=0), np.repeat([0, 1], 5))
    assert "do not vary within any class" in refused(flat, "mahalanobis")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"features": np.zeros((0, 3))}, "no training features"),
        ({"features": np.array([[np.nan, 1]])}, "must be finite"),
        ({"features": np.zeros(3)}, "training features must be (n, C)"),
        ({"labels": np.zeros(3, int)}, "400 samples but training labels are of shape (3,)"),
        ({"weight": np.zeros((CLASSES, 3))}, "weight must be (C, 13)"),
        ({"bias": np.zeros(3)}, "bias must be (C,)"),
        ({"weight": None}, "bias must be (C,) and come with its weight"),
    ],
)
def test_training_refusals(values: dict[str, Any], message: str) -> None:
    good = {"features": CASE.train, "labels": CASE.labels, "weight": CASE.weight, "bias": CASE.bias}
    if "features" in values:
        good = {}
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        Training(**{**good, **values})
    assert message in str(refusal.value)
