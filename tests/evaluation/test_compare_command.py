"""Command line of compare."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tal_fast import compare
from tal_fast.config.names import METRICS, UNITS
from tal_fast.config.schema import Config
from tal_fast.evaluation import compare_command
from tal_fast.evaluation.compare_tables import FORMATS
from tal_fast.evaluation.differences import OVER
from tal_fast.evaluation.report import EvaluationOptions, read_report, write_report
from tal_fast.evaluation.sources import evaluate_npz, evaluate_run
from tal_fast.metrics import failure
from tal_fast.metrics.failure import failure_metrics
from tests.helpers.compare import csv_rows, one_report, table_lines, write_run
from tests.helpers.evaluation import make_run


def test_evaluated_runs_are_compared(evaluated_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = evaluate_run(make_run(tmp_path / "synthetic-ce", "ce", seed=1), shifts={"noisy": "gaussian-noise"})
    assert other is not None
    lines = table_lines([str(evaluated_run), str(tmp_path / "synthetic-ce"), "--bootstrap", "20"], capsys)
    assert lines[1] == "95% intervals: over the test images, paired"
    assert [line.split()[:2] for line in lines[3:6]] == [
        ["run", "score"], ["synthetic-tal", "cosine"], ["synthetic-ce", "msp"],
    ]  # fmt: skip
    end = lines.index("", len(lines) - 4)  # of the tables; a sentence with Old FD and New FD follows
    assert sum(line.count("[") for line in lines[:end]) == 4 * 3  # settings, metrics
    assert lines[end + 1].startswith("AURC of synthetic-ce compared with synthetic-tal: Old FD ")
    assert sum(line.count("%]") for line in lines[end:]) == 2


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
    assert tuple(actions["over"].choices or ()) == tuple(OVER)
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
    assert "other has another method or seed than its config.yaml" in capsys.readouterr().err
    settings = one_report("cosine", 0.1, 0.5)["settings"]["old_fd"]["msp"]
    report = read_report(evaluated_run)["settings"]
    changed = {key: dict.fromkeys(scores, settings) for key, scores in report.items()}
    assert compare.main(rewrite("last", weights_sha256="0", settings=changed)) == 0
    assert "synthetic-tal and last have the same seed 0" in capsys.readouterr().err


def test_a_run_is_named_and_judged_as_its_argument_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("ce-lr=0.1", "tal-0", "tal-1", "a:b"):
        (tmp_path / folder).mkdir()
    for text, runs in {
        "tal-0": [("tal-0", None, None)],
        "ce-lr=0.1": [("ce-lr=0.1", None, None)],
        "CE=ce-lr=0.1:msp": [("ce-lr=0.1", "CE", "msp")],
        "lr=0.1=ce-lr=0.1": [("ce-lr=0.1", "lr=0.1", None)],
        "a:b:ood:ReAct": [("a:b", None, "ood:ReAct")],
        "TAL=tal-?:cosine": [("tal-0", "TAL", "cosine"), ("tal-1", "TAL", "cosine")],
        "TAL=gone": [("gone", None, None)],
        "runs/lr=1": [("runs/lr=1", None, None)],
    }.items():
        assert compare_command.parse_runs(text) == runs


def npz_reports(folder: Path, names: str, labels: Any = None, n: int = 90) -> dict[str, tuple[Any, Any]]:
    """Evaluate outputs of one made-up model per letter; returns the probabilities and correctness of each."""
    made = {}
    for i, name in enumerate(names):
        rng = np.random.default_rng(i)
        target = rng.integers(3, size=n) if labels is None else labels
        logits = rng.normal(size=(n, 3)) + 1.5 * np.eye(3)[target]
        foreign = {f"ood_{ood}_logits": rng.normal(size=(40, 3)) for ood in ("svhn", "dtd")}
        np.savez(folder / f"{name}.npz", logits=logits, labels=target, **foreign)
        evaluate_npz(folder / f"{name}.npz", options=EvaluationOptions(scores=["msp", "max_logit"]))
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        made[name] = p.max(1), logits.argmax(1) == target
    return made


def test_runs_of_one_name_are_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made = npz_reports(tmp_path, "abcd", np.random.default_rng(9).integers(3, size=90))
    runs = ["One=[ab]-report:msp", "Two=[cd]-report:msp", "Two=[cd]-report:max_logit", "--bootstrap", "50"]
    rows = csv_rows([*runs, "--over", "both", "--metrics", "old-fd:aurc"], capsys)
    assert [name for name, _, _ in rows] == ["One", "Two, msp", "Two, max_logit"]
    values = [failure_metrics(*made[name])["aurc"] for name in "cd"]
    assert float(rows["Two, msp", "old_fd", "aurc"]["mean"]) == pytest.approx(np.mean(values))
    # The same models by two scores are paired: less uncertain than models of other names.
    by_model = csv_rows([*runs, "--over", "both", "--metrics", "old-fd:aurc", "--baseline", "Two, msp"], capsys)
    widths = [float(row["high"]) - float(row["low"]) for row in by_model.values() if row["low"]]
    assert widths[1] < widths[0]
    text = "\n".join(table_lines([*runs, "--metrics", "new-fd:aurc", "new-fd/svhn:auroc", "ood/*:fpr95"], capsys))
    assert re.findall("^(?:OOD|New FD|Old FD).*", text, re.M) == [
        "New FD: mean over 2 OOD sets", "New FD against svhn", "OOD against svhn", "OOD against dtd",
    ]  # fmt: skip
    for metrics, message in {
        "new-fd/cifar:aurc": "the reports have no 'new-fd/cifar'; they have old_fd, ood/svhn",
        "ece": "the reports have no 'ece'; they have aurc, eaurc",
    }.items():
        assert compare.main([*runs, "--metrics", metrics]) == 2
        assert message in capsys.readouterr().err


def test_long_form_has_a_row_per_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made = npz_reports(tmp_path, "abc")
    runs = ["One=a-report:msp", "One=b-report:msp", "c-report:msp", "--bootstrap", "50", "--format", "csv-runs"]
    lines = table_lines([*runs, "--metrics", "old-fd:aurc", "new-fd/*:auroc", "ood:aurc"], capsys)
    rows = list(csv.DictReader(lines))
    assert [(row["run"], row["members"]) for row in rows[:3]] == [
        ("One", "a-report"), ("One", "b-report"), ("c-report", "c-report"),
    ]  # fmt: skip
    for row, name in zip(rows, "abc", strict=False):
        confidence, correct = made[name]
        assert float(row["mean"]) == pytest.approx(failure_metrics(confidence, correct)["aurc"])
        assert float(row["mean_low"]) < float(row["mean"]) < float(row["mean_high"])
        assert (float(row["n"]), float(row["errors"])) == (90, 90 - correct.sum())
    assert [row["set"] for row in rows[::3]] == ["", "svhn", "dtd", "mean"]
    assert rows[-1]["n"] == ""


def test_the_reason_stands_where_an_interval_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    npz_reports(tmp_path, "abc")  # each with labels of its own
    runs = ["a-report", "b-report", "c-report", "--score", "msp", "--metrics", "old-fd:auroc"]
    said = " ".join(" ".join(table_lines(runs, capsys)).split())
    for name in "bc":
        assert (
            f"{name}-report − a-report: no interval, since the test images or labels of {name}-report and a-report "
            f"differ (val), and {name}-report is a single run"
        ) in said
    assert "[" not in said
    assert "differ (val)" in csv_rows(runs, capsys)["b-report", "old_fd", "auroc"]["why_not"]
    said = " ".join(" ".join(table_lines([*runs, "--bootstrap", "0"], capsys)).split())
    assert "no interval, since none over test images was asked for, and b-report is a single run" in said
    (tmp_path / "a-report" / "samples.npz").unlink()
    said = " ".join(" ".join(table_lines(runs, capsys)).split())
    assert "since there is no samples.npz beside the report of a-report" in said
    perfect = np.zeros(30, int)
    for name in "xy":
        np.savez(f"{name}.npz", logits=np.tile([9.0, 1, 0], (30, 1)), labels=perfect)
        evaluate_npz(f"{name}.npz", options=EvaluationOptions(scores=["msp"]))
    said = " ".join(" ".join(table_lines(["x-report", "y-report", "--metrics", "auroc"], capsys)).split())
    assert "no interval, since auroc is undefined: there are no errors among the 30 samples" in said


@pytest.mark.parametrize("over", ["images", "both"])
def test_curves_of_several_runs_are_drawn(
    over: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    npz_reports(tmp_path, "abc", np.random.default_rng(9).integers(3, size=90))
    runs = ["$x^{=a-report:msp", "Two $=[bc]-report:msp", "--bootstrap", "0", "--over", over]
    drawn = {}
    for folder in ("one", "again"):
        files = [f"{folder}/c.{suffix}" for suffix in ("pdf", "svg", "png")]
        assert compare.main([*runs, "--curves", *files]) == 0
        drawn[folder] = [Path(file).read_bytes() for file in files]
    assert drawn["one"] == drawn["again"]
    assert [content[:4] for content in drawn["one"]] == [b"%PDF", b"<?xm", b"\x89PNG"]
    capsys.readouterr()
    assert compare.main([*runs, "--curves", "c.xyz"]) == 2
    assert "xyz" in capsys.readouterr().err
    (tmp_path / "a-report" / "samples.npz").unlink()
    assert compare.main([*runs, "--curves", "c.pdf"]) == 2
    assert "there are no samples of a-report to draw its curves from" in capsys.readouterr().err
