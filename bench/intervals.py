"""Coverage of the metrics' confidence intervals in simulation.

``python -m bench.intervals --out bench/results/intervals_cpu.json``.

Draws test sets from populations whose metrics are known from a sample 400 times as large, and counts the intervals that
hold the true value, for one score and for the paired difference of two correlated scores. The number of errors is
binomial. ``--table`` writes the table of docs/metrics.md from the results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import environment, write_json
from tal_fast.config.names import METRICS
from tal_fast.metrics.failure import failure_metrics
from tal_fast.metrics.influence import influence
from tal_fast.metrics.intervals import LEVEL, interval

CELLS = ((200, 10), (500, 25), (1_000, 20), (1_000, 200), (5_000, 250), (10_000, 8))
"""Number of samples, and mean number of errors."""
SHOWN = ("aurc", "eaurc", "augrc", "auroc", "fpr95", "aupr_success", "aupr_error")
BAND = (0.935, 0.965)
RESULTS = Path(__file__).parent / "results" / "intervals_cpu.json"
LEAST_TRUTH = 1_000_000  # samples

Floats = np.ndarray[Any, np.dtype[np.float64]]
Draw = tuple[np.ndarray[Any, np.dtype[np.bool_]], Floats, Floats]
"""Whether each sample is a success, and two scores of it."""


def binormal(rng: np.random.Generator, n: int, rate: float) -> Draw:
    """Normal logits, AUROC 0.86 and 0.80."""
    success = rng.random(n) >= rate
    noise = rng.normal(size=n)
    return success, noise + 1.5 * success, 0.7 * noise + np.sqrt(0.51) * rng.normal(size=n) + 1.2 * success


def heavy_tail(rng: np.random.Generator, n: int, rate: float) -> Draw:
    """Calibrated score: the probability of an error is log-normal with σ = 1.6; the other score is a noisy copy."""
    q = np.minimum(np.exp(1.6 * rng.normal(size=n)) * _scale(rate), 0.95)
    return rng.random(n) >= q, -q, -q * np.exp(0.7 * rng.normal(size=n))


@lru_cache
def _scale(rate: float) -> float:
    """Factor at which the mean of the heavy tail's capped probabilities is the error rate."""
    spread = np.exp(1.6 * np.random.default_rng(0).normal(size=200_000))
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(spread * middle, 0.95).mean() < rate else (low, middle)
    return low


def saturated(rng: np.random.Generator, n: int, rate: float) -> Draw:
    """Softmax near 1 for most samples and for three errors of ten; the second model has other noise."""
    success = rng.random(n) >= rate
    part = rng.random(n)
    mean = np.where(success, np.where(part < 0.85, 5.0, 2.0), np.where(part < 0.7, 1.0, 4.0))
    noise = rng.logistic(size=n)
    return success, _sigmoid(mean + noise), _sigmoid(0.8 * mean + 0.5 * noise + 0.9 * rng.normal(size=n) + 0.4)


def _sigmoid(logits: Floats) -> Floats:
    return 1 / (1 + np.exp(-logits))


def two_decimals(rng: np.random.Generator, n: int, rate: float) -> Draw:
    """The binormal scores as probabilities with two decimals: at most 101 different ones."""
    success, one, two = binormal(rng, n, rate)
    return success, np.round(_sigmoid(one), 2), np.round(_sigmoid(two), 2)


def bfloat16(rng: np.random.Generator, n: int, rate: float) -> Draw:
    """The saturated softmax in bfloat16, which has 128 values above 0.5."""
    success, one, two = saturated(rng, n, rate)
    return success, _bfloat16(one), _bfloat16(two)


def _bfloat16(values: Floats) -> Floats:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


POPULATIONS: dict[str, Callable[[np.random.Generator, int, float], Draw]] = {
    "binormal": binormal, "heavy tail": heavy_tail, "saturated": saturated, "two decimals": two_decimals,
    "bfloat16": bfloat16,
}  # fmt: skip


