"""Calibration metrics of the softmax on in-distribution samples: ECE, NLL, Brier score."""

from __future__ import annotations

from typing import Any

import numpy as np

from tal_fast.metrics.ranking import as_correct
from tal_fast.scores.logits import logit_scores
from tal_fast.utils.arrays import as_classes, as_matrix, to_numpy

CALIBRATION = ("ece", "nll", "brier")
BINS = 15
"""Default number of bins of ECE and of reliability diagrams."""


def expected_calibration_error(confidence: Any, correct: Any, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al., 2017).

    Σ over bins of (samples in the bin / n) · |accuracy − mean confidence| in the bin; NaN for no samples.

    Args:
        confidence: (n,) probabilities of the predicted class.
        correct: (n,) 0/1 or bool.
        bins: number of bins of equal width over [0, 1], closed on the right; 0 is in the first.
    """
    p, outcomes = to_numpy(confidence).astype(np.float64), as_correct(correct)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    if p.shape != outcomes.shape:
        raise ValueError(f"confidence is of shape {p.shape} but correct of {outcomes.shape}; they must match")
    outside = np.flatnonzero(~((p >= 0) & (p <= 1)))
    if outside.size:
        raise ValueError(f"confidence must be a probability in [0, 1], not {p[outside[0]]} (index {outside[0]})")
    if p.size == 0:
        return float("nan")
    inner_edges = np.linspace(0, 1, bins + 1)[1:-1]
    # |Σ correct − Σ p| of a bin, over n, is its share of the samples times the gap of its means.
    gap = np.bincount(np.digitize(p, inner_edges, right=True), weights=outcomes - p, minlength=bins)
    return float(np.abs(gap).sum() / p.size)


def calibration_metrics(logits: Any, labels: Any, bins: int = BINS) -> dict[str, float]:
    """Compute ECE, NLL and Brier score of the softmax.

    Args:
        logits: (n, C) of any real type; computed in float64.
        labels: (n,) integers in [0, C).
        bins: number of bins of ECE.

    Returns:
        ``ece``: ``expected_calibration_error`` of the largest probability. ``nll``: mean −log p of the label, in nats.
        ``brier``: mean over samples of Σ_c (p_c − [c is the label])², in [0, 2]. NaN for no samples.
    """
    matrix = as_matrix(logits, "logits")
    classes = as_classes(labels, matrix.shape[1])
    if classes.shape != matrix.shape[:1]:
        raise ValueError(f"logits are of shape {matrix.shape} but labels of {classes.shape}; labels must be (n,)")
    if not classes.size:
        return dict.fromkeys(CALIBRATION, float("nan"))

    scores = logit_scores(matrix, ("energy", "doctor", "msp"))
    log_p = matrix[np.arange(len(classes)), classes].astype(np.float64) - scores["energy"]
    # Σ (p_c − e_c)² = Σ p² − 2 p_label + 1.
    brier = scores["doctor"] - 2 * np.exp(log_p) + 1
    correct = matrix.argmax(axis=1) == classes
    return {
        "ece": expected_calibration_error(scores["msp"], correct, bins),
        "nll": float(-log_p.mean()),
        "brier": float(np.maximum(brier, 0).mean()),
    }
