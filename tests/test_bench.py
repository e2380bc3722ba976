"""The benchmarks' own parts: the list queue they compare with is right, and they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import CASES, golden, relative, trace

from bench.harness import time_side_by_side
from bench.list_queue import ListQueueTAL

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("case", CASES)
def test_list_queue_matches_the_golden_data(case: str) -> None:
    g = golden(case)
    step = ListQueueTAL(int(g["capacity"]), *(float(g[k]) for k in ("t_min", "t_max", "t_wrong")))
    step.means, step.stds = g["queue_mean"].tolist(), g["queue_std"].tolist()
    logits = g["logits"].double().requires_grad_()
    loss = step(logits, g["features"].double(), g["labels"], warmup=bool(g["warmup"]))
    loss.backward()
    assert relative(loss, g["released/loss"]) <= 1e-12
    assert logits.grad is not None
    assert relative(logits.grad, g["released/grad"]) <= 1e-7
    torch.testing.assert_close(torch.tensor(step.means), g["queue_mean_after"].float(), rtol=1e-6, atol=0)


def test_list_queue_matches_the_golden_trace() -> None:
    t = trace()
    step = ListQueueTAL(int(t["capacity"]))
    for i in range(len(t["logits"])):
        loss = step(
            t["logits"][i].double(), t["features"][i].double(), t["labels"][i], warmup=i < int(t["warmup_steps"])
        )
        assert relative(loss, t["loss_released"][i]) <= 1e-12
        assert len(step.means) == int(t["queue_len"][i])


def test_side_by_side_runs_in_turns() -> None:
    order: list[str] = []
    times = time_side_by_side({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 6, 1.0, block=3)
    assert "".join(order) == "aabb" + "aaabbb" * 2
    assert times["a"]["repeats"] == 6


@pytest.mark.parametrize("command", ["bench.loss_step", "bench.queue_cost", "bench.loaders", "bench.metrics"])
def test_benchmarks_run(command: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", command, "--smoke", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {"cpu", "torch", "commit"} <= set(result["environment"])
    assert result["results"]
