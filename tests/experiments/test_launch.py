"""Jobs through submitit: on its local cluster, interrupted, and refused."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import submitit

from tal_fast.experiments import launch as module
from tal_fast.experiments.command import main
from tal_fast.experiments.folder import Folder
from tal_fast.experiments.launch import Cell
from tal_fast.experiments.parse import read_experiment
from tal_fast.experiments.scheduler import job_folders
from tests.helpers.experiments import SMALL, error_of, write
from tests.helpers.training import assert_same_end


def test_what_submitit_cannot_do_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(write(tmp_path / "e.yaml")), "--output", str(tmp_path / "out"), "--launcher"]
    assert "--launcher slurm: " in error_of([*command, "slurm"], capsys)  # there is none here
    local = [*command, "submitit-local", "--resources"]
    assert "--resources gpus: must be NAME=VALUE, such as timeout_min=600" in error_of([*local, "gpus"], capsys)
    assert "--resources timeout_min={: " in error_of([*local, "timeout_min={"], capsys)
    assert "--launcher submitit-local: " in error_of([*local, "nonsense=3"], capsys)


def test_a_cell_runs_in_submitits_debug_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    class Done:
        returncode = 0

        def __init__(self, words: list[str]) -> None:
            started.append(words[1:])

        def poll(self) -> int:
            return self.returncode

    monkeypatch.setattr(module.subprocess, "Popen", Done)
    executor = submitit.AutoExecutor(tmp_path, cluster="debug")
    executor.submit(Cell(["e.yaml", "--only", "x"])).submission().result()  # the job's own leaves log files open
    assert started == [["-m", "tal_fast.experiment", "e.yaml", "--only", "x"]]
    Done.returncode = 2
    with pytest.raises(RuntimeError, match=r"exit code 2 of tal_fast\.experiment e\.yaml --only x"):
        Cell(["e.yaml", "--only", "x"])()


def signal_a_run(folder: Folder, number: int, module: str) -> None:
    """Send a signal to the process of a module that runs a job, or to its parent, once the run has saved something."""
    while not (folder.path / "checkpoints" / "last.pt").exists():
        time.sleep(0.05)
    words = {module, folder.job.name if module == "tal_fast.experiment" else str(folder.path / "asked.yaml")}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if words <= set((process / "cmdline").read_text().split("\0")):
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                os.kill(parent if module == "tal_fast.experiment" else int(process.name), number)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twelve_cells_of_which_one_is_killed_and_one_preempted_end_as_on_this_machine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {
        "seeds": [0, 1, 2], "grid": {"optim.lr": [0.05, 0.1]}, "compare": {"bootstrap": 0},
        "evaluate": {"no_typicalness": True},
        "overrides": {**SMALL, "epochs": 6, "checkpoint_every_steps": 1},
    }  # fmt: skip
    file = write(tmp_path / "e.yaml", **options)
    assert main([str(file), "--output", str(tmp_path / "here"), "--jobs", "2"]) == 0
    folders = job_folders(read_experiment(file), tmp_path / "there")
    assert len(folders) == 12
    killed, preempted = folders[3], folders[7]
    # The parent of the experiment's process is submitit's, which gets SIGUSR2 from Slurm.
    for what in ((killed, signal.SIGKILL, "tal_fast.train"), (preempted, signal.SIGUSR2, "tal_fast.experiment")):
        threading.Thread(target=signal_a_run, args=what, daemon=True).start()
    command = [str(file), "--output", str(tmp_path / "there"), "--launcher", "submitit-local", "--jobs", "2"]
    with caplog.at_level(logging.INFO):
        assert main(command) == 1
    assert killed.record()["failed"] == "killed by SIGKILL"
    assert f"{killed.job.name}: failed; see " in caplog.text
    assert [folder for folder in folders if not folder.is_done(read_experiment(file).evaluate)] == [killed]
    assert len(preempted.record()["attempts"]) == 3  # training twice, evaluation
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert main(command) == 0
    assert "1 jobs to submit" in caplog.text
    for folder in folders:
        assert_same_end(tmp_path / "here" / "runs" / folder.job.name, folder.path)
