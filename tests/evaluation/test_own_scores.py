"""Confidence scores of the user's own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tal_fast import compare, evaluate
from tal_fast.config.names import check_scores
from tal_fast.evaluation import calibrate_command, export_command
from tal_fast.evaluation.calibration import split_samples
from tal_fast.evaluation.npz import read_npz
from tal_fast.evaluation.pipeline import evaluate_outputs
from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.evaluation.sample_scores import read_samples
from tal_fast.metrics.failure import failure_metrics
from tal_fast.utils import own_code
from tests.helpers.evaluation import make_run, read_json, write_npz
from tests.helpers.own_package import installed_package

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "own-outputs.md").read_text()
OWN = """
import numpy as np

def spread(logits, features):
    assert logits.dtype == np.float64
    return logits.std(axis=1)

def norms(logits, features):
    return np.linalg.norm(features, axis=1)

def matrix(logits, features):
    return logits

def holes(logits, features):
    return np.where(logits[:, 0] > 0, 1.0, np.nan)

def bad(logits, features):
    return logits[:, 99]

def alone(logits):
    return logits[:, 0]

def leaves(logits, features):
    raise SystemExit(0)

number = 3

def msp(logits, features):
    return logits[:, 0]
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File of scores in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)


def test_functions_of_a_file_are_scores(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    path = write_npz(
        tmp_path / "x.npz", features=rng.normal(size=(200, 3)), ood_noise_features=rng.normal(size=(90, 3))
    )
    options = ["--scores", "msp", "own.py:spread", "own.py:norms", "--output", str(tmp_path / "out")]
    assert evaluate.main(["--npz", str(path), *options]) == 0
    inputs, samples = read_npz(path), read_samples(tmp_path / "out")
    assert samples is not None
    assert list(samples.id_scores) == ["msp", "spread", "norms"]
    want = inputs.id.logits.astype(np.float64).std(axis=1)
    np.testing.assert_array_equal(samples.id_scores["spread"], want)
    np.testing.assert_array_equal(
        samples.ood_scores["noise"]["norms"], np.linalg.norm(inputs.ood["noise"].features, axis=1)
    )
    assert read_json(tmp_path / "out")["settings"]["old_fd"]["spread"] == failure_metrics(want, inputs.id.correct)


def test_values_beside_saved_outputs_are_scores(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    mine, foreign, half = rng.random(200), rng.random(90).astype(np.float32), rng.random(200)
    path = write_npz(tmp_path / "x.npz", score_mine=mine, ood_noise_score_mine=foreign, score_half=half)
    evaluation = evaluate_outputs(read_npz(path), EvaluationOptions(scores=["msp"], temperature=0.25))
    assert list(evaluation.samples.id_scores) == ["msp", "mine"]
    assert set(evaluation.samples.id_scores["mine"]) < set(mine)
    np.testing.assert_array_equal(evaluation.samples.ood_scores["noise"]["mine"], foreign)
    assert evaluation.report["left_out"] == {"half": "there are no values of it for noise"}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "own.py:matrix",
            r"matrix must have a number for each of 200 samples, shape \(200,\); it has float\d+ of shape",
        ),
        ("own.py:holes", r"holes is NaN for \d+ of 200 samples, first for sample \d+; give numbers"),
        ("own.py:alone", r"your score alone, a function of \(logits, features\), failed \(TypeError"),
        ("own.py:leaves", r"your score leaves, .* failed in line \d+ of .*own.py \(SystemExit: 0\)"),
        ("own.py:number", r"your score number, a function of \(logits, features\), failed \(TypeError"),
        ("own.py:bad", r"your score bad, .* failed in line \d+ of .*own.py \(IndexError: index 99 is out"),
        ("own.py:msp", "your score msp has the name of another score; rename it"),
        ("own.py:none", "own.py defines no none"),
        ("none.py:spread", "there is no file .*none.py, which defines spread; put it there, or name another"),
        ("own:spread", "unknown score own:spread; choose from .*FILE.py:FUNCTION"),
    ],
)
def test_what_is_no_score_is_refused(
    name: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_npz(tmp_path / "x.npz")
    assert evaluate.main(["--npz", str(path), "--scores", "msp", name]) == 2
    assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"score_mine": np.zeros(199)}, "score_mine must have a number for each of 200 samples"),
        ({"score_msp": np.zeros(200)}, "score_msp has the name of a score of this package; rename it"),
    ],
)
def test_values_that_do_not_fit_are_refused(arrays: dict[str, np.ndarray], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        evaluate_outputs(read_npz(write_npz(tmp_path / "x.npz", **arrays)))


def test_a_run_is_judged_by_a_function_even_without_features(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "ce")
    assert evaluate.main(["--run", str(run), "--scores", "own.py:spread", "--fast", "--device", "cpu"]) == 0
    assert list(read_json(run)["settings"]["old_fd"]) == ["spread", "msp"]


def test_scores_of_an_installed_package_have_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed_package(tmp_path, monkeypatch, "own_package", OWN, "[tal_fast.scores]\nwide = own_package:spread\n"):
        assert check_scores(["wide"]) == ["wide"]
        evaluation = evaluate_outputs(read_npz(write_npz(tmp_path / "x.npz")), EvaluationOptions(scores=["wide"]))
        assert list(evaluation.samples.id_scores) == ["wide"]


METRICS = """
import numpy as np

def rejected(scores, correct):
    assert scores.dtype == np.float64 and correct.dtype == bool
    scores.sort()  # a copy
    return 1 - correct[: len(correct) // 2].mean()

def nothing(scores, correct):
    return None

def endless(scores, correct):
    return np.inf

def aurc(scores, correct):
    return 0.0
"""


def test_own_metrics_are_reported_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(METRICS)
    rng = np.random.default_rng()
    path = write_npz(tmp_path / "x.npz", ood_far_logits=rng.normal(size=(30, 5)))
    assert evaluate.main(["--npz", str(path), "--metrics", "mine.py:rejected", "naurc", "--mix", "all"]) == 0
    report, samples = read_json(tmp_path / "x-report"), read_samples(tmp_path / "x-report")
    assert samples is not None
    half = {"old_fd": samples.correct[:100], "new_fd/far": samples.correct[:115], "new_fd/noise": samples.correct[:145]}
    for key, correct in half.items():
        assert report["further"][key]["msp"]["rejected"] == pytest.approx(1 - correct.mean())
    assert report["further"]["ood/far"]["msp"] == {"rejected": 0}
    mean = np.mean([report["further"][f"new_fd/{name}"]["msp"]["rejected"] for name in ("far", "noise")])
    assert report["further"]["new_fd"]["msp"]["rejected"] == pytest.approx(mean)
    capsys.readouterr()
    words = [str(tmp_path / "x-report"), "--score", "msp", "--format", "csv", "--metrics"]
    tables = []
    for metric in ("rejected", "mine.py:rejected", "new-fd:mine.py:rejected"):
        assert compare.main([*words, metric]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    assert len(tables[0].splitlines()) == 1 + 3  # Old FD, and the means in OOD and New FD
    assert f"{mean:.6f}"[:6] in tables[2]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "mine.py:nothing",
            r"your metric nothing, a function of \(scores, correct\), failed \(TypeError: float\(\) arg",
        ),
        ("mine.py:endless", r"endless, .* failed \(ValueError: it is infinite; return NaN where it is undefined\)"),
        ("mine.py:aurc", "your metric aurc has the name of another metric; rename it"),
        ("mine.py:gone", "mine.py defines no gone"),
        ("mine:gone", r"unknown metric 'mine:gone'; use naurc, .* or FILE.py:FUNCTION"),
    ],
)
def test_what_is_no_metric_is_refused(name: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(METRICS)
    write_npz(Path("x.npz"))
    assert evaluate.main(["--npz", "x.npz", "--scores", "msp", "--metrics", name]) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_a_threshold_is_chosen_by_own_scores_but_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_npz(tmp_path / "x.npz", score_mine=np.arange(200.0), ood_noise_score_mine=np.arange(90.0))
    for name in ("own.py:spread", "mine", "msp"):
        words = ["--npz", str(path), "--score", name, "--confidence", "0.5", "--output", str(tmp_path / "out")]
        assert calibrate_command.main([*words, "--risk", "0.5"]) == 0
        about = json.loads((tmp_path / "out" / "threshold.json").read_text())
        values = {"mine": np.arange(200.0), "msp": None}.get(name, read_npz(path).id.logits.astype(float).std(1))
        if values is not None:
            kept = values[split_samples(200, 0.5, 0)[0]] > (
                -np.inf if about["threshold"] is None else about["threshold"]
            )
            assert (about["score"], about["accepted"]) == (name, kept.sum())
        assert calibrate_command.main([*words, "--risk", "0.5", "--metric", "false-accept-ood", "--ood", "noise"]) == 0
    capsys.readouterr()
    assert calibrate_command.main([*words[:2], "--score", "own.py:matrix", "--risk", "0.5"]) == 2
    assert "matrix must have a number for each of 200 samples" in capsys.readouterr().err
    run = make_run(tmp_path / "run", "ce")
    for main in (calibrate_command.main, export_command.main):
        assert main(["--run", str(run), "--score", "own.py:spread", "--risk", "0.5", "--device", "cpu"]) == 2
        assert "own.py:spread is Python code, which a graph cannot hold; choose its threshold with calibrate --npz" in (
            capsys.readouterr().err
        )


@pytest.mark.parametrize("score", ["auto", "cosine"])
def test_a_refusal_names_the_score(score: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng()
    path = write_npz(tmp_path / "x.npz", logits=rng.normal(size=(200, 5)))
    assert calibrate_command.main(["--npz", str(path), "--score", score, "--risk", "0.01"]) == 1
    assert re.match(r"refused: with (cosine|\w+), (no threshold|\d+ held-out)", capsys.readouterr().err)


@pytest.mark.slow
def test_the_documented_score_runs(tmp_path: Path) -> None:
    outputs = next(
        block for block in re.findall(r"^```python\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE) if "savez" in block
    )
    section = GUIDE.partition("## A score of your own")[2]
    (function,) = re.findall(r"^```python\n(.*?)^```", section.partition("\n## ")[0], re.DOTALL | re.MULTILINE)
    command = re.findall(r"^```sh\npython (.*?)\n```", section, re.DOTALL | re.MULTILINE)[0]
    assert len(function.splitlines()) <= 15
    (tmp_path / "my_scores.py").write_text(function)
    root = str(Path(__file__).parents[2])
    for words in (["-c", outputs], command.split()):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert "top_gap" in read_json(tmp_path / "outputs-report")["settings"]["new_fd"]
    section = GUIDE.partition("## A metric of your own")[2].partition("\n## ")[0]
    (function,) = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    (tmp_path / "my_metrics.py").write_text(function)
    for command in re.findall(r"^python (.*)$", section, re.MULTILINE):
        done = subprocess.run(
            [sys.executable, *command.split()], cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert "risk_at_half" in done.stdout


def test_a_name_is_of_the_working_folder_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (1, 2):
        folder = tmp_path / str(value)
        folder.mkdir()
        (folder / "mine.py").write_text(f"def rejected(scores, correct):\n    return {value}\n")
        monkeypatch.chdir(folder)
        assert own_code.load("mine.py:rejected", own_code.METRICS)(None, None) == value
