"""Time and memory of scores, metrics and intervals on the CPU: ``python -m bench.metrics``.

Seconds for each score over logits, for all metrics of all of them, for calibration, with the peak memory of the
process, against the number of samples; and for a report with intervals of all metrics of all scores and their paired
differences in one setting, with the CPU seconds over all threads, which a busy machine stretches less than the clock's.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import environment, write_json
from bench.metric_peers import measure_peers
from tal_fast.evaluation.evaluation import evaluate_samples
from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.evaluation.sample_scores import Samples
from tal_fast.metrics.calibration import calibration_metrics
from tal_fast.metrics.failure import failure_metrics
from tal_fast.metrics.ranking import tied_share
from tal_fast.scores.logits import SCORES, logit_scores
from tal_fast.utils.arrays import by_blocks

SIZES = (1_000, 5_000, 10_000, 50_000)
CLASSES = 1_000
INTERVALS = 10_000


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


def log_sum_exp(block: Any) -> Any:
    """A plain pass over a block of rows in float64: maximum, exponentials and their sum."""
    z = torch.from_numpy(block)
    top = z.amax(1)
    return (top + (z - top[:, None]).exp().sum(1).log()).numpy()


def measure(samples: int, classes: int) -> dict[str, Any]:
    logits, labels = outputs(samples, classes)
    before = peak_mib()
    cpu_s = time.process_time()
    right = logits.argmax(1) == labels
    seconds, scores = {}, {}
    for name, function in SCORES.items():
        seconds[name], scores[name] = timed(lambda function=function: function(logits))  # type: ignore[misc]
    one_pass_s, _ = timed(lambda: logit_scores(logits))
    plain_pass_s, _ = timed(lambda: by_blocks(log_sum_exp, logits))
    metrics_s, _ = timed(lambda: [failure_metrics(values, right) for values in scores.values()])
    calibration_s, _ = timed(lambda: calibration_metrics(logits, labels))
    cpu_s = time.process_time() - cpu_s
    return {
        "n": samples, "C": classes, "scores_s": seconds, "one_pass_s": one_pass_s,
        "plain_pass_s": plain_pass_s, "metrics_s": metrics_s, "calibration_s": calibration_s,
        "total_s": sum(seconds.values()) + metrics_s + calibration_s, "cpu_s": cpu_s, "accuracy": float(right.mean()),
        "tied_share": {name: tied_share(values) for name, values in scores.items()},
        "logits_mib": logits.nbytes / 2**20, "peak_mib_before": before, "peak_mib_after": peak_mib(),
    }  # fmt: skip


def measure_intervals(samples: int, classes: int) -> dict[str, Any]:
    logits, labels = outputs(samples, classes)
    right = logits.argmax(1) == labels
    scores = {name: function(logits) for name, function in SCORES.items()}
    found = Samples(right, scores, {}, {})
    cpu_s, before = time.process_time(), peak_mib()
    total_s, _ = timed(lambda: evaluate_samples(found, EvaluationOptions(intervals=True)))
    return {
        "n": samples, "scores": len(scores), "total_s": total_s, "cpu_s": time.process_time() - cpu_s,
        "added_peak_mib": peak_mib() - before,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a small case, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    args = parser.parse_args()
    sizes, classes = ((200,), 10) if args.smoke else (SIZES, CLASSES)
    result: dict[str, Any] = {
        "what": "scores, metrics and intervals on the CPU",
        "environment": {**environment(), "numpy": np.__version__, "torch_threads": torch.get_num_threads()},
        "results": [],
    }
    for samples in sizes:
        row = measure(samples, classes)
        print(
            f"n {samples:7,} x {classes:,}  scores {sum(row['scores_s'].values()):6.2f} s, in one "
            f"pass {row['one_pass_s']:.2f} s, a plain pass {row['plain_pass_s']:.2f} s  metrics "
            f"{row['metrics_s']:5.2f} s  calibration {row['calibration_s']:5.2f} s  all {row['total_s']:6.2f} s, "
            f"{row['cpu_s']:.2f} CPU seconds  "
            f"peak {row['peak_mib_after']:,.0f} MiB, logits {row['logits_mib']:,.0f} of it"
        )
        result["results"].append(row)
    row = measure_intervals(200 if args.smoke else INTERVALS, classes)
    print(
        f"metrics, intervals and differences: n {row['n']:,}, {row['scores']} scores in {row['total_s']:.2f} s, "
        f"{row['cpu_s']:.2f} CPU seconds, {row['added_peak_mib']:.0f} MiB more"
    )
    result["intervals"] = row
    result["peers"] = measure_peers(*[(2_000,)] * args.smoke)
    for row in result["peers"]:
        print(f"{row['metric']:13} n {row['n']:9,} {row['library']:18} {row['ms']:9.3f} ms")
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
