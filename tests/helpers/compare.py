"""Reports and run folders for the tests of comparisons."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tal_fast.config.schema import Config
from tal_fast.evaluation import compare_command
from tal_fast.evaluation.evaluation import evaluate_samples, write_evaluation
from tal_fast.evaluation.report import EvaluationOptions, Report
from tal_fast.evaluation.sample_scores import Samples
from tal_fast.metrics.failure import METRICS
from tal_fast.metrics.settings import Mix


def one_report(score: str | None, aurc: float, auroc: float, **changes: Any) -> Report:
    """A report with two scores in one setting."""
    values = {**dict.fromkeys(METRICS, 0.5), "aurc": aurc, "auroc": auroc}
    return {
        "format": 1, "id_accuracy": 0.9, "convention": "tal_fast", "mix": "all", "seed": 0, "ood_names": [],
        "counts": {"id": 10, "id_right": 9, "ood": {}}, "score": score,
        "settings": {"old_fd": {"msp": values, "cosine": {**values, "aurc": 0.01}}}, **changes,
    }  # fmt: skip


def write_run(
    folder: Path, method: str, seed: int, quality: float, n: int = 400, identity: str = "same"
) -> tuple[np.ndarray, np.ndarray]:
    """Write config, report and samples of a run, as training and evaluation would; returns scores and correctness."""
    folder.mkdir(parents=True)
    config = Config.from_dict({"method": {"name": method}, "seed": seed, "output": str(folder), "threads": seed + 1})
    config.save(folder / "config.yaml")
    correct = np.random.default_rng(0).random(n) < 0.8
    scores = quality * correct + np.random.default_rng(seed + 1).normal(size=n)
    ood = np.random.default_rng(seed + 10).normal(size=90)
    samples = Samples(correct, {"msp": scores}, {"noise": {"msp": ood}}, {"val": identity, "noise": "x"})
    evaluation = evaluate_samples(samples, EvaluationOptions(mix=Mix("all")))
    evaluation.report["score"] = "msp"
    write_evaluation(evaluation, folder)
    return scores, correct


def table_lines(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines that the command prints."""
    assert compare_command.main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def csv_rows(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, str, str], dict[str, str]]:
    """Rows that the command prints as CSV, by run, setting and metric."""
    lines = table_lines([*arguments, "--format", "csv"], capsys)
    return {(row["run"], row["setting"], row["metric"]): row for row in csv.DictReader(io.StringIO("\n".join(lines)))}
