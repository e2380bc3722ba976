"""Images in the page."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tal_fast.data.datasets import MemoryImages
from tal_fast.evaluation import pipeline
from tal_fast.evaluation.evaluation import read_evaluation
from tal_fast.evaluation.galleries import GALLERY_SIZE, find_galleries
from tal_fast.evaluation.html.images import THUMBNAIL_SIDE, gallery_sections, thumbnail
from tal_fast.evaluation.html.page import FILE, write_html
from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.evaluation.sources import evaluate_run
from tal_fast.runs.load import load_run
from tests.helpers.evaluation import Page, make_run


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_thumbnails_are_small_and_small_images_exact(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 9, 3), dtype=np.uint8)
    uri, width, height = thumbnail(pixels, 3)
    assert uri.startswith("data:image/png;")
    assert (width, height) == (9, 8)
    np.testing.assert_array_equal(np.asarray(decoded(uri)), pixels)
    np.testing.assert_array_equal(np.asarray(decoded(thumbnail(pixels[..., :1], 1)[0])), pixels[..., 0])
    Image.new("CMYK", (3000, 1000), "red").save(tmp_path / "large.jpg")
    uri, width, height = thumbnail(tmp_path / "large.jpg", 3)
    assert uri.startswith("data:image/jpeg;")
    assert (width, height) == decoded(uri).size == (THUMBNAIL_SIDE, round(THUMBNAIL_SIDE / 3))
    assert len(uri) < 8000
    Image.new("LA", (20, 10), (7, 0)).save(tmp_path / "alpha.png")
    assert decoded(thumbnail(tmp_path / "alpha.png", 1)[0]).getpixel((0, 0)) == 7


def test_galleries_show_the_chosen_images(evaluated_run: Path) -> None:
    evaluation = find_galleries(read_evaluation(evaluated_run), evaluated_run)
    samples = evaluation.samples
    val = samples.predictions["val"]
    mistakes, correct, ood, *_ = evaluation.galleries
    alts = [image["alt"] or "" for image in Page(evaluated_run / FILE).all("img")]
    assert [alt for alt in alts if "predicted as" in alt and "val #" in alt] == [
        f"bars-{val.label[i]} predicted as bars-{val.prediction[i]}: val #{i}" for i in mistakes.chosen
    ]
    assert [int(alt.split("#")[1]) for alt in alts if "correctly" in alt] == correct.chosen.tolist()
    assert [int(alt.split("#")[1]) for alt in alts if "noise #" in alt] == ood.chosen.tolist()
    typical = [int(alt.split("#")[1]) for alt in alts if "train-eval #" in alt]
    assert typical == [i for gallery in evaluation.galleries[-2:] for i in gallery.chosen]
    assert len(typical) == 2 * GALLERY_SIZE
    # The pixels are the data set's own.
    noise = load_run(evaluated_run).data.split("noise")
    assert isinstance(noise, MemoryImages)
    tile = gallery_sections(evaluation)[2].tiles[0]
    np.testing.assert_array_equal(np.asarray(decoded(tile.image)), noise.pixels[ood.chosen[0], :, :, 0])


def test_held_out_samples_do_not_shift_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "fit_temperature", lambda logits, labels: 2.0)  # random weights have none
    run = make_run(tmp_path / "run", "ce")
    evaluation = evaluate_run(run, options=EvaluationOptions(scores=["msp"], temperature=0.25))
    assert evaluation is not None
    assert evaluation.images is not None
    labels = evaluation.images.splits["val"].labels
    for tile in gallery_sections(evaluation)[1].tiles:
        assert f"label: bars-{labels[int(tile.name.split('#')[1])]}" in tile.lines


def test_a_damaged_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAL_FAST_CACHE", str(tmp_path / "cache"))
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.effect_noise((300, 300), 60).convert("RGB").save(tmp_path / split / name / "0.jpg")
    data = {"dataset": "folder", "root": str(tmp_path), "loader": "torch", "workers": 0, "image_size": 16}
    run = make_run(tmp_path / "run", data=data, classes=["cat", "dog"])
    evaluate_run(run)
    assert "data:image/jpeg" in (run / FILE).read_text()
    damaged = tmp_path / "train" / "cat" / "0.jpg"
    damaged.write_bytes(damaged.read_bytes()[:3000])
    evaluate_run(run)
    # It is left out of typicalness as it was of training.
    alts = [image["alt"] or "" for image in Page(run / FILE).all("img")]
    assert [alt for alt in alts if "training" in alt] == ["training image of dog, typicalness 1.00: dog/0.jpg"] * 2
    assert len(alts) == 2 + 2
    damaged = tmp_path / "val" / "cat" / "0.jpg"
    status, content = damaged.stat(), damaged.read_bytes()
    damaged.write_bytes(bytes(len(content)))
    os.utime(damaged, ns=(status.st_atime_ns, status.st_mtime_ns))  # or it is known to be another image
    page = Page(write_html(find_galleries(read_evaluation(run), run), run))
    assert "cannot be read" in page.text
    assert len(page.all("img")) == 1 + 2
