"""Train, evaluate, compare and calibrate on digits, by the commands' own functions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tal_fast import calibrate, compare, evaluate, train
from tests.helpers.training import one_thread  # noqa: F401


def test_train_evaluate_compare_calibrate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [tmp_path / "ce", tmp_path / "tal"]
    for run in runs:
        options = (
            f"--config digits-{run.name} --epochs 2 --data.train-limit 300 --data.image-size 8 --model.width 8 "
            f"--data.loader torch --data.workers 0 --logger none --device cpu --output {run}"
        )
        train.main(options.split())
        assert evaluate.main(["--run", str(run), "--device", "cpu", "--no-typicalness"]) == 0
        assert str(run / "report.html") in capsys.readouterr().out
    assert compare.main([str(run) for run in runs]) == 0
    printed = capsys.readouterr().out
    assert "ce" in printed
    assert "tal" in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert calibrate.main(["--run", str(runs[1]), "--risk", "0.9", "--output", str(tmp_path / "model")]) == 0
    threshold = json.loads((tmp_path / "model" / "threshold.json").read_text())
    assert threshold["accepted"] > 0
    assert (tmp_path / "model" / "selective.pt2").exists()
