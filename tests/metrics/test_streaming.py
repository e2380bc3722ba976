"""Metrics over batches equal the metrics of everything at once, on one process and on several."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tal_fast.metrics import streaming
from tal_fast.metrics.failure import CONVENTIONS, METRICS, failure_metrics
from tal_fast.metrics.streaming import AUGRC, AURC, AUROC, EAURC, FPR95, FailureMetrics

SINGLE: dict[str, type[streaming._SingleMetric]] = {m.name: m for m in (AURC, EAURC, AUGRC, FPR95, AUROC)}


def case(n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    scores = np.round(rng.random(n), 2)
    return scores, rng.random(n) < 0.3 + 0.6 * scores


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_batches_add_up(convention: str) -> None:
    scores, correct = case()
    want = failure_metrics(scores, correct, convention)
    everything = FailureMetrics(convention)
    metrics = {name: kind(convention) for name, kind in SINGLE.items()}
    for part in np.split(np.arange(300), [7, 7, 100, 299]):
        for metric in (everything, *metrics.values()):
            metric.update(torch.from_numpy(scores[part]), torch.from_numpy(correct[part]))
    assert {k: v.item() for k, v in everything.compute().items()} == want
    for name, metric in metrics.items():
        value = metric.compute()
        assert (value.dtype, value.shape) == (torch.float64, ())
        assert value.item() == want[name]


def test_computing_and_resetting_between_batches() -> None:
    scores, correct = case()
    metric = AURC()
    assert metric.compute().isnan()
    metric.update(scores[:100], correct[:100])
    assert metric.compute().item() == failure_metrics(scores[:100], correct[:100])["aurc"]
    metric.update(scores[100:], correct[100:])
    assert metric.compute().item() == failure_metrics(scores, correct)["aurc"]
    metric.reset()
    metric.update(scores[:9], correct[:9])
    assert metric.compute().item() == failure_metrics(scores[:9], correct[:9])["aurc"]


def test_values_of_all_types_are_copied() -> None:
    scores, correct = torch.tensor([0.5, 0.25, 0.75], requires_grad=True), torch.tensor([1, 0, 1])
    metric = FailureMetrics()
    metric.update(scores, correct)
    metric.update(scores.bfloat16(), correct.bool())
    metric.update([16777217, 16777216], [True, False])
    with torch.no_grad():
        scores.zero_()
    both = [0.5, 0.25, 0.75, 0.5, 0.25, 0.75, 16777217, 16777216]
    assert metric.values() == failure_metrics(both, [1, 0, 1, 1, 0, 1, 1, 0])


@pytest.mark.parametrize(
    ("confidence", "correct"), [(torch.rand(3), torch.ones(2)), (torch.rand(3, 1), torch.ones(3, 1)), (0.5, 1)]
)
def test_wrong_shapes_are_refused_at_once(confidence: Any, correct: Any) -> None:
    metric = AURC()
    with pytest.raises(ValueError, match="must be vectors"):
        metric.update(confidence, correct)
    assert metric.compute().isnan()


def test_invalid_values_are_refused_by_compute() -> None:
    metric = AURC()
    metric.update([0.5, float("nan")], [1, 0])
    with pytest.raises(ValueError, match="1 NaN of 2"):
        metric.compute()
    with pytest.raises(ValueError, match="unknown convention"):
        AURC("x")


def _rank(rank: int, world: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    scores, correct = case()
    # Unequal counts and other types for one metric, no samples at all on rank 1 for the other.
    bounds = [(0, 210), (210, 300)][rank]
    metric, area = FailureMetrics("tal"), AURC()
    for start in range(*bounds, 37):
        part = slice(start, min(start + 37, bounds[1]))
        metric.update(scores[part], correct[part].astype(np.int64 if rank == 1 else bool))
    if rank == 0:
        area.update(torch.from_numpy(scores), torch.from_numpy(correct))
    want = failure_metrics(scores, correct, "tal")
    assert {name: value.item() for name, value in metric.compute().items()} == want
    assert area.compute().item() == failure_metrics(scores, correct)["aurc"]
    groups: list[Any] = [dist.new_group([r]) for r in range(world)]
    alone = AURC(group=groups[rank])
    alone.update(scores[: rank + 5], correct[: rank + 5])
    assert alone.compute().item() == failure_metrics(scores[: rank + 5], correct[: rank + 5])["aurc"]
    if rank == 0:
        area.update([float("nan")], [1])
    with pytest.raises(ValueError, match="1 NaN of 301"):
        area.compute()
    Path(folder, f"done-{rank}").touch()
    dist.destroy_process_group()


def test_ranks_with_unequal_counts(tmp_path: Path) -> None:
    mp.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-0", "done-1"]


def test_single_metrics_have_the_names_of_the_metrics() -> None:
    assert set(SINGLE) <= set(METRICS)
