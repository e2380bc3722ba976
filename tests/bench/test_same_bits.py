"""``bench.same_bits`` notices one changed bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.same_bits import compare


class FinishedRun:
    """Stand-in for ``bench.same_bits.Code`` whose runs are there already."""

    def __init__(self, folder: Path, weight: float, seconds: float, aurc: float) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "checkpoints").mkdir()
        row: dict[str, Any] = {"epoch": 1, "aurc": 0.25, "seconds": seconds}
        content = {"epoch": 1, "model": {"weight": torch.tensor([weight, torch.nan])}, "history": [row]}
        torch.save(content, folder / "checkpoints" / "last.pt")
        (folder / "metrics.csv").write_text(f"epoch,aurc,seconds\n1,0.25,{seconds}\n")
        (folder / "report.json").write_text(json.dumps({"settings": {"old_fd": {"msp": {"aurc": aurc}}}}))

    def train_and_evaluate(self, case: str) -> Path:
        return self.folder


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({}, []),
        ({"seconds": 2.0}, []),
        ({"weight": 1.0 + 2**-23}, ["tensors: /model/weight"]),
        ({"aurc": 0.2500000001}, ["evaluation metrics: /settings/old_fd/msp/aurc"]),
    ],
)
def test_every_difference_but_timings_is_found(tmp_path: Path, change: dict[str, float], differing: list[str]) -> None:
    values = {"weight": 1.0, "seconds": 1.0, "aurc": 0.25}
    old, new = FinishedRun(tmp_path / "old", **values), FinishedRun(tmp_path / "new", **{**values, **change})
    found = compare("case", [old, new])  # type: ignore[list-item]
    assert found["differing"] == differing
    assert found["counts"]["tensors"] == 1


def test_tolerance_is_for_evaluation_metrics_alone(tmp_path: Path) -> None:
    old, new = FinishedRun(tmp_path / "old", 1.0, 1.0, 0.25), FinishedRun(tmp_path / "new", 1.0 + 2**-23, 1.0, 0.25001)
    found = compare("case", [old, new], tolerance=1e-3)  # type: ignore[list-item]
    assert found["differing"] == ["tensors: /model/weight"]
    assert found["largest"] == pytest.approx(1e-5)
