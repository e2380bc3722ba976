"""Heads trained on cached features: the same network, bits and errors as in training on images."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from tal_fast.config.schema import Config, DataConfig, OptimConfig
from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.evaluation.sources import evaluate_run
from tal_fast.models import build_model
from tal_fast.models.features import head_path
from tal_fast.runs import prediction_store, predictions
from tal_fast.runs.load import load_run
from tal_fast.training.trainer import Trainer
from tal_fast.utils.distributed import Ranks
from tal_fast.utils.signals import Stopped, StopRequest
from tests.helpers.ranks import run_ranks
from tests.helpers.training import assert_same_end, config, final, raise_signal_at

EPOCHS = 3


def cached(output: Path, method: str = "tal", head: str = "linear", **options: Any) -> Config:
    """Configuration of a head on the cached features of a frozen network."""
    made = config(output, method, **{"epochs": EPOCHS, "method_options": {}, **options})
    made.model.cache_features, made.model.head = True, head  # type: ignore[assignment]
    weights = Path(os.environ["TAL_FAST_CACHE"]) / "weights.pt"
    if not weights.exists():
        weights.parent.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            torch.save(build_model(made.model, 10, 1, 8).state_dict(), weights)
    made.model.weights = str(weights)
    return made


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test alone."""
    monkeypatch.setenv("TAL_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images of the batches that any network of the project sees."""
    seen: list[int] = []
    original = predictions.run_model

    def run_model(model: nn.Module, loader: Any, *args: Any) -> Any:
        for indices, outputs in original(model, loader, *args):
            seen.append(len(indices))
            yield indices, outputs

    monkeypatch.setattr(predictions, "run_model", run_model)
    return seen


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_the_result_is_the_whole_network_with_its_frozen_layers(tmp_path: Path, head: str) -> None:
    trainer = Trainer(cached(tmp_path, head=head))
    assert trainer.state.whole is not None
    before = {name: value.clone() for name, value in trainer.state.whole.state_dict().items()}
    trainer.fit()
    run = load_run(tmp_path, "last")
    path = head_path(run.model)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith(f"{path}."), name
    with torch.no_grad():
        losses = [
            F.cross_entropy(run.model(images)[0], labels, reduction="sum")
            for images, labels, _ in run.data.loader("val", batch_size=100)
        ]
    assert float(sum(losses)) / 896 == pytest.approx(trainer.history[-1]["val_loss"], rel=1e-5)


def test_the_head_learns_as_in_a_plain_loop_over_the_features(tmp_path: Path) -> None:
    options = cached(tmp_path, "ce", epochs=2)
    trainer = Trainer(options)
    model = build_model(options.model, 10, 1, 8)
    assert trainer.state.whole is not None
    model.load_state_dict(trainer.state.whole.state_dict())
    model.requires_grad_(False)
    head = model.get_submodule(head_path(model)).requires_grad_()
    optim = options.optim
    trainer.fit()
    images: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for batch, labels, indices in trainer.data.loader("train-eval", batch_size=50):
        images |= {int(i): (x, y) for i, x, y in zip(indices, batch, labels, strict=True)}
    loader = trainer.data.loader("train", batch_size=32, seed=options.seed)
    groups: list[dict[str, Any]] = [{"params": [head.weight]}, {"params": [head.bias], "weight_decay": 0.0}]
    sgd = torch.optim.SGD(groups, optim.lr, optim.momentum, weight_decay=optim.weight_decay, nesterov=True)
    model.eval()
    for epoch in range(2):
        loader.set_epoch(epoch)
        for step, (_, _, indices) in enumerate(loader):
            batch = torch.stack([images[int(i)][0] for i in indices])
            labels = torch.stack([images[int(i)][1] for i in indices])
            for group in sgd.param_groups:
                group["lr"] = trainer._learning_rate(epoch, step)
            sgd.zero_grad()
            F.cross_entropy(model(batch)[0], labels).backward()
            sgd.step()
    assert isinstance(trainer.network, nn.Linear)
    torch.testing.assert_close(trainer.network.weight, head.weight, rtol=1e-4, atol=1e-6)


def test_the_frozen_network_runs_once_for_all_seeds_methods_and_heads(
    tmp_path: Path, cache: Path, passes: list[int]
) -> None:
    Trainer(cached(tmp_path / "a")).fit()
    assert sum(passes) == 200 + 896
    Trainer(cached(tmp_path / "b", "crl", "mlp", optim=OptimConfig(name="adamw", nesterov=False))).fit()
    assert sum(passes) == 200 + 896
    changed = cached(tmp_path / "d")
    changed.data.crop_fraction = 0.5
    Trainer(changed)
    assert sum(passes) == 2 * (200 + 896)


@pytest.mark.parametrize(("method", "head"), [("tal", "linear"), ("fmfp", "mlp")])
def test_resuming_within_an_epoch_is_bit_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, head: str
) -> None:
    Trainer(cached(tmp_path / "straight", method, head)).fit()
    with monkeypatch.context() as patch:
        raise_signal_at(patch, step=9)  # of 6 in an epoch
        with pytest.raises(Stopped, match="after 1 epochs and 3 steps"):
            Trainer(cached(tmp_path / "parts", method, head)).fit()
    Trainer(cached(tmp_path / "parts", method, head, resume="auto")).fit()
    assert_same_end(tmp_path / "straight", tmp_path / "parts")


