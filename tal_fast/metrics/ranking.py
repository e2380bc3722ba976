"""Samples ranked by confidence: checked inputs, ties, and the risk-coverage curve."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tal_fast.utils.arrays import Floats, Ints, to_numpy


def as_scores(confidence: Any, name: str = "confidence") -> Floats:
    """Confidence scores as (n,) float64; a ValueError unless they are numbers, without NaN. Infinity ranks."""
    raw = to_numpy(confidence)
    if raw.ndim != 1:
        raise ValueError(f"{name} must be a vector (n,), one score per sample, not of shape {raw.shape}")
    if raw.size and raw.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be real numbers, not {raw.dtype}")
    scores = raw.astype(np.float64)
    nan = np.flatnonzero(np.isnan(scores))
    if nan.size:
        raise ValueError(
            f"{name} has {nan.size} NaN of {scores.size} scores (the first at index {nan[0]}); NaN has no rank: "
            "leave these samples out or correct the score"
        )
    return scores


def as_correct(correct: Any, name: str = "correct") -> Ints:
    """Outcomes as (n,) int64; a ValueError for anything but 0, 1, False and True."""
    raw = to_numpy(correct)
    if raw.ndim != 1:
        raise ValueError(f"{name} must be a vector (n,), one outcome per sample, not of shape {raw.shape}")
    if raw.size and raw.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be booleans or 0 and 1, not {raw.dtype}")
    invalid = np.flatnonzero(~((raw == 0) | (raw == 1)))
    if invalid.size:
        raise ValueError(f"{name} must hold only 0 and 1, not {raw[invalid[0]]} (index {invalid[0]})")
    return raw.astype(np.int64)


class Ranking(NamedTuple):
    """Samples by falling confidence, and cumulative counts at the end of each group of tied scores."""

    scores: Floats  # (n,) falling
    correct: Ints  # (n,) in the same order
    end: Ints  # (groups,) number of samples down to the end of each group
    tp: Ints  # (groups,) successes among them
    fp: Ints  # (groups,) errors among them


def rank(confidence: Any, correct: Any, stable: bool = False) -> Ranking:
    """Rank samples by confidence (n,), higher = more confident; arguments and errors as for ``failure_metrics``.

    Tied samples stay in the input's order only if ``stable``, which makes the sort four to six times as slow.
    """
    scores, outcomes = as_scores(confidence), as_correct(correct)
    if scores.size != outcomes.size:
        raise ValueError(f"confidence has {scores.size} samples but correct has {outcomes.size}; they must match")
    order = np.argsort(-scores, kind="stable") if stable else np.argsort(scores)[::-1]
    scores, outcomes = scores[order], outcomes[order]
    # Compared, not subtracted: inf − inf is NaN.
    last = np.append(scores[1:] != scores[:-1], True) if scores.size else np.zeros(0, dtype=bool)
    end = np.flatnonzero(last) + 1
    tp = np.cumsum(outcomes)[last]
    return Ranking(scores, outcomes, end, tp, end - tp)


def expected_errors(ranking: Ranking) -> Floats:
    """(n,) errors among the i most confident samples, expected over all orders of tied scores.

    The first j of m tied samples with e errors hold j·e/m errors on average, so that the number is linear in between.
    """
    if ranking.end.size == ranking.scores.size:
        return ranking.fp.astype(np.float64)
    i = np.arange(1, ranking.scores.size + 1)
    return np.interp(i, np.append(0, ranking.end), np.append(0, ranking.fp))


class RiskCoverage(NamedTuple):
    """Risk-coverage curve; entry i − 1 is for keeping the i most confident samples. Its area is AURC."""

    coverage: Floats  # (n,) float64, i / n
    risk: Floats  # (n,) float64, errors among the i most confident / i, expected over all orders of tied scores
    threshold: Floats  # (n,) float64, the i-th largest score


def risk_coverage_curve(confidence: Any, correct: Any) -> RiskCoverage:
    """Error rate among the i most confident samples for i = 1..n, expected over all orders of tied scores.

    Its mean risk is the AURC of the convention ``tal_fast``. Empty arrays for no samples. Arguments and errors as for
    ``failure_metrics``.
    """
    ranking = rank(confidence, correct)
    i = np.arange(1, ranking.scores.size + 1)
    return RiskCoverage(i / max(i.size, 1), expected_errors(ranking) / i, ranking.scores)


def tied_share(confidence: Any) -> float:
    """Share of samples whose score equals another sample's; NaN for no samples.

    Where it is not small, the order of the input changes AURC in the conventions ``tal``, ``tal-test`` and
    ``torch-uncertainty``.
    """
    scores = as_scores(confidence)
    if scores.size == 0:
        return float("nan")
    _, counts = np.unique(scores, return_counts=True)
    return float(np.sum(counts[counts > 1]) / scores.size)
