"""Choice of the best grid point."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tal_fast.experiments import results, select
from tal_fast.experiments.command import main
from tal_fast.experiments.parse import read_experiment
from tal_fast.experiments.plan import SelectOptions
from tal_fast.experiments.scheduler import job_folders
from tests.helpers.experiments import finish_jobs, write


def test_selection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"optim.lr": [0.1, 0.2, 0.3, 0.4]}
    options = {"compare": {"baseline": "ce", "bootstrap": 0}, "evaluate": {"ood": {"far": "patches"}}}
    path = write(tmp_path / "e.yaml", grid=grid, **options)
    experiment = read_experiment(path)
    output = tmp_path / "out"
    # The best point has too low an accuracy, the next one lacks a seed.
    quality = {0.1: (1.0, 0.8), 0.2: (3.2, 0.79), 0.3: (3.0, 0.8), 0.4: (2.0, 0.8)}

    def quality_of(job: Any) -> tuple[float, float]:
        good, accuracy = quality[job.grid["optim.lr"]] if job.method == "tal" else (1.0, 0.8)
        return good, np.nan if job.name == "tal-lr=0.3-seed1" else accuracy

    finish_jobs(output, experiment, quality_of)
    command = [str(path), "--output", str(output), "--table-only", "--select", "old_fd.aurc", "new_fd/far.auroc"]
    assert main(command) == 1
    said = capsys.readouterr().out
    rows = {line.split()[0]: line for line in said[said.index("chosen (*)") :].splitlines() if "lr=" in line}
    assert "tal-lr=0.2" in rows
    assert "accuracy below 73.17%" in rows["tal-lr=0.2"]
    assert "1 of 2 seeds" in rows["tal-lr=0.3"]
    criterion = SelectOptions(["old_fd.aurc", "new_fd/far.auroc"])
    candidates = select.candidates(experiment, results.read_results(output), criterion)
    for candidate in candidates:
        runs = [r["report"] for r in results.read_results(output)["runs"] if r["label"] == candidate.label]
        losses = (
            np.mean([r["settings"]["old_fd"]["msp"]["aurc"] for r in runs]),
            1 - np.mean([r["settings"]["new_fd/far"]["msp"]["auroc"] for r in runs]),
        )
        assert candidate.value == pytest.approx(np.sqrt(losses[0] * losses[1]))
    assert "tal-lr=0.4*" in rows
    assert "ce-lr=0.1*" in rows  # all of ce are alike: the first
    chosen = yaml.safe_load((output / "selected.yaml").read_text())["methods"]
    assert chosen["tal"] == {"method": {"name": "tal", "options": {"queue_size": 150}}, "optim": {"lr": 0.4}}
    assert "set data.holdout to choose on held-out training images" in said
    # The file can be the methods of another experiment.
    again = read_experiment(write(tmp_path / "f.yaml", methods="out/selected.yaml", seeds=[0]))
    assert again.jobs[1].config == next(j.config for j in experiment.jobs if j.name == "tal-lr=0.4-seed0")
    # The settings of an only set do not have its name.
    for run in (found := results.read_results(output))["runs"]:
        settings = run["report"]["settings"]
        run["report"]["ood_names"] = ["far"]
        for kind in ("ood", "new_fd"):
            settings[kind] = settings.pop(f"{kind}/far")
            del settings[f"{kind}/near"]
    alone = select.candidates(experiment, found, criterion)
    assert [(c.label, c.value) for c in alone] == [(c.label, c.value) for c in candidates]
    # A lower accuracy can be allowed; a metric of an unknown set is rejected.
    free = select.candidates(experiment, results.read_results(output), SelectOptions(accuracy_loss=0.5))
    assert select.chosen(free)["tal"].label == "tal-lr=0.2"
    with pytest.raises(ValueError, match="no setting 'new_fd/x'"):
        select.candidates(experiment, results.read_results(output), SelectOptions(["new_fd/x.aurc"]))


def test_an_earlier_choice_is_removed_if_no_point_may_be_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "e.yaml", compare={"bootstrap": 0}, select={"metrics": ["old_fd.aurc"]})
    experiment, output = read_experiment(path), tmp_path / "out"
    command = [str(path), "--output", str(output), "--table-only"]
    finish_jobs(output, experiment, lambda job: (1.0, 0.8))
    assert main(command) == 0
    assert str(output / "selected.yaml") in capsys.readouterr().out
    for folder in job_folders(experiment, output)[:2]:
        shutil.rmtree(folder.path)
    (output / "results.json").unlink()
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "no run of tal may be chosen" in said
    assert str(output / "selected.yaml") not in said
    assert not (output / "selected.yaml").exists()
