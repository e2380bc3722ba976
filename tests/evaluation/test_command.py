"""Command line of evaluate."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest

from tal_fast import evaluate
from tal_fast.config.names import CONVENTIONS, check_scores
from tal_fast.evaluation import command
from tal_fast.evaluation.tables import WIDTH
from tal_fast.metrics import failure
from tests.helpers.evaluation import make_run, read_json, write_npz


def test_a_run_is_reported_and_the_page_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", "ce")
    options = ["--mix", "all", "--units", "paper", "--output", str(tmp_path / "out"), "--batch_size", "100"]
    options += ["--ood", "far=uniform:20", "--shift", "foggy=contrast:5", "--scores", "logits,knn", "--device", "cpu"]
    assert evaluate.main(["--run", str(run), *options, "--knn-samples", "all"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == ""
    assert lines[0] == f"{run}: ce, best checkpoint, epoch 7"
    assert lines[1].startswith("ID accuracy ")
    assert lines[-1] == str(tmp_path / "out" / "report.html")
    assert max(map(len, lines[1:-1])) <= WIDTH
    for title in ("Old FD", "OOD against noise", "New FD: mean over 2 OOD sets", "Old FD under shift (foggy)"):
        assert title in lines
    report = read_json(tmp_path / "out")
    assert report["counts"]["ood"] == {"noise": 1000, "far": 20}
    assert report["counts"]["shift"] == {"foggy": 200}
    assert report["fitted"]["knn_samples"] == 400
    assert (tmp_path / "out" / "report.html").is_file()


def test_saved_outputs_with_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_npz(tmp_path / "outputs.npz")
    assert evaluate.main(["--npz", str(path), "--scores", "msp", "energy", "--bootstrap", "20", "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("intervals: 95%, Student's t from the influence of each sample") for line in lines)
    assert sum(line.startswith("  97.5%") for line in lines) == 3 * 3
    report = read_json(tmp_path / "outputs-report")
    assert (report["mix"], report["seed"], report["bootstrap"]["baseline"]) == ("balanced-random", 3, "msp")


def test_saved_outputs_are_evaluated_by_the_first_process_of_torchrun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_npz(tmp_path / "outputs.npz")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert evaluate.main(["--npz", str(path)]) == 0
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "outputs-report").exists()
    monkeypatch.setenv("RANK", "0")
    assert evaluate.main(["--npz", str(path)]) == 0
    assert "ID accuracy" in capsys.readouterr().out
    assert (tmp_path / "outputs-report" / "report.html").is_file()


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluated_run: Path) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "no-labels.npz", logits=np.zeros((2, 3)))
    run, elsewhere = ["--run", str(evaluated_run)], ["--output", str(tmp_path / "out")]
    for args, message in (
        (["--run", str(tmp_path / "gone")], "gone holds no run of tal_fast.train; train one first"),
        (["--run", str(tmp_path / "empty")], "empty holds no run of tal_fast.train; train one first"),
        (["--npz", str(tmp_path / "no-labels.npz")], "has no 'labels'"),
        ([*run, "--scores", "cosine,trust"], "unknown score trust; choose from cosine, msp,"),
        ([*run, "--device", "cuda:99"], "the device 'cuda:99' cannot be used"),
        ([*run, *elsewhere, "--ood", "val=gaussian:5"], "an OOD set cannot be called 'val'"),
        ([*run, *elsewhere, "--ood", "folder"], "--ood takes NAME=WHERE"),
        ([*run, *elsewhere, "--fast", "--scores", "knn", "--output", str(tmp_path)], None),
    ):
        if message is None:  # the run's own logit score is left
            assert evaluate.main(args) == 0
            assert list(read_json(tmp_path)["settings"]["old_fd"]) == ["cosine"]
            continue
        assert evaluate.main(args) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert message in said
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--weights", "x.pt", "--data-dir", "x"], "--weights needs --model NAME"),
        (["--weights", "x.pt", "--model", "resnet18"], "--weights needs --data-dir DIR"),
        (["--weights", "x.pt", "--checkpoint", "best"], "--checkpoint does not go with --weights"),
        (["--run", "x", "--model", "resnet18"], "--model does not go with --run"),
        (["--npz", "x.npz", "--ood", "a=b"], "--ood does not go with --npz"),
        (["--npz", "x.npz", "--fast"], "--fast does not go with --npz"),
    ],
)
def test_options_of_another_source_are_refused(
    capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert evaluate.main(args) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--convention", "fd"], "invalid choice: 'fd'"),
        (["--mix", "half"], "unknown mix 'half'; choose from balanced-random"),
        (["--mix", "prior=2"], "must lie in (0, 1), not 2.0"),
        (["--batch-size", "0"], "must be at least 1, not 0"),
        (["--seed", "x"], "must be a whole number, not 'x'"),
        (["--knn-samples", "9"], "must be at least 10, not 9"),
        (["--temperature", "held-out=1"], "must be held-out or held-out=SHARE"),
        (["--checkpoint", "first"], "invalid choice: 'first'"),
    ],
)
def test_values_out_of_range_are_refused(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--run", "x", *args])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_underscores_are_read_as_hyphens() -> None:
    parser = command.parser()
    spelled = ["--run_dir", "my_run", "--batch_size=3", "--no_typicalness", "--ood", "a_b=c_d"]
    args = parser.parse_args(spelled)
    assert vars(args) == vars(parser.parse_args([spelled[0].replace("_", "-"), "my_run", "--batch-size", "3",
                                                 "--no-typicalness", "--ood", "a_b=c_d"]))  # fmt: skip
    assert (args.run, args.ood) == ("my_run", ["a_b=c_d"])


def test_choices_are_those_of_the_library() -> None:
    assert failure.CONVENTIONS == CONVENTIONS


def test_commands_in_the_documentation_are_understood() -> None:
    docs = Path(__file__).parents[2] / "docs"
    text = "\n".join(path.read_text() for path in docs.rglob("*.md")).replace("\\\n", " ")
    lines = [line.split("tal_fast.evaluate ", 1)[1] for line in text.splitlines() if "-m tal_fast.evaluate --" in line]
    commands = [line for line in lines if "`" not in line and ";" not in line]
    assert len(commands) >= 6
    for line in commands:
        args = command.parser().parse_args(shlex.split(line))
        command.check_source(args)
        check_scores([name for group in args.scores or ["msp"] for name in group.split(",")])
