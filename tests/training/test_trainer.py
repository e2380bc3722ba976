"""Training loop: exact resume, checkpoints, signals, refusals, what a run writes."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tal_fast.config.schema import OptimConfig
from tal_fast.loss import watch
from tal_fast.runs import checkpoint
from tal_fast.runs.load import load_run
from tal_fast.training.trainer import Trainer, TrainingFailed
from tal_fast.utils.distributed import Ranks
from tal_fast.utils.environment import commit
from tal_fast.utils.signals import REQUEUE, Stopped
from tests.helpers.ranks import run_ranks
from tests.helpers.training import (
    assert_same_end,
    config,
    correct_predictions,
    final,
    raise_signal_at,
    read_metrics,
)

EPOCHS = 3


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that was never interrupted."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    Trainer(config(output, epochs=EPOCHS)).fit()
    return output


def resumed(output: Path, **options: Any) -> Trainer:
    return Trainer(config(output, epochs=EPOCHS, resume="auto", **options))


def test_resume_after_an_epoch_is_bit_exact(tmp_path: Path, straight: Path) -> None:
    Trainer(config(tmp_path, epochs=EPOCHS)).fit(until=2)
    assert len(read_metrics(tmp_path)) == 2
    torch.manual_seed(12345)  # the state of the new process must not matter
    resumed(tmp_path).fit()
    assert_same_end(straight, tmp_path)
    tensors, numbers = final(straight)
    assert numbers["epoch"] == EPOCHS
    assert "rank0.loss_fn.queue.mean" in tensors


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_resume_within_an_epoch_is_bit_exact(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, loader: str
) -> None:
    options: dict[str, Any] = {"epochs": EPOCHS, "data_options": {"loader": loader}}
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
        straight = tmp_path / "straight"
        Trainer(config(straight, **options)).fit()
    with monkeypatch.context() as patch:
        raise_signal_at(patch, step=9)  # of 6 in an epoch
        with pytest.raises(
            Stopped, match="stopped by SIGTERM and saved after 1 epochs and 3 steps; go on with --resume"
        ):
            Trainer(config(tmp_path / "parts", **options)).fit()
    assert checkpoint.load(tmp_path / "parts" / "checkpoints" / "last.pt")["step"] == 3
    assert len(read_metrics(tmp_path / "parts")) == 1
    Trainer(config(tmp_path / "parts", resume="auto", **options)).fit()
    assert_same_end(straight, tmp_path / "parts")


def test_a_damaged_checkpoint_costs_a_validation(
    tmp_path: Path, straight: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Trainer(config(tmp_path, epochs=EPOCHS)).fit(until=2)
    last = tmp_path / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    with caplog.at_level(logging.INFO):
        resumed(tmp_path).fit()
    assert "last.pt cannot be read" in caplog.text
    assert "previous.pt: 1 epochs and 6 steps" in caplog.text  # trained, not yet validated
    assert_same_end(straight, tmp_path)


def stop_and_resume(rank: int, folder: Path) -> tuple[str, torch.Tensor]:
    """On one of two ranks: a straight run, and one that a signal to rank 1 stops within an epoch and that resumes."""
    ranks = Ranks(rank, 2, torch.device("cpu"))
    Trainer(config(folder / "straight", epochs=2), ranks).fit()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            raise_signal_at(patch, step=9)  # of 6 in an epoch
        try:
            Trainer(config(folder / "parts", epochs=2), ranks).fit()
        except Stopped as error:
            message = str(error)
    resumed = Trainer(config(folder / "parts", epochs=2, resume="auto"), ranks)
    resumed.fit()
    return message, torch.cat([p.detach().flatten() for p in resumed.network.parameters()])


def test_two_ranks_stop_together_and_resume_bit_for_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (message, weights), (other_message, other_weights) = run_ranks(stop_and_resume, 2, tmp_path, tmp_path)
    assert message == other_message
    assert message.startswith("stopped by SIGTERM and saved after 1 epochs and 3 steps")
    assert torch.equal(weights, other_weights)
    assert_same_end(tmp_path / "straight", tmp_path / "parts")
    tensors, _ = final(tmp_path / "straight")
    queues = [tensors[f"rank{rank}.loss_fn.queue.mean"] for rank in (0, 1)]
    assert not torch.equal(*queues)  # each rank has its own

    run = load_run(tmp_path / "straight", "last")  # measures alone what both ranks measured together
    correct = correct_predictions(run.model, run.data.loader("val", batch_size=128))
    assert correct / 896 == pytest.approx(run.history[-1]["val_accuracy"])
    Trainer(config(tmp_path / "parts", epochs=2, resume="auto"))
    assert "ranks 2 -> 1 since" in caplog.text


def test_resume_from_a_path_into_another_folder(tmp_path: Path, straight: Path) -> None:
    Trainer(config(tmp_path / "a", epochs=EPOCHS)).fit(until=2)
    path = str(tmp_path / "a" / "checkpoints" / "last.pt")
    Trainer(config(tmp_path / "b", epochs=EPOCHS, resume=path)).fit()
    assert_same_end(straight, tmp_path / "b")
    assert len(read_metrics(tmp_path / "a")) == 2


def test_ctrl_c_at_the_last_step_of_an_epoch_saves_the_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    raise_signal_at(monkeypatch, step=6, number=signal.SIGINT)
    with pytest.raises(Stopped, match="stopped by SIGINT and saved after 1 epochs and 0 steps") as caught:
        Trainer(config(tmp_path)).fit()
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    content = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
    assert (content["epoch"], content["step"]) == (0, 6)  # trained, not yet validated


def test_sigusr1_saves_and_asks_for_a_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raise_signal_at(monkeypatch, step=2, number=signal.SIGUSR1)
    with pytest.raises(Stopped, match="stopped by SIGUSR1 and saved after 0 epochs and 2 steps") as caught:
        Trainer(config(tmp_path)).fit()
    assert caught.value.exit_code == REQUEUE


def test_checkpoints_within_an_epoch_and_every_second_epoch(tmp_path: Path, straight: Path) -> None:
    trainer = Trainer(config(tmp_path, epochs=EPOCHS, checkpoint_every_steps=2, keep_every_epochs=2))
    saved = []
    start = trainer._writer.start
    trainer._writer.start = lambda content, copies=(): (  # type: ignore[method-assign]
        saved.append((content["epoch"], content["step"])),
        start(content, copies),
    )[1]
    trainer.fit()
    assert saved == [point for e in range(EPOCHS) for point in ((e, 2), (e, 4), (e, 6), (e + 1, 0))]
    assert_same_end(straight, tmp_path)
    folder = tmp_path / "checkpoints"
    assert [path.name for path in folder.glob("epoch-*")] == ["epoch-0002.pt"]
    for name in ("last.pt", "previous.pt"):
        (folder / name).write_bytes(b"damaged")
    content, path, problems = checkpoint.load_newest(folder)
    assert (path.name, content["epoch"], len(problems)) == ("epoch-0002.pt", 2, 2)
    resumed(tmp_path).fit()
    assert_same_end(straight, tmp_path)


def test_a_checkpoint_holds_the_state_at_the_call_of_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while a slow thread writes."""
    written = threading.Event()
    save = checkpoint.save

    def slow_save(*args: Any) -> None:
        written.wait(60)
        save(*args)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    trainer = Trainer(config(tmp_path))
    trainer.save()
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    for batch in trainer.batches.epoch(0):
        trainer.train_step(batch, 0.1)
    written.set()
    assert trainer._writer.finish() is None
    content = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
    for name, tensor in before.items():
        assert torch.equal(content["model"][name], tensor), name
    assert content["ranks"][0]["method"]["loss_fn.queue.cursor"].tolist() == [0, 0]
    assert float(content["ranks"][0]["sums"].sum()) == 0
    assert not torch.equal(trainer.network.fc.weight, before["fc.weight"])  # type: ignore[union-attr,arg-type]


