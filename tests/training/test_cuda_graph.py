"""CUDA graph of a training step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tal_fast.training.trainer import Trainer
from tests.helpers.training import config


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["ce", "tal"])
def test_cuda_graphs_give_the_same_losses(tmp_path: Path, method: str) -> None:
    losses = []
    for graphs in (False, True):
        options = config(tmp_path / str(graphs), method, device="cuda", precision="float32", cuda_graphs=graphs)
        options.model.compile = False
        trainer = Trainer(options)
        trainer.fit()
        losses.append([row["train_loss"] for row in trainer.history])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
