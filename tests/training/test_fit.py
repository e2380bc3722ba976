"""Options that fit the data and the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tal_fast.config.parse import load_config, parse_training
from tal_fast.config.schema import Config
from tal_fast.models import pretrained
from tal_fast.training import fit as module
from tal_fast.training.command import main
from tal_fast.training.fit import CHOSEN, Facts, choose, fit, with_options
from tests.data.test_split import class_folders

PLAIN = Facts(2000, 10, 300, memory=16.0, cores=4, gpu=None, network="resnet18", weights=None, tal=True)
CACHE = {"model.cache_features": True, "model.freeze": "backbone", "model.head": "mlp", "epochs": 30}


@pytest.mark.parametrize(
    ("facts", "expected", "reason"),
    [
        ({"weights": "resnet18"}, {**CACHE, "model.name": "resnet18", "data.image_size": None}, "no GPU and 4 cores"),
        ({"weights": "x", "images": 10**6, "memory": 16.0}, {"epochs": 3, "model.freeze": "backbone"}, "do not fit a"),
        ({"weights": "x", "images": 10**6, "memory": 64.0}, CACHE, "its features for 30 epochs"),
        ({"images": 500}, {"data.image_size": 224, "batch_size": 64}, "resnet18 trains at 224 pixels for 40 epochs"),
        ({"cores": 2}, {"data.image_size": 160}, "there are no pretrained weights in the cache"),
        ({"cores": 1}, {"data.image_size": 128}, "no GPU and 1 core: "),
        ({"images": 50_000}, {"data.image_size": 64, "model.name": "cifar_resnet20"}, "would take more than 2 hours"),
        ({"side": 28}, {"data.image_size": 28, "model.name": "cifar_resnet20"}, "would have to be enlarged"),
        ({"gpu": 80.0}, {"batch_size": 128}, "a GPU with 80 GiB: all of resnet18 is trained, from random weights"),
        ({"gpu": 80.0, "weights": "resnet18"}, {"epochs": 20, "optim.lr": 0.02}, "from its pretrained weights"),
        ({"gpu": 6.0}, {"batch_size": 64}, "a GPU with 6 GiB"),
        ({"images": 9}, {"batch_size": 2}, "9 images of 10 classes"),
        ({"classes": 200}, {"method.options.t_max": 100.0, "method.options.t_wrong": 20.0}, "200 classes"),
    ],
)
def test_the_choice_fits_data_and_machine(facts: dict[str, Any], expected: dict[str, Any], reason: str) -> None:
    values, text = choose(replace(PLAIN, **facts))
    assert {name: values.get(name) for name in expected} == expected
    assert reason in text
    assert values.keys() <= set(CHOSEN)
    if facts.get("gpu"):
        assert "model.cache_features" not in values
    if "classes" not in facts:
        assert "method.options.t_max" not in values
    assert "method.options.t_max" not in choose(replace(PLAIN, tal=False, classes=200))[0]


def planned(words: str) -> tuple[Config, str]:
    config, _, given = parse_training(words.split(), "train")
    assert given is not None
    values, text = fit(config, given, torch.device("cpu"))
    return with_options(config, values), text


def test_options_of_one_section_are_set_together() -> None:
    names = ("method.options.t_min", "method.options.t_max", "optim.lr", "optim.warmup_epochs")
    config = with_options(load_config("folder-tal"), dict(zip(names, (3.0, 30.0, 0.2, 1), strict=True)))
    assert [config.flat()[name] for name in names] == [3.0, 30.0, 0.2, 1]


def test_what_is_given_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = class_folders(tmp_path / "data", {"a": 20, "b": 20})
    words = f"--config folder-tal --data.root {root} --data.split 0.5 --output {tmp_path / 'run'}"
    config, text = planned(words)
    assert (config.model.name, config.data.image_size, config.batch_size) == ("cifar_resnet20", 20, 4)
    assert text.startswith("plan: 20 images of 2 classes, 20 pixels, no GPU")
    config, _ = planned(f"{words} --model.name resnet18 --batch-size 8 --optim.lr 0.3")
    assert (config.model.name, config.data.image_size, config.batch_size, config.optim.lr) == ("resnet18", 20, 8, 0.3)
    mine = tmp_path / "mine.yaml"
    mine.write_text("batch_size: 16\n")
    assert planned(f"{words} --config {mine}")[0].batch_size == 16
    monkeypatch.setattr(module, "is_cached", lambda name: name == "mobilenet_v3_large")
    config, text = planned(f"{words} --epochs 7")
    assert (config.model.name, config.model.weights, config.epochs) == ("mobilenet_v3_large", "pretrained", 7)
    assert "What you set wins (epochs);" in text
    assert config.model.cache_features
    assert config.data.image_size is None  # that of the weights
    assert not planned(f"{words} --model.name resnet18")[0].model.cache_features  # not in the cache
    assert parse_training(["--config", "digits-ce"], "train")[2] is None


def test_a_continued_run_keeps_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = class_folders(tmp_path / "data", {"a": 20, "b": 20})
    words = (
        f"--config folder-ce --data.root {root} --data.split 0.5 --output {tmp_path / 'run'} --epochs 2 "
        "--data.workers 0 --data.loader torch --device cpu --progress none --logger none --resume auto"
    )
    main(words.split())
    monkeypatch.setattr(module, "is_cached", lambda name: True)
    main([*words.split(), "--epochs", "3", "--extend"])
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "cifar_resnet20" in saved
    assert "epochs: 3" in saved


def test_weights_are_found_in_the_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert not pretrained.is_cached("resnet18")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet18-f37072fd.pth").touch()
    assert pretrained.is_cached("resnet18")
    assert not pretrained.is_cached("resnet50")
    assert not pretrained.is_cached("cifar_resnet8")
