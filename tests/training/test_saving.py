"""Saving and ending early: stops and kills within validation, errors of a step, states that are not finite."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tal_fast.config.schema import OptimConfig
from tal_fast.data.headers import UnreadableImage
from tal_fast.models import build_model
from tal_fast.runs import checkpoint
from tal_fast.training.batches import TrainingBatches
from tal_fast.training.saving import TrainingFailed
from tal_fast.training.state import not_finite
from tal_fast.training.train_step import Update
from tal_fast.training.trainer import Trainer
from tal_fast.training.validation import Validator
from tal_fast.utils.distributed import Ranks
from tal_fast.utils.signals import Stopped
from tests.helpers.images import make_folder
from tests.helpers.locks import holder
from tests.helpers.ranks import run_ranks
from tests.helpers.training import assert_same_end, config, read_metrics

STEPS = 6
"""Steps of an epoch of ``config``."""


class Killed(BaseException):
    """Stands for SIGKILL: nothing reacts to it."""


def at_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, act: Callable[[], Any]) -> None:
    """Run ``act`` before the ``call``-th call, counted from 1, of a function."""
    original, count = getattr(owner, name), [0]

    def function(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)


def fail(kind: type[BaseException] = ValueError, message: str = "a fault of the network") -> Callable[[], Any]:
    def act() -> None:
        raise kind(message)

    return act


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def saved_at(output: Path) -> tuple[int, int]:
    """Finished epochs and steps of the last checkpoint."""
    content = checkpoint.load(output / "checkpoints" / "last.pt")
    return content["epoch"], content["step"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of an undisturbed run of ``config``, trained once for each configuration."""
    outputs: dict[str, Path] = {}

    def run(method: str = "tal", **options: Any) -> Path:
        key = repr((method, options))
        if key not in outputs:
            outputs[key] = tmp_path_factory.mktemp("straight")
            Trainer(config(outputs[key], method, **options)).fit()
        return outputs[key]

    return run


@pytest.mark.parametrize(
    ("method", "options"),
    [("tal", {}), ("crl", {"optim": OptimConfig(lr=0.05, ema_decay=0.8)})],
    ids=["tal", "crl with a moving average"],
)
def test_a_stop_or_a_kill_within_validation_loses_nothing(
    tmp_path: Path, straight: Callable[..., Path], method: str, options: dict[str, Any]
) -> None:
    options = {"epochs": 2, "eval_batch_size": 100, **options}
    parts = tmp_path / "parts"
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, Validator, "_logits", 3, terminate)
        with pytest.raises(Stopped, match="saved after 1 epochs and 0 steps"):
            Trainer(config(parts, method, **options)).fit()
    assert saved_at(parts) == (0, STEPS)
    assert not (parts / "metrics.csv").exists()
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, Validator, "_logits", 9 + 8, fail(Killed))
        with pytest.raises(Killed):
            Trainer(config(parts, method, resume="auto", **options)).fit()
    assert saved_at(parts) == (1, STEPS)
    Trainer(config(parts, method, resume="auto", **options)).fit()
    assert_same_end(straight(method, **options), parts)
    row = read_metrics(parts)[1]
    assert float(row["images_per_s"]) == 0.0  # the process that wrote the row trained on none


def test_validation_stops_at_the_batch_of_the_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    at_call(monkeypatch, Validator, "_logits", 2, terminate)
    counted = Validator._logits
    monkeypatch.setattr(Validator, "_logits", lambda *args: (calls.append(1), counted(*args))[1])
    with pytest.raises(Stopped):
        Trainer(config(tmp_path, eval_batch_size=100)).fit()
    assert len(calls) == 2  # of 9


