"""Options of the training loop: what each does to the numbers, to the files, to the compiled graph."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tal_fast.config.schema import Config, MethodConfig, OptimConfig
from tal_fast.loss.queue import FeatureQueue
from tal_fast.loss.resharding import reshard
from tal_fast.metrics.failure import failure_metrics
from tal_fast.runs import checkpoint
from tal_fast.runs.load import load_run
from tal_fast.scores.logits import SCORES
from tal_fast.training.optim import build_optimizer, learning_rate, set_learning_rate
from tal_fast.training.runtime import Execution
from tal_fast.training.train_step import BINS, EpochSums, Histogram, TrainStep
from tal_fast.training.trainer import Trainer, TrainingFailed
from tal_fast.training.weight_averaging import MovingAverage
from tal_fast.utils import io as storage
from tal_fast.utils.signals import REQUEUE, Stopped
from tests.helpers.training import assert_same_end, config, one_thread, raise_signal_at, read_metrics  # noqa: F401
from tests.helpers.training import method as make_method

CPU = torch.device("cpu")


# ---- The step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ce", "tal"])
def test_the_compiled_step_is_one_graph_and_trains_alike(tmp_path: Path, method: str) -> None:
    import torch._dynamo
    from torch._dynamo.utils import counters

    histories = []
    for compile in (False, True):
        made = config(tmp_path / str(compile), method, epochs=1, data_options={"channels": 3})
        made.model.compile = compile
        torch._dynamo.reset()
        counters.clear()
        trainer = Trainer(made)
        trainer._train_epoch(0)
        assert counters["stats"]["unique_graphs"] == int(compile)
        assert not counters["graph_break"]
        assert not any("_orig_mod" in name or name.startswith("network") for name in trainer.network.state_dict())
        histories.append(trainer.sums.total.clone())
    eager, compiled = histories
    assert eager[0] == compiled[0] == 192
    assert compiled[1] == pytest.approx(float(eager[1]), rel=2e-2)  # after a few steps: rounding grows


def test_sums_leave_out_rows_without_an_image() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return images[:, 0, 0], images[:, 0, 0].abs()

    method = make_method(MethodConfig("tal", options={"t_min": 2.0, "t_max": 20.0, "t_wrong": 30.0}))
    method.loss_fn.queue.push(torch.rand(20), torch.rand(20))
    step = TrainStep(Fixed(), method, Execution.of(Config(device="cpu"), CPU))
    images, labels = torch.randn(9, 1, 1, 5), torch.randint(5, (9,))
    labels[[2, 7]] = -100
    logits = images[:, 0, 0]
    want, stats = copy.deepcopy(method.loss_fn)(logits, logits.abs(), labels, return_stats=True)
    loss, sums = step(images, labels, torch.arange(9))
    assert loss == want
    epoch = EpochSums(method, CPU)
    epoch.add(sums)
    epoch.add(sums)
    assert float(epoch.total[0]) == 14
    means = epoch.means(epoch.total)
    assert means["train_loss"] == pytest.approx(float(loss), rel=1e-6)
    assert means["train_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().sum() / 7))
    histograms = epoch.histograms(epoch.total)
    for name, (low, high) in {"typicalness": (0.0, 1.0), "temperature": (2.0, 30.0)}.items():
        values = getattr(stats, name)[labels >= 0]
        assert means[name] == pytest.approx(float(values.double().mean()), rel=1e-6)
        assert histograms[name].counts == (2 * torch.histc(values.double(), BINS, low, high)).tolist()


def test_quantiles_of_a_histogram_are_right_to_a_bin() -> None:
    values = torch.rand(5000, dtype=torch.float64) ** 2 * 3 + 1
    counts = torch.histc(values, BINS, 1.0, 4.0).tolist()
    histogram = Histogram(1.0, 4.0, counts)
    for share in (0.01, 0.1, 0.5, 0.9, 1.0):
        assert histogram.quantile(share) == pytest.approx(float(values.quantile(share)), abs=3 / BINS)
    assert math.isnan(Histogram(0, 1, [0.0, 0.0]).quantile(0.5))
    assert Histogram(0, 1, [0, 4, 0, 0]).quantile(0.5) == pytest.approx(0.375)


def test_accumulated_parts_are_the_whole_batch_to_a_network_without_batch_statistics(tmp_path: Path) -> None:
    ends = []
    for parts in (1, 4):
        made = config(tmp_path / str(parts), "ce", epochs=2, optim=OptimConfig(lr=0.01, accumulate=parts))
        trainer = Trainer(made)
        for module in trainer.network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
                module.train = lambda mode=True, module=module: module  # type: ignore[method-assign,misc]
        trainer.fit()
        ends.append(torch.cat([p.detach().double().flatten() for p in trainer.network.parameters()]))
        assert trainer.history[0]["train_loss"] == pytest.approx(2.3, abs=0.5)
    assert (ends[0] - ends[1]).norm() < 1e-5 * ends[0].norm()
    with pytest.raises(ValueError, match="optim.accumulate is 5 but a rank's 32 images do not divide"):
        Trainer(config(tmp_path / "x", "ce", optim=OptimConfig(accumulate=5)))


def test_the_moving_average_is_the_formula_and_what_a_run_is_judged_by(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    average = MovingAverage(network, 0.9)
    want = [p.detach().clone() for p in network.parameters()]
    for _ in range(5):
        network(torch.randn(8, 3))
        with torch.no_grad():
            for w, p in zip(want, network.parameters(), strict=True):
                p.add_(torch.randn_like(p))
                w.mul_(0.9).add_(p, alpha=0.1)
        average.update(network)
    for w, got in zip(want, average.network.parameters(), strict=True):
        torch.testing.assert_close(got, w)
    assert torch.equal(average.network[1].running_mean, network[1].running_mean)  # type: ignore[arg-type]

    made = config(tmp_path, "ce", epochs=3, optim=OptimConfig(lr=0.05, ema_decay=0.8))
    trainer = Trainer(made)
    trainer.fit()
    run = load_run(tmp_path, "last")
    assert trainer.average is not None
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, trainer.average.network.state_dict()[name])
    assert not torch.equal(run.model.fc.weight, trainer.network.fc.weight)  # type: ignore[arg-type,union-attr]
    with torch.no_grad():
        right = sum(int((run.model(x)[0].argmax(1) == y).sum()) for x, y, _ in run.data.loader("val", batch_size=128))
    assert right / 896 == pytest.approx(run.history[-1]["val_accuracy"])


def test_float16_scales_its_gradients_and_resumes_exactly(tmp_path: Path) -> None:
    def made(output: str, **options: Any) -> Config:
        return config(
            tmp_path / output, "tal", epochs=2, precision="float16", optim=OptimConfig(clip_norm=5.0), **options
        )

    trainer = Trainer(made("straight"))
    scales = []
    unscale = trainer.scaler.unscale_
    trainer.scaler.unscale_ = lambda o: (scales.append(trainer.scaler.get_scale()), unscale(o))[1]  # type: ignore
    trainer.fit()
    assert len(scales) == 12
    assert min(scales) > 1  # 65,536 at first, halved when a gradient overflows
    Trainer(made("parts")).fit(until=1)
    saved = checkpoint.load(tmp_path / "parts" / "checkpoints" / "last.pt")["scaler"]
    assert saved["scale"] > 1
    Trainer(made("parts", resume="auto")).fit()
    assert_same_end(tmp_path / "straight", tmp_path / "parts")


def test_auto_precision_on_the_cpu_is_float32(tmp_path: Path) -> None:
    execution = Execution.of(Config(device="cpu"), CPU)
    assert (execution.dtype, execution.compile, execution.channels_last) == (None, False, False)
    for options, sentence in (
        ({"cuda_graphs": True}, "cuda_graphs is on but the device is cpu"),
        ({"profile": "5:5"}, "profile is '5:5' but must be START:STOP"),
        ({"image_sizes": [(1, 8)]}, "image_sizes is .* ascending from 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Trainer(config(tmp_path, **options))
    made = config(tmp_path)
    made.model.sync_batchnorm = True
    with pytest.raises(ValueError, match="sync_batchnorm works on GPUs only"):
        Trainer(made)


# ---- Optimizer ------------------------------------------------------------------------------------------------


def test_only_weights_decay_by_type() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)
            self.norm = torch.nn.LayerNorm([4, 2, 2])  # its weight has three dimensions
            self.token = torch.nn.Parameter(torch.zeros(1, 1, 4))
            self.scale = torch.nn.Parameter(torch.zeros(4))

        def no_weight_decay(self) -> set[str]:
            return {"token"}

    model = Net()
    groups = build_optimizer(OptimConfig(weight_decay=0.5), model).param_groups
    decaying = {id(p) for p in groups[0]["params"]}
    assert decaying == {id(model.conv.weight), id(model.scale)}
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_fused_optimizer_does_what_the_plain_one_does(name: Any) -> None:
    networks = [torch.nn.Linear(5, 4) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    fused = build_optimizer(OptimConfig(name, weight_decay=0.01, decay_all=True), networks[0])
    plain = (
        torch.optim.SGD(networks[1].parameters(), 0.1, 0.9, weight_decay=0.01, nesterov=True)
        if name == "sgd"
        else torch.optim.AdamW(networks[1].parameters(), 0.1, weight_decay=0.01)
    )
    for step in range(6):
        x = torch.randn(7, 5)
        set_learning_rate(fused, 0.1 / (step + 1))
        plain.param_groups[0]["lr"] = 0.1 / (step + 1)
        for network, optimizer in zip(networks, (fused, plain), strict=True):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(networks[0].weight, networks[1].weight)


def test_step_schedule() -> None:
    step = OptimConfig(lr=1.0, schedule="step", step_size=30, step_factor=0.1)
    assert [learning_rate(step, 90, e) for e in (0.0, 29.99, 30.0, 60.5)] == pytest.approx([1, 1, 0.1, 0.01])


# ---- Files ----------------------------------------------------------------------------------------------------


def test_checkpoints_inside_an_epoch_and_every_second_epoch(tmp_path: Path) -> None:
    straight = config(tmp_path / "straight", epochs=4)
    Trainer(straight).fit()
    made = config(tmp_path / "parts", epochs=4, checkpoint_every_steps=2, keep_every_epochs=2)
    trainer = Trainer(made)
    saved = []
    start = trainer._writer.start
    trainer._writer.start = lambda content, copies=(): (  # type: ignore[method-assign]
        saved.append((content["epoch"], content["step"], list(copies))),
        start(content, copies),
    )[1]
    trainer.fit()
    assert [pair[:2] for pair in saved] == [point for e in range(4) for point in ((e, 2), (e, 4), (e + 1, 0))]
    assert_same_end(tmp_path / "straight", tmp_path / "parts")
    folder = tmp_path / "parts" / "checkpoints"
    assert sorted(p.name for p in folder.glob("epoch-*")) == ["epoch-0002.pt", "epoch-0004.pt"]
    assert checkpoint.load(folder / "epoch-0002.pt")["epoch"] == 2
    for name in ("last.pt", "previous.pt"):
        (folder / name).write_bytes(b"damaged")
    (folder / "epoch-0004.pt").write_bytes(b"")
    content, path, problems = checkpoint.load_newest(folder)
    assert (path.name, content["epoch"], len(problems)) == ("epoch-0002.pt", 2, 3)
    Trainer(config(tmp_path / "parts", epochs=4, resume="auto")).fit()
    assert_same_end(tmp_path / "straight", tmp_path / "parts")


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that writes is slow, and training goes on meanwhile."""
    import threading

    go = threading.Event()
    write = storage.write_atomically

    def slowly(*args: Any, **kwargs: Any) -> None:
        go.wait(60)
        write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "write_atomically", slowly)
    trainer = Trainer(config(tmp_path))
    trainer.save()
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    for batch in trainer.batches(0):
        trainer._train_step(batch, 0.1)
    go.set()
    assert trainer._writer.finish() is None
    content = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
    for name, tensor in before.items():
        assert torch.equal(content["model"][name], tensor), name
    assert content["ranks"][0]["method"]["loss_fn.queue.cursor"].tolist() == [0, 0]
    assert float(content["ranks"][0]["sums"].sum()) == 0
    assert not torch.equal(trainer.network.fc.weight, before["fc.weight"])  # type: ignore[union-attr,arg-type]


