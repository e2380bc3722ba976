"""Small training runs, and the comparison of their results."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tal_fast.config.schema import Config, DataConfig, MethodConfig, ModelConfig, OptimConfig
from tal_fast.data.loader import IGNORED_LABEL
from tal_fast.methods import Method, Step, Task, build_method
from tal_fast.runs import checkpoint
from tal_fast.training.train_step import Update
from tal_fast.training.trainer import Trainer
from tal_fast.utils.signals import Stopped

TIMINGS = ("seconds", "images_per_s", "data_wait")
"""Columns of metrics.csv that differ from run to run."""


@pytest.fixture(autouse=True, scope="module")
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One PyTorch thread, which is fastest for networks this small, and a cache of the test session."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAL_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield
    torch.set_num_threads(threads)


def config(output: Path, method: str = "tal", **options: Any) -> Config:
    """Configuration of a small run on digits, with everything that is random: crops, shuffling, queue."""
    method_options = {"queue_size": 150, **options.pop("method_options", {})}
    data_options, label_smoothing = options.pop("data_options", {}), method_options.pop("label_smoothing", 0.0)
    return Config(
        data=DataConfig(
            **{
                "dataset": "digits",
                "loader": "torch",
                "workers": 0,
                "image_size": 8,
                "channels": 1,
                "train_limit": 200,
                "crop_area": (0.5, 1.0),
                **data_options,
            }
        ),
        # Below 7, oneDNN's channels-last 1 x 1 convolutions of stride 2 write out of bounds on AVX2 (torch 2.14).
        model=ModelConfig("cifar_resnet8", width=8),
        method=MethodConfig(method, label_smoothing, method_options),
        **{
            "optim": OptimConfig(lr=0.05, warmup_epochs=1),
            "output": str(output),
            "epochs": 4,
            "batch_size": 32,
            "device": "cpu",
            "progress": "none",
            "logger": "none",
            "seed": 3,
            **options,
        },
    )


def method(config: MethodConfig, epochs: int = 10, classes: int = 10, images: int = 100) -> Method:
    """A method outside of a trainer."""
    return build_method(config, Task(epochs, classes, images, learning_rate=0.1))


def step_of(method: Method, logits: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> Step:
    """A method's step on the first training images."""
    return method(logits, features, labels, torch.arange(len(labels)))


def labelled_batch(rows: int = 9, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random logits, features and labels; the fourth row has no label."""
    labels = torch.randint(classes, (rows,))
    labels[3] = IGNORED_LABEL
    return 3 * torch.randn(rows, classes), torch.rand(rows, 6), labels


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics.csv without timings."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def final(output: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All tensors of a run's last checkpoint by name, and its metrics."""
    content = checkpoint.load(output / "checkpoints" / "last.pt")
    tensors = {f"model.{k}": v for k, v in content["model"].items()}
    tensors |= {f"average.{k}": v for k, v in (content["average"] or {}).items()}
    for number, state in content["optimizer"]["state"].items():
        tensors |= {f"optimizer.{number}.{k}": v for k, v in state.items() if isinstance(v, torch.Tensor)}
    for rank, saved in enumerate(content["ranks"]):
        state = dict(saved["method"])
        extra = state.pop("_extra_state", {})
        tensors |= {f"rank{rank}.{k}": torch.as_tensor(v) for k, v in {**state, **extra}.items()}
        tensors |= {f"rank{rank}.rng": saved["rng"]["torch"]}
    return tensors, {"history": untimed(content["history"]), "best": content["best"], "epoch": content["epoch"]}


def assert_same_end(one: Path, other: Path) -> None:
    """Assert that two runs ended with equal tensors and metrics."""
    tensors, numbers = final(one)
    others, other_numbers = final(other)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    assert numbers == other_numbers
    assert untimed(read_metrics(one)) == untimed(read_metrics(other))


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics.csv."""
    with open(output / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def correct_predictions(model: torch.nn.Module, batches: Any) -> int:
    """Number of correct predictions of a model over the batches of a loader."""
    with torch.no_grad():
        return sum(int((model(images)[0].argmax(1) == labels).sum()) for images, labels, _ in batches)


def raise_signal_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal during the ``step``-th training step from now."""
    original = Update.__call__
    count = [0]

    def update(self: Update, *args: Any) -> None:
        original(self, *args)
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Update, "__call__", update)


def assert_resumes_to_the_bit(
    run: Callable[..., Trainer], folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Assert that a run stopped at a random one of fewer than ``steps`` steps, and resumed, ends as one that was not.

    ``run(output, **options)`` makes its trainer in ``folder / output``; the runs are ``straight`` and ``parts``.
    """
    run("straight").fit()
    with monkeypatch.context() as patch:
        raise_signal_at(patch, int(np.random.default_rng().integers(1, steps)))
        with pytest.raises(Stopped):
            run("parts").fit()
    run("parts", resume="auto").fit()
    assert_same_end(folder / "straight", folder / "parts")
