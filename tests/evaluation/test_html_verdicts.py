"""Verdicts on the settings of an evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tal_fast.evaluation.evaluation import Evaluation, evaluate_samples
from tal_fast.evaluation.html.verdicts import verdicts
from tal_fast.evaluation.npz import read_npz
from tal_fast.evaluation.pipeline import evaluate_outputs
from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.evaluation.sample_scores import Samples
from tests.helpers.evaluation import write_npz


def evaluation_of(shift: float, ood_shift: float = 0.0, intervals: bool = False) -> Evaluation:
    """Evaluation whose errors and OOD samples lie this far below the successes, in standard deviations."""
    rng = np.random.default_rng(5)
    correct = np.arange(400) >= 60
    values = rng.normal(size=400) + shift * correct
    scores = {"own": values, "sharp": values + correct}
    ood = {"photos": {name: rng.normal(size=300) + shift - ood_shift for name in scores}}
    return evaluate_samples(Samples(correct, scores, ood, {}), EvaluationOptions(intervals=intervals), "own")


@pytest.mark.parametrize(
    ("shift", "words", "level"),
    [
        (0.0, "own separates errors from correct predictions no better than chance: AUROC 0.", "poor"),
        (-1.0, "own separates errors from correct predictions worse than chance, in the wrong order: AUROC 0.", "poor"),
        (0.5, "own separates errors from correct predictions weakly: AUROC 0.", "fair"),
        (3.0, "own separates errors from correct predictions very well: AUROC 0.", "good"),
    ],
)
def test_a_verdict_follows_from_the_interval(shift: float, words: str, level: str) -> None:
    title, sentence, found = verdicts(evaluation_of(shift))[0]
    assert (title, found) == ("Old FD", level)
    assert sentence.startswith(words)
    assert sentence.endswith("% are errors instead of 15.00%.")


def test_foreign_images_that_cannot_be_told_are_named() -> None:
    evaluation = evaluation_of(1.5, 0.25, intervals=True)
    by_title = {title: sentence for title, sentence, _ in verdicts(evaluation)}
    assert "foreign from in-distribution images no better than chance" in by_title["OOD against photos"]
    low, high = evaluation.report["intervals"]["old_fd"]["own"]["auroc"][-2:]
    assert f"[{low:.3f}, {high:.3f}]" in by_title["Old FD"]


def test_few_errors_are_no_verdict_of_chance() -> None:
    correct = np.arange(60) >= 3
    values = np.where(correct, 1.0, [*(0.0, 0.1, 2.0), *[0.0] * 57]) + np.linspace(0, 0.5, 60)
    _, sentence, level = verdicts(evaluate_samples(Samples(correct, {"own": values}, {}, {})))[0]
    assert level == "none"
    assert "to an unknown degree, with too few samples to tell it from chance: AUROC 0.6" in sentence


def test_a_setting_without_errors_has_no_verdict_but_a_reason(tmp_path: Path) -> None:
    labels = np.arange(40) % 4
    path = write_npz(tmp_path / "x.npz", logits=np.eye(4)[labels] * 3, labels=labels, ood_noise_logits=None)
    evaluation = evaluate_outputs(read_npz(path))
    assert [v[1:] for v in verdicts(evaluation)] == [
        ("Cannot be judged: there are no errors among the 40 samples.", "none")
    ]
