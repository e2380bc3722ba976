"""Confidence scores of penultimate features, fitted on training features; higher = surer, always.

``FeatureScorer(training).scores(names, logits, features)`` gives them; ``FEATURE_SCORES`` lists the names. All of it is
in float64, a block of rows at a time, so that nothing the size of the training set is copied.

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
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tal_fast.scores import NORM_EPS, Floats, as_matrix, by_blocks, energy, log_softmax

NEIGHBOUR = 10
PLAIN = ("feature_norm", "gradnorm", "mahalanobis", "residual", "vim", "knn")
SIRC_FIRST = ("msp", "doctor", "cosine", "neg_entropy")
SIRC_SECOND = ("feature_norm", "residual", "knn")
SIRC = {f"sirc_{first}_{second}": (first, second) for first in SIRC_FIRST for second in SIRC_SECOND}
FEATURE_SCORES = (*PLAIN, *SIRC)

# Training rows cast to float64 at a time.
_ROWS = 4096


@dataclass(frozen=True)
class Training:
    """What feature scores are fitted on. Only what the wanted scores need has to be there.

    Attributes:
        features: (n, D), the input of the last Linear layer for training images without augmentation.
        labels: (n,) int64; for ``mahalanobis``.
        weight: (C, D) of the last Linear layer; for ``residual``, ``vim`` and SIRC with ``residual``.
        bias: (C,); zeros where the layer has none.
    """

    features: NDArray[Any]
    labels: NDArray[Any] | None = None
    weight: NDArray[Any] | None = None
    bias: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        features = as_matrix(self.features, "training features")
        if not len(features):
            raise ValueError("there are no training features to fit scores on")
        if not np.isfinite(features).all():
            raise ValueError("training features must be finite; NaN or infinity is among them")
        if self.labels is not None and self.labels.shape != (len(features),):
            raise ValueError(
                f"training features have {len(features)} samples but training labels are of shape {self.labels.shape}"
            )
        if self.weight is not None and (self.weight.ndim != 2 or self.weight.shape[1] != features.shape[1]):
            raise ValueError(
                f"the last layer's weight must be (C, {features.shape[1]}) for these features, not {self.weight.shape}"
            )
        if self.bias is not None and (self.weight is None or self.bias.shape != self.weight.shape[:1]):
            raise ValueError("the last layer's bias must be (C,) and come with its weight (C, D)")


def principal_dimensions(width: int) -> int:
    """How many principal directions ``residual`` and ``vim`` leave out for (n, ``width``) features."""
    return 1000 if width >= 2048 else 512 if width >= 768 else width // 2


class FeatureScorer:
    """Feature scores fitted on training features; each part is fitted when first asked for.

    Raises:
        ValueError: from ``scores``: an unknown name, training data that a score needs and that are not there or too
            few, or test features of another width.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self._sirc: dict[str, tuple[float, float]] = {}

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
        if features.shape[1] != self.training.features.shape[1]:
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
            return by_blocks(lambda f: np.abs(f).sum(axis=1), features)
        if name == "residual":
            origin, directions = self._null_space
            return by_blocks(lambda f: -np.linalg.norm((f - origin) @ directions, axis=1), features)
        assert name == "knn"
        return by_blocks(self._nearest, features, _ROWS)

    def _blocks(self) -> Iterator[Floats]:
        features = self.training.features
        for i in range(0, len(features), _ROWS):
            yield features[i : i + _ROWS].astype(np.float64)

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
        scatter = np.zeros((width, width))
        for block in self._blocks():
            scatter += (block - origin).T @ (block - origin)
        # Eigenvalues come rising: the first columns are the directions of least variance.
        _, vectors = np.linalg.eigh(scatter / len(self.training.features))
        return origin, vectors[:, : width - principal_dimensions(width)]

    @cached_property
    def _vim_scale(self) -> float:
        """α: it gives the residual, as a virtual logit, the size of the largest logit in training."""
        weight = self.training.weight
        residual = -self._on_training("residual").sum()
        assert weight is not None  # or _null_space would have said so
        bias = 0.0 if self.training.bias is None else self.training.bias.astype(np.float64)
        largest = sum(float((f @ weight.astype(np.float64).T + bias).max(axis=1).sum()) for f in self._blocks())
        if residual == 0:
            raise ValueError("vim is undefined here: no training feature leaves the principal subspace")
        return largest / residual

    @cached_property
    def _gaussians(self) -> tuple[Floats, Floats, Floats]:
        """Centre (D,), whitening (D, rank) of the tied covariance, whitened class means (classes, rank)."""
        labels = self.training.labels
        if labels is None:
            raise ValueError("mahalanobis needs training labels (n,)")
        classes, index = np.unique(labels, return_inverse=True)
        width = self.training.features.shape[1]
        sums = np.zeros((len(classes), width))
        for i, block in enumerate(self._blocks()):
            np.add.at(sums, index[i * _ROWS : i * _ROWS + len(block)], block)
        means = sums / np.bincount(index)[:, None]
        centre = means.mean(axis=0)
        scatter, power = np.zeros((width, width)), 0.0
        for i, block in enumerate(self._blocks()):
            power += float(np.square(block - centre).sum())
            within = block - means[index[i * _ROWS : i * _ROWS + len(block)]]
            scatter += within.T @ within
        values, vectors = np.linalg.eigh(scatter / len(labels))
        # A pseudo-inverse: directions without variance beyond rounding (dead units) say nothing.
        kept = values > power / len(labels) * width * np.finfo(np.float64).eps
        if not kept.any():
            raise ValueError("mahalanobis is undefined here: the training features do not vary within any class")
        whiten = vectors[:, kept] / np.sqrt(values[kept])
        return centre, whiten, (means - centre) @ whiten

    def _mahalanobis(self, features: NDArray[Any]) -> Floats:
        centre, whiten, means = self._gaussians

        def nearest(f: Floats) -> Floats:
            white = (f - centre) @ whiten
            squared = (white * white).sum(axis=1)[:, None] - 2 * white @ means.T + (means * means).sum(axis=1)
            return -np.maximum(squared.min(axis=1), 0)

        return by_blocks(nearest, features, len(means))

    def _nearest(self, features: Floats) -> Floats:
        if len(self.training.features) < NEIGHBOUR:
            raise ValueError(
                f"knn takes the {NEIGHBOUR}th nearest training feature but there are {len(self.training.features)}"
            )
        rows = _normalised(features)
        best = np.full((len(rows), NEIGHBOUR), np.inf)
        for block in self._blocks():
            # Of unit vectors; a zero vector stays zero, which the two norms allow for.
            other = _normalised(block)
            squared = (rows * rows).sum(axis=1)[:, None] + (other * other).sum(axis=1) - 2 * rows @ other.T
            best = np.partition(np.concatenate((best, squared), axis=1), NEIGHBOUR - 1, axis=1)[:, :NEIGHBOUR]
        return -np.maximum(best.max(axis=1), 0)

    def _on_training(self, name: str) -> Floats:
        return self._second(name, self.training.features)

    def _sirc_parameters(self, second: str) -> tuple[float, float]:
        if second not in self._sirc:
            values = self._on_training(second)
            std = float(values.std())
            if std == 0:
                raise ValueError(f"sirc with {second} is undefined here: it is the same for all training features")
            self._sirc[second] = float(values.mean()) - 3 * std, 1 / std
        return self._sirc[second]


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
