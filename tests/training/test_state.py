"""State of a training run: restoring on another number of ranks, best epoch."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from tal_fast.runs import checkpoint
from tal_fast.training.trainer import Trainer
from tests.helpers.training import config


def test_another_number_of_ranks_goes_on_from_the_start_of_the_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(config(tmp_path))
    for batch in trainer.batches.epoch(0):
        trainer.train_step(batch, 0.05)
    trainer.state.epoch, trainer.state.step = 1, 2
    trainer.save()
    assert trainer._writer.finish() is None
    path = tmp_path / "checkpoints" / "last.pt"
    content = checkpoint.load(path)
    unreadable = [{"train": {"a": "why"}, "val": {}}, {"train": {"a": "why", "b": "why"}, "val": {"c": "why"}}]
    content["ranks"] = [{**content["ranks"][0], "unreadable": files} for files in unreadable]
    content["world_size"] = 2
    checkpoint.save(path, content)
    with caplog.at_level(logging.INFO):
        resumed = Trainer(config(tmp_path, resume="auto"))
    assert "ranks 2 -> 1 since" in caplog.text
    assert "not bit for bit as it would have, from the start of the epoch" in caplog.text
    assert (resumed.state.epoch, resumed.state.step) == (1, 0)
    assert resumed.state.unreadable == unreadable[1]  # of both
    saved = content["ranks"][0]["method"]["loss_fn.queue.mean"]
    entries, _ = resumed.method.loss_fn.queue.contents()  # type: ignore[union-attr,operator]
    count = int(content["ranks"][0]["method"]["loss_fn.queue.cursor"][1])
    newest = saved[:count].repeat_interleave(2)[-150:]  # two equal queues, merged by age
    assert torch.equal(entries, newest)


@pytest.mark.parametrize(("name", "value"), [("class_names", ["a", "b"]), ("image_size", 9)])
def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path, name: str, value: object) -> None:
    trainer = Trainer(config(tmp_path))
    trainer.save()
    assert trainer._writer.finish() is None
    path = tmp_path / "checkpoints" / "last.pt"
    content = checkpoint.load(path)
    content["shape"][name] = value
    checkpoint.save(path, content)
    with pytest.raises(ValueError, match=r"last.pt was made with .* but the data have .*; point data.root at the same"):
        Trainer(config(tmp_path, resume="auto"))


def test_the_best_epoch_is_the_first_of_the_highest_accuracy(tmp_path: Path) -> None:
    state = Trainer(config(tmp_path)).state
    better = []
    for epoch, accuracy in enumerate([0.5, 0.7, 0.7, 0.6], 1):
        state.epoch = epoch
        better.append(state.finish_epoch({"epoch": epoch, "val_accuracy": accuracy}))
    assert better == [True, True, False, False]
    assert state.best == {"epoch": 2, "val_accuracy": 0.7}


def test_the_first_averaged_epoch_replaces_the_best_before_it(tmp_path: Path) -> None:
    state = Trainer(config(tmp_path, "fmfp", epochs=5)).state  # averages from epoch 4 on
    assert state.average is not None
    better = []
    for epoch, accuracy in enumerate([0.5, 0.9, 0.8, 0.6, 0.7], 1):
        state.epoch, state.average.epochs = epoch, max(0, epoch - 3)
        better.append(state.finish_epoch({"epoch": epoch, "val_accuracy": accuracy}))
    assert better == [True, True, False, True, True]
    assert state.best == {"epoch": 5, "val_accuracy": 0.7}
