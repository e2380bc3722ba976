"""Command line of experiments."""

from __future__ import annotations

from pathlib import Path

import pytest

from tal_fast.experiments.command import main
from tests.helpers.experiments import error_of, write


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--jobs", "0"], "--jobs: must be at least 1, not 0"), (["--nproc", "2"], "--nproc goes with --export-sweep")],
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
    assert "results.json, and there are no runs to make it from; leave --table-only out" in error_of(options, capsys)
