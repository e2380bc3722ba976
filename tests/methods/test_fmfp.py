"""FMFP, with cross-entropy and with TAL: steps, averaged weights and learning rate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tal_fast.config.schema import OptimConfig
from tal_fast.runs import checkpoint
from tal_fast.runs.load import load_run
from tal_fast.training.trainer import Trainer
from tests.helpers.training import config, one_thread  # noqa: F401


def test_fmfp_steps_by_the_gradient_at_the_perturbed_weights(tmp_path: Path) -> None:
    optim = OptimConfig(lr=0.05, momentum=0.0, nesterov=False, weight_decay=0.0, accumulate=2)
    trainer = Trainer(config(tmp_path, "fmfp", optim=optim, method_options={"rho": 0.2}))
    trainer.model.eval()  # BatchNorm by its running statistics, so that the parts of a batch are independent
    network = copy.deepcopy(trainer.network)
    images, labels, indices = next(trainer.batches.epoch(0))
    trainer.train_step((images, labels, indices), 0.05)

    def gradient(module: nn.Module) -> list[torch.Tensor]:
        return list(torch.autograd.grad(F.cross_entropy(module(images)[0], labels), list(module.parameters())))

    start = [p.detach().clone() for p in network.parameters()]
    ascent = gradient(network)
    norm = torch.sqrt(sum(g.square().sum() for g in ascent))  # type: ignore[arg-type]
    with torch.no_grad():
        for p, g in zip(network.parameters(), ascent, strict=True):
            p.add_(0.2 * g / norm)
    for p, before, g in zip(trainer.network.parameters(), start, gradient(network), strict=True):
        torch.testing.assert_close(p.detach(), before - 0.05 * g, rtol=1e-4, atol=1e-6)


def test_fmfp_tal_updates_the_queue_once_a_step_and_has_no_temperature_for_wrong_samples(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, "fmfp-tal", method_options={"t_wrong": 20.0, "confidence_threshold": -1.0}))
    loss_fn = trainer.method.loss_fn
    assert loss_fn.options.t_wrong is None
    trainer.model.train()
    pushed = []
    for batch in list(trainer.batches.epoch(0))[:3]:
        before = len(loss_fn.queue)
        trainer.train_step(batch, 0.01)
        pushed.append(len(loss_fn.queue) - before)
    correct = trainer.state.sums.total[2]  # in the first pass, at almost the same weights
    assert abs(sum(pushed) - float(correct)) <= 0.3 * float(correct) + 3


def test_weights_are_averaged_from_six_tenths_of_the_epochs(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, "fmfp", epochs=5))
    weights, rates, train_step = [], [], trainer.train_step

    def recorded_step(batch: Any, rate: float) -> None:
        rates.append(rate)
        train_step(batch, rate)

    trainer.train_step = recorded_step  # type: ignore[assignment]
    for epoch in range(1, 6):
        trainer.fit(until=epoch)
        weights.append([p.detach().clone() for p in trainer.network.parameters()])
        content = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
        assert (content["average"] is not None) == (epoch > 3)
    run = load_run(tmp_path, "last")
    for average, *parts in zip(run.model.parameters(), *weights[3:], strict=True):
        torch.testing.assert_close(average, torch.stack(parts).mean(0))
    assert rates[-1] == pytest.approx(0.025)  # half the peak
    assert trainer.state.best["epoch"] >= 4
    correct = sum(int((run.model(x)[0].argmax(1) == y).sum()) for x, y, _ in run.data.loader("val", batch_size=128))
    assert correct / 896 == pytest.approx(trainer.history[-1]["val_accuracy"])


def test_two_kinds_of_average_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optim.ema_decay is 0.9 but fmfp averages the weights itself"):
        Trainer(config(tmp_path, "fmfp", optim=OptimConfig(ema_decay=0.9)))
