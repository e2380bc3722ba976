"""Confidence scores of penultimate features, fitted on training features; higher = surer, always.

``FeatureScorer(training).scores(names, logits, features)`` gives them; ``FEATURE_SCORES`` lists the names.

========================  =============================================================================================
name                      score
========================  =============================================================================================
``feature_norm``          ‖f‖₁
``gradnorm``              ‖p − 1/C‖₁ · ‖f‖₁ (Huang et al., 2021)
``mahalanobis``           −min over classes of (f − μ_c)ᵀ Σ⁻¹ (f − μ_c), Σ tied over classes (Lee et al., 2018)
``residual``              −‖Rᵀ(f − u)‖₂: the part of f outside the training features' principal subspace about u = −W⁺b
``vim``                   energy − α‖Rᵀ(f − u)‖₂, α = Σ max-logit / Σ ‖Rᵀ(f − u)‖₂ in training (Wang et al., 2022)
``knn``                   −(10th smallest squared distance to a training feature, both L2-normalised) (Sun et al., 2022)
``sirc_S1_S2``            −log(s1_max − s1) − log(1 + exp(−b(s2 − a))), a = mean − 3 std, b = 1/std of s2 in training
                          (Xia and Bouganis, 2022); S1 ``msp``, ``doctor``, ``cosine`` or ``neg_entropy``, S2
                          ``feature_norm``, ``residual`` or ``knn``
========================  =============================================================================================

Fitting reads the training features a block at a time, in float64, so they may be far larger than memory:

1. One pass gives the class means, the tied scatter about them and the moments of ‖f‖₁, merged block by block (Chan et
   al., 1979). The scatter about u follows from these: Σ(f − u)(f − u)ᵀ = within + Σ_c n_c (μ_c − u)(μ_c − u)ᵀ. Memory:
   a few D × D, C × D and 4096 × D matrices: with pass 2, 390 MB at the peak for D = 2048 and C = 1000.
2. R is known only after that, so α and the moments of the residual take a second pass over the same features (from
   disk, not through the network), for the scores that need them.
3. ``knn`` keeps at most ``knn_samples`` training features, chosen at random, in memory; ``None`` compares with all of
   them, read anew for every 4,096 samples. SIRC with ``knn`` takes its mean and std from at most 10,000 of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tal_fast.scores.logits import NORM_EPS, Floats, as_matrix, by_blocks, energy, log_softmax

NEIGHBOUR = 10
PLAIN = ("feature_norm", "gradnorm", "mahalanobis", "residual", "vim", "knn")
SIRC_FIRST = ("msp", "doctor", "cosine", "neg_entropy")
SIRC_SECOND = ("feature_norm", "residual", "knn")
SIRC = {f"sirc_{first}_{second}": (first, second) for first in SIRC_FIRST for second in SIRC_SECOND}
FEATURE_SCORES = (*PLAIN, *SIRC)

# Rows cast to float64 at a time.
_ROWS = 4096
# Neighbours taken beyond the tenth from faiss, which works in float32; float64 distances then decide.
_SPARE = 6
KNN_SAMPLES = 50_000
"""Training features that ``knn`` keeps unless told otherwise: 400 MB of float32 at 2,048 wide."""
SIRC_KNN_SAMPLES = 10_000


class Rows(Protocol):
    """Training features that are not in memory, such as ``tal_fast.evaluation.prediction_store.StoredFeatures``."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, D)."""
        ...

    def blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """(indices, features) of some samples at a time; each sample once, in any order."""
        ...


