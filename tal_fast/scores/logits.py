"""Confidence scores of a classifier's outputs; higher = surer, always.

Scores over logits need nothing else: each is a function (n, C) logits -> (n,) float64, listed in ``SCORES``. Those over
features are fitted on training data: see ``tal_fast.scores.features``.
Everything is computed in float64 whatever the logits' type: in bfloat16, rounding alone ties thousands of samples of a
confident model and moves its AURC.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Added to ‖z‖ in the cosine, as in the loss.
NORM_EPS = 1e-7
# Rows are scored in blocks of about this many numbers, so that float64 copies of large outputs never exist at once.
_BLOCK = 1 << 22


def as_matrix(values: Any, name: str) -> NDArray[Any]:
    """(n, columns) as an array, not copied when it is one; a float64 one for tensors of any floating type.

    Raises:
        ValueError: not two-dimensional, no columns, or not numbers.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values if str(values.dtype) == "torch.float32" else values.double()).numpy()
    matrix = np.asarray(values)
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ValueError(f"{name} must be (n, C) with C >= 1, not of shape {matrix.shape}")
    if matrix.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be real numbers, not {matrix.dtype}")
    return matrix


def by_blocks(function: Callable[[Floats], Floats], matrix: NDArray[Any], columns: int = 0) -> Floats:
    """``function`` of the rows, a block of them in float64 at a time.

    Args:
        function: (rows, columns of the matrix) -> (rows,).
        matrix: (n, columns).
        columns: of what the function makes on the way, where that is wider than the matrix.
    """
    rows = max(1, _BLOCK // max(matrix.shape[1], columns))
    parts = [function(matrix[i : i + rows].astype(np.float64)) for i in range(0, len(matrix), rows)]
    return np.concatenate(parts) if parts else np.zeros(0)


def _logit_score(function: Callable[[Floats], Floats]) -> Callable[[Any], Floats]:
    def score(logits: Any) -> Floats:
        # Logits that are not finite give NaN, which the metrics refuse; no need to warn as well.
        with np.errstate(invalid="ignore", over="ignore"):
            return by_blocks(function, as_matrix(logits, "logits"))

    score.__name__ = score.__qualname__ = function.__name__.lstrip("_")
    score.__doc__ = f"{function.__doc__}\n\n    (n, C) logits of any floating type -> (n,) float64.\n    "
    return score


def log_softmax(z: Floats) -> Floats:
    """(n, C) -> (n, C), row by row."""
    shifted = z - z.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@_logit_score
def cosine(z: Floats) -> Floats:
    """max z / (‖z‖₂ + 1e-7): TAL's confidence, the cosine between the logits and the predicted class's axis."""
    return z.max(axis=1) / (np.sqrt(np.sum(z * z, axis=1)) + NORM_EPS)


@_logit_score
def msp(z: Floats) -> Floats:
    """Maximum softmax probability (Hendrycks and Gimpel, 2017)."""
    return 1 / np.exp(z - z.max(axis=1, keepdims=True)).sum(axis=1)


@_logit_score
def max_logit(z: Floats) -> Floats:
    """max z (Hendrycks et al., 2022)."""
    return z.max(axis=1)


@_logit_score
def energy(z: Floats) -> Floats:
    """log Σ exp z, the negative free energy at temperature 1 (Liu et al., 2020)."""
    top = z.max(axis=1)
    return top + np.log(np.exp(z - top[:, None]).sum(axis=1))


@_logit_score
def neg_entropy(z: Floats) -> Floats:
    """Σ p log p: minus the entropy of the softmax, in nats."""
    log_p = log_softmax(z)
    p = np.exp(log_p)
    return np.sum(np.where(p > 0, p * log_p, np.where(np.isnan(p), p, 0.0)), axis=1)


@_logit_score
def doctor(z: Floats) -> Floats:
    """Σ p², the collision probability of the softmax (Granese et al., 2021)."""
    return np.exp(2 * log_softmax(z)).sum(axis=1)


SCORES: dict[str, Callable[[Any], Floats]] = {
    "cosine": cosine,
    "msp": msp,
    "max_logit": max_logit,
    "energy": energy,
    "neg_entropy": neg_entropy,
    "doctor": doctor,
}
