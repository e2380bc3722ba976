"""Command line of compare."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tal_fast import compare
from tal_fast.config.names import METRICS, UNITS
from tal_fast.config.schema import Config
from tal_fast.evaluation import compare_command
from tal_fast.evaluation.compare_tables import FORMATS
from tal_fast.evaluation.differences import OVER
from tal_fast.evaluation.report import read_report, write_report
from tal_fast.evaluation.sources import evaluate_run
from tal_fast.metrics import failure
from tests.helpers.compare import one_report, table_lines, write_run
from tests.helpers.evaluation import make_run


def test_evaluated_runs_are_compared(evaluated_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = evaluate_run(make_run(tmp_path / "synthetic-ce", "ce", seed=1), shifts={"noisy": "gaussian-noise"})
    assert other is not None
    lines = table_lines([str(evaluated_run), str(tmp_path / "synthetic-ce"), "--bootstrap", "20"], capsys)
    assert lines[1] == "95% intervals: paired bootstrap over the test images, 20 resamples"
    assert [line.split()[:2] for line in lines[3:6]] == [
        ["run", "score"], ["synthetic-tal", "cosine"], ["synthetic-ce", "msp"],
    ]  # fmt: skip
    assert sum(line.count("[") for line in lines) == 4 * 3  # settings, metrics


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "ce-0", "ce", 0, 1.0)
    write_run(tmp_path / "tal-0", "tal", 0, 1.0)
    runs = [str(tmp_path / "ce-0"), str(tmp_path / "tal-0")]
    (tmp_path / "broken.json").write_text("{")
    for arguments, message in (
        ([*runs, "--baseline", "fmfp"], "there is no row 'fmfp' to be the baseline; there are ce-0, tal-0"),
        ([runs[0], str(tmp_path / "gone")], f"evaluate --run {tmp_path}/gone\n"),
        ([runs[0], str(tmp_path / "broken.json")], "cannot be read as JSON"),
        ([runs[0], f"{runs[0]}/."], "ce-0/. is named twice; name each run once"),
        ([*runs, "--score", "energy"], "ce-0 has no score 'energy'; it has msp"),
    ):
        assert compare.main(arguments) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    with pytest.raises(SystemExit):
        compare.main([*runs, "--bootstrap", "-1"])
    assert "--bootstrap: must be at least 0, not -1" in capsys.readouterr().err


def test_choices_are_those_of_the_library() -> None:
    actions = {action.dest: action for action in compare_command.parser()._actions}
    assert tuple(actions["format"].choices or ()) == (*FORMATS, "csv-runs")
    assert tuple(actions["over"].choices or ()) == OVER
    assert tuple(actions["units"].choices or ()) == UNITS
    assert failure.METRICS == METRICS


@pytest.mark.parametrize("command", ["evaluate", "compare", "html_report"])
def test_help_needs_no_torch(command: str) -> None:
    code = (
        "import sys\n"
        f"from tal_fast.{command} import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("usage: python -m tal_fast.")
    assert found.stdout.endswith("[]\n")


def test_one_evaluation_is_not_two_seeds(
    evaluated_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(evaluated_run, tmp_path / "copy")
    assert compare.main([str(evaluated_run), str(tmp_path / "copy")]) == 2
    assert "synthetic-tal and copy are evaluations of the same weights" in capsys.readouterr().err

    def rewrite(name: str, **changes: Any) -> list[str]:
        shutil.copytree(evaluated_run, tmp_path / name)
        report = read_report(evaluated_run)
        write_report(
            {**report, "config": {**report["config"], **changes.pop("config", {})}, **changes},
            tmp_path / name / "report.json",
        )
        return [str(evaluated_run), str(tmp_path / name), "--bootstrap", "0"]

    assert compare.main(rewrite("again", epoch=9)) == 2  # the same weights
    assert compare.main(rewrite("old", weights_sha256=None)) == 2  # equal numbers of the same seed
    assert capsys.readouterr().err.count("are evaluations of the same weights") == 2
    other = rewrite("other", weights_sha256="0", config={"seed": 7})
    assert compare.main(other) == 0
    assert capsys.readouterr().err == ""
    Config.from_dict(read_report(evaluated_run)["config"]).save(tmp_path / "other" / "config.yaml")
    assert compare.main(other) == 0
    assert "other is of another method or seed than its config.yaml" in capsys.readouterr().err
    settings = one_report("cosine", 0.1, 0.5)["settings"]["old_fd"]["msp"]
    report = read_report(evaluated_run)["settings"]
    changed = {key: dict.fromkeys(scores, settings) for key, scores in report.items()}
    assert compare.main(rewrite("last", weights_sha256="0", settings=changed)) == 0
    assert "synthetic-tal and last have the same seed 0" in capsys.readouterr().err
