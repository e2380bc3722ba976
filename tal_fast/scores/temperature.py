"""Temperature scaling of logits (Guo et al., 2017), fitted on held-out samples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from tal_fast.scores.logits import Rows, logit_score
from tal_fast.utils.arrays import Ints, as_classes, as_matrix

if TYPE_CHECKING:
    from torch import Tensor

HELD_OUT = 0.2
"""Default share of the validation samples that a temperature is fitted on."""
# Beyond these temperatures the softmax is one-hot or uniform in float64.
LOWEST, HIGHEST = 1e-4, 1e4


def held_out(samples: int, share: float = HELD_OUT, seed: int = 0) -> tuple[Ints, Ints]:
    """Split samples at random into a share to fit on and the rest: two ascending arrays of indices, none empty."""
    take = round(samples * share)
    if not 0 < take < samples:
        raise ValueError(
            f"a share of {share:g} of {samples} samples leaves {take} to fit a temperature on and {samples - take} to "
            f"evaluate; give a share with some of each"
        )
    order = np.random.default_rng([seed, samples]).permutation(samples)
    return np.sort(order[:take]), np.sort(order[take:])


def fit_temperature(logits: Any, labels: Any) -> float:
    """Find the temperature T > 0 that minimises the mean cross-entropy of softmax(z / T), in float64.

    Cross-entropy is convex in 1/T, so its derivative there, mean(Σ p z − z_label), has one root; it is bracketed and
    found by Brent's method to a relative 1e-10.

    Args:
        logits: (n, C).
        labels: (n,) integers in [0, C).

    Raises:
        ValueError: no samples, or no minimum at a finite T > 0: it is at T = 0 if all samples are classified
            correctly, at infinity if the logits carry no more than chance about the labels.
    """
    from scipy.optimize import brentq

    matrix = as_matrix(logits, "logits")
    classes = as_classes(labels, matrix.shape[1])
    if not len(matrix) or classes.shape != (len(matrix),):
        raise ValueError(f"a temperature needs samples: logits are {matrix.shape}, labels {classes.shape}")
    label_logits = matrix[np.arange(len(matrix)), classes].astype(np.float64)
    scale = float(np.abs(matrix).max()) or 1.0

    def slope(log_temperature: float) -> float:
        """Derivative of the cross-entropy with respect to 1/T, over the scale of the logits."""
        inverse = math.exp(-log_temperature)

        @logit_score
        def expected_logit(rows: Rows) -> Tensor:
            z = rows.z
            return ((z * inverse).softmax(1) * z).sum(1)

        return float(np.mean(expected_logit(matrix) - label_logits)) / scale

    low, high = math.log(LOWEST * scale), math.log(HIGHEST * scale)
    if slope(high) >= 0:
        raise ValueError(
            f"no temperature fits: on the {len(matrix)} held-out samples the logits say no more than chance about the "
            f"labels, and cross-entropy falls up to T = infinity"
        )
    if (matrix.argmax(axis=1) == classes).all() or slope(low) <= 0:
        raise ValueError(
            f"no temperature fits: all {len(matrix)} held-out samples are classified correctly, and cross-entropy "
            f"falls down to T = 0; hold out more samples"
        )
    return math.exp(brentq(slope, low, high, xtol=1e-12, rtol=1e-10))
