"""report.json: its content, and how it is written and read."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tal_fast.evaluation.evaluation import evaluate_samples
from tal_fast.evaluation.report import EvaluationOptions, read_report, write_report
from tal_fast.evaluation.sample_scores import Samples
from tal_fast.evaluation.tables import format_report, setting_title
from tal_fast.metrics.failure import METRICS, failure_metrics
from tal_fast.metrics.further import further_metrics, operating_point
from tal_fast.metrics.influence import influence
from tal_fast.metrics.intervals import interval
from tal_fast.metrics.joint import binned_joint_metrics, joint_metrics
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


def test_near_and_far_sets_have_means_of_their_own() -> None:
    rng = np.random.default_rng(2)
    correct, scores = rng.random(60) < 0.8, rng.normal(size=60)
    sets = {name: {"msp": rng.normal(size=30) - 1} for name in ("near/a", "near/b", "far/c", "other")}
    options = EvaluationOptions(mix=Mix("all"), intervals=True)
    report = evaluate_samples(Samples(correct, {"msp": scores, "half": scores / 2}, {
        name: {**each, "half": each["msp"] / 2} for name, each in sets.items()
    }, {}), options).report  # fmt: skip
    for key, members in (("near", ["near/a", "near/b"]), ("far", ["far/c"])):
        mean = np.mean([report["settings"][f"new_fd/{name}"]["msp"]["aurc"] for name in members])
        assert report["settings"][f"new_fd/{key}"]["msp"]["aurc"] == pytest.approx(mean)
        low, high = report["intervals"][f"new_fd/{key}"]["msp"]["aurc"]
        assert low < mean < high
        assert f"mean over {len(members)} {key} OOD set{'s' if len(members) > 1 else ''}" in setting_title(
            f"ood/{key}", report
        )
    assert "mean over 4 OOD sets" in setting_title("new_fd", report)


def test_full_spectrum_counts_shifted_sets_as_id() -> None:
    rng = np.random.default_rng(3)
    correct, scores, noise = rng.random(50) < 0.8, rng.normal(size=50), rng.normal(size=40)
    shifts = {name: (rng.random(n) < 0.5, {"msp": rng.normal(size=n)}) for name, n in (("fog", 30), ("snow", 20))}
    samples = Samples(correct, {"msp": scores}, {"noise": {"msp": noise}}, {}, shifts=shifts)
    evaluation = evaluate_samples(samples, EvaluationOptions(mix=Mix.parse("all,full-spectrum")))
    report = evaluation.report
    assert (report["mix"], report["samples"]["old_fd"]["n"]) == ("all,full-spectrum", 50)
    assert report["samples"]["ood"] == {"n": 140, "id": 100, "ood": 40, "errors": 40}
    everything = np.concatenate([scores, shifts["fog"][1]["msp"], shifts["snow"][1]["msp"], noise])
    right = np.concatenate([correct, shifts["fog"][0], shifts["snow"][0], np.zeros(40)])
    assert report["settings"]["new_fd"]["msp"] == failure_metrics(everything, right)
    assert report["settings"]["ood"]["msp"] == failure_metrics(everything, np.arange(140) < 100)
    with pytest.raises(ValueError, match="the mix first-n,full-spectrum needs shifted sets"):
        evaluate_samples(replace(samples, shifts={}), EvaluationOptions(mix=Mix.parse("first-n,full-spectrum")))


def test_further_metrics_on_request(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    correct = rng.random(80) < 0.7
    scores = {"msp": rng.random(80), "energy": rng.normal(size=80)}
    ood = {"noise": {"msp": rng.random(20), "energy": rng.normal(size=20)}}
    names = ("naurc", "coverage@risk=0.5", "ds=msp+energy", "ds=energy+msp")
    options = EvaluationOptions(scores=["msp", "energy"], mix=Mix("all"), metrics=names)
    report = evaluate_samples(Samples(correct, scores, ood, {}), options).report
    write_report(report, tmp_path / "report.json")
    found = read_report(tmp_path)["further"]
    assert found["old_fd"]["msp"] == {
        "naurc": further_metrics(scores["msp"], correct)["naurc"],
        "coverage@risk=0.5": operating_point(scores["msp"], correct, "coverage@risk", 0.5),
    }
    assert [list(found[key]) for key in found] == [["msp", "energy"], ["msp", "energy", "msp+energy", "energy+msp"]]
    pair = [np.append(scores[score], ood["noise"][score]) for score in ("msp", "energy")]
    joint, binned = (f(*pair, np.append(correct, np.zeros(20)), 20) for f in (joint_metrics, binned_joint_metrics))
    assert found["new_fd"]["msp+energy"] == pytest.approx({**joint, **{f"{m}_binned": v for m, v in binned.items()}})
    assert list(found["new_fd"]["energy+msp"]) == ["ds_aurc", "ds_f1"]
    assert "naurc" not in report["settings"]["old_fd"]["msp"]
    for metric in ("eaurc", "coverage@risk=2", "ds=msp", "ds=msp+energy+msp"):
        with pytest.raises(ValueError, match=r"unknown metric .*; use naurc, .* ds=msp\+energy"):
            EvaluationOptions(metrics=[metric])
    with pytest.raises(ValueError, match=r"ds=msp\+vim needs both scores; there are msp, energy"):
        evaluate_samples(Samples(correct, scores, ood, {}), replace(options, metrics=["ds=msp+vim"]))


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
    assert "With fewer than 8 errors intervals are not verified; here are 0" in format_report(report)
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
