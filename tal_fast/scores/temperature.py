"""Temperature scaling (Guo et al., 2017): one number that logits are divided by, fitted on held-out samples."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import brentq

from tal_fast.metrics.failure import Ints
from tal_fast.scores.logits import Floats, as_matrix, by_blocks, log_softmax

HELD_OUT = 0.2
"""Share of the validation samples that a temperature is fitted on, unless told otherwise."""
# Beyond these the softmax is one-hot or uniform to float64.
LOWEST, HIGHEST = 1e-4, 1e4


def held_out(samples: int, share: float = HELD_OUT, seed: int = 0) -> tuple[Ints, Ints]:
    """Indices of the samples to fit on, a random share, and of the rest; both rising.

    Raises:
        ValueError: the share leaves nothing on one side.
    """
    take = round(samples * share)
    if not 0 < take < samples:
        raise ValueError(
            f"a share of {share:g} of {samples} samples leaves {take} to fit a temperature on and {samples - take} to "
            f"evaluate; give a share with some of each"
        )
    order = np.random.default_rng([seed, samples]).permutation(samples)
    return np.sort(order[:take]), np.sort(order[take:])


def fit_temperature(logits: Any, labels: Any) -> float:
    """The temperature T > 0 that minimises the mean cross-entropy of softmax(z / T), in float64.

    Cross-entropy is convex in 1/T, so its derivative there, mean(Σ p z − z_label), has one root; it is bracketed and
    found by Brent's method to a relative 1e-10.

    Args:
        logits: (n, C).
        labels: (n,) integers in [0, C).

    Raises:
        ValueError: no samples, or no minimum at a finite T > 0: with every label the largest logit it is T = 0, with
            logits that say no more than chance about the labels it is infinite.
    """
    matrix, classes = as_matrix(logits, "logits"), np.asarray(labels)
    if not len(matrix) or classes.shape != (len(matrix),):
        raise ValueError(f"a temperature needs samples: logits are {matrix.shape}, labels {classes.shape}")
    of_label = matrix[np.arange(len(matrix)), classes].astype(np.float64)
    scale = float(np.abs(matrix).max()) or 1.0

    def slope(log_temperature: float) -> float:
        """Of the cross-entropy over 1/T."""
        inverse = np.exp(-log_temperature)

        def expected(z: Floats) -> Floats:
            return (np.exp(log_softmax(z * inverse)) * z).sum(axis=1)

        return float(np.mean(by_blocks(expected, matrix) - of_label)) / scale

    low, high = np.log(LOWEST * scale), np.log(HIGHEST * scale)
    if slope(high) >= 0:
        raise ValueError(
            f"no temperature fits: on the {len(matrix)} held-out samples the logits say no more than chance about the "
            f"labels, and cross-entropy falls up to T = infinity"
        )
    if (matrix.argmax(axis=1) == classes).all() or slope(low) <= 0:
        raise ValueError(
            f"no temperature fits: all {len(matrix)} held-out samples are classified right, and cross-entropy falls "
            f"down to T = 0; hold out more samples"
        )
    return float(np.exp(brentq(slope, low, high, xtol=1e-12, rtol=1e-10)))
