"""Simulation of thresholds: its committed results, their table in the documentation, and its populations."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from bench import thresholds


def test_the_documentation_has_the_committed_results() -> None:
    text = thresholds.PAGE.read_text()
    assert thresholds.fill_in(text, json.loads(thresholds.RESULTS.read_text())) == text
    assert "| calibrated | 2,500 | 2% |" in text


def test_the_committed_results_keep_the_promise() -> None:
    result = json.loads(thresholds.RESULTS.read_text())
    assert len(result["results"]) == len(thresholds.CELLS) * len(thresholds.populations(0.1))
    for row in result["results"]:
        allowed = 1 - result["confidence"]
        assert row["tal-fast"]["violations"] <= allowed + 2 * math.sqrt(allowed * (1 - allowed) / row["draws"])
        assert row["tal-fast"]["coverage"] >= row["union bound"]["coverage"]
        assert row["refused_by_tal_fast_alone"] == 0


@pytest.mark.parametrize("name", list(thresholds.populations(0.1)))
def test_a_population_has_the_risk_that_it_states(name: str) -> None:
    population = thresholds.Population(*thresholds.populations(0.1)[name])
    scores, correct = population.draw(400_000, np.random.default_rng(0))
    for threshold in (-0.5, -0.8):
        coverage, risk = population.accepted(threshold)
        accept = scores > threshold
        assert accept.mean() == pytest.approx(coverage, abs=0.005)
        assert 1 - correct[accept].mean() == pytest.approx(risk, abs=0.005)
    best = population.best_coverage(0.1)
    assert best == 0 or population.accepted(-best + (1 / 40 if population.levels else 0))[1] <= 0.1 * (1 + 1e-4)


def test_a_small_simulation_runs() -> None:
    population = thresholds.Population(*thresholds.populations(0.1)["calibrated"])
    row = thresholds.simulate("calibrated", population, 200, 0.1, 20, 0)
    assert row["oracle"] == pytest.approx(0.725, abs=1e-4)
    for name in thresholds.PROCEDURES:
        assert 0 <= row[name]["coverage"] <= 1
    assert row["tal-fast"]["coverage"] >= row["union bound"]["coverage"] > 0