def test_a_moving_average_of_the_head_is_kept_with_the_frozen_layers(tmp_path: Path) -> None:
    options = cached(tmp_path, "ce")
    options.optim.ema_decay = 0.5
    Trainer(options).fit(until=1)
    tensors, _ = final(tmp_path)
    assert torch.equal(tensors["average.conv1.weight"], tensors["model.conv1.weight"])
    assert not torch.equal(tensors["average.fc.weight"], tensors["model.fc.weight"])
    again = Trainer(cached(tmp_path, "ce", resume="auto", optim=options.optim))
    assert again.state.average is not None
    assert torch.equal(again.state.average.network.weight, tensors["average.fc.weight"])  # type: ignore[arg-type]


def test_a_stopped_pass_goes_on_where_it_was(
    tmp_path: Path, cache: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction_store, "SHARD_BYTES", 1)  # a shard per batch
    Trainer(cached(tmp_path / "straight", eval_batch_size=64)).fit()
    whole = sum(passes)
    passes.clear()
    monkeypatch.setenv("TAL_FAST_CACHE", str(tmp_path / "other"))

    stop = StopRequest()
    monkeypatch.setattr(stop, "poll", lambda: signal.SIGTERM if len(passes) == 5 else 0)
    with pytest.raises(Stopped, match="stopped by SIGTERM; the features so far are kept: run the same command again"):
        Trainer(cached(tmp_path / "parts", eval_batch_size=64), stop=stop)
    Trainer(cached(tmp_path / "parts", eval_batch_size=64)).fit()
    assert sum(passes) == whole  # none twice
    assert_same_end(tmp_path / "straight", tmp_path / "parts")


def two_ranks(rank: int, folder: Path) -> torch.Tensor:
    os.environ["TAL_FAST_CACHE"] = str(folder / "cache")
    ranks = Ranks(rank, 2, torch.device("cpu"))
    Trainer(cached(folder / "two", "ce"), ranks).fit()
    trainer = Trainer(cached(folder / "two", "ce", resume="auto"), ranks)
    return trainer.network.weight.detach()  # type: ignore[operator]


@pytest.mark.slow
def test_two_ranks_train_the_head_of_one(tmp_path: Path, cache: Path) -> None:
    weights, others = run_ranks(two_ranks, 2, tmp_path, tmp_path)
    assert torch.equal(weights, others)
    alone = Trainer(cached(tmp_path / "one", "ce"))
    alone.fit()
    torch.testing.assert_close(weights, alone.network.weight, rtol=1e-3, atol=1e-5)


def test_files_that_do_not_decode_are_left_out_and_counted(tmp_path: Path, cache: Path) -> None:
    random = np.random.default_rng()
    for split, count in (("train", 12), ("val", 6)):
        for i in range(count):
            path = tmp_path / "data" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(256, size=(9, 9, 3), dtype=np.uint8)).save(path)
    broken = tmp_path / "data" / "train" / "a" / "4.png"
    broken.write_bytes(broken.read_bytes()[:-60])
    options = cached(tmp_path / "run", "ce", batch_size=6)
    options.data = DataConfig(root=str(tmp_path / "data"), image_size=8, channels=1, workers=0, loader="torch")
    trainer = Trainer(options)
    trainer.fit()
    assert [row["unreadable"] for row in trainer.history] == [1] * EPOCHS
    assert broken.name in str(trainer.state.unreadable)


def test_what_needs_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"openmix trains on mixtures of images, but model\.cache_features keeps"):
        Trainer(cached(tmp_path, "openmix", method_options={"outliers": "noise"}))
    with pytest.raises(ValueError, match="image_sizes, .* need images in training"):
        Trainer(cached(tmp_path, image_sizes=[(0, 8)]))


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_the_evaluator_runs_the_frozen_network_for_new_images_only(
    tmp_path: Path, cache: Path, passes: list[int], head: str
) -> None:
    Trainer(cached(tmp_path / "run", "ce", head)).fit()
    run = load_run(tmp_path / "run", "last")
    whole = predictions.Inference(run.model, run.data, tmp_path / "whole").store("val").load()
    other = predictions.Inference(run.model, run.data, tmp_path / "whole").store("photos").load()
    passes.clear()
    inference = run.inference(tmp_path / "outputs", predictions.PassOptions())
    outputs = inference.store("val").load()
    assert sum(passes) == 896  # of the head
    np.testing.assert_allclose(outputs.logits, whole.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs.features, whole.features, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    np.testing.assert_array_equal(outputs.labels, whole.labels)
    passes.clear()
    np.testing.assert_allclose(inference.store("photos").load().logits, other.logits, rtol=1e-4, atol=1e-5)
    assert sum(passes) == 2 * len(other.labels)  # of the frozen network and of the head
    evaluate_run(tmp_path / "run", options=EvaluationOptions(scores=["msp", "knn"]), typicalness=False)
