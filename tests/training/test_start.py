"""Runs that start from weights: the new last layer, the preprocessing, resuming without the file."""

from __future__ import annotations

import contextlib
import logging
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tal_fast.config.schema import Config, ModelConfig, OptimConfig
from tal_fast.evaluation.sources import evaluate_run
from tal_fast.models import build_model
from tal_fast.runs import checkpoint
from tal_fast.runs.load import load_run
from tal_fast.runs.predictions import PassOptions
from tal_fast.runs.resume import differences
from tal_fast.training.trainer import Trainer
from tal_fast.utils.distributed import Ranks
from tal_fast.utils.signals import Stopped
from tests.helpers.ranks import run_ranks
from tests.helpers.training import assert_same_end, config, raise_signal_at

MODEL = ModelConfig("cifar_resnet8", width=8)


def weights_file(folder: Path, classes: int = 7, channels: int = 1, model: ModelConfig = MODEL) -> Path:
    torch.manual_seed(11)
    path = folder / "weights.pt"
    torch.save({"state_dict": build_model(model, classes, channels, 32).state_dict(), "epoch": 3}, path)
    return path


def start(output: Path, weights: Path | str | None, freeze: Any = "none", **options: Any) -> Config:
    made = config(output, **options)
    made.model = replace(MODEL, weights=None if weights is None else str(weights), freeze=freeze)
    return made


def test_a_file_of_other_classes_gets_a_new_last_layer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = weights_file(tmp_path)
    with caplog.at_level(logging.INFO):
        network = Trainer(start(tmp_path / "a", path)).network.state_dict()
    assert "is for 7 classes: the head, for 10 classes, is new" in caplog.text
    theirs = torch.load(path)["state_dict"]
    assert all(torch.equal(network[name], value) for name, value in theirs.items() if not name.startswith("fc."))
    random = Trainer(start(tmp_path / "b", None)).network.state_dict()
    assert torch.equal(network["fc.weight"], random["fc.weight"])
    same = Trainer(start(tmp_path / "c", weights_file(tmp_path, 10))).network.state_dict()
    assert torch.equal(same["fc.weight"], torch.load(path)["state_dict"]["fc.weight"])


def test_resuming_does_not_need_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights_file(tmp_path)
    Trainer(start(tmp_path / "straight", path, epochs=2)).fit()
    Trainer(start(tmp_path / "parts", path, epochs=2)).fit(until=1)
    path.unlink()
    Trainer(start(tmp_path / "parts", path, epochs=2, resume="auto")).fit()
    assert_same_end(tmp_path / "straight", tmp_path / "parts")
    assert load_run(tmp_path / "parts").config.model.weights == str(path)
    monkeypatch.chdir(path.parent)  # a relative path is the same file
    saved = checkpoint.load(tmp_path / "parts" / "checkpoints" / "last.pt")["config"]
    assert differences(saved, start(tmp_path / "other", path.name, epochs=2)) == []
    with pytest.raises(ValueError, match="there is no file of weights"):
        Trainer(start(tmp_path / "new", path))
    with pytest.raises(ValueError, match=r"model\.weights was .* and is None\), which its state does not fit"):
        Trainer(start(tmp_path / "parts", None, epochs=3, resume="auto"))


def test_a_run_goes_on_from_the_weights_and_preprocessing_of_another(tmp_path: Path) -> None:
    options: dict[str, Any] = {"mean": [0.2], "std": [0.4], "crop_fraction": 0.9, "interpolation": "bicubic"}
    Trainer(config(tmp_path / "first", epochs=1, data_options=options)).fit()
    best = checkpoint.load(tmp_path / "first" / "checkpoints" / "best.pt")
    unset = {"image_size": None, "crop_fraction": None}
    second = start(tmp_path / "second", tmp_path / "first", data_options={**unset, "crop_area": None}, epochs=2)
    trainer = Trainer(second)
    assert all(torch.equal(trainer.network.state_dict()[name], value) for name, value in best["model"].items())
    trainer.fit(until=1)
    written = yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())["data"]
    assert {name: written[name] for name in (*options, "image_size")} == {**options, "image_size": 8}
    resumed = start(tmp_path / "second", tmp_path / "first", data_options={**unset, "crop_area": None}, epochs=2)
    resumed.resume = "auto"
    assert Trainer(resumed).data.config.mean == [0.2]  # without being given
    given = {**unset, "crop_fraction": 0.5, "mean": [0.0], "std": [1.0]}
    data = Trainer(start(tmp_path / "third", tmp_path / "first", data_options=given)).data
    assert (data.config.normalization(), data.config.central_crop) == (([0.0], [1.0]), 0.5)
    assert data.config.resampling == "bicubic"


