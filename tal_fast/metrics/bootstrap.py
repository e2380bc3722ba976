"""Bootstrap intervals of failure-detection metrics, and of paired differences between scores or runs.

A resample draws n of n samples with replacement, ID and OOD samples each among themselves (stratified), so that their
mix stays the same. All scores of a setting get the same resamples: the interval of a difference is that of the paired
differences. Intervals are percentile intervals (Efron and Tibshirani, 1993, chapter 13) over the test samples; they do
not cover the seed of training or of the mix.

Each score is sorted once. A resample is a count of each sample; in the order of a score, the cumulative sums of the
counts are the numbers of successes and errors accepted at each threshold, from which every metric follows. Copies of a
sample are tied, so the values are those of ``tal_fast.metrics.failure_metrics`` on the resampled arrays. The other
conventions depend on the order of the input or on which thresholds are left; that function computes them for one
resample at a time, which takes several times as long.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tal_fast.metrics.failure import METRICS, check_convention, failure_metrics
from tal_fast.metrics.ranking import as_correct, as_scores
from tal_fast.utils.arrays import Floats, Ints

Ints32 = NDArray[np.int32]

LEVEL = 0.95
"""Default level of the intervals."""
# Number of resamples drawn from one seed. Another number would give other resamples.
BLOCK = 64
# Number of counts in a batch of resamples. Temporaries stay below the 128 KiB from which the C library maps fresh,
# zeroed pages for each: on a Zen 4 at n = 10,000, one resample at a time takes 21 ns a count, four take 43, sixteen 70.
_BATCH = 15_000
# Maximum number of threads. NumPy releases the interpreter lock here, but more than a few threads bring no more.
_THREADS = 4


class Interval(NamedTuple):
    """Percentile interval."""

    low: float  # NaN if the metric is undefined in all resamples
    high: float
    undefined: float  # share of resamples in which the metric is undefined (no errors, for instance); they are left out


def interval(values: Any, level: float = LEVEL) -> Interval:
    """Central percentile interval of the values of the resamples, (resamples,); NaN = undefined."""
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval must lie in (0, 1), not {level}; 0.95 is usual")
    values = np.asarray(values, dtype=np.float64)
    defined = values[~np.isnan(values)]
    if not defined.size:
        return Interval(np.nan, np.nan, 1.0 if values.size else np.nan)
    low, high = np.quantile(defined, ((1 - level) / 2, (1 + level) / 2))
    return Interval(float(low), float(high), 1 - defined.size / values.size)


def bootstrap(
    scores: Mapping[str, Any],
    success: Any,
    n_ood: int = 0,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    stream: int = 0,
    convention: str = "tal_fast",
    progress: Any = None,
) -> dict[str, Floats]:
    """Compute every metric of every score on the same resamples.

    Args:
        scores: name -> (n,) confidences, higher = more confident.
        success: (n,) 0/1 or bool.
        n_ood: number of OOD samples, which are the last ones; they are resampled among themselves.
        resamples: number of resamples.
        seed: the same seed and sizes give the same resamples for any scores, machine and number of threads, so that
            values of several runs on the same samples are paired.
        stream: number of the OOD draws: they are independent for different numbers, while the ID draws are the same.
        convention: convention of the metrics.
        progress: called with the number of resamples just done for all scores, from several threads.

    Returns:
        Name -> (resamples, len(METRICS)) float64 in the order of ``METRICS``, NaN where undefined.
    """
    check_convention(convention)
    outcomes = as_correct(success, "success")
    vectors = {name: as_scores(values, f"the score {name}") for name, values in scores.items()}
    n = outcomes.size
    for name, values in vectors.items():
        if values.size != n:
            raise ValueError(f"the score {name} has {values.size} samples but success has {n}; they must match")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    if not 0 <= n_ood <= n:
        raise ValueError(f"n_ood must lie in 0..{n}, the number of samples, not {n_ood}")
    found = {name: np.full((resamples, len(METRICS)), np.nan) for name in vectors}
    if n == 0:
        return found
    ranked = {name: _Ranked(values, outcomes) for name, values in vectors.items()} if convention == "tal_fast" else {}

    rows = max(1, _BATCH // n)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def work(block: int) -> None:
        draws = _Draws(n - n_ood, n_ood, (seed, block), stream)
        end = min((block + 1) * BLOCK, resamples)
        for start in range(block * BLOCK, end, rows):
            stop = min(start + rows, end)
            counts = draws.counts(stop - start)
            for name, values in vectors.items():
                if ranked:
                    found[name][start:stop] = ranked[name].metrics(counts)
                    continue
                for i, row in enumerate(counts, start):
                    resampled = failure_metrics(np.repeat(values, row), np.repeat(outcomes, row), convention)
                    found[name][i] = [resampled[metric] for metric in METRICS]
            if progress is not None:
                progress(stop - start)

    with ThreadPoolExecutor(min(_THREADS, cores)) as pool:
        for _ in pool.map(work, range(-(-resamples // BLOCK))):
            pass
    return found


class _Draws:
    """Stream of resamples, the same however many are drawn at a time."""

    def __init__(self, n_id: int, n_ood: int, seed: tuple[int, int], stream: int) -> None:
        kinds = ((n_id, 0), (n_ood, 1 + stream))
        self.strata = [(size, np.random.default_rng([*seed, kind])) for size, kind in kinds if size]

    def counts(self, rows: int) -> Ints32:
        """(rows, n_id + n_ood) number of times each sample is drawn."""
        parts = []
        for size, rng in self.strata:
            drawn = rng.integers(size, size=(rows, size))
            drawn += size * np.arange(rows)[:, None]
            parts.append(np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size))
        return np.concatenate(parts, axis=1).astype(np.int32)


@lru_cache(maxsize=4)
def _harmonic(n: int) -> Floats:
    """(n + 1,) harmonic numbers Σ_{j=1..i} 1/j, summed in extended precision where the platform has it."""
    terms = 1 / np.arange(1, n + 1, dtype=np.longdouble)
    return np.concatenate(([0.0], np.cumsum(terms))).astype(np.float64)


class _Ranked:
    """Samples by falling score, tied ones in groups, for metrics of weighted samples."""

    def __init__(self, scores: Floats, outcomes: Ints) -> None:
        self.n = scores.size
        order = np.argsort(-scores, kind="stable")
        ranked, wrong = scores[order], outcomes[order] == 0
        first = np.append(True, ranked[1:] != ranked[:-1])
        self.starts = None if first.all() else np.flatnonzero(first)
        self.order = order
        self.wrong = wrong
        group_errors = wrong if self.starts is None else np.add.reduceat(wrong.astype(np.int64), self.starts)
        self.with_errors = np.flatnonzero(group_errors)

    def metrics(self, counts: Ints32) -> Floats:
        """(rows, n) counts -> (rows, len(METRICS))."""
        rows = len(counts)
        weight = np.take(counts, self.order, axis=1)
        errors = weight * self.wrong
        if self.starts is not None:
            weight = np.add.reduceat(weight, self.starts, axis=1)
            errors = np.add.reduceat(errors, self.starts, axis=1)
        # Numbers of samples, errors and successes down to the end of each group.
        end = np.cumsum(weight, axis=1, dtype=np.int32)
        fp = np.cumsum(errors, axis=1, dtype=np.int32)
        tp = end - fp
        n, k = self.n, fp[:, -1].astype(np.int64)
        successes = n - k
        rate = k / n

        aurc = self._aurc(weight, errors, end, fp)
        harmonic = _harmonic(n)
        floor = (k - successes * (harmonic[n] - harmonic[successes])) / n
        with np.errstate(divide="ignore", invalid="ignore"):
            closed_form = np.where(rate < 1, rate + (1 - rate) * np.log1p(-np.minimum(rate, 1)), 1.0)
            w, e = self.with_errors, errors[:, self.with_errors].astype(np.float64)
            tp_w = tp[:, w].astype(np.float64)
            # P(a success has the higher score), ties half: per error, successes above it and half of the tied ones.
            above = 2 * tp_w - (weight[:, w] - e)
            auroc = np.einsum("ij,ij->i", e, above) / (2.0 * successes * k)
            # Errors found and samples seen from the least confident group up.
            seen = (n - end[:, w] + weight[:, w]).astype(np.float64)
            found = (k[:, None] - fp[:, w]) + e
            aupr_error = np.einsum("ij,ij->i", e, found / np.maximum(seen, 1)) / k
            precision = tp / np.maximum(end, 1)
            aupr_success = np.sum((weight - errors) * precision, axis=1) / successes
            # The first group at which 95% of the successes are accepted, in integers.
            need = -(-19 * successes // 20)
            at = [np.searchsorted(tp[i], need[i]) for i in range(rows)]
            fpr95 = fp[np.arange(rows), at] / k
        both = (k > 0) & (successes > 0)
        augrc = rate * rate / 2 + np.where(both, rate * (1 - rate) * (1 - auroc), 0.0)
        values = {
            "aurc": aurc,
            "eaurc": aurc - closed_form,
            "eaurc_exact": aurc - floor,
            "augrc": augrc,
            "auroc": np.where(both, auroc, np.nan),
            "fpr95": np.where(both, fpr95, np.nan),
            "tnr95": np.where(both, 1 - fpr95, np.nan),
            "aupr_success": np.where(successes > 0, aupr_success, np.nan),
            "aupr_error": np.where(k > 0, aupr_error, np.nan),
        }
        return np.stack([values[metric] for metric in METRICS], axis=1)

    def _aurc(self, weight: Ints32, errors: Ints32, end: Ints32, fp: Ints32) -> Floats:
        """(rows,) AURC, expected over orders of tied samples.

        A group of m samples with e errors after B samples with b errors adds Σ_{i=B+1..B+m} (b + (i − B) e/m)/i =
        e + (b − B e/m)(H(B + m) − H(B)), H the harmonic numbers.
        """
        upto = np.take(_harmonic(self.n), end, mode="clip")
        steps = np.empty_like(upto)
        steps[:, 0] = upto[:, 0]
        np.subtract(upto[:, 1:], upto[:, :-1], out=steps[:, 1:])
        # Every group is taken to have successes only (e = 0, b = fp); the few with errors are corrected below.
        total = np.sum(fp * steps, axis=1)
        w = self.with_errors
        e, m, after = (x[:, w].astype(np.float64) for x in (errors, weight, end))
        b, before = fp[:, w] - e, after - m
        slope = e / np.maximum(m, 1)
        total += np.einsum("ij,ij->i", (b - before * slope) - fp[:, w], steps[:, w]) + e.sum(axis=1)
        return total / self.n
