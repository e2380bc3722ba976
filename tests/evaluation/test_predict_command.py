"""Commands predict and export."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tal_fast.evaluation import calibrate_command, export_command
from tal_fast.evaluation.classifier import Classifier
from tal_fast.evaluation.predict_command import SHIFT_LEVEL, find_images, main, shift_warning
from tal_fast.runs.load import load_run
from tests.helpers.evaluation import make_run
from tests.helpers.images import cut_short, make_folder, picture

CLASSES = ("cat", "dog", "emu")
CALIBRATE = ["--risk", "0.85", "--confidence", "0.5", "--calibration-share", "1", "--device", "cpu"]
"""Accepts some of the predictions of an untrained network, a third of which are right."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a calibrated run on image files."""
    folder = tmp_path_factory.mktemp("predict")
    data = make_folder(folder / "data", val=23)
    options = {"dataset": "folder", "root": str(data), "image_size": 24, "loader": "torch", "workers": 0}
    run = make_run(folder / "run", data=options, classes=CLASSES)
    assert calibrate_command.main(["--run", str(run), *CALIBRATE]) == 0
    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Folder with five good images, one below another folder, and two bad ones."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for i in range(4):
        picture(30 + i, 40 - i, i).save(folder / f"{i}, ü.png")
    picture(50, 20, 9).save(folder / "below" / "9.jpg")
    cut_short(folder / "cut.jpg")
    (folder / "text.png").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("ending", [None, "csv", "jsonl", "parquet"])
def test_every_image_is_a_row_and_bad_ones_are_listed(
    ending: str | None, run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    out = [] if ending is None else ["--out", str(tmp_path / f"predictions.{ending}")]
    arguments = ["--model", str(run), str(photos), str(photos / "gone.png"), "--top-k", "2", "--batch-size", "3"]
    assert main([*arguments, *out, "--device", "cpu"]) == 1
    printed, errors = capsys.readouterr()
    if ending == "parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(out[1]).to_pylist()
    elif ending == "jsonl":
        rows = [json.loads(line) for line in Path(out[1]).read_text().splitlines()]
        for row in rows:
            for k, (name, probability) in enumerate(row.pop("top") or [(None, None)] * 2, 1):
                row |= {f"class_{k}": name, f"probability_{k}": probability}
    else:
        text = printed if ending is None else Path(out[1]).read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(text)))
        rows = [{name: value or None for name, value in row.items()} for row in rows]
    names = ["0, ü.png", "1, ü.png", "2, ü.png", "3, ü.png", "below/9.jpg", "cut.jpg", "text.png", "gone.png"]
    assert [row["path"] for row in rows] == [str(photos / name) for name in names]
    want = Classifier(run, device="cpu")([photos / name for name in names[:5]], top_k=2)
    for row, prediction in zip(rows, want, strict=False):
        assert (row["class"], row["class_1"], row["error"]) == (prediction.class_name, prediction.top[0][0], None)
        assert float(row["confidence"]) == pytest.approx(prediction.confidence, abs=1e-6)
        assert float(row["probability_2"]) == pytest.approx(prediction.top[1][1], abs=1e-6)
        assert str(row["accepted"]) == str(prediction.accepted)
    for row in rows[5:]:
        assert row["path"] + " cannot be read as an image (" in row["error"]
        assert row["error"] in errors
        assert [row[name] for name in ("class", "confidence", "accepted", "class_1")] == [None] * 4
    accepted = sum(p.accepted is True for p in want)
    assert f"5 images; {accepted} accepted; {5 - accepted} abstained; 3 could not be read" in errors


