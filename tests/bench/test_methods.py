"""Comparison of methods: pages and figures match the committed results."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import pytest

from bench import methods, small_folder
from tal_fast.evaluation.report import write_report
from tal_fast.experiments.parse import read_experiment
from tal_fast.experiments.results import check_options, collect, read_results
from tal_fast.experiments.scheduler import job_folders
from tal_fast.runs.resume import differences
from tests.helpers.experiments import finish_jobs


@pytest.mark.parametrize("page", methods.PAGES, ids=lambda p: p.name)
def test_pages_match_the_committed_results(page: Path) -> None:
    text = page.read_text()
    assert "<!-- methods:" in text
    assert methods.fill_in(text) == text


def test_a_changed_result_changes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = methods.RESULTS / "fashion-mnist-choice"
    results = json.loads((folder / "results.json").read_text())
    changed = copy.deepcopy(results)
    for run in changed["runs"]:
        for score in run["report"]["settings"]["old_fd"].values():
            score["aurc"] = 0.5
    before = methods.whole("fashion-mnist-choice")
    (tmp_path / "fashion-mnist-choice").mkdir()
    (tmp_path / "fashion-mnist-choice" / "results.json").write_text(json.dumps(changed))
    monkeypatch.setattr(methods, "RESULTS", tmp_path)
    assert "0.50000" in methods.whole("fashion-mnist-choice")
    assert "0.50000" not in before
    assert methods.whole("elsewhere") == methods.MISSING


def test_the_table_of_scores_has_the_best_of_each_method_and_its_cost() -> None:
    runs = read_results(methods.RESULTS / "fashion-mnist")["runs"]
    lines = methods.scores("fashion-mnist").splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]}
    for row in ("ce", "tal-paper"):
        reports = [run["report"] for run in runs if run["label"] == row]
        judged = [report["settings"]["old_fd"] for report in reports]
        mean = {score: sum(of_run[score]["aurc"] for of_run in judged) / 5 for score in judged[0]}
        best = min(mean, key=lambda score: mean[score])
        assert cells[row][2] == f"{1e3 * mean[reports[0]['score']]:.1f} {reports[0]['score']}"
        assert cells[row][3] == f"{1e3 * mean[best]:.1f} {best}"
    spent = {row: sum(run["seconds"]["train"] for run in runs if run["label"] == row) for row in ("ce", "fmfp")}
    assert [cells["ce"][0], cells["fmfp"][0]] == ["1.0", f"{spent['fmfp'] / spent['ce']:.1f}"]
    assert methods.scores("elsewhere") == methods.MISSING


def test_results_of_a_gpu_experiment_appear_with_hardware_hours_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (methods.ROOT / "docs" / "results-gpu.md").read_text()
    names = re.findall(r"<!-- methods:gpu ([\w-]+) -->", page)
    assert len(names) == 4
    monkeypatch.setattr(methods, "RESULTS", tmp_path)
    for name in names:
        assert (methods.EXPERIMENTS / f"{name}.yaml").exists()
        assert f"python -m tal_fast.experiment examples/experiments/{name}.yaml" in page
    assert methods.fill_in(page).count("Not run yet") == 4
    experiment = read_experiment(methods.EXPERIMENTS / "cifar100.yaml")
    finish_jobs(tmp_path / "runs", experiment, lambda job: (2.0, math.nan if job.name == "crl-seed2" else 0.8))
    machine = {
        "gpu": "GPU X",
        "cpu": "c",
        "cores": 8,
        "python": "3.12",
        "torch": "2.14",
        "tal_fast": "0.2",
        "commit": "c0",
    }
    folders = job_folders(experiment, tmp_path / "runs")
    for folder in folders:
        if folder.path.exists():
            stages = (("train", 7200.0), ("evaluate", 360.0))
            tried = [{"stage": stage, "environment": machine, "seconds": s, "exit_code": 0} for stage, s in stages]
            folder.update(attempts=tried)
    (tmp_path / "cifar100").mkdir()
    write_report(collect(experiment, folders, "cifar100"), tmp_path / "cifar100" / "results.json")
    filled = methods.fill_in(page)
    assert filled.count("Not run yet") == 3
    section = filled.split("\n## ")[1]
    assert "32 of 33 runs; 64.0 hours of training and 3.2 of evaluation" in section
    assert "ce 2.0, label-smoothing 2.0" in section
    assert "GPU X; Python 3.12, torch 2.14; tal\\_fast 0.2, commit c0" in section
    assert "missing: crl-seed2" in section
    assert "experiments/cifar100.yaml --output bench/results/methods/cifar100\n```" in section
    assert section.count("| sure-plus-tal |") >= 3
    assert methods.fill_in(filled) == filled


def test_committed_results_are_complete_and_match_their_experiment_files() -> None:
    for folder in sorted(methods.RESULTS.iterdir()):
        if folder.is_dir():
            results = read_results(folder)
            assert not results["missing"], folder.name
            assert len(results["runs"]) == results["jobs"]
            experiment = read_experiment(methods.EXPERIMENTS / f"{folder.name}.yaml")
            check_options(results, experiment)
            jobs = {job.name: job for job in experiment.jobs}
            assert [
                run["name"] for run in results["runs"] if differences(run["config"], jobs[run["name"]].config)
            ] == []


def test_figures_are_drawn_from_the_committed_results(tmp_path: Path) -> None:
    for name in methods.plot(tmp_path):
        drawn = (methods.FIGURES / name).read_text()
        assert "<svg" in drawn
        assert (tmp_path / name).stat().st_size > 2000


def test_the_table_of_stable_training_is_what_was_measured() -> None:
    settings = json.loads(small_folder.RESULT.read_text())["settings"]
    assert settings.keys() == small_folder.SETTINGS.keys()
    assert small_folder.lines(settings) in (methods.ROOT / "docs" / "methods.md").read_text()
