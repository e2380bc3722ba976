"""Time and memory of scores, metrics and intervals on the CPU: ``python -m bench.metrics``.

Seconds for each score over logits, for all metrics of all of them, for calibration, with the peak memory of the
process, against the number of samples; and for bootstrap intervals of all metrics of all scores in one setting, with
the CPU seconds over all threads, which a busy machine stretches less than the clock's.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import environment, write_json
from tal_fast.metrics import bootstrap as intervals
from tal_fast.metrics.calibration import calibration_metrics
from tal_fast.metrics.failure import CONVENTIONS, failure_metrics
from tal_fast.metrics.ranking import tied_share
from tal_fast.scores.logits import SCORES

SIZES = (1_000, 5_000, 10_000, 50_000)
CLASSES = 1_000
RESAMPLES, RESAMPLED = 10_000, 10_000


def outputs(samples: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Random float32 logits of a classifier with an accuracy of about 75%, and labels."""
    rng = np.random.default_rng(samples)
    logits = rng.standard_normal((samples, classes), dtype=np.float32)
    labels = rng.integers(classes, size=samples)
    logits[np.arange(samples), labels] += 1.5 + 3 * rng.random(samples, dtype=np.float32)
    return logits, labels


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock seconds of a call, and its result."""
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def peak_mib() -> float:
    """Peak memory of this process in MiB."""
    kilo = 1024 if sys.platform != "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 2**20


def measure(samples: int, classes: int) -> dict[str, Any]:
    logits, labels = outputs(samples, classes)
    before = peak_mib()
    cpu_s = time.process_time()
    right = logits.argmax(1) == labels
    seconds, scores = {}, {}
    for name, function in SCORES.items():
        seconds[name], scores[name] = timed(lambda function=function: function(logits))  # type: ignore[misc]
    metrics_s, _ = timed(lambda: [failure_metrics(values, right) for values in scores.values()])
    calibration_s, _ = timed(lambda: calibration_metrics(logits, labels))
    cpu_s = time.process_time() - cpu_s
    return {
        "n": samples, "C": classes, "scores_s": seconds, "metrics_s": metrics_s, "calibration_s": calibration_s,
        "total_s": sum(seconds.values()) + metrics_s + calibration_s, "cpu_s": cpu_s, "accuracy": float(right.mean()),
        "tied_share": {name: tied_share(values) for name, values in scores.items()},
        "logits_mib": logits.nbytes / 2**20, "peak_mib_before": before, "peak_mib_after": peak_mib(),
    }  # fmt: skip


def measure_bootstrap(samples: int, resamples: int, classes: int) -> dict[str, Any]:
    logits, labels = outputs(samples, classes)
    right = logits.argmax(1) == labels
    scores = {name: function(logits) for name, function in SCORES.items()}
    cpu_s = time.process_time()
    fast_s, _ = timed(lambda: intervals.bootstrap(scores, right, resamples=resamples))
    cpu_s = time.process_time() - cpu_s
    few = max(1, resamples // 500)
    other_s = {
        convention: timed(lambda c=convention: intervals.bootstrap(scores, right, resamples=few, convention=c))[0]  # type: ignore[misc]
        for convention in CONVENTIONS[1:]
    }
    return {
        "n": samples, "resamples": resamples, "scores": len(scores), "total_s": fast_s,
        "threads": min(intervals._THREADS, os.cpu_count() or 1),
        "cpu_s": cpu_s,
        "ms_per_resample": fast_s / resamples * 1e3,
        "other_conventions_ms_per_resample": {name: s / few * 1e3 for name, s in other_s.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a small case, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    args = parser.parse_args()
    sizes, classes = ((200,), 10) if args.smoke else (SIZES, CLASSES)
    resampled = (200, 64, 10) if args.smoke else (RESAMPLED, RESAMPLES, 100)
    result: dict[str, Any] = {
        "what": "scores, metrics and intervals on the CPU",
        "environment": {**environment(), "numpy": np.__version__, "torch_threads": torch.get_num_threads()},
        "results": [],
    }
    for samples in sizes:
        row = measure(samples, classes)
        print(
            f"n {samples:7,} x {classes:,}  scores {sum(row['scores_s'].values()):6.2f} s  metrics "
            f"{row['metrics_s']:5.2f} s  calibration {row['calibration_s']:5.2f} s  all {row['total_s']:6.2f} s, "
            f"{row['cpu_s']:.2f} CPU seconds  "
            f"peak {row['peak_mib_after']:,.0f} MiB, logits {row['logits_mib']:,.0f} of it"
        )
        result["results"].append(row)
    row = measure_bootstrap(*resampled)
    slow = ", ".join(f"{name} {ms:.0f}" for name, ms in row["other_conventions_ms_per_resample"].items())
    print(
        f"bootstrap: n {row['n']:,}, {row['scores']} scores, {row['resamples']:,} resamples in {row['total_s']:.1f} s, "
        f"{row['cpu_s']:.1f} CPU seconds "
        f"({row['ms_per_resample']:.2f} ms each; in other conventions {slow} ms)"
    )
    result["bootstrap"] = row
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
