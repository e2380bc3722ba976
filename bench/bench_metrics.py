"""Benchmark of the failure-detection metrics beside scikit-learn's.

The floor is one sort of the scores, which every one of these metrics rests on. The gate: AUROC and both average
precisions agree with scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from bench.harness import CannotRun
from tal_fast.metrics.failure import failure_metrics


@dataclass(frozen=True)
class Case:
    peer: str
    n: int

    def __str__(self) -> str:
        return f"{self.peer}-n{self.n}"


PEERS = ("tal_fast", "sklearn")
FULL = [Case(peer, n) for n in (10_000, 100_000, 1_000_000) for peer in PEERS]
SMOKE = [Case(peer, 10_000) for peer in PEERS]


def scikit_learn(scores: Any, correct: Any) -> dict[str, float]:
    """AUROC and both average precisions by scikit-learn, which has three of the nine metrics."""
    try:
        from sklearn.metrics import average_precision_score, roc_auc_score
    except ImportError:
        raise CannotRun("scikit-learn is not installed") from None
    return {
        "auroc": roc_auc_score(correct, scores),
        "aupr_success": average_precision_score(correct, scores),
        "aupr_error": average_precision_score(1 - correct, -scores),
    }


@pytest.mark.cases(FULL, SMOKE, group="metrics")
def bench_metrics(case: Case, measure: Callable[..., None]) -> None:
    random = np.random.default_rng(0)
    correct = (random.random(case.n) < 0.8).astype(np.int64)
    scores = random.random(case.n) + 0.5 * correct
    ours, theirs = failure_metrics(scores, correct), scikit_learn(scores, correct)
    for name, value in theirs.items():
        if abs(value - ours[name]) > 1e-9:
            raise AssertionError(f"{name} is {ours[name]} but scikit-learn's is {value}; not timed")
    run = failure_metrics if case.peer == "tal_fast" else scikit_learn
    measure(
        [lambda: run(scores, correct)],
        lambda: np.argsort(-scores, kind="stable"),
        case=case,
        facts={"floor": "one stable sort"},
    )