def test_a_full_disk_costs_a_checkpoint_not_the_run(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save = checkpoint.save
    count = [0]

    def full_at_times(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
        count[0] += 1
        if count[0] in failing:
            raise OSError(28, "No space left on device")
        save(path, content, previous)

    monkeypatch.setattr(checkpoint, "save", full_at_times)
    failing = {2}
    Trainer(config(tmp_path / "a", epochs=EPOCHS)).fit()
    assert "a checkpoint could not be written to" in caplog.text
    assert "No space left on device" in caplog.text
    assert_same_end(straight, tmp_path / "a")

    failing, count[0] = {2 * EPOCHS - 1, 2 * EPOCHS}, 0  # the last epoch, trained and validated
    with pytest.raises(TrainingFailed, match=r"No space left on device.*the one before is whole.*--resume auto"):
        Trainer(config(tmp_path / "b", epochs=EPOCHS)).fit()
    assert checkpoint.load(tmp_path / "b" / "checkpoints" / "last.pt")["epoch"] == EPOCHS - 1
    failing = set()
    resumed(tmp_path / "b").fit()
    assert_same_end(straight, tmp_path / "b")


def test_metrics_that_cannot_be_written_do_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("tal_fast.training.trainer.write_metrics", full)
    Trainer(config(tmp_path, epochs=1)).fit()
    assert "metrics.csv could not be written (No space left on device)" in caplog.text
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["epoch"] == 1


def test_a_finished_run_is_left_alone(straight: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = (straight / "checkpoints" / "last.pt").read_bytes()
    with caplog.at_level(logging.INFO):
        resumed(straight).fit()
    assert f"is trained already: {EPOCHS} of {EPOCHS} epochs" in caplog.text
    with pytest.raises(ValueError, match="holds a run already; continue it with --resume auto, or name another"):
        Trainer(config(straight, epochs=EPOCHS))
    assert (straight / "checkpoints" / "last.pt").read_bytes() == before


def test_a_run_writes_config_metrics_and_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(config(Path("runs/x"), epochs=EPOCHS))
    trainer.fit()
    output = tmp_path / "runs" / "x"
    assert sorted(os.listdir(output)) == ["checkpoints", "config.yaml", "metrics.csv"]
    assert sorted(os.listdir(output / "checkpoints")) == ["best.pt", "last.pt", "previous.pt"]
    rows = read_metrics(output)
    assert list(rows[0])[:6] == ["epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"]
    assert set(rows[0]) >= {"images_per_s", "seconds", "data_wait", "queue_length", "typicalness", "temperature_p50"}
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]

    run = load_run(output, "last")
    assert (run.method, run.score, run.epoch) == ("tal", "cosine", EPOCHS)
    assert run.config.to_dict() == trainer.config.to_dict()
    assert run.class_names == tuple("0123456789")
    best = load_run(output)
    accuracies = [float(row["val_accuracy"]) for row in rows]
    assert best.epoch == accuracies.index(max(accuracies)) + 1  # the earliest of the best
    assert best.checkpoint.name == "best.pt"
    assert checkpoint.load(best.checkpoint)["shape"]["commit"] == commit()


def test_a_queue_that_correct_samples_do_not_enter_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Trainer(config(tmp_path, epochs=2, method_options={"confidence_threshold": 0.999})).fit()
    rows = read_metrics(tmp_path)
    assert all(float(row["accepted"]) == 0 < float(row["train_accuracy"]) for row in rows)
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("only 0% of the correctly classified samples of this epoch enter TAL's queue")
    assert "set method.options.confidence_threshold to -1" in warning


def test_a_queue_that_stands_still_is_said_within_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "INTERVAL", 3)
    trainer = Trainer(config(tmp_path, epochs=2, method_options={"confidence_threshold": 0.999}))
    trainer.fit()
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "of steps 3 and 6 enter TAL's queue" in warning
    assert "set method.options.confidence_threshold to -1" in warning


def test_every_correct_sample_counts_as_accepted_by_default(straight: Path) -> None:
    assert all(row["accepted"] == row["train_accuracy"] for row in read_metrics(straight))


def test_the_log_has_a_line_for_the_run_and_each_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Trainer(config(tmp_path, epochs=2)).fit()
    first, *epochs, last = caplog.messages
    assert first.startswith("tal on digits: ")
    assert [line[:9] for line in epochs] == ["epoch 1/2", "epoch 2/2"]
    assert last.startswith("done: best val acc ")


def test_train_metrics_are_means_over_the_images(tmp_path: Path) -> None:
    optim = OptimConfig(lr=1e-30, warmup_epochs=0, weight_decay=0)  # the weights stay the initial ones
    trainer = Trainer(config(tmp_path, "ce", epochs=1, batch_size=50, optim=optim))
    trainer.fit()
    trainer.network.train()
    loss = correct = 0.0
    with torch.no_grad():
        for images, labels, _ in trainer.batches.epoch(0):
            logits, _ = trainer.network(images)
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            correct += float((logits.argmax(1) == labels).sum())
    (row,) = trainer.history
    assert row["train_loss"] == pytest.approx(loss / 200, rel=1e-6)
    assert row["train_accuracy"] == pytest.approx(correct / 200)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    Trainer(config(tmp_path, epochs=EPOCHS)).fit(until=1)
    trainer = resumed(tmp_path)
    with torch.no_grad():
        trainer.network.fc.weight.fill_(float("inf"))  # type: ignore[union-attr,operator]
    with pytest.raises(TrainingFailed, match=r"training loss is not finite after step 1 of epoch 2"):
        trainer.fit()
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["epoch"] == 1


def test_the_averaged_model_is_validated_and_saved(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, "ce", epochs=EPOCHS, optim=OptimConfig(lr=0.05, ema_decay=0.8)))
    trainer.fit()
    run = load_run(tmp_path, "last")
    assert trainer.state.averaged is not None
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, trainer.state.averaged.state_dict()[name])
    assert not torch.equal(run.model.fc.weight, trainer.network.fc.weight)  # type: ignore[arg-type,union-attr]
    correct = correct_predictions(run.model, run.data.loader("val", batch_size=128))
    assert correct / 896 == pytest.approx(run.history[-1]["val_accuracy"])


