"""Confidence scores of logits; higher means more confident.

``SCORES`` lists them by name. Each takes (n, C) logits of any real type and gives (n,) float64: an array for an array
or a list; a tensor on the same device for a tensor. ``logit_scores`` computes several in one pass over the logits.
``LOG_GAPS`` has the logarithm of what is missing to a perfect score, for SIRC (``tal_fast.scores.features``).

Training, evaluation, calibration and the exported ``SelectiveClassifier`` all call these functions. On a CPU a row's
score has the same bits whatever the other rows of the call and whichever scores are computed with it, so that a
threshold chosen in one batch accepts the same rows in every other, ties included; sums therefore go through
``_row_sum``. Float64 because rounding to bfloat16 alone ties thousands of samples of a confident model and moves its
AURC.

Tensor methods serve for all of it, so that importing the names does not import PyTorch.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from tal_fast.utils.arrays import as_matrix, check_dense, check_matrix_shape

if TYPE_CHECKING:
    from torch import Tensor

# Added to ‖z‖ in the cosine, as in the loss.
NORM_EPS = 1e-7
# Above it squares may overflow.
_SQUARABLE = 2.0**500
# PyTorch divides the sum of 32,768 numbers or more among threads if it is the only one of its call, that is, for a
# batch of one row.
_SUM_COLUMNS = 1 << 14
# Numbers in a block of rows, 1 MB, which stays in the cache between operations. Six scores of 50,000 x 1,000 take 0.51
# s on one busy core so, 0.67 s in blocks of 32 MB, and 0.56 s (with two threads 1.6 times as long) in blocks of 256 KB.
_BLOCK = 1 << 17


class Rows:
    """Rows of logits and what several scores need of them, each computed once.

    Attributes:
        z: (n, C) contiguous float64 logits.
        branch: whether Python may look at values: not on a GPU, nor in a graph of ``torch.export``.
        top: (n,) largest logit.
        below: (n, C) logits minus the largest; at least -800, whose exponential is 0, so that 0 · -inf is 0.
        exps, total: (n, C) exponentials of ``below``, and (n,) their sum, at least 1: their ratio is the softmax.
        log_odds: see ``_log_odds``.
    """

    def __init__(self, z: Tensor, branch: bool) -> None:
        self.z, self.branch = z, branch

    top = functools.cached_property(lambda self: self.z.amax(1))
    below = functools.cached_property(lambda self: (self.z - self.top[:, None]).clamp_(min=-800))
    exps = functools.cached_property(lambda self: self.below.exp())
    total = functools.cached_property(lambda self: _row_sum(self.exps))
    log_odds = functools.cached_property(lambda self: _log_odds(self.z))


def logit_score(function: Callable[[Rows], Tensor]) -> Callable[[Any], Any]:
    """Decorator: let a function of ``Rows`` take (n, C) arrays, lists and tensors of any real type.

    Args:
        function: ``Rows`` -> (n,) float64, each row by itself, in operations that ``torch.export`` takes.
    """

    @functools.wraps(function)
    def score(logits: Any) -> Any:
        return _by_rows(logits, {"": function})[""]

    score.of_rows = function  # type: ignore[attr-defined]
    return score


def logit_scores(logits: Any, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Confidence scores of logits, in one pass over them.

    Args:
        logits: (n, C) array, list or tensor of any real type.
        names: keys of ``SCORES``; all unless given.

    Returns:
        Name -> (n,) float64, the same bits as ``SCORES[name](logits)``.
    """
    names = tuple(SCORES if names is None else names)
    return _by_rows(logits, {name: SCORES[name].of_rows for name in names})  # type: ignore[attr-defined]