def test_a_trained_epoch_is_not_trained_again_with_other_batches(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, Validator, "_logits", 2, terminate)
        with pytest.raises(Stopped):
            Trainer(config(tmp_path, epochs=1)).fit()
    trainer = Trainer(config(tmp_path, epochs=1, batch_size=20, allow=["batch_size"], resume="auto"))
    weights = trainer.network.fc.weight.clone()  # type: ignore[union-attr,operator]
    trainer.fit()
    assert torch.equal(trainer.network.fc.weight, weights)  # type: ignore[union-attr,arg-type]
    assert read_metrics(tmp_path)[0]["train_loss"] != "nan"


def test_a_stop_while_averaged_weights_get_their_statistics_loses_nothing(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 3, "method_options": {"swa_from": 0.4}}
    Trainer(config(tmp_path / "straight", "fmfp", **options)).fit()
    images, read = TrainingBatches.images, []

    def interrupted(self: TrainingBatches, epoch: int, steps: int) -> Iterator[torch.Tensor]:
        for number, batch in enumerate(images(self, epoch, steps)):
            read.append((epoch, number))
            if (epoch, number) == (1, 2):
                terminate()
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingBatches, "images", interrupted)
        with pytest.raises(Stopped, match="saved after 2 epochs and 0 steps"):
            Trainer(config(tmp_path / "parts", "fmfp", **options)).fit()
    assert read[-1] == (1, 2)  # of 6
    assert saved_at(tmp_path / "parts") == (1, STEPS)
    Trainer(config(tmp_path / "parts", "fmfp", resume="auto", **options)).fit()
    assert_same_end(tmp_path / "straight", tmp_path / "parts")


def fail_forward(trainer: Trainer, call: int) -> None:
    """Raise in the ``call``-th training pass of the network, after its first BatchNorm has seen the images."""
    count = [0]

    def hook(*_: Any) -> None:
        count[0] += trainer.network.training
        if count[0] == call and trainer.network.training:
            raise ValueError("a fault of the network")

    trainer.network.fc.register_forward_pre_hook(hook)  # type: ignore[union-attr,operator]


def fail_backward(trainer: Trainer, call: int) -> None:
    """Raise in the ``call``-th backward pass, when the queue has been pushed to."""
    count = [0]

    def hook(gradient: torch.Tensor) -> None:
        count[0] += 1
        if count[0] == call:
            raise ValueError("a fault of the network")

    trainer.network.conv1.weight.register_hook(hook)  # type: ignore[union-attr,operator]


@pytest.mark.parametrize(
    ("method", "optim", "fault", "call"),
    [
        ("tal", {}, fail_forward, 10),
        ("tal", {}, fail_backward, 10),
        ("ce", {"accumulate": 2}, fail_forward, 20),  # the second half of the tenth step
        ("fmfp-tal", {}, fail_backward, 20),  # at the perturbed weights of the tenth step
        ("tal", {"sam_radius": 0.1, "sam_sigma": 1.0}, fail_forward, 20),
    ],
    ids=["forward", "backward", "second part", "perturbed", "friendly SAM"],
)
def test_an_error_of_a_step_saves_the_last_whole_step(
    tmp_path: Path,
    straight: Callable[..., Path],
    method: str,
    optim: dict[str, Any],
    fault: Callable[[Trainer, int], None],
    call: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options: dict[str, Any] = {"epochs": 2, "optim": OptimConfig(lr=0.05, **optim)}
    trainer = Trainer(config(tmp_path / "parts", method, **options))
    fault(trainer, call)
    with pytest.raises(ValueError, match="a fault of the network"):
        trainer.fit()
    assert "an error ended the run, which is saved after 1 epochs and 3 steps; go on with --resume auto" in caplog.text
    assert saved_at(tmp_path / "parts") == (1, 3)
    Trainer(config(tmp_path / "parts", method, resume="auto", **options)).fit()
    assert_same_end(straight(method, **options), tmp_path / "parts")


def test_half_updated_weights_are_not_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(config(tmp_path, checkpoint_every_steps=2))

    def step() -> None:
        with torch.no_grad():
            trainer.network.fc.weight.zero_()  # type: ignore[union-attr,operator]
        raise MemoryError("within the optimizer")

    at_call(pytest.MonkeyPatch(), trainer.state.optimizer, "step", 4, step)
    with pytest.raises(MemoryError):
        trainer.fit()
    assert "the last step cannot be saved: the weights were half updated" in caplog.text
    assert saved_at(tmp_path) == (0, 2)


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_an_error_of_the_loader_saves_the_steps_before_it(
    tmp_path: Path, straight: Callable[..., Path], kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(config(tmp_path / "parts", epochs=1))
    with pytest.MonkeyPatch.context() as patch:
        fail_loader(patch, trainer, 4, kind("a worker died"))
        with pytest.raises(kind, match="a worker died"):
            trainer.fit()
    assert "saved after 0 epochs and 4 steps" in caplog.text
    Trainer(config(tmp_path / "parts", epochs=1, resume="auto")).fit()
    assert_same_end(straight(epochs=1), tmp_path / "parts")


def test_an_error_at_the_first_step_leaves_no_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path))
    fail_forward(trainer, 1)
    with pytest.raises(ValueError, match="a fault of the network"):
        trainer.fit()
    assert not checkpoint.exists(tmp_path / "checkpoints")


