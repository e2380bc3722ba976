"""Confidence scores of logits that are fitted on held-out validation samples.

``pnorm`` is the centred MaxLogit-pNorm with the p of 0..9 that has the least AURC, or MSP where none beats it;
``cosine_log_gap`` the sum of cosine and log-gap, each less its mean and over its standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tal_fast.metrics.failure import failure_metrics
from tal_fast.metrics.settings import new_fd, old_fd
from tal_fast.runs.prediction_store import Outputs
from tal_fast.scores import cosine, log_gap, max_logit_pnorm, msp


def fit_score(
    name: str, held_out: Outputs, choose_by: str, outliers: Any = None, seed: int = 0
) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    """Fit a score; returns it, a function of (n, C) logits, and the report's entry.

    Args:
        choose_by: setting whose AURC p is chosen by, ``old-fd`` or ``new-fd``.
        outliers: (m, C) logits of OOD samples for ``new-fd``; default the held-out logits with each class's shuffled
            among the samples, by ``seed``.
    """
    z = held_out.logits
    if name == "cosine_log_gap":
        parts = [(score, score(z)) for score in (cosine, log_gap)]
        if not all(np.isfinite(values).all() and np.ptp(values) > 0 for _, values in parts):
            raise ValueError("cosine or log-gap is infinite or the same for all held-out samples")
        moments = {"mean_std": [(float(values.mean()), float(values.std())) for _, values in parts]}
        return lambda x: sum((s(x) - v.mean()) / v.std() for s, v in parts), moments
    outliers = np.random.default_rng(seed).permuted(z, axis=0) if outliers is None else outliers
    right = held_out.correct
    setting = old_fd(right) if choose_by == "old-fd" else new_fd(right, len(outliers), seed=seed)
    choices = {"msp": msp, **{f"p = {p}": max_logit_pnorm(p) for p in range(10)}}
    confidences = {choice: setting.confidence(score(z), score(outliers)) for choice, score in choices.items()}
    aurc = {choice: failure_metrics(values, setting.success)["aurc"] for choice, values in confidences.items()}
    chosen = min(aurc, key=lambda choice: aurc[choice])  # the first of equal ones, so MSP before any p
    return choices[chosen], {"chosen": chosen, "aurc": aurc}
