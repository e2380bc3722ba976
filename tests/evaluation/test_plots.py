"""PNG plots."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tal_fast.evaluation.evaluation import evaluate_samples
from tal_fast.evaluation.plots import COLOURS, LINE_STYLES, write_plots
from tal_fast.evaluation.sample_scores import Samples


def test_plots_show_a_line_per_score(evaluated_run: Path) -> None:
    for name in ("risk_coverage.png", "confidence_histogram.png"):
        with Image.open(evaluated_run / name) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) > 300
        for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # of the first two lines
            assert (pixels == colour).all(2).sum() > 20, name


@pytest.mark.parametrize("name", ["$", "$x_1^", r"a$\frac$", "50%_{"])
def test_names_are_not_formulas(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng()
    scores = {name: rng.random(30), "msp": rng.random(30)}
    samples = Samples(rng.random(30) < 0.7, scores, {name: scores, "b": scores}, {})
    write_plots(evaluate_samples(samples), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"risk_coverage.png", "confidence_histogram.png"}


def test_no_two_of_many_lines_look_the_same() -> None:
    lines = {(COLOURS[i % len(COLOURS)], LINE_STYLES[i % len(LINE_STYLES)]) for i in range(24)}
    assert len(lines) == 24


def test_without_matplotlib_one_warning_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    evaluation = evaluate_samples(Samples(np.array([True, False]), {"msp": np.array([1.0, 2.0])}, {}, {}))
    with caplog.at_level(logging.WARNING):
        write_plots(evaluation, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert [record.getMessage() for record in caplog.records] == [
        "matplotlib is not installed, so no plots are written; pip install matplotlib"
    ]