def test_classes_of_other_names_get_a_new_last_layer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Trainer(config(tmp_path / "first", epochs=1)).fit()
    path = tmp_path / "first" / "checkpoints" / "best.pt"
    content = checkpoint.load(path)
    content["shape"]["class_names"][0] = "naught"
    torch.save(content, path)
    with caplog.at_level(logging.INFO):
        network = Trainer(start(tmp_path / "second", tmp_path / "first")).network.state_dict()
    assert "is for 10 other classes: the head, for 10 classes, is new" in caplog.text
    assert not torch.equal(network["fc.weight"], content["model"]["fc.weight"])
    content["shape"]["class_names"][0] = "0"
    torch.save(content, path)
    other = start(tmp_path / "third", tmp_path / "first")
    other.model.head = "mlp"
    with caplog.at_level(logging.INFO):
        Trainer(other)
    assert "has another kind of head: the head, for 10 classes, is new" in caplog.text


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = weights_file(tmp_path, model=ModelConfig("cifar_resnet8", width=4))
    with pytest.raises(ValueError, match=r"conv1\.weight is of shape \(4, 1, 3, 3\), not \(8, 1, 3, 3\)"):
        Trainer(start(tmp_path / "a", path))
    with pytest.raises(ValueError, match="there is no file of weights .*best.pt"):
        Trainer(start(tmp_path / "a", tmp_path))
    assert not (tmp_path / "a").exists()


def test_images_of_one_channel_take_the_sum_over_three(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = weights_file(tmp_path, channels=3)
    with caplog.at_level(logging.INFO):
        network = Trainer(start(tmp_path / "a", path)).network
    images = torch.rand(2, 1, 8, 8)
    wide = torch.load(path)["state_dict"]["conv1.weight"]
    conv2d = torch.nn.functional.conv2d
    torch.testing.assert_close(conv2d(images.expand(-1, 3, -1, -1), wide), conv2d(images, network.conv1.weight))
    assert "conv1.weight is summed over its 3 channels" in caplog.text


def no_network(*args: Any, **options: Any) -> Any:
    raise AssertionError("a connection was opened")


def test_a_fine_tuned_run_is_evaluated_without_its_weights_and_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    made = start(tmp_path / "run", weights_file(tmp_path, model=ModelConfig("timm/test_vit")), epochs=1)
    made.model = replace(made.model, name="timm/test_vit", width=None, freeze=1)
    made.data.image_size = 48  # of the file: 32
    Trainer(made).fit()
    (tmp_path / "weights.pt").rename(tmp_path / "elsewhere.pt")
    monkeypatch.setattr(socket.socket, "connect", no_network)
    passes = PassOptions(batch_size=64, features=False)
    evaluation = evaluate_run(tmp_path / "run", typicalness=False, passes=passes)
    assert evaluation is not None
    assert evaluation.report["config"]["data"]["mean"] == [0.5]  # of the weights
    content = checkpoint.load(tmp_path / "run" / "checkpoints" / "best.pt")
    theirs = torch.load(tmp_path / "elsewhere.pt")["state_dict"]
    frozen = [name for name in theirs if name.startswith("blocks.0.")]
    assert frozen
    assert all(torch.equal(content["model"][name], theirs[name]) for name in frozen)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_frozen_parts_change_in_nothing(tmp_path: Path, name: Any) -> None:
    optim = OptimConfig(name, lr=0.02, weight_decay=0.1, ema_decay=0.9)
    trainer = Trainer(start(tmp_path / "a", weights_file(tmp_path), epochs=1, optim=optim, freeze=2))
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    trainer.fit()
    assert trainer.state.average is not None
    for network in (trainer.network, trainer.state.average.network):
        changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
        assert {key.split(".")[0] for key in changed} == {"stages", "fc"}
        assert {key.split(".")[1] for key in changed if key.startswith("stages")} == {"2"}
    frozen = [p for key, p in trainer.network.named_parameters() if not key.startswith(("stages.2", "fc"))]
    assert frozen
    assert not any(p.requires_grad or p in trainer.state.optimizer.state for p in frozen)


def head_first(epochs: int = 2, **optim: Any) -> OptimConfig:
    return OptimConfig(**{"lr": 0.05, "weight_decay": 0.01, "head_epochs": epochs, **optim})


def test_only_the_head_trains_in_the_first_epochs(tmp_path: Path) -> None:
    options = {"epochs": 3, "optim": head_first()}
    path = weights_file(tmp_path)
    trainer = Trainer(start(tmp_path / "a", path, **options))
    first = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    trainer.fit(until=2)
    second = trainer.network.state_dict()
    assert {name for name, value in first.items() if not torch.equal(value, second[name])} == {"fc.weight", "fc.bias"}
    third = Trainer(start(tmp_path / "a", path, resume="auto", **options))
    third.fit()
    unchanged = {name for name, value in first.items() if torch.equal(value, third.network.state_dict()[name])}
    assert not unchanged


@pytest.mark.parametrize(("step", "options"), [(4, {}), (11, {}), (13, {"name": "adamw"}), (15, {"accumulate": 2})])
def test_a_kill_before_and_after_the_head_epochs_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, options: dict[str, Any]
) -> None:
    made: dict[str, Any] = {"epochs": 3, "optim": head_first(layer_decay=0.7, ema_decay=0.9, **options)}
    path = weights_file(tmp_path)
    Trainer(start(tmp_path / "straight", path, **made)).fit()
    with monkeypatch.context() as patch:
        raise_signal_at(patch, step)  # of 6 in an epoch
        with pytest.raises(Stopped):
            Trainer(start(tmp_path / "parts", path, **made)).fit()
    Trainer(start(tmp_path / "parts", path, resume="auto", **made)).fit()
    assert_same_end(tmp_path / "straight", tmp_path / "parts")