def run_on(rank: int, output: Path, prepare: Callable[[pytest.MonkeyPatch, Trainer], None] | None = None) -> str:
    """Train, or go on, on one of two ranks, the second of which is prepared; returns the error that ended it."""
    trainer = Trainer(config(output, epochs=2, resume="auto", eval_batch_size=60), Ranks(rank, 2, torch.device("cpu")))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1 and prepare is not None:
            prepare(patch, trainer)
        try:
            trainer.fit()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def fail_loader(patch: pytest.MonkeyPatch, trainer: Trainer, step: int, error: Exception) -> None:
    """Let the loader of a trainer fail in place of a step's batch, counted from 0."""
    batches = trainer.batches.epoch

    def failing(epoch: int, first: int) -> Iterator[Any]:
        for number, batch in enumerate(batches(epoch, first)):
            if number == step:
                raise error
            yield batch

    patch.setattr(trainer.batches, "epoch", failing)


def end_three_times(rank: int, folder: Path) -> list[str]:
    run_on(rank, folder / "straight")
    return [
        run_on(rank, folder / "parts", lambda patch, _: at_call(patch, Validator, "_logits", 3, terminate)),
        run_on(rank, folder / "parts", lambda *run: fail_loader(*run, 2, OSError("a worker died"))),
        run_on(rank, folder / "parts", lambda _, trainer: fail_forward(trainer, 3)),
    ]


def test_a_fault_of_one_of_two_ranks_is_saved_by_both(tmp_path: Path) -> None:
    messages = run_ranks(end_three_times, 2, tmp_path, tmp_path)
    saved = saved_at(tmp_path / "parts")
    (tmp_path / "again").mkdir()  # for another store
    run_ranks(run_on, 2, tmp_path / "again", tmp_path / "parts")
    stopped, loader, step = zip(*messages, strict=True)
    assert stopped[0] == stopped[1]
    assert stopped[0].startswith("Stopped: stopped by SIGTERM and saved after 1 epochs and 0 steps")
    assert loader[0].startswith("TrainingFailed: another rank failed, see its message; the run is saved after 1 epochs")
    assert loader[1] == "OSError: a worker died"
    assert step[1] == "ValueError: a fault of the network"
    assert "peer" in step[0] or "Broken pipe" in step[0]  # the connection to the rank that ended
    assert saved == (1, 4)  # after two steps more than the loader's fault
    assert_same_end(tmp_path / "straight", tmp_path / "parts")


def poison(tensor: torch.Tensor) -> Callable[[], Any]:
    return lambda: tensor.data.fill_(float("nan"))