@dataclass(frozen=True)
class Training:
    """What feature scores are fitted on. Only what the wanted scores need has to be there.

    Attributes:
        features: (n, D), the input of the last Linear layer for training images without augmentation; an array, or
            ``Rows`` on disk.
        labels: (n,) int64; for ``mahalanobis``.
        weight: (C, D) of the last Linear layer; for ``residual``, ``vim`` and SIRC with ``residual``.
        bias: (C,); zeros where the layer has none.
        logits: (n, C) of the training images, for α of ``vim``; W f + b unless given.
    """

    features: NDArray[Any] | Rows
    labels: NDArray[Any] | None = None
    weight: NDArray[Any] | None = None
    bias: NDArray[Any] | None = None
    logits: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.features, np.ndarray):
            as_matrix(self.features, "training features")
            for _, block in self.blocks():
                if not np.isfinite(block).all():
                    raise ValueError("training features must be finite; NaN or infinity is among them")
        samples, width = self.features.shape
        if not samples:
            raise ValueError("there are no training features to fit scores on")
        if self.labels is not None and self.labels.shape != (samples,):
            raise ValueError(
                f"training features have {samples} samples but training labels are of shape {self.labels.shape}"
            )
        if self.logits is not None and (self.logits.ndim != 2 or len(self.logits) != samples):
            raise ValueError(
                f"training features have {samples} samples but training logits are of shape {self.logits.shape}"
            )
        if self.weight is not None and (self.weight.ndim != 2 or self.weight.shape[1] != width):
            raise ValueError(
                f"the last layer's weight must be (C, {width}) for these features, not {self.weight.shape}"
            )
        if self.bias is not None and (self.weight is None or self.bias.shape != self.weight.shape[:1]):
            raise ValueError("the last layer's bias must be (C,) and come with its weight (C, D)")

    def blocks(self) -> Iterator[tuple[NDArray[np.int64], Floats]]:
        """(indices, features in float64) of at most 4,096 samples at a time; each sample once, in no set order."""
        parts: Any = [(np.arange(len(self.features)), self.features)] if isinstance(self.features, np.ndarray) else None
        for indices, features in self.features.blocks() if parts is None else parts:  # type: ignore[union-attr]
            for i in range(0, len(indices), _ROWS):
                yield indices[i : i + _ROWS], features[i : i + _ROWS].astype(np.float64)

    def scaled(self, temperature: float) -> Training:
        """The same with logits divided by a temperature."""
        divided = (None if x is None else np.asarray(x) / temperature for x in (self.weight, self.bias, self.logits))
        return Training(self.features, self.labels, *divided)


class Moments:
    """Mean and variance of numbers that come a block at a time, in float64."""

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def update(self, values: Floats) -> None:
        """Take in (m,) more."""
        if not values.size:
            return
        mean, total = float(values.mean()), self.count + values.size
        step = mean - self.mean
        self._squares += float(np.square(values - mean).sum()) + step * step * self.count * values.size / total
        self.mean += step * values.size / total
        self.count = total

    @property
    def std(self) -> float:
        """Of all numbers so far, as a population."""
        return math.sqrt(self._squares / self.count)


class ClassScatter:
    """Class means and the scatter about them, of features that come a block at a time.

    Args:
        width: D.

    Attributes:
        classes: (K,) the labels met so far, rising.
        counts: (K,) samples of each.
        means: (K, D) float64.
        within: (D, D) Σ (f − μ)(f − μ)ᵀ, each f about its class's mean.
    """

    def __init__(self, width: int) -> None:
        self.classes = np.zeros(0, np.int64)
        self.counts, self.means = np.zeros(0), np.zeros((0, width))
        self.within = np.zeros((width, width))

    def update(self, features: Floats, labels: NDArray[np.int64]) -> None:
        """Take in (m, D) more with their (m,) labels: the sums of two sets from those of each (Chan et al., 1979)."""
        classes, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
        self._admit(classes)
        at = np.searchsorted(self.classes, classes)
        # Sums by class as runs of the sorted rows; np.add.at over rows is many times slower.
        order = np.argsort(index, kind="stable")
        means = np.add.reduceat(features[order], np.append(0, np.cumsum(counts)[:-1])) / counts[:, None]
        centred = features - means[index]
        step, before = means - self.means[at], self.counts[at]
        after = before + counts
        apart = step * np.sqrt(before * counts / after)[:, None]
        self.within += centred.T @ centred
        self.within += apart.T @ apart
        self.means[at] += step * (counts / after)[:, None]
        self.counts[at] = after

    def _admit(self, classes: NDArray[np.int64]) -> None:
        new = np.setdiff1d(classes, self.classes)
        if new.size:
            place = np.searchsorted(self.classes, new)
            self.classes = np.insert(self.classes, place, new)
            self.counts = np.insert(self.counts, place, 0.0)
            self.means = np.insert(self.means, place, 0.0, axis=0)

    def about(self, origin: Floats) -> Floats:
        """(D, D) Σ (f − origin)(f − origin)ᵀ over all samples."""
        apart = (self.means - origin) * np.sqrt(self.counts)[:, None]
        return self.within + apart.T @ apart