def test_a_full_disk_costs_a_checkpoint_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = checkpoint.save
    count = [0]

    def full_at_times(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
        count[0] += 1
        if count[0] in failing:
            raise OSError(28, "No space left on device")
        real(path, content, previous)

    monkeypatch.setattr(checkpoint, "save", full_at_times)
    failing = {2}
    Trainer(config(tmp_path / "a", progress="lines")).fit()
    out = capsys.readouterr().out
    assert "a checkpoint could not be written to" in out
    assert "No space left on device" in out
    assert checkpoint.load(tmp_path / "a" / "checkpoints" / "last.pt")["epoch"] == 4

    failing, count[0] = {4}, 0
    with pytest.raises(TrainingFailed, match=r"No space left on device.*the one before is whole.*--resume auto"):
        Trainer(config(tmp_path / "b")).fit()
    assert checkpoint.load(tmp_path / "b" / "checkpoints" / "last.pt")["epoch"] == 3
    failing = set()
    Trainer(config(tmp_path / "b", resume="auto")).fit()
    assert_same_end(tmp_path / "a", tmp_path / "b")


def test_usr1_asks_to_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raise_signal_at(monkeypatch, step=8, number=signal.SIGUSR1)
    with pytest.raises(Stopped, match="stopped by SIGUSR1 and saved after 1 epochs and 2 steps") as caught:
        Trainer(config(tmp_path)).fit()
    assert caught.value.exit_code == REQUEUE == 75
    assert Stopped(signal.SIGINT, "").exit_code == 130


def test_a_process_that_torchrun_restarts_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainer(config(tmp_path)).fit(until=1)
    with pytest.raises(ValueError, match="holds a run already"):
        Trainer(config(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Trainer(config(tmp_path)).epoch == 1


# ---- What a run shows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ce", "tal"])
def test_failure_detection_after_each_epoch_is_the_evaluators(tmp_path: Path, method: str) -> None:
    trainer = Trainer(config(tmp_path, method, epochs=2))
    trainer.fit()
    run = load_run(tmp_path, "last")
    outputs = [(run.model(x)[0].detach(), y) for x, y, _ in run.data.loader("val", batch_size=300)]
    logits, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    score = SCORES[run.score](logits)
    assert trainer.method.confidence(logits).equal(score)
    want = failure_metrics(score, (logits.argmax(1) == labels).numpy())
    row = read_metrics(tmp_path)[-1]
    for name in ("aurc", "auroc", "fpr95"):
        assert float(row[name]) == pytest.approx(want[name], abs=2e-3)  # other batches, other rounding


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


def test_wandb_offline_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    Trainer(config(tmp_path, epochs=2, logger="wandb")).fit(until=1)
    identity = (tmp_path / "wandb" / "run-id.txt").read_text()
    Trainer(config(tmp_path, epochs=2, logger="wandb", resume="auto")).fit()
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(identity in folder.name for folder in folders)


def test_a_logger_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else found(name, *a))
    with pytest.raises(ValueError, match="logger is 'all' but wandb is not installed; pip install wandb"):
        Trainer(config(tmp_path, logger="all"))


def test_the_profile_is_a_chrome_trace_of_the_window(tmp_path: Path) -> None:
    Trainer(config(tmp_path, epochs=1, profile="2:4")).fit()
    trace = json.loads((tmp_path / "profile" / "trace-rank0.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert sum(name == "Optimizer.step#SGD.step" for name in names) == 2


# ---- Another number of ranks ----------------------------------------------------------------------------------


def filled(capacity: int, values: list[float]) -> dict[str, Any]:
    queue = FeatureQueue(capacity, backend="reference")
    queue.push(torch.tensor(values), torch.tensor(values) / 2)
    return dict(queue.state_dict())


def content(state: dict[str, Any]) -> list[float]:
    queue = FeatureQueue(state["mean"].numel(), backend="reference")
    queue.load_state_dict(state)
    mean, std = queue.contents()
    assert torch.equal(std, mean / 2)
    return mean.tolist()


def test_queues_merge_by_age_and_split_in_turn() -> None:
    two = [filled(6, [1, 2, 3]), filled(6, [11, 12, 13])]
    assert content(reshard(two, 0, 1, False)) == [1, 11, 2, 12, 3, 13]
    four = [filled(6, [1, 2, 3, 4, 5]), filled(6, [11, 12])]
    assert content(reshard(four, 0, 1, False)) == [2, 3, 4, 11, 5, 12]  # the oldest leaves
    one = [filled(4, [1, 2, 3, 4, 5, 6])]
    assert [content(reshard(one, rank, 2, False)) for rank in (0, 1)] == [[3, 5], [4, 6]]
    assert content(reshard([filled(5, []), filled(5, [])], 0, 3, False)) == []
    assert content(reshard(two, 2, 3, True)) == [1, 2, 3]


def test_there_and_back_gives_the_same_queues() -> None:
    old = [filled(8, (torch.arange(11) + 100 * rank).tolist()) for rank in range(3)]
    halves = [reshard(old, rank, 6, False) for rank in range(6)]
    assert sum(len(content(half)) for half in halves) == 24
    for rank in range(3):
        assert content(reshard(halves, rank, 3, False)) == content(old[rank])


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["ce", "tal"])
def test_a_step_never_waits_for_the_gpu(tmp_path: Path, method: str) -> None:
    made = config(tmp_path, method, device="cuda", optim=OptimConfig(clip_norm=1.0, ema_decay=0.9))
    trainer = Trainer(made)
    trainer.model.train()
    batches = list(trainer.batches(0))
    for batch in batches[:3]:
        trainer._train_step(batch, 0.1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[3:]:
            trainer._train_step(batch, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["ce", "tal"])
def test_cuda_graphs_give_the_same_losses(tmp_path: Path, method: str) -> None:
    rows = []
    for graphs in (False, True):
        made = config(tmp_path / str(graphs), method, device="cuda", precision="float32", cuda_graphs=graphs)
        made.model.compile = False
        trainer = Trainer(made)
        trainer.fit()
        rows.append([row["train_loss"] for row in trainer.history])
    assert rows[1] == pytest.approx(rows[0], rel=1e-3)


def test_the_command_says_what_to_do_next_after_a_signal(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tal_fast.train", "--config", "digits-tal", "--epochs", "200", "--device", "cpu"]
    words += ["--data.loader", "torch", "--data.workers", "0", "--log", "none", "--output", str(tmp_path / "x")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch"):
            process.send_signal(signal.SIGUSR1)
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped by SIGUSR1 and saved after" in err
