"""Validation: accuracy, loss and failure detection after an epoch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tal_fast.metrics.failure import failure_metrics
from tal_fast.runs.load import load_run
from tal_fast.scores.logits import SCORES
from tal_fast.training.trainer import Trainer
from tal_fast.training.validation import Validator
from tests.helpers.training import config, read_metrics


@pytest.mark.parametrize("method", ["ce", "tal"])
def test_validation_measures_what_the_evaluator_measures(tmp_path: Path, method: str) -> None:
    trainer = Trainer(config(tmp_path, method, epochs=2))
    trainer.fit()
    run = load_run(tmp_path, "last")
    assert not run.model.training
    with torch.no_grad():
        outputs = [(run.model(x)[0], y) for x, y, _ in run.data.loader("val", batch_size=300)]
    logits, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    score, correct = SCORES[run.score](logits), logits.argmax(1) == labels
    want = failure_metrics(score, correct.numpy())
    row = read_metrics(tmp_path)[-1]
    for name in ("aurc", "auroc", "fpr95"):
        assert float(row[name]) == pytest.approx(want[name], abs=2e-3)  # other batches, other rounding
    assert float(row["val_accuracy"]) == pytest.approx(float(correct.double().mean()))
    assert float(row["val_loss"]) == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


def test_a_compiled_network_sees_full_batches_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(config(tmp_path, "ce"))
    want = trainer.validator.validate(trainer.network)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    runtime = dataclasses.replace(trainer.runtime, compile=True)
    loader = trainer.data.loader("val", batch_size=500)  # of 896 images
    validator = Validator(loader, 500, 10, trainer.method, runtime, trainer.ranks)
    shapes = []
    trainer.network.register_forward_pre_hook(lambda module, args: shapes.append(len(args[0])))
    assert validator.validate(trainer.network) == pytest.approx(want, rel=1e-5)
    assert shapes == [500, 500]