def principal_dimensions(width: int) -> int:
    """How many principal directions ``residual`` and ``vim`` leave out for (n, ``width``) features."""
    return 1000 if width >= 2048 else 512 if width >= 768 else width // 2


def training_needed(name: str) -> bool:
    """Whether a feature score is fitted on training features at all."""
    return name not in ("feature_norm", "gradnorm")


class FeatureScorer:
    """Feature scores fitted on training features; each part is fitted when first asked for.

    Args:
        training: what to fit on; None serves ``feature_norm`` and ``gradnorm`` only.
        knn_samples: training features that ``knn`` keeps, a random choice where there are more; None: all.
        seed: of that choice.

    Raises:
        ValueError: from ``scores``: an unknown name, training data that a score needs and that are not there or too
            few, or test features of another width.
    """

    def __init__(self, training: Training | None, knn_samples: int | None = KNN_SAMPLES, seed: int = 0) -> None:
        if knn_samples is not None and knn_samples < NEIGHBOUR:
            raise ValueError(f"knn_samples is {knn_samples} but knn takes the {NEIGHBOUR}th neighbour; keep more")
        self._given = training
        self._knn_samples, self._seed = knn_samples, seed
        self._sirc: dict[str, tuple[float, float]] = {}

    @property
    def training(self) -> Training:
        """What the scores are fitted on.

        Raises:
            ValueError: there is nothing.
        """
        if self._given is None:
            raise ValueError("there are no training features")
        return self._given

    def undefined(self, names: Sequence[str]) -> dict[str, str]:
        """Fit what the scores need; those that cannot be computed, with the reason."""
        problems: dict[str, str] = {}
        for name in names:
            try:
                self._fit(name)
            except ValueError as problem:
                problems[name] = str(problem)
        return problems

    def _fit(self, name: str) -> None:
        if name in SIRC:
            self._sirc_parameters(SIRC[name][1])
        elif name == "vim":
            _ = self._vim_scale
        elif name == "residual":
            _ = self._null_space
        elif name == "mahalanobis":
            _ = self._gaussians
        elif name == "knn":
            _ = self._neighbours

    def about(self) -> dict[str, Any]:
        """What the scores were fitted on, for a report."""
        if self._given is None:
            return {}
        samples = self.training.features.shape[0]
        found: dict[str, Any] = {"training_samples": samples}
        if "_neighbours" in self.__dict__:
            found |= {"knn_samples": self._neighbours.samples, "knn_search": self._neighbours.method}
        if "knn" in self._sirc:
            found["sirc_knn_samples"] = min(SIRC_KNN_SAMPLES, samples)
        return found

    def scores(self, names: Sequence[str], logits: Any, features: Any) -> dict[str, Floats]:
        """Score name -> (n,) float64.

        Args:
            names: of ``FEATURE_SCORES``.
            logits: (n, C).
            features: (n, D), as wide as the training features.
        """
        logits, features = as_matrix(logits, "logits"), as_matrix(features, "features")
        if len(logits) != len(features):
            raise ValueError(f"logits have {len(logits)} samples but features {len(features)}; they must match")
        if self._given is not None and features.shape[1] != self.training.features.shape[1]:
            raise ValueError(
                f"features are {features.shape[1]} wide but those in training {self.training.features.shape[1]}"
            )
        parts: dict[str, Floats] = {}

        def part(name: str) -> Floats:
            # Shared by several scores: the neighbours alone can take minutes.
            if name not in parts:
                parts[name] = self._second(name, features)
            return parts[name]

        return {name: self._score(name, logits, part, features) for name in names}

    def _score(self, name: str, logits: NDArray[Any], part: Callable[[str], Floats], features: NDArray[Any]) -> Floats:
        if name in SIRC_SECOND:
            return part(name)
        if name == "gradnorm":
            return by_blocks(_distance_to_uniform, logits) * part("feature_norm")
        if name == "mahalanobis":
            return self._mahalanobis(features)
        if name == "vim":
            return energy(logits) + self._vim_scale * part("residual")
        if name in SIRC:
            first, second = SIRC[name]
            a, b = self._sirc_parameters(second)
            return -by_blocks(_LOG_GAP[first], logits) - np.logaddexp(0, -b * (part(second) - a))
        raise ValueError(f"unknown feature score {name!r}; choose from {', '.join(FEATURE_SCORES)}")

    def _second(self, name: str, features: NDArray[Any]) -> Floats:
        """A score of the features alone."""
        if name == "feature_norm":
            return by_blocks(_l1, features)
        if name == "residual":
            return by_blocks(self._residual, features)
        assert name == "knn"
        return self._neighbours.scores(features)

    def _residual(self, features: Floats) -> Floats:
        origin, directions = self._null_space
        return -np.linalg.norm((features - origin) @ directions, axis=1)

    @cached_property
    def _first_pass(self) -> tuple[ClassScatter, Moments]:
        """Scatter of the features, in one class without labels, and the moments of ‖f‖₁."""
        training = self.training
        scatter, norms = ClassScatter(training.features.shape[1]), Moments()
        for indices, block in training.blocks():
            scatter.update(block, _no_labels(indices) if training.labels is None else training.labels[indices])
            norms.update(_l1(block))
        return scatter, norms

    @cached_property
    def _null_space(self) -> tuple[Floats, Floats]:
        """Origin u (D,) and the directions R (D, D − dim) of least variance about it."""
        weight, bias = self.training.weight, self.training.bias
        if weight is None:
            raise ValueError("residual and vim need the weight (C, D) of the last Linear layer, and its bias")
        width = weight.shape[1]
        origin = np.zeros(width)
        if bias is not None:
            origin = -np.linalg.pinv(weight.astype(np.float64)) @ bias.astype(np.float64)
        scatter, _ = self._first_pass
        # Eigenvalues come rising: the first columns are the directions of least variance.
        _, vectors = np.linalg.eigh(scatter.about(origin) / scatter.counts.sum())
        return origin, vectors[:, : width - principal_dimensions(width)]

    @cached_property
    def _second_pass(self) -> tuple[Moments, float]:
        """Moments of ``residual`` over the training features, and the sum of their largest logits."""
        training = self.training
        weight, logits = training.weight, training.logits
        assert weight is not None  # or _null_space has said so
        _ = self._null_space
        weight = weight.astype(np.float64)
        bias = 0.0 if training.bias is None else training.bias.astype(np.float64)
        residuals, largest = Moments(), 0.0
        for indices, block in training.blocks():
            residuals.update(self._residual(block))
            of_block = block @ weight.T + bias if logits is None else logits[indices].astype(np.float64)
            largest += float(of_block.max(axis=1).sum())
        return residuals, largest

    @cached_property
    def _vim_scale(self) -> float:
        """α: it gives the residual, as a virtual logit, the size of the largest logit in training."""
        _ = self._null_space
        residuals, largest = self._second_pass
        if residuals.mean == 0:
            raise ValueError("vim is undefined here: no training feature leaves the principal subspace")
        return largest / -(residuals.mean * residuals.count)

    @cached_property
    def _gaussians(self) -> tuple[Floats, Floats, Floats]:
        """Centre (D,), whitening (D, rank) of the tied covariance, whitened class means (classes, rank)."""
        if self.training.labels is None:
            raise ValueError("mahalanobis needs training labels (n,)")
        scatter, _ = self._first_pass
        samples, width = scatter.counts.sum(), scatter.means.shape[1]
        centre = scatter.means.mean(axis=0)
        power = float(np.trace(scatter.about(centre)))
        values, vectors = np.linalg.eigh(scatter.within / samples)
        # A pseudo-inverse: directions without variance beyond rounding (dead units) say nothing.
        kept = values > power / samples * width * np.finfo(np.float64).eps
        if not kept.any():
            raise ValueError("mahalanobis is undefined here: the training features do not vary within any class")
        whiten = vectors[:, kept] / np.sqrt(values[kept])
        return centre, whiten, (scatter.means - centre) @ whiten

    def _mahalanobis(self, features: NDArray[Any]) -> Floats:
        centre, whiten, means = self._gaussians

        def nearest(f: Floats) -> Floats:
            white = (f - centre) @ whiten
            squared = (white * white).sum(axis=1)[:, None] - 2 * white @ means.T + (means * means).sum(axis=1)
            return -np.maximum(squared.min(axis=1), 0)

        return by_blocks(nearest, features, len(means))

    @cached_property
    def _neighbours(self) -> _Neighbours:
        return _Neighbours(self.training, self._knn_samples, self._seed)

    def _sirc_parameters(self, second: str) -> tuple[float, float]:
        if second not in self._sirc:
            moments = self._moments(second)
            # Of equal numbers, rounding alone can leave a little.
            if moments.std <= 1e-14 * abs(moments.mean):
                raise ValueError(f"sirc with {second} is undefined here: it is the same for all training features")
            self._sirc[second] = moments.mean - 3 * moments.std, 1 / moments.std
        return self._sirc[second]

    def _moments(self, second: str) -> Moments:
        if second == "feature_norm":
            return self._first_pass[1]
        if second == "residual":
            _ = self._null_space
            return self._second_pass[0]
        moments = Moments()
        moments.update(self._neighbours.scores(_choose(self.training, SIRC_KNN_SAMPLES, self._seed)))
        return moments


