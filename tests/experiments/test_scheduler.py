"""Scheduler of jobs: failures, signals, sharing and resuming."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tal_fast.experiments import results, scheduler
from tal_fast.experiments.command import main
from tal_fast.experiments.parse import read_experiment
from tal_fast.runs import checkpoint
from tal_fast.training.trainer import Trainer
from tal_fast.utils.logs import console_logging
from tests.helpers.experiments import SMALL, write, write_evaluated_run
from tests.helpers.training import assert_same_end

# Replaces training, which takes seconds to start, by the code in a file.
TRAIN = "import os, pathlib, signal, sys, time; run = pathlib.Path(sys.argv[1]); exec(open(sys.argv[2]).read())"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Function that makes jobs run the given code in place of training; returns the list of started stages."""
    ran: list[str] = []
    script = tmp_path / "train.py"
    write_evaluated_run(tmp_path / "report", 1.0, 0)

    def command(stage: str, run: Path, words: Any, device: str) -> list[str]:
        ran.append(f"{stage} {run.name}")
        if stage == "train":
            return [sys.executable, "-c", TRAIN, str(run), str(script)]
        return ["cp", *(str(tmp_path / "report" / name) for name in ("report.json", "samples.npz")), str(run)]

    def use(code: str) -> list[str]:
        script.write_text(code)
        ran.clear()
        return ran

    monkeypatch.setattr(scheduler, "command", command)
    monkeypatch.setattr(scheduler, "_describe_machine", lambda environment: None)
    return use