def test_a_loss_that_is_not_finite_ends_the_epoch_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(config(tmp_path / "parts", epochs=1, checkpoint_every_steps=2))
    at_call(monkeypatch, trainer.state.optimizer, "step", 4, poison(trainer.network.fc.weight))  # type: ignore
    sentence = r"diverged: the training loss is not finite after step 5 of epoch 1, with a learning rate of 0\.0375;"
    remedy = r" this was not saved.*--resume auto --allow optim.lr,optim.clip_norm and a lower --optim.lr \(now 0.05\)"
    monkeypatch.setattr(trainer, "save", lambda best=False: None if trainer.state.step == 4 else Trainer.save(trainer))
    with pytest.raises(TrainingFailed, match=sentence + remedy):
        trainer.fit()
    assert saved_at(tmp_path / "parts") == (0, 2)
    again = Trainer(config(tmp_path / "parts", epochs=1, checkpoint_every_steps=2, resume="auto"))
    at_call(monkeypatch, again.state.optimizer, "step", 1, poison(again.network.fc.weight))  # type: ignore
    with pytest.raises(TrainingFailed, match=r"an older one, such as --resume .*best.pt, or start anew"):
        again.fit()


@pytest.mark.parametrize(
    "what", ["model.fc.weight", "optimizer.state", "method.loss_fn.queue.mean", "average.fc.weight"]
)
def test_a_state_that_is_not_finite_replaces_no_checkpoint(tmp_path: Path, what: str) -> None:
    options: dict[str, Any] = {"epochs": 1, "optim": OptimConfig(lr=0.05, ema_decay=0.8), "checkpoint_every_steps": 2}
    trainer = Trainer(config(tmp_path / "parts", **options))
    state = trainer.state
    tensors = {
        "model.fc.weight": trainer.network.fc.weight,
        "optimizer.state": state.optimizer.state[trainer.network.fc.weight]["momentum_buffer"],  # type: ignore
        "method.loss_fn.queue.mean": state.method.loss_fn.queue.ring.mean,  # type: ignore
        "average.fc.weight": state.average.network.fc.weight,  # type: ignore
    }
    update, count = state.average.update_after_step, [0]  # type: ignore[union-attr]

    def poisoned(network: nn.Module) -> None:
        update(network)
        count[0] += 1
        if count[0] == 4:  # the save after this step comes before any other loss
            poison(tensors[what])()

    state.average.update_after_step = poisoned  # type: ignore[union-attr,method-assign]
    with pytest.raises(TrainingFailed, match=rf"diverged: {what}.* holds NaN or infinity after step 4 of epoch 1"):
        trainer.fit()
    for name in ("last.pt", "best.pt"):
        path = tmp_path / "parts" / "checkpoints" / name
        assert not path.exists() or not not_finite(checkpoint.load(path))
    assert saved_at(tmp_path / "parts") == (0, 2)
    if what == "model.fc.weight":
        Trainer(config(tmp_path / "parts", resume="auto", **options)).fit()
        Trainer(config(tmp_path / "straight", **options)).fit()
        assert_same_end(tmp_path / "straight", tmp_path / "parts")


@pytest.mark.parametrize("method", ["tal", "fmfp"])
def test_masks_of_infinity_may_be_saved(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def masked(*args: Any) -> nn.Module:
        network = build_model(*args)
        network.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        return network

    monkeypatch.setattr("tal_fast.training.state.build_model", masked)
    Trainer(config(tmp_path, method, epochs=2, method_options={"swa_from": 0.4} if method == "fmfp" else {})).fit()
    content = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
    assert not_finite(content["model"]) == {"mask"}
    assert (content["average"] is None) == (method == "tal")


def test_large_finite_values_are_finite() -> None:
    tree = {"a": [torch.full((9,), 3e38), {"b": torch.tensor([1, 2])}], "c": "text"}  # their sum overflows
    assert not_finite(tree) == set()
    tree["a"][1]["b"] = torch.tensor([float("inf"), float("-inf")])  # type: ignore[index]
    assert not_finite(tree) == {"a.1.b"}


def test_steps_that_a_float16_scaler_skips_are_no_divergence(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, "ce", epochs=1, precision="float16", checkpoint_every_steps=2))
    trainer.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    trainer.fit()
    assert trainer.state.scaler.get_scale() < 2.0**30


