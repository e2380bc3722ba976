"""The soak of the queue: it passes, and sees planted faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import soak
from tal_fast import FeatureQueue
from tests.helpers.backends import NEEDS_EXTENSION

pytestmark = NEEDS_EXTENSION


def test_small_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "RUNS", ((50, torch.float32), (5000, torch.float64)))
    monkeypatch.setattr(soak, "CHECKS", 20)
    threads = torch.get_num_threads()
    try:
        assert soak.main(["--pushes", "60000", "--out", str(tmp_path / "soak.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads((tmp_path / "soak.json").read_text())
    assert result["pushes"] >= 60_000
    assert [run["capacity"] for run in result["runs"]] == [50, 5000, 5000]
    assert all(run["checks"] > 10 for run in result["runs"][:2])


@pytest.mark.parametrize("fault", ["an entry lost", "an entry changed", "a nearer entry missed"])
def test_soak_notices(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    push, nearest = FeatureQueue.push, FeatureQueue.nearest

    def faulty_push(self: FeatureQueue, mean: Any, std: Any, accepted: Any = None) -> None:
        if self.backend == "native" and len(mean) > 300:
            if fault == "an entry lost":
                mean, std, accepted = mean[1:], std[1:], None if accepted is None else accepted[1:]
            if fault == "an entry changed":
                std = std + torch.finfo(std.dtype).eps * std.abs()
        push(self, mean, std, accepted)

    def faulty_nearest(self: FeatureQueue, mean: Any, std: Any) -> Any:
        distance = nearest(self, mean, std)
        return distance * 1.0001 if self.backend == "native" and fault == "a nearer entry missed" else distance

    monkeypatch.setattr(FeatureQueue, "push", faulty_push)
    monkeypatch.setattr(FeatureQueue, "nearest", faulty_nearest)
    with pytest.raises(soak.Failed):
        soak.soak(5000, torch.float32, 20_000)


def test_committed_soak_reached_its_end() -> None:
    result = json.loads((Path(soak.__file__).parent / "results" / "soak_pushes_cpu.json").read_text())
    assert result["pushes"] >= 24_000_000
    assert len(result["runs"]) == len(soak.RUNS) + 1
    assert result["runs"][-1]["threads"] == soak.THREADS
