"""report.json: its content, and how it is written and read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tal_fast.evaluation.evaluation import evaluate_samples
from tal_fast.evaluation.report import EvaluationOptions, read_report, write_report
from tal_fast.evaluation.sample_scores import Samples
from tal_fast.evaluation.tables import format_report
from tal_fast.metrics.failure import METRICS, failure_metrics
from tal_fast.metrics.influence import influence
from tal_fast.metrics.intervals import interval
from tal_fast.metrics.settings import Mix
from tal_fast.runs.load import load_run
from tal_fast.scores.logits import SCORES
from tests.helpers.evaluation import read_json


def test_report_of_a_run_against_an_independent_pass(evaluated_run: Path) -> None:
    text = (evaluated_run / "report.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["run"] == str(evaluated_run)
    assert (found["method"], found["score"], found["checkpoint"], found["epoch"]) == ("tal", "cosine", "best", 7)
    assert (found["mix"], found["convention"], found["ood_names"]) == ("balanced-random", "tal_fast", ["noise"])
    assert found["samples"]["old_fd"]["n"] == found["counts"]["id"] == 200
    assert list(found["settings"]) == ["old_fd", "ood", "new_fd", "shift"]
    run = load_run(evaluated_run)
    with torch.inference_mode():
        passes = [(run.model(images)[0], labels) for images, labels, _ in run.data.loader("val", batch_size=77)]
    logits, labels = (torch.cat(parts) for parts in zip(*passes, strict=True))
    correct = logits.argmax(1) == labels
    assert found["id_accuracy"] == pytest.approx(correct.double().mean().item())
    for score, values in found["settings"]["old_fd"].items():
        # Batches of another size round differently.
        assert values == pytest.approx(failure_metrics(SCORES[score](logits), correct), abs=1e-4), score


def test_several_sets_have_their_plain_mean() -> None:
    rng = np.random.default_rng(1)
    correct, scores = rng.random(200) < 0.8, rng.normal(size=200)
    sets = {name: {"msp": rng.normal(size=n) - 1} for name, n in (("noise", 90), ("far", 40))}
    shifts = {name: (rng.random(n) < 0.5, {"msp": rng.normal(size=n)}) for name, n in (("fog", 30), ("snow", 60))}
    samples = Samples(correct, {"msp": scores}, sets, {}, shifts=shifts)
    report = evaluate_samples(samples, EvaluationOptions(mix=Mix.parse("prior=0.25"))).report
    assert list(report["settings"]) == [
        "old_fd", "ood/noise", "new_fd/noise", "ood/far", "new_fd/far", "shift/fog", "shift/snow", "ood", "new_fd",
        "shift",
    ]  # fmt: skip
    assert (report["samples"]["ood/far"]["id"], report["samples"]["ood/far"]["ood"]) == (120, 40)
    for kind, names in (("ood", sets), ("new_fd", sets), ("shift", shifts)):
        for metric in METRICS:
            each = [report["settings"][f"{kind}/{name}"]["msp"][metric] for name in names]
            assert report["settings"][kind]["msp"][metric] == pytest.approx(sum(each) / 2)


def test_undefined_metrics_are_null_with_a_reason(tmp_path: Path) -> None:
    samples = Samples(np.ones(20, bool), {"msp": np.arange(20.0)}, {}, {})
    write_report(evaluate_samples(samples).report, tmp_path / "report.json")
    assert "NaN" not in (tmp_path / "report.json").read_text()
    found = read_json(tmp_path)
    assert found["settings"]["old_fd"]["msp"]["auroc"] is None
    assert found["settings"]["old_fd"]["msp"]["aurc"] == 0
    assert found["undefined"]["old_fd"]["auroc"] == "there are no errors among the 20 samples"
    assert math.isnan(read_report(tmp_path)["settings"]["old_fd"]["msp"]["auroc"])


def test_a_report_without_samples(tmp_path: Path) -> None:
    samples = Samples(np.zeros(0, bool), {"msp": np.zeros(0)}, {"far": {"msp": np.zeros(3)}}, {})
    write_report(evaluate_samples(samples).report, tmp_path / "report.json")
    found = read_json(tmp_path)
    assert found["id_accuracy"] is None
    assert found["undefined"]["new_fd"]["aurc"] == "there are no samples"


def test_intervals_are_those_of_the_influences() -> None:
    rng = np.random.default_rng(1)

    def scores(n: int, shift: float = 0.0) -> dict[str, np.ndarray]:
        return {name: rng.normal(size=n) + shift for name in ("msp", "energy")}

    correct = rng.random(200) < 0.8
    ood, shifts = {"a": scores(90, -1), "b": scores(60)}, {"fog": (rng.random(80) < 0.5, scores(80))}
    samples = Samples(correct, scores(200), ood, {}, shifts=shifts)
    report = evaluate_samples(samples, EvaluationOptions(mix=Mix("all"), seed=3, intervals=True), "energy").report
    assert report["bootstrap"]["few"] == {}
    keys = ["old_fd", "ood/a", "new_fd/a", "ood/b", "new_fd/b", "shift", "ood", "new_fd"]
    assert sorted(report["intervals"]) == sorted(report["differences"]) == sorted(keys)
    auroc, (success, fog) = METRICS.index("auroc"), shifts["fog"]
    rows = {name: influence(values, success)[:, auroc] for name, values in fog.items()}
    point, size = report["settings"]["shift"], (80, int(80 - success.sum()))
    expected = interval("auroc", point["msp"]["auroc"], rows["msp"], *size)
    assert report["intervals"]["shift"]["msp"]["auroc"] == list(expected)
    assert report["differences"]["shift"] == {"msp": report["differences"]["shift"]["msp"]}  # to the baseline, energy
    gap = point["msp"]["auroc"] - point["energy"]["auroc"]
    expected = interval("auroc", gap, rows["msp"] - rows["energy"], *size, difference=True)
    assert report["differences"]["shift"]["msp"]["auroc"] == [gap, *expected]


def test_few_errors_are_noted_and_undefined_metrics_have_no_interval(tmp_path: Path) -> None:
    samples = Samples(np.ones(30, bool), {"msp": np.ones(30)}, {}, {})
    write_report(evaluate_samples(samples, EvaluationOptions(intervals=True)).report, tmp_path / "report.json")
    report = read_json(tmp_path)
    assert report["intervals"]["old_fd"]["msp"]["aurc"] == [0, pytest.approx(1 - 0.025 ** (1 / 30))]
    assert report["intervals"]["old_fd"]["msp"]["auroc"] == [None, None]
    assert report["bootstrap"]["few"] == {"old_fd": {"errors": 0, "successes": 30}}
    assert "Old FD: 0 errors; intervals are not verified below 8" in format_report(report)
    samples = Samples(np.arange(30) < 22, {"msp": np.ones(30)}, {}, {})
    assert evaluate_samples(samples, EvaluationOptions(intervals=True)).report["bootstrap"]["few"] == {}


def test_no_intervals_unless_asked_for() -> None:
    report = evaluate_samples(Samples(np.array([True, False]), {"msp": np.array([1.0, 2.0])}, {}, {})).report
    assert "bootstrap" not in report
    assert "intervals" not in report


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "there is no"), ("{", "cannot be read as JSON"), ("[]", "is not a report of format 1")],
)
def test_files_that_are_not_reports_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_report(tmp_path)
