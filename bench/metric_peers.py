"""One metric at a time beside other libraries' own code, for ``bench.metrics``.

CPU milliseconds on one thread, the least of many calls in turns. Metric objects hold their samples already: only
``compute`` is timed. A library that is not installed is left out; ``make test-peers`` installs all of them.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from time import process_time
from typing import Any

import numpy as np
import torch

from tal_fast.metrics.calibration import expected_calibration_error
from tal_fast.metrics.failure import failure_metrics

SIZES = (10_000, 100_000, 1_000_000)
BINS = 15
# Calls of a million samples; the others are made more often, for about the same time.
CALLS = 5


def imported(name: str) -> Any:
    """A module, or None if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


def contestants(scores: Any, correct: Any) -> dict[str, dict[str, Callable[[], Any]]]:
    """Metric -> library -> a call that computes it.

    Args:
        scores: (n,) float64 in [0.5, 1].
        correct: (n,) bool.
    """
    p, right = torch.from_numpy(scores), torch.from_numpy(correct).long()

    def ours(metric: str, convention: str = "tal_fast") -> Callable[[], Any]:
        return lambda: failure_metrics(scores, correct, convention, [metric])[metric]

    found: dict[str, dict[str, Callable[[], Any]]] = {
        name: {"tal_fast": ours(name)} for name in ("aurc", "augrc", "fpr95", "auroc", "aupr_success", "aupr_error")
    }
    found["ece"] = {"tal_fast": lambda: expected_calibration_error(scores, correct, BINS)}
    if uncertainty := imported("torch_uncertainty.metrics"):
        for name, kind in (("aurc", uncertainty.AURC), ("augrc", uncertainty.AUGRC)):
            metric = kind()
            metric.update(torch.stack([p, 1 - p], 1), 1 - right)
            found[name]["torch_uncertainty"] = lambda metric=metric: type(metric).compute(metric)
        fpr = uncertainty.FPR95(pos_label=1)
        fpr.update(p, right)
        found["fpr95"]["torch_uncertainty"] = lambda: type(fpr).compute(fpr)
    if torchmetrics := imported("torchmetrics.functional.classification"):
        found["auroc"]["torchmetrics"] = lambda: torchmetrics.binary_auroc(p, right)
        found["aupr_success"]["torchmetrics"] = lambda: torchmetrics.binary_average_precision(p, right)
        found["aupr_error"]["torchmetrics"] = lambda: torchmetrics.binary_average_precision(1 - p, 1 - right)
        found["ece"]["torchmetrics"] = lambda: torchmetrics.binary_calibration_error(p, right, n_bins=BINS)
    if sklearn := imported("sklearn.metrics"):
        found["auroc"]["scikit_learn"] = lambda: sklearn.roc_auc_score(correct, scores)
        found["aupr_success"]["scikit_learn"] = lambda: sklearn.average_precision_score(correct, scores)
        found["aupr_error"]["scikit_learn"] = lambda: sklearn.average_precision_score(~correct, -scores)
    if mapie := imported("mapie.metrics.calibration"):
        found["ece"]["mapie"] = lambda: mapie.expected_calibration_error(correct.astype(int), scores, num_bins=BINS)
    return found


def measure_peers(sizes: tuple[int, ...] = SIZES) -> list[dict[str, Any]]:
    """A row with CPU milliseconds for each size, metric and library.

    Raises:
        AssertionError: two libraries differ by more than 1e-4 (those in float32; areas with a factor n / (n - 1)), but
            for MAPIE, whose bins have other edges.
    """
    rows = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for n in sizes:
        rng = np.random.default_rng(n)
        correct = rng.random(n) < 0.8
        scores = 0.5 + (rng.random(n) + correct) / 4
        for metric, calls in contestants(scores, correct).items():
            for name, call in calls.items():
                if name != "mapie" and abs(float(call()) - float(calls["tal_fast"]())) > 1e-4 + 2 / n:
                    raise AssertionError(f"{metric} of {n} samples is {float(call())} by {name}; not timed")
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(CALLS * min(100, max(1, 1_000_000 // n))):
                for name, call in calls.items():
                    start = process_time()
                    call()
                    seconds[name].append(process_time() - start)
            rows += [
                {"n": n, "metric": metric, "library": name, "ms": min(times) * 1e3} for name, times in seconds.items()
            ]
    torch.set_num_threads(threads)
    return rows
