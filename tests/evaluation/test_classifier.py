"""Classifier and its preprocessing: what it predicts is what validation sees."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tal_fast
from tal_fast.config.schema import DataConfig
from tal_fast.data.build import build_data
from tal_fast.data.headers import UnreadableImage
from tal_fast.data.preprocessing import Preprocessing
from tal_fast.evaluation import export_command
from tal_fast.evaluation.calibrate_command import calibrate_run
from tal_fast.evaluation.classifier import Classifier
from tal_fast.runs.load import load_run
from tal_fast.runs.predictions import Inference
from tal_fast.scores.logits import SCORES
from tests.helpers.evaluation import make_run
from tests.helpers.images import cut_short, make_folder, picture

CLASSES = ("cat", "dog", "emu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run on image files of many sizes, formats and modes."""
    folder = tmp_path_factory.mktemp("classifier")
    data = make_folder(folder / "data", val=23)
    options = {"dataset": "folder", "root": str(data), "image_size": 24, "loader": "torch", "workers": 0}
    return make_run(folder / "run", data=options, classes=CLASSES)


@pytest.mark.parametrize(
    "options", [{"exif_rotation": True, "channels": 1}, {"interpolation": "bicubic", "crop_fraction": 1.0}]
)
def test_options_of_the_data_are_those_of_predictions(options: dict[str, Any], run: Path) -> None:
    config = DataConfig(**{**load_run(run).config.to_dict()["data"], **options})
    data = build_data(config)
    preprocessing = Preprocessing.of(config, data.image_size)
    paths = data.split("val").paths
    images, _, _ = next(iter(data.loader("val", batch_size=len(paths))))
    mine = preprocessing.normalizer()(torch.from_numpy(np.stack([preprocessing.read(path) for path in paths])))
    assert torch.equal(mine, images)
    assert Preprocessing.from_dict(json.loads(json.dumps(asdict(preprocessing)))) == preprocessing