def test_paths_come_from_patterns_and_standard_input(
    run: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ["--model", str(run), "--device", "cpu"]
    assert main([*model, str(photos / "[01]*.png"), str(photos / "**" / "*.jpg")]) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [Path(row["path"]).name for row in rows] == ["0, ü.png", "1, ü.png", "9.jpg", "cut.jpg"]
    odd = os.fsencode(photos) + b"/\xff.png"
    shutil.copy(photos / "0, ü.png", odd)
    given = io.TextIOWrapper(io.BytesIO(odd + b"\r\n\n" + os.fsencode(photos / "2, ü.png")))
    monkeypatch.setattr(sys, "stdin", given)
    assert main([*model, "-", "--out", str(photos / "out.csv")]) == 0
    lines = (photos / "out.csv").read_bytes().splitlines()
    assert lines[1].startswith(odd + b",")
    assert lines[2].startswith(b'"' + os.fsencode(photos / "2, ü.png") + b'",')


def test_folders_are_searched_without_other_files(
    photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["0, ü.png", "1, ü.png", "2, ü.png", "3, ü.png", "below/9.jpg", "cut.jpg", "text.png"]
    assert list(find_images([str(photos)])) == [f"{photos}/{name}" for name in names]
    assert f"{photos}: 1 file is left out: 1 .txt" in caplog.text
    monkeypatch.chdir(photos.parent)
    assert list(find_images(["photos/"])) == [f"photos/{name}" for name in names]  # as the user names it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "4"], "--top-k is 4 but the model has 3 classes"),
        (["--out", "a.txt"], "--out is 'a.txt' but must end with .csv, .jsonl or .parquet"),
        (["-"], "- reads the paths from standard input"),
        (["*.nothing"], "*.nothing has no images"),
        (["--batch-size", "0"], "must be at least 1, not 0"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], message: str, run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([str(photos), "--model", str(run), "--device", "cpu", *arguments])
    except SystemExit as leaving:
        code = leaving.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_help_needs_no_torch() -> None:
    for command in ("predict", "export"):
        code = (
            f"import sys, atexit, tal_fast.{command} as c\n"
            "atexit.register(lambda: print('torch' in sys.modules)); c.main()"
        )
        done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=300)
        assert done.stdout.endswith("False\n"), done.stderr


def test_the_end_of_the_reader_of_the_output_is_no_mistake(
    run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    for command, arguments in (
        (main, ["--model", str(run), str(photos)]),
        (calibrate_command.main, ["--run", str(run), *CALIBRATE, "--output", str(photos / "out")]),
    ):
        with pytest.raises(BrokenPipeError):
            command(arguments)
    assert "error" not in capsys.readouterr().err


def test_a_shift_is_warned_of_and_chance_is_not() -> None:
    about = {"threshold": 0.5, "risk": 0.02, "accepted": 180, "samples": 200, "test": {"accepted": 184, "samples": 200}}
    assert shift_warning(about, 910, 1000) is None
    for accepted in (700, 1000):
        found = shift_warning(about, accepted, 1000)
        assert found is not None
        assert f"{accepted / 10:.1f}% of 1,000 images are accepted" in found
        assert "the bound of 2.00% does not hold" in found
    assert shift_warning(about, 0, 1) is None
    assert shift_warning({**about, "threshold": None}, 0, 1000) is None
    assert shift_warning({}, 0, 1000) is None
    # Without a shift, warnings are rarer than their level.
    random = np.random.default_rng(0)
    warned = 0
    for _ in range(1000):
        kept, accepted = random.binomial(400, 0.9), int(random.binomial(500, 0.9))
        warned += (
            shift_warning({"threshold": 0.0, "risk": 0.1, "accepted": int(kept), "samples": 400}, accepted, 500)
            is not None
        )
    assert warned <= 1000 * SHIFT_LEVEL + 3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_a_calibrated_run_is_exported_with_its_risk(
    format: str, precision: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    capsys.readouterr()
    arguments = ["--run", str(run), "--format", format, "--precision", precision, "--output", str(tmp_path)]
    assert export_command.main([*arguments, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    calibrated = json.loads((run / "calibrated" / "threshold.json").read_text())
    about = json.loads((tmp_path / "threshold.json").read_text())
    assert [about[name] for name in ("risk", "confidence", "seed", "score", "samples")] == [
        calibrated[name] for name in ("risk", "confidence", "seed", "score", "samples")
    ]
    agreed = about["agreement"]
    assert agreed["images"] == 23
    assert agreed["decisions_differ"] <= agreed["inside"] < 23
    assert 0 <= agreed["largest_difference"] <= agreed["bound"]
    assert f"within {agreed['bound']:.2g} of the threshold there are {agreed['inside']}" in printed
    images, labels, _ = next(iter(load_run(run).data.loader("val", batch_size=256)))
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / "selective.onnx", providers=["CPUExecutionProvider"])
        classes, _, accepted, _ = map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
    else:
        classes, _, accepted = torch.export.load(tmp_path / "selective.pt2").module()(images)
    assert int(accepted.sum()) == about["accepted"] < 23
    assert int((classes != labels)[accepted].sum()) == about["errors"]


def test_an_export_without_a_risk_accepts_everything_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    arguments = ["--run", str(run), "--format", "torch-export", "--device", "cpu"]
    assert export_command.main([*arguments, "--confidence", "0.9"]) == 2
    assert "choose a new threshold; give its --risk too" in capsys.readouterr().err
    assert export_command.main(arguments) == 0
    assert "accept every prediction, as no risk is given" in capsys.readouterr().out
    about = json.loads((run / "exported" / "torch-export-fp32" / "threshold.json").read_text())
    assert (about["threshold"], about["risk"], about["crop_fraction"]) == (None, None, 1.0)
