"""Folders of jobs: configuration, lock and log."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tal_fast.experiments import scheduler
from tal_fast.experiments.command import main
from tal_fast.experiments.folder import Folder
from tal_fast.experiments.parse import read_experiment
from tests.helpers.experiments import SMALL, error_of, write


def test_a_folder_of_another_configuration_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    command = [str(tmp_path / "e.yaml"), "--output", str(output), "--dry-run"]
    for folder in scheduler.job_folders(read_experiment(write(tmp_path / "e.yaml")), output):
        folder.prepare()
    assert main(command) == 0
    assert capsys.readouterr().out.count("  to train") == 4
    for changed, sentence in (
        ({"epochs": 3}, "ce-seed0 was made by another configuration (epochs was 2 and is 3); set it back, give the"),
        ({"data.ood": {"x": "y"}}, "data.ood was {} and is {'x': 'y'}: add sets under 'evaluate' instead"),
    ):
        write(tmp_path / "e.yaml", overrides={**SMALL, **changed})
        assert sentence in error_of(command, capsys)
    # A missing option has its default value.
    for then, now, words in (({"tau": 0.3}, {}, "tau was 0.3 and is 0.04"), ({}, {"tau": 0.04}, None)):
        job = [tmp_path / "l.yaml", "--output", tmp_path / f"l{len(then)}", "--dry-run"]
        methods = [{"l": {"method": {"name": "logitnorm", "options": options}}} for options in (then, now)]
        for folder in scheduler.job_folders(read_experiment(write(job[0], methods=methods[0])), job[2]):
            folder.prepare()
        write(job[0], methods=methods[1])
        if words:
            assert words in error_of(list(map(str, job)), capsys)
        else:
            assert main(list(map(str, job))) == 0
    # Threads and loggers may change; other seeds and methods have other folders.
    more = {"ce": {"method.name": "ce"}, "smooth": {"method": {"name": "ce", "label_smoothing": 0.1}}}
    write(tmp_path / "e.yaml", threads=2, overrides={**SMALL, "logger": "all"}, seeds=[1, 2], methods=more)
    assert main(command) == 0
    (output / "runs" / "ce-seed2").mkdir()
    (output / "runs" / "ce-seed2" / "config.yaml").write_text("epochs: 2\n")
    assert "ce-seed2 holds a run that no experiment made" in error_of(command, capsys)


def test_own_code_is_the_same_in_another_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    for checkout in ("a", "b"):
        (tmp_path / checkout).mkdir()
        monkeypatch.chdir(tmp_path / checkout)
        Path("own.py").write_text("from tal_fast.methods.ce import CrossEntropy as Mine\n")
        path = write(Path("e.yaml"), methods={"mine": {"method": {"name": "own.py:Mine"}}})
        folder = scheduler.job_folders(read_experiment(path), tmp_path / "out")[0]
        ids.append(folder.job.id)
        if checkout == "a":
            folder.prepare()
            assert str(tmp_path / "a") not in (folder.path / "asked.yaml").read_text()
        folder.check()
    assert ids[0] == ids[1]


def test_a_process_that_outlives_its_scheduler_keeps_the_lock(tmp_path: Path) -> None:
    folder = scheduler.job_folders(read_experiment(write(tmp_path / "e.yaml")), tmp_path)[0]
    folder.prepare()
    lock = folder.lock()
    assert lock is not None
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,)) as process:
        os.close(lock)  # as the runner's death does
        assert folder.lock() is None
        assert f"process {os.getpid()}" in folder.holder()
        process.communicate(b"\n")
    again = folder.lock()
    assert again is not None
    os.close(again)


def test_holder_and_log_of_a_missing_folder(tmp_path: Path) -> None:
    folder = Folder(read_experiment(write(tmp_path / "e.yaml")).jobs[0], tmp_path / "none")
    assert folder.holder() == "another scheduler"
    assert folder.last_error() == ""


def test_an_ood_set_within_the_working_folder_may_have_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(Path("e.yaml"), overrides={**SMALL, "data.ood": {"other": str(tmp_path / "other")}})
    folder = scheduler.job_folders(read_experiment(path), tmp_path / "out")[0]
    folder.prepare()
    assert str(tmp_path / "other") not in (folder.path / "asked.yaml").read_text()
    folder.check()


def test_the_cluster_jobs_number_is_not_in_the_record_that_the_job_writes(tmp_path: Path) -> None:
    folder = Folder(read_experiment(write(tmp_path / "e.yaml")).jobs[0], tmp_path / "run")
    assert folder.submitted() is None
    folder.path.mkdir()
    folder.update(attempts=[{"stage": "train", "environment": 0, "seconds": None}])
    before = (folder.path / "job.json").read_bytes()
    folder.set_submitted("17_3")
    assert folder.submitted() == "17_3"
    assert (folder.path / "job.json").read_bytes() == before


def test_own_code_that_has_changed_since_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("from tal_fast.methods.ce import CrossEntropy as Mine\n")
    path = write(Path("e.yaml"), methods={"mine": {"method": {"name": "own.py:Mine"}}})
    folder = scheduler.job_folders(read_experiment(path), tmp_path / "out")[0]
    folder.check()
    folder.prepare()
    folder.check()
    Path("own.py").write_text("from tal_fast.methods.ce import CrossEntropy as Mine  # changed\n")
    with pytest.raises(ValueError, match=r"mine-seed0 was made by another .* \(the file of method.name has changed\)"):
        folder.check()


@pytest.mark.parametrize(
    "content", ["[]", "null", "5", '{"attempts": null}', '{"attempts": [1]}', '{"attempts": [{}]}', "{"]
)
def test_a_damaged_record_is_named(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = write(tmp_path / "e.yaml"), tmp_path / "out"
    folder = scheduler.job_folders(read_experiment(path), output)[0]
    folder.prepare()
    (folder.path / "job.json").write_text(content)
    assert f"{folder.path / 'job.json'} cannot be read (" in error_of([str(path), "--output", str(output)], capsys)


@pytest.mark.parametrize("content", ["seed: x", "data: 3", "method: {name: nope}", "data: {ood: [1]}", "foo: 1", ""])
def test_a_damaged_configuration_is_named(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = write(tmp_path / "e.yaml"), tmp_path / "out"
    folder = scheduler.job_folders(read_experiment(path), output)[0]
    folder.prepare()
    (folder.path / "asked.yaml").write_text(content)
    said = error_of([str(path), "--output", str(output)], capsys)
    assert f"{folder.path / 'asked.yaml'} cannot be used (" in said
    assert f"; delete {folder.path}" in said
    assert main([str(path), "--output", str(output), "--only", "ce-seed1", "--status"]) == 0  # the others go on