def _choose(training: Training, limit: int, seed: int) -> NDArray[Any]:
    """At most so many training features, in the order of their indices; a random choice where there are more."""
    samples, width = training.features.shape
    if isinstance(training.features, np.ndarray) and samples <= limit:
        return training.features
    chosen = np.sort(np.random.default_rng(seed).permutation(samples)[:limit])
    place = np.full(samples, -1)
    place[chosen] = np.arange(len(chosen))
    found: NDArray[Any] | None = None
    # As they are stored: in float64 they would take twice the memory.
    if isinstance(training.features, np.ndarray):
        return training.features[chosen]
    for indices, block in training.features.blocks():
        if found is None:
            found = np.empty((len(chosen), width), block.dtype)
        inside = place[indices] >= 0
        found[place[indices[inside]]] = block[inside]
    assert found is not None
    return found


class _Neighbours:
    """The 10th nearest of the L2-normalised training features, or of a random choice of them.

    faiss, where it is installed, finds candidates among features in memory; their distances are computed in float64
    either way.
    """

    def __init__(self, training: Training, limit: int | None, seed: int) -> None:
        self._training = training
        self._bank = None if limit is None else _choose(training, limit, seed)
        self.samples = training.features.shape[0] if self._bank is None else len(self._bank)
        if self.samples < NEIGHBOUR:
            raise ValueError(f"knn takes the {NEIGHBOUR}th nearest training feature but there are {self.samples}")
        self._index = None if self._bank is None else self._build(self._bank)
        self.method = "exact" if self._index is None else "faiss"

    @staticmethod
    def _build(bank: NDArray[Any]) -> Any:
        try:
            import faiss
        except ImportError:
            return None
        index = faiss.IndexFlatL2(bank.shape[1])
        for i in range(0, len(bank), _ROWS):
            index.add(_normalised(bank[i : i + _ROWS].astype(np.float64)).astype(np.float32))
        return index

    def _blocks(self) -> Iterator[Floats]:
        if self._bank is None:
            for _, block in self._training.blocks():
                yield _normalised(block)
            return
        for i in range(0, len(self._bank), _ROWS):
            yield _normalised(self._bank[i : i + _ROWS].astype(np.float64))

    def scores(self, features: NDArray[Any]) -> Floats:
        """(n, D) -> (n,) minus the squared distance."""
        nearest = self._by_blocks if self._index is None else self._by_faiss
        parts = [
            nearest(_normalised(features[i : i + _ROWS].astype(np.float64))) for i in range(0, len(features), _ROWS)
        ]
        return -np.concatenate(parts) if parts else np.zeros(0)

    def _by_blocks(self, rows: Floats) -> Floats:
        best = np.full((len(rows), NEIGHBOUR), np.inf)
        for other in self._blocks():
            # Of unit vectors; a zero vector stays zero, which the two norms allow for.
            squared = (rows * rows).sum(axis=1)[:, None] + (other * other).sum(axis=1) - 2 * rows @ other.T
            best = np.partition(np.concatenate((best, squared), axis=1), NEIGHBOUR - 1, axis=1)[:, :NEIGHBOUR]
        return np.maximum(best.max(axis=1), 0)

    def _by_faiss(self, rows: Floats) -> Floats:
        assert self._bank is not None
        assert self._index is not None
        _, candidates = self._index.search(rows.astype(np.float32), min(NEIGHBOUR + _SPARE, self.samples))
        found = np.empty(len(rows))
        step = 256  # 67 MB of candidates at 2,048 wide
        for i in range(0, len(rows), step):
            chosen = candidates[i : i + step]
            others = _normalised(self._bank[chosen.ravel()].astype(np.float64)).reshape(*chosen.shape, -1)
            squared = np.square(others - rows[i : i + step, None]).sum(axis=2)
            found[i : i + step] = np.partition(squared, NEIGHBOUR - 1, axis=1)[:, NEIGHBOUR - 1]
        return found


