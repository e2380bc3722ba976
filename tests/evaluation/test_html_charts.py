"""Charts of the page."""

from __future__ import annotations

import pytest

from tal_fast.evaluation.html.charts import nice_ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0, 1.05, [0, 0.25, 0.5, 0.75, 1.0]),
        (-0.3, 0.5, [-0.2, 0, 0.2, 0.4]),
        (2, 2, [2]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)