def _by_rows(logits: Any, functions: dict[str, Callable[[Rows], Tensor]]) -> dict[str, Any]:
    """Apply functions of ``Rows`` to the logits, a block of rows at a time on a CPU."""
    tensor = hasattr(logits, "detach")
    if tensor:
        check_dense(logits, "logits")
        check_matrix_shape(logits.shape, "logits")
    else:
        logits = as_matrix(logits, "logits")
    if not functions:
        return {}
    import torch

    whole = tensor and (logits.device.type != "cpu" or torch.compiler.is_compiling())
    step = max(1, _BLOCK // logits.shape[1])
    parts = []
    for block in [logits] if whole else (logits[i : i + step] for i in range(0, max(len(logits), 1), step)):
        z = block.double().contiguous() if tensor else torch.from_numpy(block.astype(np.float64, order="C"))
        rows = Rows(z, not whole)
        parts.append([function(rows) for function in functions.values()])
    columns = (part[0] if len(part) == 1 else torch.cat(part) for part in zip(*parts, strict=True))
    return {name: column if tensor else column.numpy() for name, column in zip(functions, columns, strict=True)}


def _row_sum(values: Tensor) -> Tensor:
    """Sum of each row of (n, C), with the same bits for any number of rows."""
    return functools.reduce(operator.add, [part.sum(1) for part in values.split(_SUM_COLUMNS, 1)])


def _squarable(z: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, C), rows whose squares would overflow scaled by a power of two, and ``NORM_EPS`` scaled so (n,).

    Rows with an infinite logit, whose direction is undefined, become NaN.
    """
    largest = z.abs().amax(1)
    scale = largest.new_ones(largest.shape).masked_fill(largest > _SQUARABLE, 2.0**-600)
    scale = scale.masked_fill(largest == math.inf, math.nan)
    return z * scale[:, None], scale * NORM_EPS


@logit_score
def cosine(rows: Rows) -> Tensor:
    """TAL's confidence, max z / (‖z‖₂ + 1e-7): the cosine between the logits and the predicted class's axis."""
    norm = _row_sum(rows.z.square()).sqrt()
    # One look at the block saves two passes: rows below the limit are the same bits scaled by 1.
    if rows.branch and bool((norm < _SQUARABLE).all()):
        return rows.top / (norm + NORM_EPS)
    z, eps = _squarable(rows.z)
    return z.amax(1) / (_row_sum(z.square()).sqrt() + eps)


@logit_score
def msp(rows: Rows) -> Tensor:
    """Maximum softmax probability (Hendrycks and Gimpel, 2017)."""
    return 1 / rows.total


@logit_score
def max_logit(rows: Rows) -> Tensor:
    """Maximum logit (Hendrycks et al., 2022)."""
    return rows.top


@logit_score
def energy(rows: Rows) -> Tensor:
    """Negative free energy at temperature 1, log Σ exp z (Liu et al., 2020)."""
    return rows.top + rows.total.log()


@logit_score
def neg_entropy(rows: Rows) -> Tensor:
    """Negative entropy of the softmax, Σ p log p, in nats."""
    return _row_sum(rows.exps * rows.below) / rows.total - rows.total.log()


@logit_score
def doctor(rows: Rows) -> Tensor:
    """Collision probability of the softmax, Σ p² (DOCTOR; Granese et al., 2021)."""
    return _row_sum(rows.exps.square()) / rows.total.square()


def _log_odds(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-odds of the predicted class without saturation: 1 − p is summed over the other classes.

    Returns:
        (n, 1) predicted class; (n, 1) log(p / (1 − p)); (n, C) z − max z of the other classes, −inf at its own.
    """
    predicted = z.argmax(1, keepdim=True)
    others = (z - z.gather(1, predicted)).scatter(1, predicted, -math.inf)
    top = others.amax(1, keepdim=True).clamp(min=-1e300)  # finite for a single class
    return predicted, -(_row_sum((others - top).exp()).log()[:, None] + top), others


def _log_probabilities(rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(n, 1) predicted class; (n, 1) its log p and log(1 − p); (n, C) log p of the other classes, −inf at its own."""
    predicted, odds, others = rows.log_odds
    log_p = -(-odds).exp().log1p()
    return predicted, log_p, log_p - odds, others + log_p


@logit_score
def margin(rows: Rows) -> Tensor:
    """Largest logit minus the second largest; +inf for a single class."""
    return rows.top - rows.z.scatter(1, rows.z.argmax(1, keepdim=True), -math.inf).amax(1)


@logit_score
def log_gap(rows: Rows) -> Tensor:
    """Log-odds of the predicted class, log(p / (1 − p)): MSP's order without its ties at 1; +inf for a single class."""
    return rows.log_odds[1].squeeze(1)


@logit_score
def gen(rows: Rows) -> Tensor:
    """GEN, −Σ p^γ (1 − p)^γ over the 100 largest probabilities, γ = 0.1 (Liu et al., CVPR 2023)."""
    _, log_p, log_rest, others = _log_probabilities(rows)
    rest = others.topk(min(99, others.shape[1]), 1).values
    # Tenth roots: ONNX would round 0.1 to float32.
    return -_row_sum(((rest + (-rest.exp()).log1p()) / 10).exp()) - ((log_p + log_rest) / 10).exp().squeeze(1)


SCORES: dict[str, Callable[[Any], Any]] = {
    function.__name__: function
    for function in (cosine, msp, max_logit, energy, neg_entropy, doctor, margin, log_gap, gen)
}


def max_logit_pnorm(p: int) -> Callable[[Any], Any]:
    """Centred MaxLogit-pNorm, max x / max(‖x‖_p, 1e-12), x = z − mean z, ‖x‖₀ = nonzeros (Cattelan and Silva, 2024)."""

    @logit_score
    def score(rows: Rows) -> Tensor:
        x = rows.z - _row_sum(rows.z)[:, None] / rows.z.shape[1]
        size = x.abs().amax(1).clamp(min=1e-300)  # powers of x / size do not overflow
        norm = size * _row_sum((x.abs() / size[:, None]) ** p) ** (1 / p) if p else (x != 0).sum(1)
        return x.amax(1) / norm.clamp(min=1e-12)

    return score


@logit_score
def distance_to_uniform(rows: Rows) -> Tensor:
    """L1 distance between the softmax and the uniform distribution, ‖p − 1/C‖₁: the first factor of GradNorm."""
    return _row_sum((rows.exps / rows.total[:, None] - 1 / rows.z.shape[1]).abs())


@logit_score
def log_gap_msp(rows: Rows) -> Tensor:
    """log(1 − max p)."""
    return _log_probabilities(rows)[2].squeeze(1)


@logit_score
def log_gap_doctor(rows: Rows) -> Tensor:
    """log(1 − Σ p²) = log Σ p (1 − p)."""
    predicted, log_p, log_rest, others = _log_probabilities(rows)
    terms = others + (-others.exp()).log1p()
    return terms.scatter(1, predicted, log_p + log_rest).logsumexp(1)


@logit_score
def log_gap_cosine(rows: Rows) -> Tensor:
    """log(1 − max z / (‖z‖ + ε)), with ‖z‖ − max z = Σ z² over the other classes / (‖z‖ + max z)."""
    z, eps = _squarable(rows.z)
    squares, top = z * z, z.amax(1)
    norm = _row_sum(squares).sqrt()
    others = _row_sum(squares.scatter(1, z.argmax(1, keepdim=True), 0.0))
    gap = (others / (norm + top)).where(top > 0, norm - top)
    return ((gap + eps) / (norm + eps)).log()


@logit_score
def log_gap_neg_entropy(rows: Rows) -> Tensor:
    """log(−Σ p log p)."""
    predicted, log_p, log_rest, others = _log_probabilities(rows)
    # −log p = (1 − p)(1 + (1 − p)/2 + ...): for small 1 − p its logarithm is that of 1 − p.
    log_surprise = (-log_p).clamp(min=np.finfo(np.float64).tiny).log().where(log_rest >= -20, log_rest)
    return (others + (-others).log()).scatter(1, predicted, log_p + log_surprise).logsumexp(1)


LOG_GAPS: dict[str, Callable[[Any], Any]] = {
    "msp": log_gap_msp,
    "doctor": log_gap_doctor,
    "cosine": log_gap_cosine,
    "neg_entropy": log_gap_neg_entropy,
}
