"""Confidence thresholds whose error rate is bounded: selection with guaranteed risk.

``choose_threshold`` picks, on held-out samples, the confidence above which predictions are accepted so that the error
rate among them is at most the given risk, with the given confidence over the draw of the held-out samples. The bound
assumes only that the held-out samples and later ones are independent draws of one distribution.

The candidates are a few numbers of accepted samples, fixed before scores and errors are known: the threshold is the
score at that rank, and samples strictly above it are accepted. Given the threshold, the number of errors among them is
binomial with the selective risk as its rate, so that the Clopper-Pearson upper limit at level δ/K holds for each of the
K candidates and, by the union bound, for all of them at once. The candidate with the largest coverage whose limit is at
most the risk is taken. This is Geifman and El-Yaniv's selection with guaranteed risk (NeurIPS 2017, Algorithm 1), but
their bisection chooses each candidate after the errors of the one before, while their union bound counts only those
that it visits; fixed candidates avoid that. The bound is valid for tied and discrete scores, for any score and any
distribution. Fixed-sequence testing (Angelopoulos et al., *Learn then Test*, 2021) needs no division of δ, but
thresholds from other data, and one error among the most confident samples ends it: it covers more where its start suits
the risk curve, and far less, or nothing, where it does not.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tal_fast.metrics.ranking import as_correct, as_scores
from tal_fast.utils.arrays import Ints

FORMAT = 1
"""Version of ``threshold.json``."""


class NoThreshold(ValueError):
    """No candidate threshold has a bound within the risk."""


@dataclass(frozen=True)
class Threshold:
    """Confidence threshold with a bound on the error rate among accepted predictions.

    Attributes:
        threshold: a sample is accepted if its confidence is strictly above; −inf accepts all.
        risk: error rate among accepted samples that is not exceeded, with probability ``confidence``.
        confidence: 1 − δ, over the draw of the held-out samples.
        samples: number of held-out samples.
        accepted, errors: number of accepted held-out samples, and of errors among them.
        bound: upper limit on the error rate, which holds with ``confidence``; at most ``risk``.
        candidates: K, the number of candidate thresholds, over which δ is divided.
    """

    threshold: float
    risk: float
    confidence: float
    samples: int
    accepted: int
    errors: int
    bound: float
    candidates: int

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
    """Largest number of samples that each candidate threshold accepts, ascending.

    2.5 √(n · risk) candidates (4 to 64), evenly spaced from the fewest samples that could qualify without an error to
    all n. More candidates would be spaced more finely but bounded more loosely, and only about n · risk errors
    distinguish them.
    """
    count = min(max(math.ceil(2.5 * math.sqrt(samples * risk)), 4), 64)
    fewest = math.ceil(math.log(delta / count) / math.log1p(-risk))
    if fewest > samples:
        return np.zeros(0, dtype=np.int64)
    return np.unique(np.linspace(fewest, samples, count).round().astype(np.int64))


def choose_threshold(scores: Any, correct: Any, *, risk: float, confidence: float = 0.95) -> Threshold:
    """Choose the threshold of largest coverage whose selective risk is at most ``risk`` with the given confidence.

    Args:
        scores: (n,) confidences of held-out samples, on which nothing has been fitted; higher = more confident.
        correct: (n,) 0/1 or bool.
        risk: error rate among accepted samples not to exceed, in (0, 1).
        confidence: 1 − δ, in (0, 1).

    Raises:
        NoThreshold: no candidate qualifies; the message says what would.
        ValueError: vectors that do not match, NaN scores, or numbers out of range.
    """
    for name, value in (("risk", risk), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie in (0, 1), not {value}")
    values, outcomes = as_scores(scores, "scores"), as_correct(correct)
    n = values.size
    if outcomes.size != n:
        raise ValueError(f"scores has {n} samples but correct has {outcomes.size}; they must match")
    delta = 1 - confidence
    ranks = candidate_ranks(n, risk, delta)
    if not ranks.size:
        sizes = (math.ceil(1.02**k) for k in itertools.count())
        needed = next(size for size in sizes if candidate_ranks(size, risk, delta).size)
        raise NoThreshold(
            f"{n} held-out samples are too few to bound the risk by {risk:g} with confidence {confidence:g}, even "
            f"without an error: hold out about {needed}, or allow a larger risk"
        )
    order = np.argsort(-values, kind="stable")
    ranked, errors = values[order], np.append(0, np.cumsum(1 - outcomes[order]))
    thresholds = np.append(ranked, -np.inf)[ranks]
    # With ties, fewer samples than the rank are strictly above.
    accepted = np.searchsorted(-ranked, -thresholds, side="left")
    limits = upper_limit(errors[accepted], accepted, delta / ranks.size)
    qualify = np.flatnonzero(limits <= risk)
    if not qualify.size:
        best = int(np.argmin(limits))
        raise NoThreshold(
            f"no threshold keeps the risk within {risk:g} with confidence {confidence:g}: the lowest bound is "
            f"{limits[best]:.4g} ({errors[accepted[best]]} errors among {accepted[best]} of {n} held-out samples); "
            f"allow a larger risk, hold out more samples or use a better score"
        )
    chosen = qualify[-1]
    return Threshold(
        threshold=float(thresholds[chosen]),
        risk=risk,
        confidence=confidence,
        samples=n,
        accepted=int(accepted[chosen]),
        errors=int(errors[accepted[chosen]]),
        bound=float(limits[chosen]),
        candidates=int(ranks.size),
    )


def split_samples(samples: int, share: float, seed: int) -> tuple[Ints, Ints]:
    """Split samples at random into those to choose the threshold on and those to test it on, as ascending indices."""
    if not 0 < share <= 1:
        raise ValueError(f"the calibration share must lie in (0, 1], not {share}")
    order = np.random.default_rng(seed).permutation(samples)
    cut = round(share * samples)
    return np.sort(order[:cut]).astype(np.int64), np.sort(order[cut:]).astype(np.int64)


def calibrate(
    scores: Any, correct: Any, *, risk: float, confidence: float = 0.95, share: float = 0.5, seed: int = 0
) -> tuple[Threshold, dict[str, Any]]:
    """Choose a threshold on a random share of the samples and test it on the rest.

    Returns:
        The threshold, and the content of ``threshold.json``: its fields (an infinite threshold is null) with
        ``coverage``, ``calibration_share``, ``seed`` and, where samples are left, ``test``: ``samples``, ``accepted``,
        ``errors``, ``coverage``, ``risk`` and ``risk_interval``, its two-sided Clopper-Pearson interval at
        ``confidence``.
    """
    values, outcomes = as_scores(scores, "scores"), as_correct(correct)
    held_out, rest = split_samples(values.size, share, seed)
    chosen = choose_threshold(values[held_out], outcomes[held_out], risk=risk, confidence=confidence)
    about: dict[str, Any] = {
        "format": FORMAT, **asdict(chosen), "coverage": chosen.coverage, "calibration_share": share, "seed": seed,
        "bound_name": "Clopper-Pearson, union over ranks fixed in advance",
    }  # fmt: skip
    about["threshold"] = chosen.threshold if math.isfinite(chosen.threshold) else None
    if rest.size:
        accept = values[rest] > chosen.threshold
        accepted, errors = int(accept.sum()), int((1 - outcomes[rest])[accept].sum())
        half = (1 - confidence) / 2
        about["test"] = {
            "samples": int(rest.size), "accepted": accepted, "errors": errors, "coverage": accepted / rest.size,
            "risk": errors / accepted if accepted else None,
            "risk_interval": [lower_limit(errors, accepted, half), float(upper_limit(errors, accepted, half))],
        }  # fmt: skip
    return chosen, about
