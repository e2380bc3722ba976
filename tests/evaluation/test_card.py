"""Model cards of exported classifiers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tal_fast.config.parse import nest
from tal_fast.config.schema import Config
from tal_fast.evaluation.calibrate_command import describe
from tal_fast.evaluation.card import write_card
from tal_fast.evaluation.export_command import main
from tal_fast.runs import checkpoint
from tests.helpers.evaluation import make_run, read_json


def export(run: Path, output: Path, *options: str) -> int:
    words = ["--run", str(run), "--output", str(output), "--format", "torch-export", "--device", "cpu", "--card"]
    return main([*words, *options])


def header(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_has_the_numbers_of_the_report_and_the_threshold(
    evaluated_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(evaluated_run, tmp_path / "out", "--risk", "0.97", "--confidence", "0.5") == 0
    printed, text = capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()
    assert f"{tmp_path / 'out' / 'README.md'}\n" in printed
    report, about = read_json(evaluated_run), json.loads((tmp_path / "out" / "threshold.json").read_text())
    (model,) = header(text)["model-index"]
    found = {metric["name"]: metric["value"] for result in model["results"] for metric in result["metrics"]}
    assert model["name"] == evaluated_run.name
    assert found["Accuracy"] == report["id_accuracy"]
    titles = {"old_fd": "Old FD", "new_fd": "New FD against noise", "shift": "Old FD under shift (noisy)"}
    for key, title in titles.items():
        for metric in ("aurc", "augrc", "auroc", "fpr95"):
            assert found[f"{metric.upper()}, {title}"] == report["settings"][key][report["score"]][metric]
    assert len(found) == 13
    assert f"| New FD against noise | 200 + 200 | {found['AURC, New FD against noise']:.5f} |" in text
    assert f"```\n{describe(about)}\n```\nThe bound is about images drawn like" in text
    assert "risk at most 97.00% with confidence 0.5" in text
    assert "mixed in as `balanced-random, seed 0`" in text
    assert "none of the classes: tested on noise alone." in text
    assert "Shifted or corrupted images: tested on noisy alone." in text
    assert "highest accuracy on the validation images" in text
    assert "`selective.pt2` takes preprocessed images" in text
    config = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert Config.from_dict(nest(config)).check().model.name == "cifar_resnet8"
    assert str(evaluated_run.parent) not in text  # folders of the machine


def test_what_the_files_do_not_say_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, output = make_run(tmp_path / "run", "ce"), tmp_path / "out"
    assert export(run, output) == 0
    text = (output / "README.md").read_text()
    assert header(text) == {"library_name": "tal-fast", "pipeline_tag": "image-classification"}
    assert "Not evaluated." in text
    assert "No risk was chosen, so nothing is promised." in text
    assert text.count("not tested") == 2
    assert "SHA-256 of the images: not recorded; commit of the code: not recorded." in text
    assert "# license: choose one" in text
    (output / "README.md").write_text("mine")  # the user's own words, such as the licence
    capsys.readouterr()
    assert export(run, output) == 0
    printed = capsys.readouterr()
    assert "README.md" not in printed.out
    assert f"warning: {output / 'README.md'} was there already and is kept; its threshold, bound" in printed.err
    assert "delete it, or choose another --output" in printed.err
    assert (output / "README.md").read_text() == "mine"


def test_a_report_of_other_weights_is_refused(evaluated_run: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", seed=5)
    (run / "report.json").write_bytes((evaluated_run / "report.json").read_bytes())
    about = {"checkpoint": "best", "weights_sha256": "other", "score": "msp"}
    with pytest.raises(ValueError, match=f"report.json is of other weights .* --run {run} --checkpoint best"):
        write_card(run, tmp_path, about, "")
    assert not (tmp_path / "README.md").exists()
    assert export(run, tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()  # refused before the graph


def test_the_results_are_of_the_exported_score_or_named(
    evaluated_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = {"checkpoint": "best", "risk": None, "export": {"file": "selective.onnx"}, "versions": {"torch": "9"}}
    report = {**read_json(evaluated_run), "temperature": {"value": 1.25}}
    about["weights_sha256"] = report["weights_sha256"]
    other = "energy" if report["score"] != "energy" else "msp"

    def made(name: str) -> tuple[str, dict[str, float]]:
        text = write_card(evaluated_run, tmp_path / name, about, "").read_text()
        metrics = [metric for result in header(text)["model-index"][0]["results"] for metric in result["metrics"]]
        return text, {metric["name"]: metric["value"] for metric in metrics}

    about["score"] = other
    text, found = made("has")
    assert f"The confidence score is `{other}`. Of AURC" in text
    assert found["AURC, Old FD"] == report["settings"]["old_fd"][other]["aurc"]
    assert found["AURC, Old FD"] != report["settings"]["old_fd"][report["score"]]["aurc"]
    for by_score in report["settings"].values():
        del by_score[other]
    monkeypatch.setattr("tal_fast.evaluation.card.read_report", lambda run: report)
    text, found = made("has-not")
    assert f"The numbers are of the confidence score `{report['score']}`, not of `{other}`, which the export" in text
    assert "Logits were divided by a temperature of 1.25, which the export does not apply. Of AURC" in text
    name = f"AURC of {report['score']} on logits / 1.25, Old FD"
    assert found[name] == report["settings"]["old_fd"][report["score"]]["aurc"]
    assert "AURC, Old FD" not in found


def test_names_with_commas_and_one_epoch_are_plain(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "ce", classes=["crab, blue", "a_b", *(f"c{i}" for i in range(8))])
    path = run / "checkpoints" / "best.pt"
    content = checkpoint.load(path)
    content["shape"]["conditions"] = {"torch": "8.7"}
    checkpoint.save(path, {**content, "epoch": 1})
    about = {
        "checkpoint": "best", "weights_sha256": "", "risk": None, "score": "msp", "export": {"file": "selective.onnx"},
        "versions": {"torch": "9.1", "onnx": "1.2"},
    }  # fmt: skip
    text = write_card(run, tmp_path / "out", about, "").read_text()
    assert 'Classes: "crab, blue", a\\_b, c0, c1' in text
    assert "\n1 epoch; torch: 8.7. Exported with torch 9.1, onnx 1.2.\n" in text