def test_finished_jobs_are_skipped_and_failures_are_reported(
    tmp_path: Path, stand_in: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    no_bootstrap = {"bootstrap": 0}
    path = write(tmp_path / "e.yaml", compare=no_bootstrap)
    command = [str(path), "--output", str(tmp_path / "out"), "--jobs", "2"]
    ran = stand_in(
        "if run.name == 'tal-seed0': print('hello'); print('error: no such thing'); sys.exit(2)\n"
        "if run.name == 'ce-seed1': os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert main(command) == 1
    said = capsys.readouterr().out
    log = tmp_path / "out" / "runs" / "tal-seed0" / "log.txt"
    assert f"tal-seed0: train failed, exit code 2: error: no such thing; see {log}" in said
    assert "ce-seed1: train failed, killed by SIGKILL" in said
    assert "hello" in log.read_text()
    assert "2 of 4 runs" in said
    assert "missing: tal-seed0 (exit code 2: error: no such thing)" in said
    assert sorted(ran) == sorted(
        [*(f"train {m}-seed{s}" for m in ("ce", "tal") for s in (0, 1)), "evaluate ce-seed0", "evaluate tal-seed1"]
    )
    assert main([*command, "--status"]) == 0
    status = capsys.readouterr().out.splitlines()
    ids = [job.id for job in read_experiment(path).jobs]
    assert [line.split()[0] for line in status[:-1]] == ids
    assert len(set(ids)) == 4
    assert "to train, failed: exit code 2: error: no such thing (" in status[1]
    assert status[-1].startswith("2 of 4 done; ")
    ran = stand_in("sys.exit(3)")
    assert main([*command, "--only", "tal-seed0"]) == 1
    assert ran == ["train tal-seed0"]
    assert "of 4 runs" not in capsys.readouterr().out  # no table
    assert main([*command, "--only", "tal-seed5"]) == 2
    assert "--only tal-seed5: no job has this name or hash; --status lists them" in capsys.readouterr().err
    ran = stand_in("")
    assert main([*command, "--only", ids[1]]) == 0
    assert ran == ["train tal-seed0", "evaluate tal-seed0"]
    ran = stand_in("")
    assert main([*command, "--failed"]) == 0
    assert ran == ["train ce-seed1", "evaluate ce-seed1"]
    capsys.readouterr()
    ran = stand_in("")
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "4 of 4 jobs are done already" in said
    ran = stand_in("sys.exit(1)")
    assert main(command) == 0
    assert ran == []
    record = json.loads((tmp_path / "out" / "runs" / "tal-seed0" / "job.json").read_text())
    assert [(a["stage"], a["exit_code"]) for a in record["attempts"]] == [
        ("train", 2), ("train", 3), ("train", 0), ("evaluate", 0),
    ]  # fmt: skip
    # Changed evaluation options or a changed report: evaluated again without training.
    write(tmp_path / "e.yaml", evaluate={"checkpoint": "last"}, compare=no_bootstrap)
    assert main(command) == 0
    assert sorted(ran) == sorted(f"evaluate {m}-seed{s}" for m in ("ce", "tal") for s in (0, 1))
    ran.clear()
    write_evaluated_run(tmp_path / "out" / "runs" / "ce-seed0", 2.0, 5)
    assert main(command) == 0
    assert ran == ["evaluate ce-seed0"]


def test_signals_are_forwarded_to_the_jobs(
    tmp_path: Path, stand_in: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(write(tmp_path / "e.yaml")), "--output", str(tmp_path / "out"), "--jobs", "1"]
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        ran = stand_in(
            "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(75)))\n"
            f"os.kill(os.getppid(), {int(number)})\n"
            "while True: time.sleep(0.1)"
        )
        assert main(command) == code
        assert ran == ["train ce-seed0"]
        said = capsys.readouterr().out
        assert "stopping: the jobs save and end; the same command resumes them" in said
        assert "failed" not in said
        assert "saved" in (tmp_path / "out" / "runs" / "ce-seed0" / "log.txt").read_text()
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_damaged_folder_does_not_stop_other_jobs(
    tmp_path: Path, stand_in: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "e.yaml", seeds=[0], compare={"bootstrap": 0})
    output = tmp_path / "out"
    # The first job damages the folder of the second.
    ran = stand_in(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "(run.parent / 'tal-seed0').mkdir(exist_ok=True)\n"
        "(run.parent / 'tal-seed0' / 'asked.yaml').write_text('epochs: 77')"
    )
    assert main([str(path), "--output", str(output), "--jobs", "1"]) == 1
    said = capsys.readouterr()
    assert "tal-seed0: failed, " in said.out
    assert "epochs was 77 and is 2" in said.out
    assert ran == ["train ce-seed0", "evaluate ce-seed0"]
    assert "1 of 2 runs" in said.out


def test_a_job_that_cannot_be_locked_does_not_stop_the_jobs_that_run(
    tmp_path: Path, stand_in: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "e.yaml", compare={"bootstrap": 0})
    output = tmp_path / "out"
    (output / "runs" / "tal-seed0" / "lock").mkdir(parents=True)  # cannot be opened
    ran = stand_in("time.sleep(0.5)")
    assert main([str(path), "--output", str(output), "--jobs", "2"]) == 1
    said = capsys.readouterr().out
    assert "tal-seed0: failed, " in said
    assert "3 of 4 runs" in said
    assert sum(stage.startswith("evaluate") for stage in ran) == 3


def test_jobs_save_before_a_fault_of_the_scheduler_ends_it(
    tmp_path: Path, stand_in: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = read_experiment(write(tmp_path / "e.yaml", seeds=[0]))
    stand_in(
        "signal.signal(signal.SIGTERM, lambda *_: ((run / 'saved').write_text(''), sys.exit(75)))\n"
        "(run / 'started').write_text('')\n"
        "while True: time.sleep(0.05)"
    )
    folders = scheduler.job_folders(experiment, tmp_path)

    def fault(self: scheduler.Scheduler) -> None:
        start(self)
        if all((folder.path / "started").exists() for folder in folders):
            raise IndexError("a fault of the scheduler")

    start = scheduler.Scheduler._start_jobs
    monkeypatch.setattr(scheduler.Scheduler, "_start_jobs", fault)
    with scheduler.StopRequest() as stop, pytest.raises(IndexError, match="a fault of the scheduler"):
        scheduler.Scheduler(experiment, folders, [{}, {}]).run(stop)
    assert all((folder.path / "saved").exists() for folder in folders)


def test_two_schedulers_share_the_jobs(tmp_path: Path, stand_in: Callable[[str], list[str]]) -> None:
    experiment = read_experiment(write(tmp_path / "e.yaml"))
    started = stand_in("")
    taken = scheduler.job_folders(experiment, tmp_path)[0]
    taken.prepare()
    lock = taken.lock()
    assert lock is not None
    lines: list[str] = []

    class OtherScheduler(logging.Handler):
        """Finishes its job after the three others are done."""

        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            if "done in" in lines[-1] and sum("done in" in line for line in lines) == 3:
                write_evaluated_run(taken.path, 1.0, 0)
                taken.set_evaluated(experiment.evaluate)
                os.close(lock)

    handler = OtherScheduler()
    scheduler.logger.addHandler(handler)
    try:
        with console_logging(), scheduler.StopRequest() as stop:
            scheduler.Scheduler(experiment, scheduler.job_folders(experiment, tmp_path), [{}, {}]).run(stop)
    finally:
        scheduler.logger.removeHandler(handler)
    assert not any("ce-seed0" in line for line in started)
    assert any(line.startswith("ce-seed0 is being run by") for line in lines)
    assert lines[-1] == "ce-seed0 was done by another scheduler"


def test_number_of_jobs_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = read_experiment(write(tmp_path / "e.yaml", threads=2))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    monkeypatch.setattr(scheduler, "_gpus", lambda: ["2", "GPU-x"])
    assert scheduler.slots(experiment) == [{}] * 3  # device: cpu
    assert scheduler.slots(experiment, 5) == [{}] * 5
    experiment = read_experiment(write(tmp_path / "e.yaml", overrides={"device": "auto"}))
    on = [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "GPU-x"}]
    assert scheduler.slots(experiment) == on
    assert scheduler.slots(experiment, 3) == [*on, on[0]]
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 3")
    assert scheduler._gpus() == ["5", "3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert scheduler._gpus() == ["0", "1"]


def test_evaluation_uses_the_device_of_training(tmp_path: Path) -> None:
    words = scheduler.command("evaluate", tmp_path, ("--fast",), "cpu")
    assert words[-2:] == ["--device", "cpu"]
    assert scheduler.command("evaluate", tmp_path, ("--device", "cuda"), "cpu")[-2:] == ["--device", "cuda"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the job trains on when its runner is killed")
def test_a_killed_scheduler_resumes_its_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path / "e.yaml",
        methods={"tal": {"method": {"name": "tal", "queue_size": 150}}},
        seeds=[3],
        overrides={**SMALL, "epochs": 12},
        evaluate={"checkpoint": "last", "fast": True, "no_typicalness": True},
    )
    output = tmp_path / "out"
    arguments = [str(path), "--output", str(output), "--jobs", "1"]
    runner = subprocess.Popen([sys.executable, "-m", "tal_fast.experiment", *arguments])
    folder = scheduler.job_folders(read_experiment(path), output)[0]
    deadline = time.monotonic() + 200
    while not checkpoint.exists(folder.path / "checkpoints"):
        assert time.monotonic() < deadline
        assert runner.poll() is None
        time.sleep(0.02)
    runner.kill()
    runner.wait()
    # The process saves and ends, and the lock is free only then.
    while (lock := folder.lock()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.close(lock)
    assert "stopped by SIGTERM and saved" in (folder.path / "log.txt").read_text()
    assert checkpoint.load(folder.path / "checkpoints" / "last.pt")["epoch"] < 12

    assert main(arguments) == 0
    assert "tal-seed3: done in" in capsys.readouterr().out
    straight = replace(folder.job.config, output=str(tmp_path / "straight"))
    Trainer(straight).fit()
    assert_same_end(folder.path, tmp_path / "straight")
    found = results.read_results(output)
    (run,) = found["runs"]
    assert (run["method"], run["seed"], run["report"]["checkpoint"]) == ("tal", 3, "last")
    assert run["attempts"] == 2
    assert run["seconds"]["train"] > 0
    assert run["seconds"]["evaluate"] > 0
    assert found["environments"][0]["torch"] == torch.__version__
    assert str(tmp_path) not in (output / "results.json").read_text()  # nothing of where it lay
    assert main(arguments) == 0
    assert "1 of 1 jobs are done already" in capsys.readouterr().out
