"""Archives of finished runs."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import yaml

from bench import pack
from tal_fast.experiments.command import main
from tal_fast.experiments.parse import read_experiment
from tal_fast.experiments.results import collect
from tal_fast.experiments.scheduler import job_folders
from tests.helpers.experiments import finish_jobs, write


def test_unpacked_runs_are_done_and_give_the_same_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "EXPERIMENTS", tmp_path)
    file = write(tmp_path / "one.yaml", seeds=[0, 1, 2])
    experiment = read_experiment(file)
    output = tmp_path / "elsewhere"
    finish_jobs(tmp_path / "before", experiment, lambda job: (1 + (job.method == "tal"), 0.8))
    (tmp_path / "before").rename(output)
    folders = job_folders(experiment, output)
    for folder in folders:
        (folder.path / "metrics.csv").write_text("epoch,train_accuracy\n1,0.9\n")
        (folder.path / "config.yaml").write_text((folder.path / "asked.yaml").read_text())  # as training does
    archives = pack.pack("one", output, tmp_path)
    assert [archive.name for archive in archives] == ["seed0.tar.xz", "seed1.tar.xz", "seed2.tar.xz"]
    first = archives[0].read_bytes()
    assert pack.pack("one", output, tmp_path)[0].read_bytes() == first

    copies = tmp_path / "one"
    for archive in archives:
        with tarfile.open(archive) as tar:
            assert all(str(tmp_path).encode() not in tar.extractfile(file).read() for file in tar if file.isfile())
            tar.extractall(copies, filter="data")
    assert main([str(file), "--output", str(copies), "--status"]) == 0
    copied = job_folders(experiment, copies)
    assert all(folder.is_done(experiment.evaluate) for folder in copied)
    differences = collect(experiment, folders, "one")["differences"]
    assert differences
    assert collect(experiment, copied, "one")["differences"] == differences


def test_archives_name_own_code_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "EXPERIMENTS", tmp_path)
    for checkout in ("trained", "packed"):
        (tmp_path / checkout).mkdir()
        monkeypatch.chdir(tmp_path / checkout)
        Path("own.py").write_text("from tal_fast.methods.ce import CrossEntropy as Mine\n")
        file = write(tmp_path / "one.yaml", seeds=[0], methods={"mine": {"method": {"name": "own.py:Mine"}}})
        experiment = read_experiment(file)
        if checkout == "trained":
            finish_jobs(tmp_path / "output", experiment, lambda job: (1.0, 0.8))
            [folder] = job_folders(experiment, tmp_path / "output")
            (folder.path / "metrics.csv").write_text("epoch,train_accuracy\n1,0.9\n")
            (folder.path / "config.yaml").write_text(yaml.safe_dump(folder.job.config.to_dict() | {"output": "output"}))
            kept = (folder.path / "asked.yaml").read_text().replace("own.py:", str(Path("own.py").absolute()) + ":")
            (folder.path / "asked.yaml").write_text(kept)  # as before names were relative
    [archive] = pack.pack("one", tmp_path / "output", tmp_path)
    with tarfile.open(archive) as tar:
        asked = tar.extractfile("runs/mine-seed0/asked.yaml").read().decode()
    assert "name: own.py:Mine" in asked
