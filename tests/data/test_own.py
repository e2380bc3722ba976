"""Data sets of the user's own, from a file or another package."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tal_fast.config.schema import DataConfig
from tal_fast.data.build import build_data
from tal_fast.data.digest import split_hash
from tal_fast.data.headers import UnreadableImage
from tal_fast.evaluation import predict_command
from tal_fast.evaluation.classifier import Classifier
from tal_fast.evaluation.sources import evaluate_run
from tal_fast.runs.load import load_run
from tal_fast.training.trainer import Trainer
from tal_fast.utils import own_code
from tests.helpers.own_package import installed_package
from tests.helpers.training import assert_resumes_to_the_bit, config, one_thread

__all__ = ["one_thread"]

ROOT = Path(__file__).parents[2]
OWN = """
import numpy as np
from PIL import Image

numbers = np.random.default_rng(7)
pixels = numbers.integers(256, size=(90, 12, 12, 3), dtype=np.uint8)
labels = np.arange(90) % 3

def arrays(root):
    return {"train": (pixels[:60], labels[:60]), "val": (pixels[60:], labels[60:]), "classes": [*"abc"],
            "ood": {"dark": pixels[:20] // 2}}

def paths(root):
    files = [f"{i}.png" for i in range(90)]
    return {"train": (files[:60], labels[:60].tolist()), "val": (files[60:], labels[60:]), "classes": [*"abc"],
            "ood": {"dark": files[:20]}}

class Images:
    def __init__(self, rows, grey=False):
        self.rows, self.grey = rows, grey

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        image = Image.fromarray(pixels[self.rows[i]])
        return (image.convert("L") if self.grey and i % 2 else np.asarray(image)), int(labels[self.rows[i]])

class Items:
    classes = ["a", "b", "c"]

    def __init__(self, root):
        self.train, self.val, self.ood = Images(range(60)), Images(range(60, 90)), {"dark": Images(range(20), True)}
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """File of data sets in the current folder, beside the images as files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    yield own_code.load(str(tmp_path / "own.py") + ":pixels", own_code.DATA)
    own_code._load.cache_clear()


def options(name: str, **changes: Any) -> dict[str, Any]:
    in_memory = {"crop_area": None, "shift": 1} if name == "arrays" else {}
    return {"dataset": f"own.py:{name}", "image_size": 12, "channels": 3, "train_limit": None, **in_memory, **changes}


@pytest.mark.parametrize("name", ["arrays", "paths", "Items"])
def test_a_run_resumes_to_the_bit_is_evaluated_and_predicts(
    name: str, own: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for i, pixels in enumerate(own):
        Image.fromarray(pixels).save(f"{i}.png")

    def run(output: str, **changes: Any) -> Trainer:
        data = options(name, root=str(tmp_path))
        return Trainer(config(tmp_path / output, "ce", epochs=2, batch_size=8, data_options=data, **changes))

    assert_resumes_to_the_bit(run, tmp_path, monkeypatch, steps=14)

    monkeypatch.chdir("/")  # the run has absolute paths
    evaluation = evaluate_run(tmp_path / "parts")
    assert evaluation is not None
    assert evaluation.report["counts"] == {**evaluation.report["counts"], "id": 30, "ood": {"dark": 20}}
    assert "cannot be read" not in (tmp_path / "parts" / "report.html").read_text()  # its images
    found = Classifier(tmp_path / "parts", device="cpu")([str(tmp_path / f"{i}.png") for i in range(60, 90)])
    predictions = evaluation.samples.predictions["val"]
    assert [prediction.class_name for prediction in found] == ["abc"[c] for c in predictions.prediction]
    np.testing.assert_allclose([p.confidence for p in found], evaluation.samples.id_scores["msp"], rtol=1e-4)
    assert predict_command.main(["--model", str(tmp_path / "parts"), str(tmp_path / "3.png")]) == 0

    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN + "# changed\n")
    with caplog.at_level(logging.WARNING):
        run("parts", resume="auto")
    assert "the data set's file" in caplog.text
    (tmp_path / "own.py").write_text(OWN.replace("default_rng(7)", "default_rng(8)"))
    own_code._load.cache_clear()
    if name != "paths":
        with pytest.raises(ValueError, match="the 60 training images are not the 60 that"):
            run("parts", resume="auto")


@pytest.mark.parametrize("training", [True, False])
def test_items_are_the_images_of_files_and_ranks_share_them(training: bool, own: np.ndarray, tmp_path: Path) -> None:
    for i, pixels in enumerate(own):
        Image.fromarray(pixels).save(f"{i}.png")
    batches = []
    for name in ("paths", "Items"):
        data = build_data(DataConfig(**options(name, root=str(tmp_path), loader="torch", workers=2 * training)))
        loaders = [data.loader("train" if training else "val", batch_size=4, rank=r, world_size=2) for r in range(2)]
        batches.append([batch for loader in loaders for batch in loader])
        for loader in loaders:
            loader.close()
    for (one, label, index), (other, other_label, other_index) in zip(*batches, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(label, other_label)
        assert torch.equal(index, other_index)
        assert torch.equal(label, index % 3)
    seen = torch.cat([index for _, _, index in batches[1]])
    assert sorted(seen.tolist()) == sorted(set(seen.tolist()))
    assert len(seen) == (56 if training else 30)


def test_changed_items_are_unreadable_and_known_by_their_hash(tmp_path: Path) -> None:
    data = build_data(DataConfig(**options("Items", workers=0)))
    before = split_hash(data.split("val"))
    assert split_hash(build_data(DataConfig(**options("Items"))).split("val")) == before
    assert split_hash(data.split("val").subset(np.arange(29))) != before
    sys.modules[str(tmp_path / "own.py")].pixels[61] //= 2
    assert split_hash(build_data(DataConfig(**options("Items"))).split("val")) != before
    loader = data.loader("val", batch_size=10, skip_unreadable=True)
    assert [i for _, labels, _ in loader for i in np.flatnonzero(labels.numpy() == -100)] == [1]
    ((name, reason),) = loader.unreadable.items()
    assert name.endswith("own.py:Items val[1]")
    assert "another image than at the start; leave random changes to data.augment" in reason
    with pytest.raises(UnreadableImage, match=r"leave it out of .*own.py:Items"):
        list(data.loader("val", batch_size=10))


def test_grey_items_and_colour_ones_have_the_channels_asked_for() -> None:
    for channels in (1, 3):
        data = build_data(DataConfig(**options("Items", channels=channels)))
        (images, labels, _) = next(iter(data.loader("dark", batch_size=20)))
        assert images.shape == (20, channels, 12, 12)
        assert labels.tolist() == [-1] * 20


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            "return 1 / 0",
            r"own.py:f failed in line 2 of .*own.py \(ZeroDivisionError: division by zero\); mend it there",
        ),
        ("return 3", "own.py:f must return train, val, classes and optionally ood, by name; it lacks some"),
        ("return {**good, 'val': None}", "own.py:f must return .*; it lacks some"),
        (
            "return {**good, 'train': (x / 2, y)}",
            r"own.py:f train must be \(N, S, S\), .* uint8; it is float64 \(6, 4, 4\)",
        ),
        ("return {**good, 'train': (x[:, 1:], y)}", r"own.py:f train must be .* it is uint8 \(6, 3, 4\)"),
        ("return {**good, 'train': x}", "labels of .*own.py:f train must be a label for each of 6 samples"),
        ("return {**good, 'train': (x, y[1:])}", "labels of .*own.py:f train must be a label for each of 6 samples"),
        (
            "return {**good, 'val': (x, y + 1)}",
            "labels of .*own.py:f val must be integers in 0..1, the classes, not int64 from 1 to 2",
        ),
        ("return {**good, 'val': (x[:0], y[:0])}", "own.py:f val must be .* a map-style dataset, and not empty"),
        ("return {**good, 'val': ([], y[:0])}", "own.py:f val must be .* a map-style dataset, and not empty"),
        ("return {**good, 'train': (['none.png'], [0])}", "1 images that .*f train lists are missing .*none.png"),
        (
            "return {**good, 'train': [(x[0], 0)]}",
            "train and val of .*own.py:f must both be arrays of pixels, or neither",
        ),
        ("return {**good, 'train': [(x[0] / 2, 0)]}", r"f train\[0\] failed \(ValueError: an array must be .* float64"),
        ("return {**good, 'classes': 3}", "classes of .*own.py:f must be a list of different names, not 3"),
        ("return {**good, 'classes': []}", r"classes of .*own.py:f must be a list of different names, not \[\]"),
        ("return {**good, 'classes': 'ab'}", "classes of .*own.py:f must be a list of different names, not 'ab'"),
        ("return {**good, 'classes': ['a', 'a']}", "classes of .*own.py:f must be a list of different names"),
        ("return {**good, 'classes': ['a', 'b', 'c']}", "f train has no image of class 'c'; add some or remove"),
        ("return {**good, 'ood': [x]}", "ood of .*own.py:f must be a mapping from names, which are text, to images"),
        ("return {**good, 'ood': x}", "ood of .*own.py:f must be a mapping from names"),
        ("return {**good, 'ood': {3: x}}", "ood of .*own.py:f must be a mapping from names"),
        ("return {**good, 'ood': {'n': x[:0]}}", "own.py:f ood n must be .* a map-style dataset, and not empty"),
        ("return {**good, 'ood': {'n': '/tmp'}}", "own.py:f ood n must be .* a map-style dataset, and not empty"),
        (
            "return {**good, 'ood': {'far': x}}",
            "data.ood has a set 'far', a name that .*own.py:f gives to its own; rename",
        ),
        ("return {**good, 'train': (x[:, :0, :0], y)}", r"f train must be .* it is uint8 \(6, 0, 0\)"),
        ("return {**good, 'train': (x, [[0], [1, 2]])}", r"labels of .*own.py:f train failed \(ValueError: "),
        ("return {**good, 'train': [(x[0], [0, 1])]}", r"the label of .*f train\[0\] failed \(TypeError: 'list'"),
        ("return {**good, 'train': Bad()}", "f train failed in line 5 of .*own.py .RuntimeError: no length"),
        ("return {**good, 'train': 3}", r"f train must be \(pixels, labels\), .* a map-style dataset, and not empty"),
    ],
)
def test_what_is_no_data_set_is_refused(body: str, sentence: str) -> None:
    text = "import numpy as np\ndef f(root): BODY\nx, y = np.zeros((6, 4, 4), np.uint8), np.arange(6) % 2\n"
    text += "class Bad(list):\n    def __len__(self): raise RuntimeError('no length')\n"
    Path("own.py").write_text(
        text.replace("BODY", body) + "good = {'train': (x, y), 'val': (x, y), 'classes': ['a', 'b']}\n"
    )
    with pytest.raises(ValueError, match=sentence):
        build_data(DataConfig("own.py:f", crop_area=None, ood={"far": "digits"}))


def test_a_run_is_evaluated_on_the_images_it_was_trained_with_alone(
    tmp_path: Path, own: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(config(tmp_path / "run", "ce", batch_size=8, data_options=options("arrays")))
    trainer.save(best=True)
    assert trainer._writer.finish() is None
    _ = load_run(tmp_path / "run").data
    assert "since training" not in caplog.text

    (tmp_path / "own.py").write_text(OWN + "# changed\n")
    _ = load_run(tmp_path / "run").data
    assert re.search("the file of .*own.py:arrays changed since training, but gives the same", caplog.text)

    loaded = sys.modules[str(tmp_path / "own.py")]
    loaded.pixels[75] //= 2  # a validation image
    _ = load_run(tmp_path / "run").data
    assert re.search("the validation images of .*own.py:arrays are not those in training", caplog.text)
    loaded.pixels[3] //= 2
    with pytest.raises(
        ValueError, match="training images of .*own.py:arrays changed since training, so that there may be"
    ):
        _ = load_run(tmp_path / "run").data


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="data.crop_area is for image files, .*own.py:arrays is in memory; set"):
        build_data(DataConfig("own.py:arrays"))
    with pytest.raises(ValueError, match="data.shift is for in-memory data sets"):
        build_data(DataConfig("own.py:Items", shift=1))
    with pytest.raises(ValueError, match="data.split is for data.dataset folder"):
        build_data(DataConfig("own.py:Items", split=0.5))
    with pytest.raises(ValueError, match="there is no file .*none.py, which defines f"):
        build_data(DataConfig("none.py:f"))
    with pytest.raises(ValueError, match=r"data.dataset is 'own'; use folder, .*, or FILE.py:NAME"):
        DataConfig("own").check()


def test_a_data_set_of_an_installed_package_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed_package(
        tmp_path, monkeypatch, "data_package", OWN, "[tal_fast.data]\nthree = data_package:arrays\n"
    ):
        data = build_data(DataConfig("three", crop_area=None, holdout=5))
        assert (data.class_names, len(data.split("train")), len(data.split("val"))) == (("a", "b", "c"), 55, 5)


@pytest.mark.slow
def test_the_documented_data_set_trains(tmp_path: Path) -> None:
    section = (ROOT / "docs" / "data.md").read_text().partition("## A data set of your own")[2].partition("\n## ")[0]
    (function,) = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    (command,) = re.findall(r"^```sh\npython (.*?)\n```", section, re.DOTALL | re.MULTILINE)
    assert len(function.splitlines()) <= 18
    (tmp_path / "my_data.py").write_text(function)
    small = "--epochs 1 --data.train-limit 128 --logger none --device cpu"
    done = subprocess.run(
        [sys.executable, *command.split(), *small.split()],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert load_run(tmp_path / "runs" / "mine").data.ood_names == ("nine",)