def _no_labels(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.zeros(len(indices), np.int64)


def _l1(features: Floats) -> Floats:
    return np.abs(features).sum(axis=1)


def _normalised(rows: Floats) -> Floats:
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)


def _distance_to_uniform(z: Floats) -> Floats:
    return np.abs(np.exp(log_softmax(z)) - 1 / z.shape[1]).sum(axis=1)


# SIRC takes the logarithm of what is missing to a perfect score. In the functions below it is never lost to rounding,
# however sure the model: 1 − p is summed over the other classes, and in logarithms, which do not underflow.


def _log_sum(terms: Floats) -> Floats:
    """log Σ exp of each row; −inf for no columns, or only −inf in them."""
    top = terms.max(axis=1, initial=-np.inf)
    reference = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return reference + np.log(np.exp(terms - reference[:, None]).sum(axis=1))


def _log_others(z: Floats) -> tuple[Floats, Floats, Floats]:
    """log p of the top class (n,), of the others (n, C − 1), and log(1 − p) of the top class (n,)."""
    column = np.argmax(z, axis=1)
    rest = np.arange(z.shape[1] - 1) + (np.arange(z.shape[1] - 1) >= column[:, None])
    top, others = z[np.arange(len(z)), column], np.take_along_axis(z, rest, axis=1)
    odds = _log_sum(others - top[:, None])  # log((1 − p) / p)
    log_top = -np.logaddexp(0, odds)
    return log_top, others - top[:, None] + log_top[:, None], odds + log_top


