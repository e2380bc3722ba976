"""Scores over features against independent formulas in float64: plain loops, SciPy, scikit-learn, mpmath."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import scipy.special
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors

from tal_fast.metrics.failure import failure_metrics
from tal_fast.scores import features as feature_scores
from tal_fast.scores import logits as scores
from tal_fast.scores.features import FEATURE_SCORES, SIRC, FeatureScorer, Training, principal_dimensions

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


# --- fitted as the features stream by --------------------------------------------------------------------------------


class Streamed:
    """The training features of the case in blocks of uneven size, in no order, as from disk."""

    def __init__(self, features: np.ndarray, size: int = 37) -> None:
        self.features, self.size, self.passes = features, size, 0
        self.shape = features.shape

    def blocks(self) -> Any:
        self.passes += 1
        order = np.random.default_rng(self.passes).permutation(len(self.features))
        for i in range(0, len(order), self.size):
            yield order[i : i + self.size], self.features[order[i : i + self.size]]


@pytest.mark.parametrize("name", FEATURE_SCORES)
def test_a_stream_gives_what_an_array_gives(name: str) -> None:
    streamed = Training(Streamed(CASE.train), CASE.labels, CASE.weight, CASE.bias)
    got = FeatureScorer(streamed).scores([name], CASE.logits, CASE.features)[name]
    np.testing.assert_allclose(got, CASE.score(name), rtol=1e-9, atol=1e-9)


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


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_scatter_of_blocks_is_that_of_the_whole(offset: float) -> None:
    rng = np.random.default_rng(4)
    features, labels = offset + rng.normal(size=(300, 6)), rng.integers(20, size=300) * 3
    scatter = feature_scores.ClassScatter(6)
    for size in (1, 2, 97, 200):
        part, features_left = features[:size], features[size:]
        scatter.update(part, labels[:size])
        features, labels = features_left, labels[size:]
    rng = np.random.default_rng(4)
    features, labels = offset + rng.normal(size=(300, 6)), rng.integers(20, size=300) * 3
    classes = np.unique(labels)
    means = np.stack([features[labels == c].mean(0) for c in classes])
    centred = features - means[np.searchsorted(classes, labels)]
    assert scatter.classes.tolist() == classes.tolist()
    assert scatter.counts.tolist() == [np.sum(labels == c) for c in classes]
    # At an offset of a million, sums of squares would keep four digits; merged moments keep ten.
    np.testing.assert_allclose(scatter.means, means, rtol=1e-12)
    np.testing.assert_allclose(scatter.within, centred.T @ centred, rtol=1e-9, atol=1e-7)
    origin = features.mean(0) + 1
    np.testing.assert_allclose(scatter.about(origin), (features - origin).T @ (features - origin), rtol=1e-9, atol=1e-6)


def test_moments_of_blocks_are_those_of_the_whole() -> None:
    values = 1e8 + np.random.default_rng(5).normal(size=1000)
    moments = feature_scores.Moments()
    for part in np.split(values, [0, 1, 7, 500]):
        moments.update(part)
    assert moments.count == 1000
    assert moments.mean == pytest.approx(values.mean(), rel=1e-15)
    assert moments.std == pytest.approx(values.std(), rel=1e-7)


def test_training_logits_give_alpha() -> None:
    logits = 3 * (CASE.train @ CASE.weight.T + CASE.bias)
    vims = [
        FeatureScorer(Training(CASE.train, None, CASE.weight, CASE.bias, given)).scores(
            ["vim", "residual"], CASE.logits, CASE.features
        )
        for given in (None, logits)
    ]
    energy = scores.energy(CASE.logits)
    np.testing.assert_allclose(vims[1]["vim"] - energy, 3 * (vims[0]["vim"] - energy), rtol=1e-9)
    with pytest.raises(ValueError, match=r"400 samples but training logits are of shape \(3, 5\)"):
        Training(CASE.train, logits=logits[:3])


def test_knn_among_a_random_choice() -> None:
    for features in (CASE.train, Streamed(CASE.train)):
        scorer = FeatureScorer(Training(features), knn_samples=50, seed=3)
        got = scorer.scores(["knn"], CASE.logits, CASE.features)["knn"]
        chosen = CASE.train[np.sort(np.random.default_rng(3).permutation(400)[:50])]
        want = FeatureScorer(Training(chosen)).scores(["knn"], CASE.logits, CASE.features)["knn"]
        np.testing.assert_allclose(got, want, rtol=1e-12)
        assert scorer.about() == {
            "training_samples": 400, "knn_samples": 50, "knn_search": scorer._neighbours.method,
        }  # fmt: skip
    with pytest.raises(ValueError, match="knn_samples is 9 but knn takes the 10th neighbour; keep more"):
        FeatureScorer(Training(CASE.train), knn_samples=9)


def test_knn_among_all_reads_the_stream() -> None:
    stream = Streamed(CASE.train)
    scorer = FeatureScorer(Training(stream), knn_samples=None)
    got = scorer.scores(["knn"], CASE.logits, CASE.features)["knn"]
    np.testing.assert_allclose(got, CASE.score("knn"), rtol=1e-9)
    assert scorer.about() == {"training_samples": 400, "knn_samples": 400, "knn_search": "exact"}


def test_faiss_gives_what_blocks_give(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    rng = np.random.default_rng(6)
    # Crowded: many distances that float32 does not tell apart.
    train = (rng.normal(size=(5, 64))[rng.integers(5, size=3000)] + 1e-4 * rng.normal(size=(3000, 64))).astype("f4")
    features = train[:300] + 1e-4 * rng.normal(size=(300, 64))
    fast = FeatureScorer(Training(train)).scores(["knn"], features, features)["knn"]
    monkeypatch.setattr(feature_scores._Neighbours, "_build", staticmethod(lambda bank: None))
    scorer = FeatureScorer(Training(train))
    exact = scorer.scores(["knn"], features, features)["knn"]
    assert scorer.about()["knn_search"] == "exact"
    np.testing.assert_allclose(fast, exact, rtol=0.02)
    spread = FeatureScorer(Training(CASE.train)).scores(["knn"], CASE.logits, CASE.features)["knn"]
    np.testing.assert_allclose(spread, CASE.score("knn"), rtol=1e-9)


PEAK = """
import sys
import numpy as np
from tal_fast.scores import features as feature_scores
from tal_fast.scores.features import FeatureScorer, Training

