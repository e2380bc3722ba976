"""Confidence thresholds whose error rate is bounded: selection with guaranteed risk.

``choose_threshold`` picks, on held-out samples, the confidence above which predictions are accepted so that the error
rate among them is at most the given risk r, with probability 1 − δ over the draw of the held-out samples. It assumes
only that these and later samples are independent draws of one distribution.

The procedure is fixed-sequence testing with several starts (Wiens, *Pharmaceutical Statistics*, 2003; Angelopoulos et
al., *Learn then Test*, 2021). From a start the threshold is lowered sample by sample as long as the exact binomial test
P(Bin(accepted, r) ≤ errors) ≤ α rejects a risk above r; α is the sum of the shares of δ of that start and of the
earlier ones whose sequences have arrived there. Starts are numbers of accepted samples, and use no label: K evenly
spaced ones have what a union bound over them (Geifman and El-Yaniv, NeurIPS 2017) would spend there, the binomial
probability of the most errors with a Clopper-Pearson limit at δ/K within r. What this leaves of δ goes to the earliest
rank that it allows, among the most confident samples, where errors are fewest. So whatever the union bound accepts is
accepted too.

Validity. For scores without ties, cut them at the thresholds where the true risk crosses r. Given how many samples lie
between these cuts, the errors down to a cut are binomial with rate r, and those down to a threshold of larger risk are
at least as many as with rate r. These counts fix which threshold of too large a risk a sequence meets first, so that it
passes with probability at most the α that has come there, and all shares sum to δ. Tied samples are accepted together;
the argument then holds if the risk, from where it first exceeds r, does not fall within ties, and ``bench.thresholds``
finds no violation of δ where it does.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tal_fast.metrics.ranking import as_correct, as_scores, rank
from tal_fast.utils.arrays import Ints


class NoThreshold(ValueError):
    """Error raised if no threshold qualifies."""


@dataclass(frozen=True)
class Threshold:
    """Confidence threshold with a bound on the error rate among accepted predictions.

    Attributes:
        threshold: a sample is accepted if its confidence is strictly above; −inf accepts all.
        risk: error rate among accepted samples that is not exceeded, with probability ``confidence``.
        confidence: 1 − δ, over the draw of the held-out samples.
        samples: number of held-out samples.
        accepted, errors: number of accepted held-out samples, and of errors among them.
        bound: Clopper-Pearson upper limit of the error rate at ``level``; at most ``risk``, which is what is promised.
        level: share of δ at which the threshold was tested.
    """

    threshold: float
    risk: float
    confidence: float
    samples: int
    accepted: int
    errors: int
    bound: float
    level: float

    @property
    def coverage(self) -> float:
        """Share of the held-out samples that are accepted."""
        return self.accepted / self.samples


def upper_limit(errors: Any, samples: Any, delta: float) -> Any:
    """Clopper-Pearson upper limit of an error rate, exceeded by the true rate with probability at most delta.

    It is the rate at which at most ``errors`` errors have probability delta; 1 where all samples are errors or there
    are none. Takes integers or arrays of them.
    """
    from scipy.stats import beta

    errors, samples = np.asarray(errors, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    all_wrong = errors >= samples
    return np.where(all_wrong, 1.0, beta.ppf(1 - delta, errors + 1, np.where(all_wrong, 1, samples - errors)))


def lower_limit(errors: int, samples: int, delta: float) -> float:
    """Clopper-Pearson lower limit of an error rate, above the true rate with probability at most delta."""
    return 1 - float(upper_limit(samples - errors, samples, delta))


def candidate_ranks(samples: int, risk: float, delta: float) -> Ints:
    """Largest number of samples accepted at each start, ascending.

    2.5 √(n · risk) ranks (4 to 64), evenly spaced from the fewest samples that could qualify at δ/K without an error to
    all n; only about n · risk errors distinguish more of them.
    """
    count = min(max(math.ceil(2.5 * math.sqrt(samples * risk)), 4), 64)
    fewest = _fewest(risk, delta / count)
    if fewest > samples:
        return np.zeros(0, dtype=np.int64)
    return np.unique(np.linspace(fewest, samples, count).round().astype(np.int64))


@functools.lru_cache(maxsize=256)
def _shares(accepted: tuple[int, ...], risk: float, delta: float, level: float) -> dict[int, float]:
    """Share of delta of each start: the probability, at the risk, of the most errors that qualify there at ``level``.

    Of starts with the same number of errors only the first has one. The rest of delta is the entry of 0.
    """
    from scipy.stats import binom

    sizes = np.array(accepted, dtype=np.int64)
    most = binom.ppf(level, sizes, risk)
    most -= binom.cdf(most, sizes, risk) > level
    most, first = np.unique(most, return_index=True)
    shares = binom.cdf(most, sizes[first], risk)
    return {0: delta - float(shares.sum()), **dict(zip(sizes[first].tolist(), shares.tolist(), strict=True))}


def _fewest(risk: float, level: float) -> int:
    """Fewest samples that qualify at a level without an error."""
    return max(math.ceil(math.log(level) / math.log1p(-risk)), 1)


def choose_threshold(scores: Any, correct: Any, *, risk: float, confidence: float = 0.95) -> Threshold:
    """Choose a threshold of large coverage whose selective risk is at most ``risk`` with the given confidence.

    Args:
        scores: (n,) confidences of held-out samples, on which nothing has been fitted; higher = more confident.
        correct: (n,) 0/1 or bool.
        risk: error rate among accepted samples not to exceed, in (0, 1).
        confidence: 1 − δ, in (0, 1).

    Raises:
        NoThreshold: no threshold qualifies; the message says what would.
        ValueError: vectors that do not match, NaN scores, or numbers out of range.
    """
    from scipy.stats import binom

    ranked = rank(as_scores(scores, "scores"), correct)
    n, delta = ranked.scores.size, _delta(risk, confidence)
    if n < _fewest(risk, delta):
        raise _too_few(n, "held-out samples", risk, confidence)
    ranks = candidate_ranks(n, risk, delta)
    # Of tied samples the rank leaves out all, unless they are the most confident.
    groups = np.maximum(np.searchsorted(ranked.end, ranks, side="right") - 1, 0)
    shares = dict(_shares(tuple(np.unique(ranked.end[groups]).tolist()), risk, delta, delta / max(ranks.size, 1)))
    left = shares.pop(0)
    earliest = int(ranked.end[np.searchsorted(ranked.end, min([_fewest(risk, left), *shares]))])
    shares[earliest] = shares.get(earliest, 0.0) + left
    sizes = sorted(shares)
    starts = [*np.searchsorted(ranked.end, sizes).tolist(), ranked.end.size]
    tails = binom.cdf(ranked.fp, ranked.end, risk)
    level, best = 0.0, None
    for size, start, stop in zip(sizes, starts, starts[1:], strict=False):
        level += shares[size]
        failed = np.flatnonzero(tails[start:stop] > level)
        last = start + int(failed[0]) if failed.size else stop
        if last > start:
            best = last - 1, level
        if failed.size:
            level = 0.0
    if best is None:
        limits = [float(upper_limit(ranked.fp[g], k, shares[k])) for g, k in zip(starts, sizes, strict=False)]
        least = int(np.argmin(limits))
        raise NoThreshold(
            f"no threshold keeps the risk within {risk:g} with confidence {confidence:g}: the lowest bound tried is "
            f"{limits[least]:.4g} ({ranked.fp[starts[least]]} wrong of {sizes[least]} among {n} held-out samples); "
            f"allow a larger risk, hold out more samples or use a better score"
        )
    end, errors = int(ranked.end[best[0]]), int(ranked.fp[best[0]])
    limit = float(ranked.scores[end]) if end < n else -math.inf
    return Threshold(limit, risk, confidence, n, end, errors, float(upper_limit(errors, end, best[1])), best[1])


def choose_class_thresholds(
    scores: Any, correct: Any, predictions: Any, classes: int, *, risk: float, confidence: float = 0.95
) -> list[Threshold | None]:
    """Threshold for each predicted class, None where none qualifies: nothing predicted as that class is accepted.

    The risk holds for all classes at once with the given confidence, as each has 1/``classes`` of δ. Arguments and
    errors are those of ``choose_threshold``, with ``predictions`` (n,) in [0, classes).
    """
    values, outcomes, of = as_scores(scores, "scores"), as_correct(correct), np.asarray(predictions)
    level = 1 - _delta(risk, confidence) / classes
    found: list[Threshold | None] = []
    for k in range(classes):
        try:
            found.append(choose_threshold(values[of == k], outcomes[of == k], risk=risk, confidence=level))
        except NoThreshold:
            found.append(None)
    if not any(found):
        raise NoThreshold(
            f"no class has a threshold that keeps its risk within {risk:g} with confidence {confidence:g} for all "
            f"{classes}; each needs at least {_fewest(risk, 1 - level)} held-out samples: hold out more, or leave out "
            "--per-class"
        )
    return found


def choose_ood_threshold(scores: Any, *, risk: float, confidence: float = 0.95) -> Threshold:
    """Lowest threshold above which at most a share ``risk`` of an OOD set lies, with the given confidence.

    It is the (k + 1)th largest score, k the largest with P(Bin(m, risk) ≤ k) ≤ δ: if more than the risk lay above it,
    at most k of m samples would lie above the threshold of exactly that risk. Arguments and errors are those of
    ``choose_threshold``, with scores (m,) of OOD samples; ``errors`` are those accepted.
    """
    from scipy.stats import binom

    ranked, delta = -np.sort(-as_scores(scores, "OOD scores")), _delta(risk, confidence)
    if ranked.size < _fewest(risk, delta):
        raise _too_few(ranked.size, "held-out OOD samples", risk, confidence)
    most = int(binom.ppf(delta, ranked.size, risk))
    most -= int(binom.cdf(most, ranked.size, risk) > delta)
    accepted = int((ranked > ranked[most]).sum())
    bound = float(upper_limit(most, ranked.size, delta))
    return Threshold(float(ranked[most]), risk, confidence, ranked.size, accepted, accepted, bound, delta)


def _delta(risk: float, confidence: float) -> float:
    for name, value in (("risk", risk), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie in (0, 1), not {value}")
    return 1 - confidence


def _too_few(samples: int, what: str, risk: float, confidence: float) -> NoThreshold:
    return NoThreshold(
        f"{samples} {what} are too few to bound the risk by {risk:g} with confidence {confidence:g}, even without an "
        f"error: hold out about {_fewest(risk, 1 - confidence)}, or allow a larger risk"
    )