def broken_folder(root: Path) -> tuple[Path, Path]:
    """Folder of pictures of which two will be broken; returns these."""
    make_folder(root, train=12, val=6)
    files = root / "train" / "cat" / "0.png", root / "train" / "dog" / "1 with spaces.png"
    return files


def folder_config(root: Path, output: Path, **options: Any) -> Any:
    data = {"dataset": "folder", "root": str(root), "image_size": 16, "channels": 3, "train_limit": None, **options}
    return config(output, "ce", epochs=2, batch_size=6, resume="auto", data_options=data)


def test_unreadable_files_are_counted_across_a_restart(tmp_path: Path) -> None:
    one, other = broken_folder(tmp_path / "images")
    whole = one.read_bytes(), other.read_bytes()
    for output in ("straight", "parts"):
        one.write_bytes(whole[0])
        trainer = Trainer(folder_config(tmp_path / "images", tmp_path / output))
        one.write_bytes(whole[0][:60])  # now that its header was read
        trainer.fit(until=1)
        one.write_bytes(whole[0])
        if output == "parts":
            trainer = Trainer(folder_config(tmp_path / "images", tmp_path / output))
        trainer.fit()
    assert [row["unreadable"] for row in read_metrics(tmp_path / "straight")] == ["1", "1"]
    assert_same_end(tmp_path / "straight", tmp_path / "parts")


def test_the_limit_of_unreadable_files_holds_across_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = broken_folder(tmp_path / "images")
    whole = other.read_bytes()

    def trainer() -> Trainer:
        return Trainer(folder_config(tmp_path / "images", tmp_path / "run", max_unreadable=1))

    first = trainer()
    kept, broken = one.read_bytes(), one.read_bytes()[:60]
    one.write_bytes(broken)
    first.fit(until=1)
    one.write_bytes(kept)
    second = trainer()
    other.write_bytes(whole[:60])
    with pytest.raises(
        UnreadableImage, match=r"it is file number 2 that .* data.max_unreadable is 1.*\(the run is saved"
    ):
        second.fit()
    other.write_bytes(whole)
    trainer().fit()
    assert [row["unreadable"] for row in read_metrics(tmp_path / "run")] == ["1", "1"]
    assert caplog.text.count("training goes on without it") == 1


def test_the_update_of_a_whole_step_is_not_taken_back(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path))
    update: Update = trainer.train_step
    for batch in trainer.batches.epoch(0):
        update(batch, 0.05)
    before = trainer.network.bn1.running_mean.clone()  # type: ignore[union-attr,operator]
    own = update.last_whole_step()
    assert own is not None
    assert torch.equal(own["sums"], trainer.state.sums.total)
    assert torch.equal(trainer.network.bn1.running_mean, before)  # type: ignore[union-attr,arg-type]


def test_a_run_whose_folder_another_run_took_stops_and_writes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer, processes = Trainer(config(run, epochs=9)), []
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, Validator, "_logits", 1, lambda: processes.append((run.rename(tmp_path / "a"), holder(run))[1]))
        with pytest.raises(TrainingFailed, match=r"was deleted or moved.*run is in use by process \d+ on"):
            trainer.fit()
    assert os.listdir(run) == [".lock"]
    processes[0].communicate("end\n")


def test_a_run_whose_folder_was_moved_locks_the_new_one(tmp_path: Path) -> None:
    run, found = tmp_path / "run", []
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, Validator, "_logits", 1, lambda: run.rename(tmp_path / "moved"))
        at_call(patch, TrainingBatches, "epoch", 2, lambda: found.extend(os.listdir(run)))
        Trainer(config(run, epochs=2)).fit()
    assert ".lock" in found
    assert not (run / ".lock").exists()