@pytest.mark.slow
def test_a_compiled_run_stopped_in_the_head_epochs_resumes_bit_for_bit(tmp_path: Path) -> None:
    path, runs = weights_file(tmp_path), []
    for output, resume in (("straight", "never"), ("parts", "never"), ("parts", "auto")):
        runs.append(start(tmp_path / output, path, epochs=3, optim=head_first(2, layer_decay=0.7), resume=resume))
        runs[-1].model.compile = True
        Trainer(runs[-1]).fit(until=1 if (output, resume) == ("parts", "never") else None)
    assert_same_end(tmp_path / "straight", tmp_path / "parts")


def stop_in_the_head_epochs(rank: int, folder: Path) -> None:
    ranks = Ranks(rank, 2, torch.device("cpu"))
    options: dict[str, Any] = {"epochs": 3, "optim": head_first(1)}
    path = weights_file(folder / str(rank)) if rank == 0 else folder / "0" / "weights.pt"
    Trainer(start(folder / "straight", path, **options), ranks).fit()
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stopped):
        raise_signal_at(patch, 3)
        Trainer(start(folder / "parts", path, **options), ranks).fit()
    trainer = Trainer(start(folder / "parts", path, resume="auto", **options), ranks)
    trainer.fit()
    torch.save([p.detach() for p in trainer.network.parameters()], folder / f"end{rank}.pt")


def test_two_ranks_unfreeze_together_and_resume_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    run_ranks(stop_in_the_head_epochs, 2, tmp_path, tmp_path)
    assert_same_end(tmp_path / "straight", tmp_path / "parts")
    ends = [torch.load(tmp_path / f"end{rank}.pt") for rank in range(2)]
    assert all(map(torch.equal, *ends))


def test_freezing_needs_weights_and_no_new_statistics(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.freeze is backbone but the weights are random; name some with"):
        Trainer(start(tmp_path / "a", None, freeze="backbone"))
    with pytest.raises(ValueError, match=r"fmfp recomputes BatchNorm's statistics, which model\.freeze 1 keeps"):
        Trainer(start(tmp_path / "a", weights_file(tmp_path), freeze=1, method="fmfp", method_options={}))
    assert not (tmp_path / "a").exists()
