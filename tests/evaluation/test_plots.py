"""Plots of an evaluation without matplotlib; with it they are tested with the evaluator."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from tal_fast.evaluation import plots


def test_without_matplotlib_a_warning_names_it_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING):
        plots.write_plots(None, tmp_path)  # type: ignore[arg-type]
    assert "pip install matplotlib" in caplog.text
    assert list(tmp_path.iterdir()) == []
