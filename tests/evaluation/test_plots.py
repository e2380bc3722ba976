"""Plots of a report where matplotlib is missing; the other plots are tested with the evaluator."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import numpy as np
import pytest

from tal_fast.evaluation import plots


def test_without_matplotlib_nothing_is_drawn_and_one_warning_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plots._can_draw.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            plots.risk_coverage(tmp_path / "curve.png", {})
            plots.confidence_histogram(tmp_path / "histogram.png", np.ones(3), {"msp": np.ones(3)}, {})
    finally:
        plots._can_draw.cache_clear()
    assert list(tmp_path.iterdir()) == []
    assert [record.getMessage() for record in caplog.records] == [
        "matplotlib is not installed (pip install matplotlib): the PNG plots are left out"
    ]