@pytest.fixture(scope="module")
def onnx(run: Path) -> Path:
    """Folder of the run's ONNX export, with a threshold that accepts some images."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    # About a third of the untrained network's predictions are right.
    arguments = (
        f"--run {run} --risk 0.85 --confidence 0.5 --calibration-share 1 --device cpu --output {run.parent / 'onnx'}"
    )
    assert export_command.main(arguments.split()) == 0
    return run.parent / "onnx"


def test_predictions_are_of_the_pixels_and_logits_of_validation(run: Path, tmp_path: Path) -> None:
    opened = load_run(run)
    paths = opened.data.split("val").paths
    outputs = Inference(opened.model, opened.data, tmp_path).store("val").load()
    preprocessing = Preprocessing.of(opened.config.data, opened.image_size)
    images, _, _ = next(iter(opened.data.loader("val", batch_size=len(paths))))
    mine = preprocessing.normalizer()(torch.from_numpy(np.stack([preprocessing.read(path) for path in paths])))
    assert torch.equal(mine, images)
    classifier = tal_fast.Classifier(run, batch_size=5, workers=3, device="cpu")
    predictions = classifier(paths, top_k=3)
    assert [p.class_name for p in predictions] == [CLASSES[c] for c in outputs.logits.argmax(1)]
    np.testing.assert_allclose([p.confidence for p in predictions], SCORES["cosine"](outputs.logits), atol=1e-6)
    softmax = torch.from_numpy(outputs.logits).double().softmax(1).numpy()
    for prediction, row in zip(predictions, softmax, strict=True):
        assert [name for name, _ in prediction.top] == [CLASSES[c] for c in np.argsort(-row)]
        np.testing.assert_allclose([p for _, p in prediction.top], np.sort(row)[::-1], atol=1e-6)
        assert prediction.accepted is None  # the run is not calibrated
    # The other kinds of images.
    assert [p.class_name for p in classifier(images)] == [p.class_name for p in predictions]
    opened_images = [Image.open(path) for path in paths]
    assert classifier(opened_images, top_k=3) == predictions
    arrays = [np.asarray(image.convert("RGB")) for image in opened_images]
    assert classifier(arrays, top_k=3) == predictions
    assert classifier(Path(paths[0]), top_k=3) == classifier(iter(paths[:1]), top_k=3)


def test_an_export_predicts_as_its_run(run: Path, onnx: Path) -> None:
    paths = load_run(run).data.split("val").paths
    exported, eager = Classifier(onnx, batch_size=4), Classifier(run, device="cpu")
    about = json.loads((onnx / "threshold.json").read_text())
    assert exported.about == {key: value for key, value in about.items() if key != "sha256"}
    assert exported.preprocessing == eager.preprocessing
    assert (exported.threshold, exported.score) == (about["threshold"], "cosine")
    for mine, want in zip(exported(paths, top_k=2), eager(paths, top_k=2), strict=True):
        assert (mine.class_name, [c for c, _ in mine.top]) == (want.class_name, [c for c, _ in want.top])
        assert mine.confidence == pytest.approx(want.confidence, abs=1e-5)
        assert mine.accepted == (mine.confidence > about["threshold"])


def test_a_calibrated_run_abstains(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    about = calibrate_run(tmp_path / "run", risk=0.82, confidence=0.5, share=1.0, score="energy")
    classifier = Classifier(tmp_path / "run", device="cpu")
    predictions = classifier(load_run(run).data.split("val").paths)
    # The logits of the sample at the threshold may round differently in another batch.
    assert abs(sum(p.accepted is True for p in predictions) - about["accepted"]) <= 1
    assert [p.accepted for p in predictions] == [p.confidence > about["threshold"] for p in predictions]
    assert 0 < about["accepted"] < len(predictions)
    # Weights that the calibration is not of.
    make_run(tmp_path / "other", seed=5, classes=CLASSES)
    shutil.copy(tmp_path / "other/checkpoints/best.pt", tmp_path / "run/checkpoints/best.pt")
    with pytest.raises(ValueError, match="is of other weights than"):
        Classifier(tmp_path / "run")


def test_bad_images_are_named_or_passed_over(run: Path, tmp_path: Path) -> None:
    cut_short(tmp_path / "cut.jpg")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.png")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    picture(30, 20, 1).save(tmp_path / "good.png")
    classifier = Classifier(run, batch_size=2, device="cpu")
    names = ["cut.jpg", "good.png", "text.png", "empty.png", "pipe.png", "gone.png", "deep.png", "good.png"]
    found = list(classifier.stream(tmp_path / name for name in names))
    good = classifier(tmp_path / "good.png")[0]
    assert [found[1], found[7]] == [good, good]
    reasons = [p.error for i, p in enumerate(found) if i not in (1, 7)]
    wanted = [
        "truncated",
        "no image format fits it",
        "it is empty",
        "not a file",
        "No such file",
        "pixels of mode I;16",
    ]
    for name, reason, part in zip([n for n in names if n != "good.png"], reasons, wanted, strict=True):
        assert reason.startswith(f"{tmp_path / name} cannot be read as an image (")
        assert part in reason
    assert math.isnan(found[0].confidence)
    with pytest.raises(UnreadableImage, match=r"cut\.jpg cannot be read"):
        classifier([tmp_path / "good.png", tmp_path / "cut.jpg"])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3)), "uint8, not (4, 4, 3) float64"),
        (np.zeros((2, 4, 4, 3), np.uint8), "an array must be (H, W)"),
        ([7], "not int"),
        (torch.zeros(2, 3, 24, 23), "preprocessed images must be (B, 3, 24, 24), not (2, 3, 24, 23)"),
        (torch.zeros(2, 3, 24, 24, dtype=torch.uint8), "must be float, not torch.uint8"),
        (Image.new("F", (3, 3)), "an image of mode F"),
    ],
)
def test_images_of_other_kinds_are_refused(image: object, message: str, run: Path) -> None:
    with pytest.raises(ValueError, match=".*") as caught:
        Classifier(run, device="cpu")(image)
    assert message in str(caught.value)


def test_what_is_no_model_is_refused(run: Path, onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is neither a run of tal_fast.train nor an ONNX export"):
        Classifier(tmp_path)
    (tmp_path / "bad.onnx").write_bytes(b"bad")
    with pytest.raises(ValueError, match=r"bad\.onnx cannot be opened by ONNX Runtime"):
        Classifier(tmp_path / "bad.onnx")
    with pytest.raises(ValueError, match="may run code when it is loaded"):
        Classifier(tmp_path / "selective.pt2")
    with pytest.raises(ValueError, match="top_k is 4 but must be 1 to 3"):
        Classifier(onnx)([], top_k=4)
    import onnx as package

    proto = package.load(onnx / "selective.onnx")
    for prop in [p for p in proto.metadata_props if p.key == "crop_fraction"]:
        proto.metadata_props.remove(prop)
    package.save(proto, tmp_path / "old.onnx")
    with pytest.raises(ValueError, match="the preprocessing lacks crop_fraction; export the model again"):
        Classifier(tmp_path / "old.onnx")
