"""TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path

import pytest

from tal_fast.training.trainer import Trainer
from tests.helpers.training import config, read_metrics


def test_tensorboard_has_steps_epochs_and_distributions(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Trainer(config(tmp_path, epochs=2, logger="tensorboard", log_every_steps=2)).fit(until=1)
    Trainer(config(tmp_path, epochs=2, logger="tensorboard", log_every_steps=2, resume="auto")).fit()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0, "histograms": 0})
    events.Reload()
    assert [e.step for e in events.Scalars("step/loss")] == [2, 4, 6, 8, 10, 12]
    epochs = events.Scalars("epoch/train_loss")
    assert [e.step for e in epochs] == [6, 12]
    assert [e.value for e in epochs] == pytest.approx(
        [float(r["train_loss"]) for r in read_metrics(tmp_path)], rel=1e-6
    )
    # Three logged pairs of steps of 32 images make the epoch's mean.
    steps = [e.value for e in events.Scalars("step/loss")]
    assert sum(steps[:3]) / 3 == pytest.approx(epochs[0].value, rel=1e-5)
    assert [int(h.histogram_value.num) for h in events.Histograms("typicalness")] == [192, 192]


def test_wandb_offline_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    Trainer(config(tmp_path, epochs=2, logger="wandb")).fit(until=1)
    identity = (tmp_path / "wandb" / "run-id.txt").read_text()
    Trainer(config(tmp_path, epochs=2, logger="wandb", resume="auto")).fit()
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(identity in folder.name for folder in folders)


def test_missing_wandb_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else found(name, *a))
    with pytest.raises(ValueError, match="logger is 'all' but wandb is not installed; pip install wandb"):
        Trainer(config(tmp_path, logger="all"))


def test_a_run_without_tensorboard_says_so_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with caplog.at_level(logging.INFO):
        Trainer(config(tmp_path, epochs=1, logger="tensorboard")).fit()
    assert "TensorBoard is not installed (pip install tensorboard); logging to metrics.csv only" in caplog.text
    assert len(read_metrics(tmp_path)) == 1
