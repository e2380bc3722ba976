"""Command line of experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tal_fast.experiments.command import main
from tests.helpers.experiments import SMALL, error_of, write


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "0"], "--jobs: must be at least 1, not 0"),
        (["--nproc", "2"], "--nproc goes with --export-sweep"),
        (["--resources", "gpus_per_node=1"], "--resources go with --launcher slurm or submitit-local; leave them out"),
        (["--only", "ce-seed0", "--select", "old_fd.aurc"], "--only writes no tables to --select from; leave one"),
    ],
)
def test_bad_options_exit_with_2(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(write(tmp_path / "e.yaml")), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path / "e.yaml"))
    assert "must be SETTING.METRIC" in error_of([path, "--select", "aurc"], capsys)
    assert "there is no file gone.yaml" in error_of(["gone.yaml"], capsys)
    options = [path, "--output", str(tmp_path / "gone"), "--table_only"]  # underscores are accepted
    wanted = "results.json, and there are no runs to make it from; run the jobs first, without --table-only or --failed"
    assert wanted in error_of(options, capsys)
    assert wanted in error_of([*options[:-1], "--failed"], capsys)


def test_a_set_that_cannot_be_read_fails_the_status_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "e.yaml", evaluate={"ood": {"far": "gaussain:20"}}, seeds=[0])
    assert main([str(path), "--output", str(tmp_path / "out"), "--status"]) == 2
    said = capsys.readouterr()
    assert said.out.count("to train") == 2
    assert "error: the set 'far' cannot be used: the set 'gaussain:20' is neither a folder nor" in said.err


@pytest.mark.parametrize("options", [[], ["--status"], ["--only", "ce-seed0"]])
@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"metrics": ["gone.py:f"]}, "there is no file {}/gone.py, which defines f"),
        ({"scores": ["own.py:gone"]}, "{}/own.py defines no gone"),
        ({"ood": {"far": "gaussain:20"}}, "the set 'far' cannot be used"),
    ],
)
def test_what_an_evaluation_needs_is_looked_for_before_training(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    evaluate: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").touch()
    path = write(tmp_path / "e.yaml", evaluate=evaluate, seeds=[0])
    assert main([str(path), "--output", "out", *options]) == 2
    assert f"error: {message.format(tmp_path)}" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/runs/*/checkpoints"))


@pytest.mark.parametrize("metric", ["new_fd/unseen.aurc", "new_fd/near.aurc", "ood/near/one.auroc", "shift.aurc"])
def test_a_choice_may_be_by_the_data_sets_own_ood_sets_and_by_means(metric: str, tmp_path: Path) -> None:
    path = write(
        tmp_path / "e.yaml",
        overrides={**SMALL, "data.unseen_classes": [3]},
        evaluate={"ood": {"near/one": "gaussian:20"}, "shift": {"blurred": "blur:2"}},
        select={"metrics": [metric]},
    )
    assert main([str(path), "--output", str(tmp_path / "out"), "--status"]) == 0
