"""Violations and coverage of thresholds by simulation: ``python -m bench.thresholds``.

For each population and number of samples, 4,000 draws of scores and errors, on which ``choose_threshold`` and two other
procedures choose a threshold: how often its true risk exceeds the promised one, how often none is found, and the true
coverage. The others are SGR (Geifman and El-Yaniv, 2017, Algorithm 1) and the procedure of this project's earlier
versions, Clopper-Pearson limits at ranks fixed in advance under a union bound. ``--report`` writes the table of
docs/abstaining.md from the results.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom

from bench.harness import environment, write_json
from bench.report.text import table
from tal_fast.evaluation.selective import NoThreshold, choose_threshold

RESULTS = Path(__file__).parent / "results" / "thresholds_cpu.json"
PAGE = Path(__file__).parents[1] / "docs" / "abstaining.md"
CONFIDENCE, DELTA = 0.95, 1 - 0.95
CELLS = ((20, 0.2), (50, 0.1), (100, 0.05), (500, 0.05), (2500, 0.02))
GRID = 200_000
ABOVE = 1 + 1e-6  # a risk above the promised one by this factor, so that whatever is accepted there violates

Rates = Callable[[np.ndarray], np.ndarray]


def rising(risk: float, coverage: float, power: float) -> Rates:
    """Error rates c · x^power at rank x in [0, 1], with the given risk at the given coverage."""
    return lambda x: np.minimum(risk * (power + 1) * (x / coverage) ** power, 1)


def populations(risk: float) -> dict[str, tuple[Rates, int, float]]:
    """Error rate at each rank x, the number of equally likely scores (0: continuous) and the share with the top score.

    Names with "at the risk" have a risk just above the promised one wherever that matters most.
    """
    return {
        "calibrated": (rising(risk, 0.725, 5), 0, 0),
        "flat, at the risk": (lambda x: np.full_like(x, risk * ABOVE), 0, 0),
        "step": (lambda x: np.where(x < 0.6, 0.3, 5.0 * ABOVE) * risk, 0, 0),
        "ties: 20 levels": (rising(risk * ABOVE, 0.75, 5), 20, 0),
        "saturated: 40% tied": (lambda x: np.where(x < 0.4, 0.5 * risk, rising(risk, 0.7, 3)(x)), 0, 0.4),
        "saturated, at the risk": (lambda x: np.where(x < 0.4, risk * ABOVE, 2 * risk), 0, 0.4),
        "not monotone": (lambda x: np.select([x < 0.1, x < 0.6], [2.5, 0.1], 3.0) * risk, 0, 0),
        "not monotone, tied": (lambda x: np.select([x < 0.1, x < 0.6], [2.5, 0.1], 3.0) * risk, 20, 0.1),
    }


class Population:
    """Scores −x for ranks x, tied as asked; ``risk`` and ``coverage`` of what lies strictly above a threshold."""

    def __init__(self, rates: Rates, levels: int, top: float) -> None:
        self.levels, self.top, self._rates = levels, top, rates
        x = (np.arange(GRID) + 0.5) / GRID
        self._scores, self._errors = -self._tied(x), np.append(0, np.cumsum(rates(x)))

    def _tied(self, x: np.ndarray) -> np.ndarray:
        x = np.floor(x * self.levels) / self.levels if self.levels else x
        return np.where(x < self.top, 0.0, x)

    def draw(self, samples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        x = rng.random(samples)
        return -self._tied(x), rng.random(samples) >= self._rates(x)

    def accepted(self, threshold: float) -> tuple[float, float]:
        """True coverage and true risk above a threshold."""
        count = np.searchsorted(-self._scores, -threshold)
        return count / GRID, self._errors[count] / max(count, 1)

    def best_coverage(self, risk: float) -> float:
        """Largest coverage within the risk, which an oracle would choose."""
        ends = np.append(np.flatnonzero(np.diff(self._scores)), GRID - 1) + 1
        within = ends[self._errors[ends] / ends <= risk]
        return float(within.max() / GRID) if within.size else 0.0


@functools.cache
def most_errors(samples: int, risk: float, level: float) -> np.ndarray:
    """Most errors among k = 0, ..., n samples whose Clopper-Pearson limit at the level is at most the risk; or −1."""
    k = np.arange(samples + 1)
    most = binom.ppf(level, k, risk).astype(int)
    return most - (binom.cdf(most, k, risk) > level)


def ranked(scores: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-scores, kind="stable")
    return scores[order], np.append(0, np.cumsum(~correct[order]))


def sgr(scores: np.ndarray, correct: np.ndarray, risk: float) -> float | None:
    """Threshold by Algorithm 1 of Geifman and El-Yaniv, strictly above which samples are accepted."""
    falling, errors = ranked(scores, correct)
    n, best = len(falling), None
    steps = math.ceil(math.log2(n))
    low, high = 0, n  # the number of accepted samples
    for _ in range(steps):
        middle = (low + high + 1) // 2
        threshold = falling[middle] if middle < n else -math.inf
        accepted = int(np.searchsorted(-falling, -threshold))
        if errors[accepted] <= most_errors(n, risk, DELTA / steps)[accepted]:
            low, best = middle, threshold
        else:
            high = middle - 1
    return best


def union(scores: np.ndarray, correct: np.ndarray, risk: float) -> float | None:
    """Threshold of largest coverage among ranks fixed in advance, each at δ/K."""
    falling, errors = ranked(scores, correct)
    n = len(falling)
    count = min(max(math.ceil(2.5 * math.sqrt(n * risk)), 4), 64)
    fewest = math.ceil(math.log(DELTA / count) / math.log1p(-risk))
    if fewest > n:
        return None
    ranks = np.unique(np.linspace(fewest, n, count).round().astype(int))
    thresholds = np.append(falling, -np.inf)[ranks]
    accepted = np.searchsorted(-falling, -thresholds)
    within = np.flatnonzero(errors[accepted] <= most_errors(n, risk, DELTA / len(ranks))[accepted])
    return float(thresholds[within[-1]]) if within.size else None


def ours(scores: np.ndarray, correct: np.ndarray, risk: float) -> float | None:
    try:
        return choose_threshold(scores, correct, risk=risk, confidence=CONFIDENCE).threshold
    except NoThreshold:
        return None


PROCEDURES = {"tal-fast": ours, "union bound": union, "SGR": sgr}


def simulate(name: str, population: Population, samples: int, risk: float, draws: int, seed: int) -> dict[str, Any]:
    """Rates of violation and refusal and the mean true coverage of each procedure, on the same draws."""
    rng = np.random.default_rng([seed, samples])
    found: dict[str, list[tuple[bool, bool, float]]] = {procedure: [] for procedure in PROCEDURES}
    for _ in range(draws):
        scores, correct = population.draw(samples, rng)
        for procedure, choose in PROCEDURES.items():
            threshold = choose(scores, correct, risk)
            coverage, true_risk = (0.0, 0.0) if threshold is None else population.accepted(threshold)
            found[procedure].append((true_risk > risk, threshold is None, coverage))
    row: dict[str, Any] = {
        "population": name, "n": samples, "risk": risk, "draws": draws, "oracle": population.best_coverage(risk)
    }  # fmt: skip
    arrays = {procedure: np.array(values, dtype=float) for procedure, values in found.items()}
    for procedure, values in arrays.items():
        row[procedure] = dict(zip(("violations", "refusals", "coverage"), values.mean(0).tolist(), strict=True))
    refused = {procedure: values[:, 1] == 1 for procedure, values in arrays.items()}
    row["refused_by_tal_fast_alone"] = int((refused["tal-fast"] & ~refused["union bound"]).sum())
    row["refused_by_union_bound_alone"] = int((refused["union bound"] & ~refused["tal-fast"]).sum())
    return row


def results_table(result: dict[str, Any]) -> str:
    """Table of docs/abstaining.md."""
    names = list(PROCEDURES)
    head = ["population", "n", "risk", "violations", *(f"coverage {name}" for name in names), "oracle"]
    head += [f"refusals {name}" for name in names]
    rows = [
        [
            row["population"], f"{row['n']:,}", f"{row['risk']:.0%}", f"{row['tal-fast']['violations']:.1%}",
            *(f"{row[name]['coverage']:.3f}" for name in names), f"{row['oracle']:.3f}",
            *(f"{row[name]['refusals']:.1%}" for name in names),
        ]
        for row in result["results"]
    ]  # fmt: skip
    return table(head, rows)


def fill_in(text: str, result: dict[str, Any]) -> str:
    """Text with the table between its markers."""
    markers = r"(<!-- thresholds -->\n).*?(<!-- /thresholds -->)"
    return re.sub(markers, lambda found: f"{found[1]}\n{results_table(result)}\n\n{found[2]}", text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=4000, help="draws of each cell")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    parser.add_argument(
        "--report", action="store_true", help="only write docs/abstaining.md from the committed results"
    )
    args = parser.parse_args()
    if args.report:
        import json

        PAGE.write_text(fill_in(PAGE.read_text(), json.loads(RESULTS.read_text())))
        return
    result: dict[str, Any] = {
        "what": "thresholds by simulation", "environment": environment(), "confidence": CONFIDENCE, "results": [],
    }  # fmt: skip
    start = time.process_time()
    for samples, risk in CELLS:
        for seed, (name, parts) in enumerate(populations(risk).items()):
            row = simulate(name, Population(*parts), samples, risk, args.draws, seed)
            result["results"].append(row)
            print(f"{name:24} n {samples:5,} risk {risk:4.0%} oracle {row['oracle']:.3f}", end="")
            for procedure in PROCEDURES:
                rates = row[procedure]
                print(
                    f"  {procedure} {rates['violations']:6.2%} {rates['refusals']:6.1%} {rates['coverage']:.3f}", end=""
                )
            print(f"  alone {row['refused_by_tal_fast_alone']}/{row['refused_by_union_bound_alone']}", flush=True)
    result["cpu_s"] = time.process_time() - start
    print(f"{result['cpu_s']:.0f} CPU seconds")
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
