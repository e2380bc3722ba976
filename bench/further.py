"""Coverage of the intervals of operating points, and time of the joint metrics: ``python -m bench.further``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tal_fast.metrics.curves import OperatingPoints
from tal_fast.metrics.further import operating_point
from tal_fast.metrics.joint import binned_joint_metrics, joint_metrics

POPULATIONS = {
    "calibrated": ((6, 1), lambda p: p, lambda p: p),
    "saturated": ((2, 0.15), lambda p: p, lambda p: 0.5 + 0.5 * p),
    "tied": ((4, 0.6), lambda p: np.round(p, 2), lambda p: p),
}
"""Beta distribution of p, score and probability of a right prediction as functions of p or of the score."""


def draw(name: str, n: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """Scores and outcomes of n samples of a population."""
    beta, score, right = POPULATIONS[name]
    scores = score(rng.beta(*beta, n))
    return scores, (rng.random(n) < right(scores)).astype(int)


def coverage(draws: int = 1000) -> None:
    """Print how often the intervals lie above and below the true value, which 2 million samples have."""
    rng = np.random.default_rng(0)
    for name in POPULATIONS:
        points = OperatingPoints(*draw(name, 2_000_000, rng))
        for n in (200, 1000, 5000):
            for kind, limit, point in (
                *(("coverage@risk", risk, points.at_risk(risk)) for risk in (0.02, 0.05)),
                ("risk@coverage", 0.8, points.at_coverage(0.8)),
            ):
                true = 0.0 if point is None else point.coverage if kind == "coverage@risk" else point.risk
                ends = np.array([operating_point(*draw(name, n, rng), kind, limit)[1:] for _ in range(draws)])
                above, below = np.mean(true < ends[:, 0]), np.mean(true > ends[:, 1])
                print(f"{name:10} n {n:5} {kind}={limit}: {true:.3f}, too high {above:.3f}, too low {below:.3f}")


def timed(function: Callable[..., Any], *args: Any) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    function(*args)
    return time.process_time() - start


def times() -> None:
    """Print the CPU seconds of the joint metrics, by the separation of the populations in standard deviations."""
    for n in (10_000, 50_000):
        for separation in (0, 1, 2, 4):
            rng = np.random.default_rng(0)
            right = np.append(rng.random(n) > 0.15, np.zeros(n)).astype(int)
            s_id = rng.normal(size=2 * n) + separation * right
            s_ood = rng.normal(size=2 * n) + separation * (np.arange(2 * n) < n) + 0.5 * s_id
            args = 1 / (1 + np.exp(-2 * s_id)), s_ood, right, n
            exact, binned = timed(joint_metrics, *args), timed(binned_joint_metrics, *args)
            print(f"{n} + {n}, separation {separation}: exact {exact:.2f} s, authors' convention {binned:.2f} s")
        one = np.random.default_rng(0).random(2 * n)
        print(f"{n} + {n}, one score without information: exact {timed(joint_metrics, one, one, right, n):.2f} s")


if __name__ == "__main__":
    times()
    coverage()