def test_an_average_that_keeps_the_initial_weights_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def said(decay: float) -> list[str]:
        caplog.clear()
        trainer = Trainer(config(tmp_path / str(decay), "ce", epochs=1, optim=OptimConfig(lr=0.05, ema_decay=decay)))
        assert len(trainer.batches) == 6
        trainer.fit()
        return [record.getMessage() for record in caplog.records if "ema_decay" in record.getMessage()]

    # 0.9998^6 = 0.9988; 0.01^(1/6) = 0.46416
    assert said(0.9998) == [
        "with optim.ema_decay 0.9998 and 6 steps, 100% of the average are the initial weights; at most 0.4641 leaves 1%"
    ]
    assert said(0.4641) == []


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
        ({"profile": "5:5"}, "profile is '5:5' but must be START:STOP"),
        ({"image_sizes": [(1, 8)]}, "image_sizes is .* ascending from 0"),
    ],
)
def test_unusable_options_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        Trainer(config(tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_only_every_nth_epoch_and_the_last_are_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainer(config(tmp_path / "all", epochs=5)).fit()
    with monkeypatch.context() as patch:
        raise_signal_at(patch, step=14)  # of 6 in an epoch
        with pytest.raises(Stopped, match="after 2 epochs and 2 steps"):
            Trainer(config(tmp_path / "some", epochs=5, validate_every=3)).fit()
    Trainer(config(tmp_path / "some", epochs=5, validate_every=3, resume="auto")).fit()
    rows, others = read_metrics(tmp_path / "some"), read_metrics(tmp_path / "all")
    for name in ("val_loss", "val_accuracy", "aurc", "auroc", "fpr95"):
        assert [row[name] for row in rows] == ["nan", "nan", others[2][name], "nan", others[4][name]]
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in others]
    best = max((2, 4), key=lambda i: float(others[i]["val_accuracy"])) + 1
    assert checkpoint.load(tmp_path / "some" / "checkpoints" / "best.pt")["epoch"] == best


def test_the_first_validated_average_is_the_best_so_far(tmp_path: Path) -> None:
    made = config(tmp_path, "fmfp", epochs=6, validate_every=4)
    made.method.options = {"swa_from": 0.5, "rho": 0.05}
    trainer = Trainer(made)
    trainer.state.best = {"epoch": 2, "val_accuracy": 1.0}  # of weights that are not averaged
    trainer.fit()
    assert trainer.state.best["epoch"] in (4, 6)
