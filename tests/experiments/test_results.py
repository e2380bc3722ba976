"""Results and tables of an experiment."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tal_fast.evaluation import compare, report
from tal_fast.evaluation.differences import Comparison
from tal_fast.evaluation.sample_scores import read_samples
from tal_fast.experiments import results, scheduler
from tal_fast.experiments.command import main
from tal_fast.experiments.parse import read_experiment
from tal_fast.experiments.table import machines
from tests.helpers.experiments import error_of, finish_jobs, write

GRID: dict[str, Any] = {"optim.lr": [0.1, 0.2]}


def test_tables_from_runs_and_from_committed_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "e.yaml", seeds=[0, 1, 2], compare={"baseline": "ce", "bootstrap": 200})
    experiment = read_experiment(path)
    output = tmp_path / "out"
    command = [str(path), "--output", str(output), "--table-only"]
    finish_jobs(output, experiment, lambda job: (2.0 if job.method == "tal" else 1.0, 0.8))
    assert main(command) == 0
    said, table = capsys.readouterr().out, (output / "table.txt").read_text()
    for title in ("Old FD\n", "OOD against far\n", "New FD against near\n", "OOD: mean over 2 OOD sets\n"):
        assert title in table
    summary = said[said.index("run  score") : said.index(str(output))].rstrip()
    assert summary in table
    assert len(summary.splitlines()) < 8
    assert "AURC of tal compared with ce: Old FD is " in summary
    found = results.read_results(output)
    assert len(found["runs"]) == 6
    # The results equal those of tal_fast.compare for the same folders.
    names = [f"{method}-seed{seed}" for method in ("ce", "tal") for seed in (0, 1, 2)]
    folders = [output / "runs" / name for name in names]
    groups = compare.group_runs(
        [report.read_report(f) for f in folders], names, [name[:3] for name in names],
        [read_samples(f) for f in folders], seeds=[0, 1, 2] * 2,
    )  # fmt: skip
    columns = [("old_fd", "aurc"), ("ood/far", "fpr95"), ("new_fd", "auroc")]
    Comparison(True, "both").add_differences(groups, groups[0], columns)
    by_column = {(d["label"], d["setting"], d["metric"]): d for d in found["differences"]}
    assert {key[0] for key in by_column} == {"tal"}
    for setting, metric in columns:
        want, got = groups[1].differences[setting, metric], by_column["tal", setting, metric]
        assert [got[key] for key in ("value", "low", "high")] == pytest.approx(list(want[:3]))
        assert (got["over"], got["baseline"]) == ("both", "ce")
    assert len((output / "table.csv").read_text().splitlines()) == 1 + 2 * 3 * 7
    # Tables from results.json alone.
    committed = tmp_path / "committed"
    committed.mkdir()
    shutil.copy(output / "results.json", committed)
    assert main([str(path), "--output", str(committed), "--table-only"]) == 0
    for name in ("table.txt", "table.md", "table.csv"):
        assert (committed / name).read_bytes() == (output / name).read_bytes()
    write(path, seeds=[0, 1, 2], compare={"baseline": "tal", "bootstrap": 200})
    assert "results.json was made with other 'compare' options" in error_of(
        [*command[:2], str(committed), command[3]], capsys
    )


def test_missing_runs_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "e.yaml", compare={"bootstrap": 0})
    output = tmp_path / "out"
    finish_jobs(output, read_experiment(path), lambda job: (1.0, np.nan if job.name == "tal-seed1" else 0.8))
    assert main([str(path), "--output", str(output), "--table-only"]) == 1
    said = capsys.readouterr().out
    assert "3 of 4 runs" in said
    assert "missing: tal-seed1 (not done)" in said
    assert all(d["over"] == "" for d in results.read_results(output)["differences"])  # one run, no interval


def test_results_are_not_replaced_by_fewer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "e.yaml", compare={"bootstrap": 0})
    output = tmp_path / "out"
    finish_jobs(output, read_experiment(path), lambda job: (1.0, 0.8))
    command = [str(path), "--output", str(output), "--table-only"]
    assert main(command) == 0
    before = (output / "results.json").read_bytes()
    shutil.rmtree(output / "runs" / "tal-seed1")
    assert "results.json has 1 runs that are not done here, such as tal-seed1, and is kept" in error_of(command, capsys)
    assert (output / "results.json").read_bytes() == before


def test_the_default_baseline_is_the_first_method(tmp_path: Path) -> None:
    experiment = read_experiment(write(tmp_path / "e.yaml", seeds=[0], compare={"bootstrap": 0}))
    finish_jobs(tmp_path / "out", experiment, lambda job: (1.0, np.nan if job.method == "ce" else 0.8))
    assert results.collect(experiment, scheduler.job_folders(experiment, tmp_path / "out"), "e")["differences"] == []


def test_differences_are_taken_at_the_same_grid_point(tmp_path: Path) -> None:
    def baselines(**changes: Any) -> dict[str, str]:
        experiment = read_experiment(write(tmp_path / "e.yaml", seeds=[0], **changes))
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        finish_jobs(output, experiment, lambda job: (1.0, 0.8))
        found = results.collect(experiment, scheduler.job_folders(experiment, output), "e")
        return {d["label"]: d["baseline"] for d in found["differences"]}

    options = {"bootstrap": 20, "baseline": "ce"}
    assert baselines(grid=GRID, compare=options) == {"tal-lr=0.1": "ce-lr=0.1", "tal-lr=0.2": "ce-lr=0.2"}
    only = {"optim.lr": {"values": [0.1, 0.2], "methods": ["tal"]}}
    assert baselines(grid=only, compare=options) == {"tal-lr=0.1": "ce", "tal-lr=0.2": "ce"}
    of_one = {**options, "baseline": "ce-lr=0.2"}
    assert baselines(grid=GRID, compare=of_one) == dict.fromkeys(["ce-lr=0.1", "tal-lr=0.1", "tal-lr=0.2"], "ce-lr=0.2")


def test_samples_of_another_evaluation_give_no_intervals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    experiment = read_experiment(write(tmp_path / "e.yaml", seeds=[0], compare={"bootstrap": 20}))
    finish_jobs(tmp_path / "out", experiment, lambda job: (1.0 + (job.method == "tal"), 0.8))
    folders = scheduler.job_folders(experiment, tmp_path / "out")
    assert {row["over"] for row in results.collect(experiment, folders, "e")["differences"]} == {"images"}
    shutil.copy(folders[0].path / "samples.npz", folders[1].path)  # with the same numbers of samples and errors
    assert {row["over"] for row in results.collect(experiment, folders, "e")["differences"]} == {""}
    assert f"samples.npz beside the report of {folders[1].path} is of another evaluation" in caplog.text


def test_a_metric_of_your_own_is_in_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def rejected(scores, correct):\n    return 1 - correct[scores > 0].mean()\n")
    monkeypatch.setattr(report, "EvaluationOptions", partial(report.EvaluationOptions, metrics=["mine.py:rejected"]))
    changes = {"evaluate": {"metrics": ["mine.py:rejected"]}, "compare": {"metrics": ["aurc", "rejected"]}}
    path = write(tmp_path / "e.yaml", seeds=[0, 1, 2], **changes)
    finish_jobs(tmp_path / "out", read_experiment(path), lambda job: (2.0 if job.method == "tal" else 1.0, 0.8))
    assert main([str(path), "--output", str(tmp_path / "out"), "--table-only"]) == 0
    assert (tmp_path / "out" / "table.txt").read_text().count("rejected") >= 7
    found = [row for row in results.read_results(tmp_path / "out")["differences"] if row["metric"] == "rejected"]
    assert len(found) == 7  # Old FD, and two sets and their mean in OOD and New FD
    assert {row["over"] for row in found} == {"seeds"}
    samples = [
        read_samples(tmp_path / "out" / "runs" / f"{name}-seed{seed}") for name in ("tal", "ce") for seed in range(3)
    ]
    wrong = [1 - s.correct[s.id_scores["msp"] > 0].mean() for s in samples if s is not None]
    (old_fd,) = [row["value"] for row in found if row["setting"] == "old_fd"]
    assert old_fd == pytest.approx(np.mean(wrong[:3]) - np.mean(wrong[3:]))


def test_own_code_and_weights_are_named_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(
        "from tal_fast.methods.ce import CrossEntropy\n\nclass Mine(CrossEntropy):\n    name, score = 'mine', 'msp'\n"
    )
    monkeypatch.chdir(tmp_path)
    methods = {"ce": {"model.weights": "some/weights.pt"}, "mine": {"method": {"name": "own.py:Mine"}}}
    path = write(tmp_path / "e.yaml", methods=methods)
    experiment = read_experiment(path)
    assert {job.config.method.name for job in experiment.jobs} == {"ce", f"{tmp_path}/own.py:Mine"}
    finish_jobs(tmp_path / "out", experiment, lambda job: (1.0, 0.8))
    found = results.collect(experiment, scheduler.job_folders(experiment, tmp_path / "out"), "e")
    assert {run["config"]["method"]["name"] for run in found["runs"]} == {"ce", "own.py:Mine"}
    assert {run["config"]["model"]["weights"] for run in found["runs"]} == {"some/weights.pt", None}


def test_a_machine_is_named_once_with_all_commits() -> None:
    here = {"gpu": None, "cpu": "CPU", "cores": 2, "python": "3.12", "torch": "2.9", "tal_fast": "1.0", "commit": "aa"}
    there = {**here, "gpu": "GPU"}
    assert machines([here, {}, {**here, "commit": "bb"}, there]) == [
        "CPU, 2 cores; Python 3.12, torch 2.9; tal_fast 1.0, commits aa, bb",
        "GPU; Python 3.12, torch 2.9; tal_fast 1.0, commit aa",
    ]


def test_a_resumed_run_does_not_count_in_the_time_of_a_training() -> None:
    runs = [("ce", 2, 100.0), ("ce", 3, 10.0), ("tal", 3, 120.0), ("tal", 3, 140.0), ("ce", 2, 120.0)]
    found: Any = {"runs": [{"label": row, "attempts": n, "seconds": {"train": s}} for row, n, s in runs]}
    assert results.training_seconds(found) == {"ce": 110.0, "tal": 130.0}
