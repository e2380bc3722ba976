"""Experiment files and finished runs for tests of the experiments package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tal_fast.evaluation import report
from tal_fast.evaluation.evaluation import evaluate_samples, write_evaluation
from tal_fast.evaluation.sample_scores import Samples
from tal_fast.experiments import scheduler
from tal_fast.experiments.command import main
from tal_fast.experiments.plan import Experiment
from tal_fast.metrics.settings import Mix

SMALL = {
    "data": {"loader": "torch", "workers": 0, "train_limit": 200, "image_size": 8},
    "epochs": 2,
    "device": "cpu",
    "logger": "none",
}


def write(path: Path, **changes: Any) -> Path:
    """Write an experiment file; a change to None removes the key."""
    content = {
        "base": "digits-ce",
        "overrides": SMALL,
        "seeds": [0, 1],
        "methods": {"ce": {"method.name": "ce"}, "tal": {"method": {"name": "tal", "queue_size": 150}}},
        **changes,
    }
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
    return path


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def write_evaluated_run(
    path: Path, quality: float, seed: int, accuracy: float = 0.8, sets: tuple[str, ...] = ("far", "near")
) -> None:
    """Write the report and samples of an evaluation to a run's folder."""
    rng = np.random.default_rng(seed + 1)
    correct = np.random.default_rng(0).random(300) < accuracy
    scores = {"msp": quality * correct + rng.normal(size=300)}
    ood = {name: {"msp": rng.normal(size=90) - i} for i, name in enumerate(sets)}
    samples = Samples(correct, scores, ood, dict.fromkeys(("val", *sets), "same"))
    evaluation = evaluate_samples(samples, report.EvaluationOptions(mix=Mix("all")))
    evaluation.report.update({"score": "msp", "run": str(path)})
    write_evaluation(evaluation, path)


def finish_jobs(output: Path, experiment: Experiment, quality: Callable[[Any], tuple[float, float]]) -> None:
    """Finish all jobs, with reports of the quality and accuracy that ``quality`` returns; NaN skips a job."""
    for folder in scheduler.job_folders(experiment, output):
        good, accuracy = quality(folder.job)
        if np.isnan(accuracy):
            continue
        folder.prepare()
        write_evaluated_run(folder.path, good, folder.job.seed, accuracy)
        folder.update(trained=True)
        folder.set_evaluated(experiment.evaluate)
