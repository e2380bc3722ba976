"""One training step: compilation, accumulation, clipping, precision, synchronisation with the GPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tal_fast.config.schema import Config, OptimConfig
from tal_fast.runs import checkpoint
from tal_fast.training.train_step import check_parts
from tal_fast.training.trainer import Trainer
from tal_fast.training.validation import Validator
from tal_fast.utils.distributed import Ranks
from tests.helpers.ranks import run_ranks
from tests.helpers.training import assert_same_end, config


@pytest.mark.parametrize("method", [pytest.param("ce", marks=pytest.mark.slow), "tal"])
def test_the_compiled_step_is_one_graph_and_trains_alike(tmp_path: Path, method: str) -> None:
    import torch._dynamo
    from torch._dynamo.utils import counters

    totals = []
    for compile in (False, True):
        options = config(tmp_path / str(compile), method, epochs=1, data_options={"channels": 3})
        options.model.compile = compile
        torch._dynamo.reset()
        counters.clear()
        trainer = Trainer(options)
        trainer._train_epoch(0)
        assert counters["stats"]["unique_graphs"] == int(compile)
        assert not counters["graph_break"]
        assert not any("_orig_mod" in name or name.startswith("network") for name in trainer.network.state_dict())
        totals.append(trainer.state.sums.total.clone())
    eager, compiled = totals
    assert eager[0] == compiled[0] == 192
    assert compiled[1] == pytest.approx(float(eager[1]), rel=2e-2)  # after a few steps: rounding grows


def test_accumulated_parts_equal_the_whole_batch_without_batch_statistics(tmp_path: Path) -> None:
    weights = []
    for parts in (1, 4):
        options = config(tmp_path / str(parts), "ce", epochs=2, optim=OptimConfig(lr=0.01, accumulate=parts))
        trainer = Trainer(options)
        for module in trainer.network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
                module.train = lambda mode=True, module=module: module  # type: ignore[method-assign,misc]
        trainer.fit()
        weights.append(torch.cat([p.detach().double().flatten() for p in trainer.network.parameters()]))
        assert trainer.history[0]["train_loss"] == pytest.approx(2.3, abs=0.5)
    assert (weights[0] - weights[1]).norm() < 1e-5 * weights[0].norm()


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 1), (16, 16)])
def test_batchnorm_needs_two_images_in_each_part(tmp_path: Path, batch_size: int, accumulate: int) -> None:
    options = config(tmp_path, batch_size=batch_size, optim=OptimConfig(accumulate=accumulate))
    with pytest.raises(ValueError, match=r"BatchNorm \(bn1\) would see one image at a time .*; raise batch_size"):
        Trainer(options)
    Trainer(config(tmp_path, batch_size=2 * accumulate, optim=OptimConfig(accumulate=accumulate)))
    check_parts(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.SyncBatchNorm(8)), 1)


def test_channels_last_and_clipping_take_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(tmp_path, optim=OptimConfig(clip_norm=1e-3))
    options.model.channels_last = True
    trainer = Trainer(options)
    norms = []
    step = trainer.state.optimizer.step

    def checked_step() -> None:
        squares = (float(p.grad.square().sum()) for p in trainer.network.parameters() if p.grad is not None)
        norms.append(math.sqrt(sum(squares)))
        step()

    monkeypatch.setattr(trainer.state.optimizer, "step", checked_step)
    for batch in trainer.batches.epoch(0):
        trainer.train_step(batch, 0.05)
    assert norms == pytest.approx([1e-3] * 6, rel=1e-2)
    assert trainer.network.conv1.weight.is_contiguous(  # type: ignore[union-attr,operator]
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize(
    "options",
    [{"precision": "bfloat16"}, {"optim": OptimConfig("adamw", lr=1e-3, clip_norm=0.5)}],
    ids=["bfloat16", "adamw"],
)
def test_precisions_and_optimizers_train(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = Trainer(config(tmp_path, **options))
    trainer.fit()
    losses = [row["train_loss"] for row in trainer.history]
    assert losses[-1] < losses[1]  # the first epoch is TAL's or the learning rate's warm-up
    assert all(p.dtype == torch.float32 for p in trainer.network.parameters())


def test_float16_scales_gradients_and_resumes_exactly(tmp_path: Path) -> None:
    def options(output: str, **more: Any) -> Config:
        return config(tmp_path / output, epochs=2, precision="float16", optim=OptimConfig(clip_norm=5.0), **more)

    trainer = Trainer(options("straight"))
    scaler, scales = trainer.state.scaler, []
    unscale = scaler.unscale_
    scaler.unscale_ = lambda o: (scales.append(scaler.get_scale()), unscale(o))[1]  # type: ignore
    trainer.fit()
    assert len(scales) == 12
    assert min(scales) > 1  # 65,536 at first, halved when a gradient overflows
    Trainer(options("parts")).fit(until=1)
    saved = checkpoint.load(tmp_path / "parts" / "checkpoints" / "last.pt")["scaler"]
    assert saved["scale"] > 1
    Trainer(options("parts", resume="auto")).fit()
    assert_same_end(tmp_path / "straight", tmp_path / "parts")


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["ce", "tal"])
def test_a_step_never_waits_for_the_gpu(tmp_path: Path, method: str) -> None:
    trainer = Trainer(config(tmp_path, method, device="cuda", optim=OptimConfig(clip_norm=1.0, ema_decay=0.9)))
    trainer.model.train()
    batches = list(trainer.batches.epoch(0))
    for batch in batches[:3]:
        trainer.train_step(batch, 0.1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[3:]:
            trainer.train_step(batch, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train_in_parts(rank: int, folder: Path) -> None:
    """Train two epochs at once, and one by one in trainers of their own, on one of three ranks."""
    ranks = Ranks(rank, 3, torch.device("cpu"))
    options = {"epochs": 2, "batch_size": 48, "data_options": {"train_limit": 192}}
    Trainer(config(folder / "straight", **options), ranks).fit()
    Trainer(config(folder / "parts", **options), ranks).fit(until=1)
    Trainer(config(folder / "parts", **options, resume="auto"), ranks).fit()


@pytest.mark.slow
def test_three_ranks_resume_to_the_same_bits(tmp_path: Path) -> None:
    run_ranks(train_in_parts, 3, tmp_path, tmp_path)
    assert_same_end(tmp_path / "straight", tmp_path / "parts")


class Cut(Exception):
    """Error that ends a run before validation."""


def train_average_in_parts(rank: int, folder: Path) -> None:
    """Train an epoch with a moving average at once, and cut before its validation, on one of two ranks."""
    ranks = Ranks(rank, 2, torch.device("cpu"))
    options = {"epochs": 1, "batch_size": 48, "data_options": {"train_limit": 192}, "optim": OptimConfig(ema_decay=0.8)}
    Trainer(config(folder / "straight", **options), ranks).fit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validator, "validate", cut)
        with pytest.raises(Cut):
            Trainer(config(folder / "parts", **options), ranks).fit()
    Trainer(config(folder / "parts", **options, resume="auto"), ranks).fit()


def cut(*_: Any) -> None:
    raise Cut


@pytest.mark.slow
def test_a_moving_average_of_two_ranks_resumes_before_validation(tmp_path: Path) -> None:
    run_ranks(train_average_in_parts, 2, tmp_path, tmp_path)
    assert_same_end(tmp_path / "straight", tmp_path / "parts")
