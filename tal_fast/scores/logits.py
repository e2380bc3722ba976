"""Confidence scores of logits; higher means more confident.

``SCORES`` lists them by name. Each takes (n, C) logits of any real type and gives (n,) float64: an array, computed in
blocks of rows, for an array or a list; a tensor on the same device for a tensor. ``LOG_GAPS`` has the logarithm of what
is missing to a perfect score, for SIRC (``tal_fast.scores.features``).

Training, evaluation, calibration and the exported ``SelectiveClassifier`` all call these functions. On a CPU a row's
score has the same bits whatever the other rows of the call, so that a threshold chosen in one batch accepts the same
rows in every other, ties included; sums therefore go through ``_row_sum``, and softmax and log-softmax treat each row
by itself. Float64 because rounding to bfloat16 alone ties thousands of samples of a confident model and moves its AURC.

Tensor methods serve for all of it, so that importing the names does not import PyTorch.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tal_fast.utils.arrays import Floats, as_matrix, by_blocks, check_dense, check_matrix_shape

if TYPE_CHECKING:
    from torch import Tensor

# Added to ‖z‖ in the cosine, as in the loss.
NORM_EPS = 1e-7
# PyTorch divides the sum of 32,768 numbers or more among threads if it is the only one of its call, that is, for a
# batch of one row.
_SUM_COLUMNS = 1 << 14


def logit_score(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """Decorator: let a function of (n, C) float64 tensors take arrays, lists and tensors of any real type.

    Args:
        function: (n, C) contiguous float64 -> (n,) float64, each row by itself, in operations that ``torch.export``
            takes.
    """

    @functools.wraps(function)
    def score(logits: Any) -> Any:
        if hasattr(logits, "detach"):
            check_dense(logits, "logits")
            check_matrix_shape(logits.shape, "logits")
            return function(logits.double().contiguous())
        import torch

        def block_scores(block: Floats) -> Floats:
            return function(torch.from_numpy(block)).numpy()

        return by_blocks(block_scores, as_matrix(logits, "logits"))

    return score


def _row_sum(values: Tensor) -> Tensor:
    """Sum of each row of (n, C), with the same bits for any number of rows."""
    return functools.reduce(operator.add, [part.sum(1) for part in values.split(_SUM_COLUMNS, 1)])


def _squarable(z: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, C), rows whose squares would overflow scaled by a power of two, and ``NORM_EPS`` scaled so (n,).

    Rows with an infinite logit, whose direction is undefined, become NaN.
    """
    largest = z.abs().amax(1)
    scale = largest.new_ones(largest.shape).masked_fill(largest > 2.0**500, 2.0**-600)
    scale = scale.masked_fill(largest == math.inf, math.nan)
    return z * scale[:, None], scale * NORM_EPS


@logit_score
def cosine(z: Tensor) -> Tensor:
    """TAL's confidence, max z / (‖z‖₂ + 1e-7): the cosine between the logits and the predicted class's axis."""
    z, eps = _squarable(z)
    return z.amax(1) / (_row_sum(z * z).sqrt() + eps)


@logit_score
def msp(z: Tensor) -> Tensor:
    """Maximum softmax probability (Hendrycks and Gimpel, 2017)."""
    return z.softmax(1).amax(1)


@logit_score
def max_logit(z: Tensor) -> Tensor:
    """Maximum logit (Hendrycks et al., 2022)."""
    return z.amax(1)


@logit_score
def energy(z: Tensor) -> Tensor:
    """Negative free energy at temperature 1, log Σ exp z (Liu et al., 2020)."""
    # max z − log p of the predicted class: the bits of logsumexp may depend on the batch.
    return z.amax(1) - z.log_softmax(1).amax(1)


@logit_score
def neg_entropy(z: Tensor) -> Tensor:
    """Negative entropy of the softmax, Σ p log p, in nats."""
    p = z.softmax(1)
    return _row_sum((p * z.log_softmax(1)).where(p > 0, p))


@logit_score
def doctor(z: Tensor) -> Tensor:
    """Collision probability of the softmax, Σ p² (DOCTOR; Granese et al., 2021)."""
    return _row_sum(z.softmax(1).square())


SCORES: dict[str, Callable[[Any], Any]] = {
    function.__name__: function for function in (cosine, msp, max_logit, energy, neg_entropy, doctor)
}


@logit_score
def distance_to_uniform(z: Tensor) -> Tensor:
    """L1 distance between the softmax and the uniform distribution, ‖p − 1/C‖₁: the first factor of GradNorm."""
    return _row_sum((z.softmax(1) - 1 / z.shape[1]).abs())


def _log_probabilities(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logarithms of the softmax that do not saturate: 1 − p is summed over the other classes, in logarithms.

    Returns:
        (n, 1) predicted class; (n, 1) its log p; (n, 1) its log(1 − p); (n, C) log p of the other classes, −inf at the
        predicted one.
    """
    predicted = z.argmax(1, keepdim=True)
    others = (z - z.gather(1, predicted)).scatter(1, predicted, -math.inf)
    odds = others.logsumexp(1, keepdim=True)  # log((1 − p) / p)
    log_p = -odds.logaddexp(odds.new_zeros(()))
    return predicted, log_p, odds + log_p, others + log_p


@logit_score
def log_gap_msp(z: Tensor) -> Tensor:
    """log(1 − max p)."""
    return _log_probabilities(z)[2].squeeze(1)


@logit_score
def log_gap_doctor(z: Tensor) -> Tensor:
    """log(1 − Σ p²) = log Σ p (1 − p)."""
    predicted, log_p, log_rest, others = _log_probabilities(z)
    terms = others + (-others.exp()).log1p()
    return terms.scatter(1, predicted, log_p + log_rest).logsumexp(1)


@logit_score
def log_gap_cosine(z: Tensor) -> Tensor:
    """log(1 − max z / (‖z‖ + ε)), with ‖z‖ − max z = Σ z² over the other classes / (‖z‖ + max z)."""
    z, eps = _squarable(z)
    squares, top = z * z, z.amax(1)
    norm = _row_sum(squares).sqrt()
    others = _row_sum(squares.scatter(1, z.argmax(1, keepdim=True), 0.0))
    gap = (others / (norm + top)).where(top > 0, norm - top)
    return ((gap + eps) / (norm + eps)).log()


@logit_score
def log_gap_neg_entropy(z: Tensor) -> Tensor:
    """log(−Σ p log p)."""
    predicted, log_p, log_rest, others = _log_probabilities(z)
    # −log p = (1 − p)(1 + (1 − p)/2 + ...): for small 1 − p its logarithm is that of 1 − p.
    log_surprise = (-log_p).clamp(min=np.finfo(np.float64).tiny).log().where(log_rest >= -20, log_rest)
    return (others + (-others).log()).scatter(1, predicted, log_p + log_surprise).logsumexp(1)


LOG_GAPS: dict[str, Callable[[Any], Any]] = {
    "msp": log_gap_msp,
    "doctor": log_gap_doctor,
    "cosine": log_gap_cosine,
    "neg_entropy": log_gap_neg_entropy,
}
