"""Training: exact resume, saving, refusals, methods, learning rates."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tal_fast.config.schema import Config, OptimConfig
from tal_fast.runs import checkpoint
from tal_fast.runs.load import load_run
from tal_fast.training.optim import build_optimizer, learning_rate
from tal_fast.training.trainer import Trainer, TrainingFailed
from tal_fast.utils.signals import Stopped
from tests.helpers.training import assert_same_end, config, final, one_thread, raise_signal_at, read_metrics, step_of  # noqa: F401

# ---- Resume ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "method_options"),
    [("ce", {}), ("tal", {"warmup_epochs": 1}), ("tal", {"variant": "released", "label_smoothing": 0.1})],
    ids=["ce", "tal", "tal-released"],
)
def test_resume_after_an_epoch_is_bit_exact(tmp_path: Path, method: str, method_options: dict[str, Any]) -> None:
    Trainer(config(tmp_path / "straight", method, method_options=method_options)).fit()
    Trainer(config(tmp_path / "parts", method, method_options=method_options)).fit(until=2)
    assert len(read_metrics(tmp_path / "parts")) == 2
    torch.manual_seed(12345)  # the state of the new process must not matter
    Trainer(config(tmp_path / "parts", method, method_options=method_options, resume="auto")).fit()
    assert_same_end(tmp_path / "straight", tmp_path / "parts")
    tensors, numbers = final(tmp_path / "straight")
    assert numbers["epoch"] == 4
    assert ("rank0.loss_fn.queue.mean" in tensors) == (method == "tal")


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_resume_within_an_epoch_is_bit_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: Any) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")

    def made(output: str, **options: Any) -> Config:
        result = config(tmp_path / output, epochs=3, **options)
        result.data.loader = loader
        return result

    Trainer(made("straight")).fit()
    with monkeypatch.context() as patch:
        raise_signal_at(patch, step=9)  # of 6 in an epoch
        with pytest.raises(
            Stopped, match="stopped by SIGTERM and saved after 1 epochs and 3 steps; go on with --resume"
        ):
            Trainer(made("parts")).fit()
    assert checkpoint.load(tmp_path / "parts" / "checkpoints" / "last.pt")["step"] == 3
    assert len(read_metrics(tmp_path / "parts")) == 1
    Trainer(made("parts", resume="auto")).fit()
    assert_same_end(tmp_path / "straight", tmp_path / "parts")


def test_ctrl_c_at_an_epochs_last_step_saves_the_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    raise_signal_at(monkeypatch, step=6, number=signal.SIGINT)
    with pytest.raises(Stopped, match="stopped by SIGINT and saved after 1 epochs and 0 steps") as caught:
        Trainer(config(tmp_path)).fit()
    assert caught.value.signal == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
    content = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
    assert (content["epoch"], content["step"]) == (1, 0)


def test_a_damaged_checkpoint_costs_one_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(config(tmp_path / "straight")).fit()
    Trainer(config(tmp_path / "parts")).fit(until=3)
    last = tmp_path / "parts" / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    Trainer(config(tmp_path / "parts", resume="auto", progress="lines")).fit()
    out = capsys.readouterr().out
    assert "last.pt cannot be read" in out
    assert "previous.pt: 2 epochs" in out
    assert_same_end(tmp_path / "straight", tmp_path / "parts")


def test_resume_from_a_path_into_another_folder(tmp_path: Path) -> None:
    Trainer(config(tmp_path / "a")).fit(until=2)
    path = str(tmp_path / "a" / "checkpoints" / "last.pt")
    Trainer(config(tmp_path / "b", resume=path)).fit()
    Trainer(config(tmp_path / "a", resume=path)).fit()
    assert_same_end(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match=r"b holds a run already, which resuming from .* would overwrite"):
        Trainer(config(tmp_path / "b", resume=path))
    with pytest.raises(ValueError, match="there is no checkpoint /nowhere"):
        Trainer(config(tmp_path / "c", resume="/nowhere"))


def test_resume_auto_without_a_run_starts_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(config(tmp_path, resume="auto", epochs=1)).fit()
    Trainer(config(tmp_path, resume="auto", epochs=1, progress="lines")).fit()
    assert "is trained already: 1 of 1 epochs" in capsys.readouterr().out


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    Trainer(config(tmp_path, epochs=1)).fit()
    before = (tmp_path / "checkpoints" / "last.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a run already; go on with it with --resume auto, or name another"):
        Trainer(config(tmp_path, epochs=1))
    assert (tmp_path / "checkpoints" / "last.pt").read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; name a folder"):
        Trainer(config(tmp_path / "file"))


def test_resume_refuses_another_configuration(tmp_path: Path) -> None:
    Trainer(config(tmp_path, epochs=2)).fit(until=1)
    sentence = r"another configuration \(seed was 3 and is 4, epochs was 2 and is 3\)|another configuration \(epochs"
    with pytest.raises(ValueError, match=sentence):
        Trainer(config(tmp_path, epochs=3, seed=4, resume="auto"))
    moved = config(tmp_path, epochs=2, resume="auto", eval_batch_size=7)
    moved.data.workers, moved.method.options["backend"] = (
        1,
        "reference",
    )  # options that change only the speed may change
    Trainer(moved).fit()
    assert len(read_metrics(tmp_path)) == 2


# ---- What a run leaves ----------------------------------------------------------------------------------------


def test_a_run_leaves_config_metrics_and_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(config(Path("runs/x"), epochs=3))
    trainer.fit()
    output = tmp_path / "runs" / "x"
    assert sorted(os.listdir(output)) == ["checkpoints", "config.yaml", "metrics.csv"]
    assert sorted(os.listdir(output / "checkpoints")) == ["best.pt", "last.pt", "previous.pt"]
    rows = read_metrics(output)
    assert list(rows[0])[:6] == ["epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"]
    assert set(rows[0]) >= {"images_per_s", "seconds", "data_wait", "queue_length", "typicalness", "temperature"}
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]

    run = load_run(output, "last")
    assert (run.method, run.score, run.epoch) == ("tal", "cosine", 3)
    assert run.config.to_dict() == trainer.config.to_dict()
    assert run.class_names == tuple("0123456789")
    assert not run.model.training
    loss = right = 0.0
    with torch.no_grad():
        for images, labels, _ in run.data.loader("val", batch_size=100):
            logits, features = run.model(images)
            assert features.shape == (len(images), 32)
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += float((logits.argmax(1) == labels).sum())
    assert right / 896 == pytest.approx(float(rows[-1]["val_accuracy"]))
    assert loss / 896 == pytest.approx(float(rows[-1]["val_loss"]), rel=1e-5)

    best = load_run(output)
    accuracies = [float(row["val_accuracy"]) for row in rows]
    assert best.epoch == accuracies.index(max(accuracies)) + 1  # the earliest of the best
    assert best.checkpoint.name == "best.pt"


def test_train_metrics_are_means_over_the_images(tmp_path: Path) -> None:
    made = config(tmp_path, "ce", epochs=1, batch_size=50, optim=OptimConfig(lr=1e-30, warmup_epochs=0, weight_decay=0))
    trainer = Trainer(made)
    trainer.fit()
    # With no learning to speak of, the weights stay the initial ones; only BatchNorm's statistics move.
    trainer.network.train()
    trainer.train_loader.set_epoch(0)
    loss = right = 0.0
    with torch.no_grad():
        for images, labels, _ in trainer.train_loader:
            logits, _ = trainer.network(images)
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += float((logits.argmax(1) == labels).sum())
    (row,) = trainer.history
    assert row["train_loss"] == pytest.approx(loss / 200, rel=1e-6)
    assert row["train_accuracy"] == pytest.approx(right / 200)


def test_load_run_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no run folder"):
        load_run(tmp_path / "none")
    with pytest.raises(ValueError, match=r"there is no checkpoint .*best.pt"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="checkpoint is 'first'; use 'best' or 'last'"):
        load_run(tmp_path, "first")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bfloat16"},
        {"optim": OptimConfig("adamw", lr=1e-3, clip_norm=0.5, decay_all=False)},
        {"model_options": {"channels_last": True}},
    ],
    ids=["bfloat16", "adamw-clip", "channels-last"],
)
def test_options_of_the_loop_train(tmp_path: Path, options: dict[str, Any]) -> None:
    model_options = options.pop("model_options", {})
    made = config(tmp_path, **options)
    for name, value in model_options.items():
        setattr(made.model, name, value)
    trainer = Trainer(made)
    trainer.fit()
    losses = [row["train_loss"] for row in trainer.history]
    assert losses[-1] < losses[1]  # the first epoch is TAL's or the learning rate's warm-up
    assert all(p.dtype == torch.float32 for p in trainer.network.parameters())


def test_channels_last_and_clipping_do_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(tmp_path, epochs=1, optim=OptimConfig(clip_norm=1e-3))
    made.model.channels_last = True
    trainer = Trainer(made)
    seen = []
    trainer.network.conv1.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    step = trainer.optimizer.step

    def checked_step() -> None:
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trainer.network.parameters()))  # type: ignore[union-attr]
        assert norm == pytest.approx(1e-3, rel=1e-2)
        step()

    monkeypatch.setattr(trainer.optimizer, "step", checked_step)
    trainer.fit()
    assert seen
    assert trainer.network.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    Trainer(config(tmp_path)).fit(until=1)
    trainer = Trainer(config(tmp_path, resume="auto"))
    with torch.no_grad():
        trainer.network.fc.weight.fill_(float("inf"))
    with pytest.raises(TrainingFailed, match=r"training loss of epoch 2 is nan; lower optim.lr"):
        trainer.fit()
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["epoch"] == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epochs": 0}, "epochs is 0 but must be at least 1"),
        ({"batch_size": 201}, "a step takes 201 images .* only 200 training images"),
        ({"method_options": {"label_smoothing": 1.0}}, "label_smoothing is 1.0"),
        ({"method_options": {"t_min": 50.0, "t_max": 20.0}}, "t_min"),
        ({"optim": OptimConfig(lr=0.0)}, "optim.lr is 0.0"),
        ({"optim": OptimConfig(schedule="multistep")}, "optim.step_epochs is empty"),
        ({"optim": OptimConfig(momentum=0.0)}, "nesterov needs momentum"),
        ({"optim": OptimConfig(clip_norm=0.0)}, "clip_norm is 0.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        Trainer(config(tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


# ---- Parts ----------------------------------------------------------------------------------------------------


def test_learning_rates() -> None:
    cosine = OptimConfig(lr=0.4, warmup_epochs=2)
    got = [learning_rate(cosine, 10, e) for e in (0.5, 1.0, 2.0, 4.0, 6.0, 10.0)]
    want = [0.1, 0.2, 0.4, 0.2 * (1 + math.sqrt(0.5)), 0.2, 0.0]
    assert got == pytest.approx(want, abs=1e-12)
    step = OptimConfig(lr=1.0, schedule="multistep", step_epochs=[3, 6], step_factor=0.1)
    assert [learning_rate(step, 10, e) for e in (0.1, 2.99, 3.0, 5.9, 6.1)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert learning_rate(OptimConfig(lr=0.3, schedule="constant"), 10, 9.9) == 0.3


def test_norms_and_biases_need_not_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    groups = build_optimizer(OptimConfig(weight_decay=0.5, decay_all=False), model).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.5), (3, 0.0)]
    (group,) = build_optimizer(OptimConfig(weight_decay=0.5, decay_all=True), model).param_groups
    assert (len(group["params"]), group["weight_decay"]) == (4, 0.5)
