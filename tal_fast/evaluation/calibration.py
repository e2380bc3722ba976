"""Thresholds chosen on one part of the held-out samples and tested on the rest, and the choice of their score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tal_fast.evaluation.selective import (
    NoThreshold,
    choose_class_thresholds,
    choose_ood_threshold,
    choose_threshold,
    lower_limit,
    upper_limit,
)
from tal_fast.metrics.ranking import as_correct, as_scores
from tal_fast.utils.arrays import Floats, Ints

FORMAT, BY_CLASS = 1, 2
"""Versions of ``threshold.json``: with one threshold, and with one for each predicted class."""

DEFAULTS: dict[str, Any] = {"confidence": 0.95, "share": 0.5, "seed": 0}

RISKS = (0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
"""Risks that ``score_table`` tries."""

_WORDS = {-math.inf: "all", math.inf: "none"}


def split_samples(samples: int, share: float, seed: int) -> tuple[Ints, Ints]:
    """Split samples at random into those to choose the threshold on and those to test it on, as ascending indices."""
    if not 0 < share <= 1:
        raise ValueError(f"the calibration share must lie in (0, 1], not {share}")
    order = np.random.default_rng(seed).permutation(samples)
    cut = round(share * samples)
    return np.sort(order[:cut]).astype(np.int64), np.sort(order[cut:]).astype(np.int64)


def parts(samples: int, share: float, seed: int, selection: bool = False) -> tuple[Ints, Ints, Ints]:
    """Indices of the samples that choose the threshold, of half of the others to choose its score, if asked, and of
    those that test it.
    """
    held_out, rest = split_samples(samples, share, seed)
    if not selection:
        return held_out, rest[:0], rest
    if rest.size < 2:
        raise ValueError(f"a calibration share of {share:g} leaves no samples for --score auto; lower it")
    pick, test = split_samples(rest.size, 0.5, seed + 1)
    return held_out, rest[pick], rest[test]


def calibrate(
    scores: Any,
    correct: Any,
    *,
    risk: float,
    confidence: float = 0.95,
    share: float = 0.5,
    seed: int = 0,
    selection: bool = False,
    predictions: Any = None,
    classes: int = 0,
    ood: Any = None,
) -> tuple[float | Floats, dict[str, Any]]:
    """Choose a threshold on a random share of the samples and test it on the rest.

    Args:
        scores, correct, risk, confidence: as for ``choose_threshold``.
        share, seed: of the samples, and of the OOD scores, that choose.
        selection: leave the samples that chose the score out of the test, see ``parts``.
        predictions, classes: predicted class (n,) and number of classes, for ``choose_class_thresholds``.
        ood: (m,) scores of an OOD set, for ``choose_ood_threshold``.

    Returns:
        The threshold, or (classes,) of them, and the content of ``threshold.json``: an infinite ``threshold`` is null,
        in ``class_thresholds`` "all" or "none"; ``test``, where samples are left, has their ``risk`` and
        ``risk_interval``, its two-sided Clopper-Pearson interval at ``confidence``.
    """
    values, outcomes = as_scores(scores, "scores"), as_correct(correct)
    if outcomes.size != values.size:
        raise ValueError(f"scores has {values.size} samples but correct has {outcomes.size}; they must match")
    held_out, _, rest = parts(values.size, share, seed, selection)
    level = {"risk": risk, "confidence": confidence}
    about: dict[str, Any] = {"format": FORMAT, "metric": "risk", "threshold": None, **level}
    if predictions is not None and ood is not None:
        raise ValueError("thresholds by class bound the risk; leave out --per-class or --metric false-accept-ood")
    if predictions is not None:
        of = np.asarray(predictions)
        by_class = choose_class_thresholds(values[held_out], outcomes[held_out], of[held_out], classes, **level)
        limits = [math.inf if one is None else one.threshold for one in by_class]
        about |= {"format": BY_CLASS, "class_thresholds": [_WORDS.get(limit, limit) for limit in limits]}
        found = max(filter(None, by_class), key=lambda one: one.bound)
    elif ood is not None:
        outside = as_scores(ood, "OOD scores")
        chosen, others = split_samples(outside.size, share, seed)
        found = choose_ood_threshold(outside[chosen], **level)
        about |= {"metric": "false-accept-ood", "ood": {"samples": found.samples, "accepted": found.accepted}}
        passed = int((outside[others] > found.threshold).sum())
        about["ood_test"] = {"samples": int(others.size), "accepted": passed}
    else:
        found = choose_threshold(values[held_out], outcomes[held_out], **level)
    if predictions is None and math.isfinite(found.threshold):
        about["threshold"] = found.threshold
    threshold = limits_of(about)
    accept = values > (threshold if predictions is None else np.asarray(threshold)[of])

    def counts(rows: Ints) -> dict[str, Any]:
        accepted, right = int(accept[rows].sum()), int(outcomes[rows][accept[rows]].sum())
        coverage = accepted / max(rows.size, 1)
        return {"samples": int(rows.size), "accepted": accepted, "errors": accepted - right, "coverage": coverage}

    about |= {
        **counts(held_out), "bound": found.bound, "level": found.level, "calibration_share": share, "seed": seed,
        "bound_name": "exact binomial tests in sequence" if ood is None else "exact binomial test",
    }  # fmt: skip
    if rest.size:
        about["test"] = test = counts(rest)
        accepted, errors, half = test["accepted"], test["errors"], (1 - confidence) / 2
        test["risk"] = errors / accepted if accepted else None
        test["risk_interval"] = [lower_limit(errors, accepted, half), float(upper_limit(errors, accepted, half))]
    return threshold, about


def limits_of(about: Mapping[str, Any]) -> float | Floats:
    """Threshold in the content of ``threshold.json``, or (classes,) of them."""
    if "class_thresholds" in about:
        infinite = {word: limit for limit, word in _WORDS.items()}
        return np.array([infinite.get(x, x) for x in about["class_thresholds"]], dtype=np.float64)
    return -math.inf if about["threshold"] is None else float(about["threshold"])


def score_table(scores: Mapping[str, Any], correct: Any, *, risk: float, confidence: float) -> list[dict[str, Any]]:
    """Coverage that ``choose_threshold`` finds with each score, name -> (n,), best first.

    Rows have ``score``, its ``coverage`` at ``risk``, and the ``least_risk`` of ``RISKS`` that has a threshold, with
    its ``least_coverage``; 0 and None where there is none.
    """

    def coverage(values: Any, at: float) -> float:
        try:
            return choose_threshold(values, correct, risk=at, confidence=confidence).coverage
        except NoThreshold:
            return 0.0

    rows: list[dict[str, Any]] = [{"score": name, "coverage": coverage(scores[name], risk)} for name in scores]
    for row in rows:
        found = ((at, covered) for at in RISKS if (covered := coverage(scores[row["score"]], at)))
        row["least_risk"], row["least_coverage"] = next(found, (None, 0.0))
    return sorted(rows, key=lambda row: (-row["coverage"], row["least_risk"] or 1, -row["least_coverage"]))


def with_table(refusal: NoThreshold, scores: Mapping[str, Any], correct: Any, **options: Any) -> NoThreshold:
    """The refusal, with what each score achieves on samples that the bound does not use, and the one recommended.

    Takes the arguments of ``calibrate``; with a share of 1 the table is of the samples that the bound uses.
    """
    held_out, pick, rest = parts(len(correct), options["share"], options["seed"], options.get("selection", False))
    used = next((rows for rows in (pick, rest) if rows.size), held_out)
    risk, confidence = options["risk"], options["confidence"]
    rows = score_table({k: v[used] for k, v in scores.items()}, correct[used], risk=risk, confidence=confidence)
    lines = [
        f"{refusal}",
        f"with confidence {confidence:g} on {used.size} samples that the bound does "
        + ("use, so that a choice by this table needs others:" if used is held_out else "not use:"),
        f"{'score':14} {f'coverage at {risk:.2%}':>20} {'risk tried':>11} {'coverage there':>15}",
    ]
    for row in rows:
        least = "-" if row["least_risk"] is None else f"{row['least_risk']:.2%}"
        lines.append(f"{row['score']:14} {row['coverage']:20.2%} {least:>11} {row['least_coverage']:15.2%}")
    best, advice = rows[0], "hold out more samples; no risk up to 50% has a threshold"
    if best["least_risk"] is not None:
        advice = f"--score {best['score']}" + ("" if best["coverage"] else f" --risk {best['least_risk']:g}")
    return NoThreshold("\n".join([*lines, f"recommended: {advice}"]))
