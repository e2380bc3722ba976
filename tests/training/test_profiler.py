"""Chrome trace of a window of steps."""

from __future__ import annotations

import json
from pathlib import Path

from tal_fast.training.trainer import Trainer
from tests.helpers.training import config


def test_the_profile_is_a_chrome_trace_of_the_window(tmp_path: Path) -> None:
    Trainer(config(tmp_path, epochs=1, profile="2:4")).fit()
    trace = json.loads((tmp_path / "profile" / "trace-rank0.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert sum(name == "Optimizer.step#SGD.step" for name in names) == 2
