"""Charts of the page."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tal_fast.evaluation.html.charts import HEIGHT, WIDTH, confidence_histogram, reliability_diagram, training_curves
from tal_fast.metrics.curves import reliability

NUMBER = r"-?\d+(?:\.\d+)?"


def test_a_chart_has_no_style_of_its_own_and_lies_within_its_box() -> None:
    rng = np.random.default_rng()
    chart = confidence_histogram("$x_1^", {"ID, correct": rng.normal(size=90), "OOD: $": rng.normal(3, 1, 50)})
    assert chart is not None
    assert not re.search(r"style|#[0-9a-f]{6}|font|<!--|\$", chart.svg)
    points = re.findall(rf"[ML] ({NUMBER}) ({NUMBER})", chart.svg)
    assert len(points) > 100
    assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in points)
    assert [name for _, name in chart.legend] == ["ID, correct (90)", "OOD: $ (50)"]


def test_bars_of_the_reliability_diagram_are_as_high_as_the_accuracy() -> None:
    rng = np.random.default_rng()
    probability = rng.uniform(0.2, 1, 500)
    bins = reliability(probability, rng.random(500) < probability)
    chart = reliability_diagram(bins, 0.0)
    bars = re.findall(r'<g class="accuracy">\s*<path d="([^"]*)"', chart.svg)
    heights = [np.ptp([float(y) for _, y in re.findall(rf"({NUMBER}) ({NUMBER})", bar)]) for bar in bars]
    accuracy = bins.accuracy[bins.samples > 0]
    np.testing.assert_allclose(np.divide(heights, max(heights)), accuracy / accuracy.max(), atol=2e-3)


@pytest.mark.parametrize("epochs", [0, 1, 4])
def test_training_of_any_length_is_drawn(epochs: int) -> None:
    rows = [{"epoch": e + 1.0, "train_loss": 2.0, "val_loss": float("nan")} for e in range(epochs)]
    assert [chart.title for chart in training_curves(rows)] == ["Loss"] * (epochs > 0)