def _log_gap_msp(z: Floats) -> Floats:
    return _log_others(z)[2]


def _log_gap_doctor(z: Floats) -> Floats:
    """log(1 − Σ p²) = log Σ p (1 − p)."""
    top, others, missing = _log_others(z)
    return _log_sum(np.concatenate(((top + missing)[:, None], others + np.log1p(-np.exp(others))), axis=1))


def _log_gap_cosine(z: Floats) -> Floats:
    """log(1 − max z / (‖z‖ + ε)), with ‖z‖ − max z = Σ_others z² / (‖z‖ + max z)."""
    top, norm = z.max(axis=1), np.linalg.norm(z, axis=1)
    squares = (z * z * (np.arange(z.shape[1]) != np.argmax(z, axis=1)[:, None])).sum(axis=1)
    gap = np.where(top > 0, np.divide(squares, norm + top, out=np.zeros_like(top), where=top > 0), norm - top)
    return np.log((gap + NORM_EPS) / (norm + NORM_EPS))


def _log_gap_neg_entropy(z: Floats) -> Floats:
    """log(−Σ p log p)."""
    top, others, missing = _log_others(z)
    # −log p of the top class is (1 − p)(1 + (1 − p)/2 + ...): for small 1 − p its logarithm is that of 1 − p.
    log_surprise = np.where(missing < -20, missing, np.log(np.maximum(-top, np.finfo(np.float64).tiny)))
    return _log_sum(np.concatenate(((top + log_surprise)[:, None], others + np.log(-others)), axis=1))


_LOG_GAP: dict[str, Callable[[Floats], Floats]] = {
    "msp": _log_gap_msp,
    "doctor": _log_gap_doctor,
    "cosine": _log_gap_cosine,
    "neg_entropy": _log_gap_neg_entropy,
}