def values_of(draw: Draw) -> Floats:
    """(3, len(METRICS)) of the first score, of the second, and their difference."""
    success, *scores = draw
    one, two = (np.array(list(failure_metrics(score, success).values())) for score in scores)
    return np.stack((one, two, one - two))


def simulate(population: str, n: int, errors: int, draws: int, seed: int = 0) -> dict[str, Any]:
    """Share of intervals that hold the true value, that lie below it and above it."""
    draw, rate = POPULATIONS[population], errors / n
    truth = values_of(draw(np.random.default_rng([seed, n, errors, 1]), max(400 * n, LEAST_TRUTH), rate))
    rng = np.random.default_rng([seed, n, errors, 0])
    ends = np.full((draws, 2, len(SHOWN), 2), np.nan)
    for i in range(draws):
        drawn = draw(rng, n, rate)
        success, *scores = drawn
        values, wrong = values_of(drawn), int(n - success.sum())
        one, two = (influence(score, success) for score in scores)
        for j, (value, rows) in enumerate(((values[0], one), (values[2], one - two))):
            for k, metric in enumerate(SHOWN):
                at = METRICS.index(metric)
                ends[i, j, k] = interval(metric, value[at], rows[:, at], n, wrong, difference=j == 1)
    row: dict[str, Any] = {"population": population, "n": n, "errors": errors, "draws": draws}
    for j, kind in enumerate(("value", "difference")):
        row[kind] = {}
        for k, metric in enumerate(SHOWN):
            low, high = ends[:, j, k].T
            true, defined = truth[2 * j, METRICS.index(metric)], ~np.isnan(low)
            row[kind][metric] = {
                "true": true, "covered": np.mean((low <= true) & (true <= high), where=defined),
                "below": np.mean(high < true, where=defined), "above": np.mean(low > true, where=defined),
                "width": np.median((high - low)[defined]), "defined": defined.mean(),
            }  # fmt: skip
            row[kind][metric] = {name: float(number) for name, number in row[kind][metric].items()}
    return row


def table(result: dict[str, Any]) -> str:
    """Markdown: least and greatest coverage over the populations, of the value and of the paired difference."""
    lines = ["| n, errors | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for kind in ("value", "difference"):
        for n, errors in CELLS:
            rows = [row for row in result["results"] if (row["n"], row["errors"]) == (n, errors)]
            cells = []
            for metric in SHOWN:
                covered = [100 * row[kind][metric]["covered"] for row in rows]
                cells.append(f"{min(covered):.1f}-{max(covered):.1f}")
            name = f"{n:,}, {errors}" + (", difference" if kind == "difference" else "")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def outside(result: dict[str, Any]) -> list[str]:
    """Cells whose coverage is more than two standard errors outside the band, one line each."""
    found = []
    for row in result["results"]:
        for kind in ("value", "difference"):
            for metric, cell in row[kind].items():
                error = 2 * np.sqrt(0.05 * 0.95 / (row["draws"] * cell["defined"]))
                if not BAND[0] - error <= cell["covered"] <= BAND[1] + error:
                    place = f"{row['population']}, {row['n']}, {row['errors']}: {metric} {kind}"
                    found.append(f"{place} {cell['covered']:.3f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=4_000, help="test sets a cell")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the table of these results, and no more")
    args = parser.parse_args()
    if args.table:
        result = json.loads(args.table.read_text())
        print(table(result), *outside(result), sep="\n")
        return
    start = time.process_time()
    facts = {**environment(), "numpy": np.__version__}
    rows = []
    for population in POPULATIONS:
        for n, errors in CELLS:
            rows.append(simulate(population, n, errors, args.draws))
            print(population, n, errors, f"{time.process_time() - start:.0f} CPU seconds", flush=True)
    result = {
        "what": f"coverage of {LEVEL:.0%} intervals", "environment": facts,
        "cpu_s": time.process_time() - start, "results": rows,
    }  # fmt: skip
    print(table(result), *outside(result), sep="\n")
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
