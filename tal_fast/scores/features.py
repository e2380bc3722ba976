"""Confidence scores of penultimate features, fitted on training features; higher means more confident.

``FeatureScorer(training).scores(names, logits, features)`` gives them; ``FEATURE_SCORES`` and ``SIRC_SCORES`` of
``tal_fast.config.names`` list the names.

========================  =============================================================================================
name                      score
========================  =============================================================================================
``feature_norm``          ‖f‖₁
``gradnorm``              ‖p − 1/C‖₁ · ‖f‖₁ (Huang et al., 2021)
``mahalanobis``           −min over classes of (f − μ_c)ᵀ Σ⁻¹ (f − μ_c), Σ tied over classes (Lee et al., 2018)
``residual``              −‖Rᵀ(f − u)‖₂: the part of f outside the training features' principal subspace about u = −W⁺b
``ctm``                   cosine to the most similar class mean of the training features (Ngoc-Hieu et al., 2023)
``vim``                   energy − α‖Rᵀ(f − u)‖₂, α = Σ max-logit / Σ ‖Rᵀ(f − u)‖₂ in training (Wang et al., 2022)
``knn``                   −(10th smallest squared distance to a training feature, both L2-normalised) (Sun et al., 2022)
``sirc_S1_S2``            −log(s1_max − s1) − log(1 + exp(−b(s2 − a))), a = mean − 3 std, b = 1/std of s2 in training
                          (Xia and Bouganis, 2022); S1 ``msp``, ``doctor``, ``cosine`` or ``neg_entropy``, S2
                          ``feature_norm``, ``residual`` or ``knn``
``ood:DETECTOR``          one of pytorch-ood's detectors, negated (``tal_fast.scores.pytorch_ood``)
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

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tal_fast.config.names import FEATURE_SCORES, SIRC_SCORES
from tal_fast.scores.logits import LOG_GAPS, distance_to_uniform, energy
from tal_fast.scores.neighbours import NEIGHBOUR, Neighbours, normalised
from tal_fast.scores.pytorch_ood import fit_detector
from tal_fast.scores.training_statistics import ClassScatter, Moments, Training, principal_dimensions
from tal_fast.utils.arrays import Floats, as_matrix, by_blocks

KNN_SAMPLES = 50_000
"""Default number of training features that ``knn`` keeps: 400 MB of float32 at 2,048 wide."""
SIRC_KNN_SAMPLES = 10_000
"""Number of training features that SIRC takes the mean and standard deviation of ``knn`` from."""


def training_needed(name: str) -> bool:
    """Whether a feature score is fitted on training features."""
    return name not in ("feature_norm", "gradnorm")


class FeatureScorer:
    """Feature scores fitted on training features; each part is fitted when it is first needed.

    Args:
        training: training data to fit on; with None only ``feature_norm`` and ``gradnorm`` can be computed.
        knn_samples: number of training features that ``knn`` and ``ood:`` detectors keep, chosen at random; None: all.
        seed: of that choice.
    """

    def __init__(self, training: Training | None, knn_samples: int | None = KNN_SAMPLES, seed: int = 0) -> None:
        if knn_samples is not None and knn_samples < NEIGHBOUR:
            raise ValueError(f"knn_samples is {knn_samples} but knn takes the {NEIGHBOUR}th neighbour; keep more")
        self._given = training
        self._knn_samples, self._seed = knn_samples, seed
        self._sirc: dict[str, tuple[float, float]] = {}
        self._detector = cache(lambda name: fit_detector(name, self.training, knn_samples, seed))

    @property
    def training(self) -> Training:
        """Training data; a ValueError if there are none."""
        if self._given is None:
            raise ValueError("it needs training features, and there are none")
        return self._given

    def undefined(self, names: Sequence[str]) -> dict[str, str]:
        """Fit the scores; return those that cannot be computed, each with the reason."""
        width = 1 if self._given is None else self._given.features.shape[1]
        problems: dict[str, str] = {}
        for name in names:
            try:
                self.scores([name], np.zeros((0, 1)), np.zeros((0, width)))
            except ValueError as problem:
                problems[name] = str(problem)
        return problems

    def about(self) -> dict[str, Any]:
        """Number of training samples and the search method of ``knn``, for a report."""
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
        """Compute scores.

        Args:
            names: names of feature scores.
            logits: (n, C).
            features: (n, D), as wide as the training features.

        Returns:
            Score name -> (n,) float64.

        Raises:
            ValueError: an unknown name, training data that a score needs and that are not there or too few, or test
                features of another width.
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
            """Score of the features alone, kept: several scores share it, and the neighbours can take minutes."""
            if name not in parts and name == "knn":
                parts[name] = self._neighbours.scores(features)
            elif name not in parts:
                parts[name] = by_blocks(_l1_norm if name == "feature_norm" else self._residual, features)
            return parts[name]

        return {name: self._score(name, logits, part, features) for name in names}

    def _score(self, name: str, logits: NDArray[Any], part: Callable[[str], Floats], features: NDArray[Any]) -> Floats:
        if name in ("feature_norm", "residual", "knn"):
            return part(name)
        if name.startswith("ood:"):
            return self._detector(name)(logits, features)
        if name == "gradnorm":
            return distance_to_uniform(logits) * part("feature_norm")
        if name == "mahalanobis":
            return self._mahalanobis(features)
        if name == "ctm":
            directions = self._class_directions
            return by_blocks(lambda f: (normalised(f) @ directions.T).max(1), features)
        if name == "vim":
            return energy(logits) + self._vim_scale * part("residual")
        if name in SIRC_SCORES:
            first, second = SIRC_SCORES[name]
            a, b = self._sirc_parameters(second)
            return -LOG_GAPS[first](logits) - np.logaddexp(0, -b * (part(second) - a))
        raise ValueError(f"unknown feature score {name!r}; choose from {', '.join((*FEATURE_SCORES, *SIRC_SCORES))}")

    @cached_property
    def _residual(self) -> Callable[[Floats], Floats]:
        origin, directions = self._null_space
        return lambda features: -np.linalg.norm((features - origin) @ directions, axis=1)

    @cached_property
    def _first_pass(self) -> tuple[ClassScatter, Moments]:
        """Scatter of the features (as one class where there are no labels) and the moments of ‖f‖₁."""
        training = self.training
        scatter, norms = ClassScatter(training.features.shape[1]), Moments()
        for indices, block in training.blocks():
            labels = np.zeros(len(indices), np.int64) if training.labels is None else training.labels[indices]
            scatter.update(block, labels)
            norms.update(_l1_norm(block))
        return scatter, norms

    @cached_property
    def _null_space(self) -> tuple[Floats, Floats]:
        """Origin u (D,), and the directions R (D, D − dim) of least variance about it."""
        weight, bias = self.training.weight, self.training.bias
        if weight is None:
            raise ValueError("residual and vim need the weight (C, D) of the last Linear layer, and its bias")
        width = weight.shape[1]
        origin = np.zeros(width)
        if bias is not None:
            # As torch.linalg.pinv of float32: rows that sum to 0 but for rounding would give an origin 1e6 away.
            cutoff = max(weight.shape) * np.finfo(np.float32).eps
            origin = -np.linalg.pinv(weight.astype(np.float64), cutoff) @ bias.astype(np.float64)
        scatter, _ = self._first_pass
        # eigh sorts eigenvalues ascending: the first columns are the directions of least variance.
        _, vectors = np.linalg.eigh(scatter.about(origin) / scatter.counts.sum())
        return origin, vectors[:, : width - principal_dimensions(width)]

    @cached_property
    def _second_pass(self) -> tuple[Moments, float]:
        """Moments of ``residual`` over the training features, and the sum of their largest logits."""
        training = self.training
        weight, logits = training.weight, training.logits
        _ = self._null_space
        assert weight is not None  # checked by _null_space
        weight = weight.astype(np.float64)
        bias = 0.0 if training.bias is None else training.bias.astype(np.float64)
        residuals, largest = Moments(), 0.0
        for indices, block in training.blocks():
            residuals.update(self._residual(block))
            block_logits = block @ weight.T + bias if logits is None else logits[indices].astype(np.float64)
            largest += float(block_logits.max(axis=1).sum())
        return residuals, largest

    @cached_property
    def _vim_scale(self) -> float:
        """Factor α, which scales the residual norm to the size of the largest logit in training."""
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
        # Pseudo-inverse: directions without variance beyond rounding (dead units) are left out.
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
    def _class_directions(self) -> Floats:
        """L2-normalised class means (classes, D)."""
        if self.training.labels is None:
            raise ValueError("ctm needs training labels (n,)")
        return normalised(self._first_pass[0].means)

    @cached_property
    def _neighbours(self) -> Neighbours:
        return Neighbours(self.training, self._knn_samples, self._seed)

    def _sirc_parameters(self, second: str) -> tuple[float, float]:
        """Parameters (a, b) of SIRC for a second score."""
        if second not in self._sirc:
            if second == "knn":
                moments = Moments()
                moments.update(self._neighbours.scores(self.training.choose(SIRC_KNN_SAMPLES, self._seed)))
            else:
                moments = self._first_pass[1] if second == "feature_norm" else self._second_pass[0]
            # Rounding can give equal numbers a small deviation.
            if moments.std <= 1e-14 * abs(moments.mean):
                raise ValueError(f"sirc with {second} is undefined here: it is the same for all training features")
            self._sirc[second] = moments.mean - 3 * moments.std, 1 / moments.std
        return self._sirc[second]


def _l1_norm(features: Floats) -> Floats:
    return np.abs(features).sum(axis=1)