n, width = int(sys.argv[1]), 64
rng = np.random.default_rng(0)
weight, labels = rng.normal(size=(10, width)), np.zeros(n, np.int8)

class Disk:
    shape = (n, width)
    def blocks(self):
        for i in range(0, n, 5000):
            block = np.random.default_rng(i).normal(size=(5000, width)).astype(np.float32)
            yield np.arange(i, i + 5000), block

import tracemalloc
tracemalloc.start()
scorer = FeatureScorer(Training(Disk(), labels, weight), knn_samples=2000)
names = ["mahalanobis", "vim", "knn", "sirc_msp_residual", "sirc_msp_feature_norm"]
assert scorer.undefined(names) == {}
print(tracemalloc.get_traced_memory()[1])
"""


def test_memory_does_not_grow_with_the_training_set() -> None:
    peaks = []
    for samples in (50_000, 400_000):
        found = subprocess.run([sys.executable, "-c", PEAK, str(samples)], capture_output=True, text=True, timeout=200)
        assert found.returncode == 0, found.stderr
        peaks.append(int(found.stdout))
    # In float64 the features would be 205 MB; what grows is the permutation that chooses neighbours, 16 bytes a sample.
    assert peaks[1] - peaks[0] < 16 * 350_000 + 1e6
    assert peaks[1] < 40e6


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
