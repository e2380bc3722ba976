"""Throughput of a configuration, as JSON: ``python -m tal_fast.train --bench``.

Four rates: images from the loader alone; training steps on images already on the device, with cross-entropy and with
the run's method (TAL, if that is cross-entropy); training from the loader. Steps of the two methods alternate, so that
whatever slows the machine slows both, and the cost of the method over cross-entropy is the median difference within a
pair. ``expected`` extrapolates a few steps to the whole training.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tal_fast.config.schema import Config, DataConfig
from tal_fast.data.builtin import FASHION_MNIST_ROOT
from tal_fast.data.cifar import LAYOUTS
from tal_fast.data.loader import Images
from tal_fast.loss.queue import FeatureQueue
from tal_fast.loss.reference import feature_statistics
from tal_fast.methods import method_class
from tal_fast.training.progress import memory_in_use
from tal_fast.training.trainer import Trainer
from tal_fast.training.weight_averaging import STATISTICS_IMAGES
from tal_fast.utils.distributed import Ranks
from tal_fast.utils.environment import environment

WARM_UP_STEPS = 5
"""Number of steps before each measurement, for compilation, cuDNN's search and the workers' first batches."""

# Limits of a measurement; a step of a large network on the CPU takes seconds.
MIN_STEPS = 3  # however long they take
MAX_STEPS = 200
MAX_SECONDS = 30.0
VALIDATION_STEPS = 20

LEARNING_RATE = 1e-4
"""Learning rate of the measured steps."""

STAND_INS = {
    "cifar10": (50_000, 10_000, 10, 32), "cifar100": (50_000, 10_000, 100, 32),
    "fashion-mnist": (60_000, 10_000, 10, 28), "folder": (1_281_167, 50_000, 1_000, 224),
}  # fmt: skip
"""Data set -> training and validation images, classes and side of a stand-in; a folder's are ImageNet's."""


class Expected(NamedTuple):
    """Expected throughput and duration of a training, without start-up, saving and evaluation."""

    images_per_s: float  # of training on images from the loader, over all ranks
    data_wait: float  # share of that time spent waiting for images
    hours: float  # of all steps and validations; images that grow (``image_sizes``) count as they are at the end
    note: str = ""  # the synthetic images that replaced missing data, in words


def measure(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Measure the throughput of all ranks together, in plain values for JSON; nothing is written to ``output``."""
    other = "tal" if config.method.name == "ce" else config.method.name
    trainers: dict[str, Trainer] = {}
    for name in ("ce", other):
        run = copy.deepcopy(config)
        if name != config.method.name:
            run.method = dataclasses.replace(config.method, name=name, options={})
            if run.mix.on and run.mix.weight is None and method_class(name).mixes != "alone":
                run.mix.weight = 1.0  # what the method would have to train with
        trainers[name] = _trainer(run, ranks)
    loader, _ = _rate(trainers["ce"], train=False)
    steps = _alternating_steps(trainers)
    training = expected(trainers[config.method.name])
    ce = statistics.median(steps["ce"])
    difference = statistics.median(b - a for a, b in zip(steps["ce"], steps[other], strict=True))
    batch = config.batch_size
    return {
        "what": "training throughput",
        "environment": environment(),
        "configuration": config.to_dict(),
        "ranks": ranks.world_size,
        "execution": trainers["ce"].runtime.summary(),
        "batch_size": batch,
        "turns": len(steps["ce"]),
        "loader_alone_images_per_s": loader,
        "step_ms": {name: 1e3 * statistics.median(times) for name, times in steps.items()},
        "compute_alone_images_per_s": {name: batch / statistics.median(times) for name, times in steps.items()},
        "training_images_per_s": training.images_per_s,
        "training_data_wait": training.data_wait,
        "expected_hours": training.hours,
        f"{other}_over_ce_percent": 100 * difference / ce,
        "memory_GiB": memory_in_use(ranks.device) / 2**30,
    }


def expected_of(config: Config, ranks: Ranks) -> Expected:
    """Expected throughput and duration of a configuration, from a few training steps.

    Synthetic images stand in for data that are missing, if ``STAND_INS`` has their number, and noise for outliers.
    Raises ValueError for whatever else keeps the configuration from training.
    """
    run = copy.deepcopy(config)
    missing, val_images = _missing(run.data), None
    if missing:
        train, val_images, classes, side = STAND_INS[run.data.dataset]
        val_images = run.data.holdout or val_images
        kept = {key: getattr(run.data, key) for key in ("channels", "flip", "shift", "holdout", "train_limit")}
        images = {"image_size": run.data.image_size or side, "crop_area": None, **kept}
        run.data = DataConfig("synthetic", synthetic_images=train, synthetic_classes=classes, **images)
        if "outliers" in run.method.options:
            run.method.options["outliers"] = f"uniform:{run.batch_size}"
    trainer = _trainer(run, ranks)
    found = expected(trainer, val_images)
    if not missing:
        return found
    numbers = f"{len(trainer.data.split('train')):,} for training, {val_images:,} for validation, {classes:,} classes"
    return found._replace(note=f"on synthetic images in memory, which need no decoding ({numbers}), as {missing}")


def _missing(data: DataConfig) -> str:
    """Reason why data that have a stand-in are missing; empty if there are any files, readable or not."""
    if data.dataset not in STAND_INS:
        return ""
    given = data.root or (FASHION_MNIST_ROOT if data.dataset == "fashion-mnist" else None)
    if given is None:
        return "data.root is not set"
    root = Path(given)
    if not root.is_dir():
        return "" if root.exists() else f"there is no folder {root}"
    if data.dataset in LAYOUTS:
        layout = LAYOUTS[data.dataset]
        names = (*layout.train, *layout.val, layout.names, "meta", "batches.meta")
        folders = (root, root / layout.folder, root / layout.pickles)
        found = any((folder / name).is_file() for folder in folders for name in names)
    else:
        found = any(root.glob("*-ubyte*" if data.dataset == "fashion-mnist" else "*"))
    return "" if found else f"data.root {root} has no files of {data.dataset}"


def expected(trainer: Trainer, val_images: int | None = None) -> Expected:
    """Expected throughput and duration of a trainer's run, from a few steps; by default with its validation images."""
    config, average = trainer.config, trainer.state.average
    images, epochs = len(trainer.batches) * config.batch_size, range(1, config.epochs + 1)
    rate, wait = _rate(trainer, train=True)
    validations = sum(epoch % config.validate_every == 0 or epoch == config.epochs for epoch in epochs)
    forward = validations * (trainer.validator.loader.num_samples if val_images is None else val_images)
    if average is not None and average.takes_statistics:
        forward += sum(map(average.counts, epochs)) * min(images, STATISTICS_IMAGES)
    seconds = config.epochs * images / rate + forward * _validation_seconds(trainer)
    return Expected(rate, wait, seconds / 3600)


def _trainer(config: Config, ranks: Ranks) -> Trainer:
    """Trainer as in most epochs: the whole network trains, queues are full, warm-up is over; ``output`` is not used."""
    config = copy.deepcopy(config)
    config.optim.head_epochs = 0
    config.resume, config.output = "never", str(Path(tempfile.gettempdir()) / "tal-fast-bench")
    trainer = Trainer(config, ranks)
    trainer.model.train()
    fill_queues(trainer)
    trainer.method.start_epoch(max(0, config.epochs - 1))
    return trainer


@torch.no_grad()
def fill_queues(trainer: Trainer) -> None:
    """Fill the queues of a trainer's method with the statistics of the network's features of training images.

    A search in a nearly empty queue is too cheap, and one among made-up entries too dear: 5 ms a step where training
    takes 0.2. What ``MAX_SECONDS`` do not fill is drawn again from what they gave, moved by a thousandth.
    """
    queues = [module for module in trainer.method.modules() if isinstance(module, FeatureQueue)]
    capacity, device, rows = max((queue.capacity for queue in queues), default=0), trainer.ranks.device, 0
    started = time.perf_counter()
    found: list[Tensor] = []
    batches = _endless_batches(trainer)
    while rows < capacity and (not found or time.perf_counter() - started < MAX_SECONDS):
        images = next(batches)[0]
        with trainer.runtime.autocast():
            features = trainer.network(trainer.runtime.arrange(images))[1]
        found.append(torch.stack(feature_statistics(features)))
        rows += len(images)
    if not queues:
        return
    statistics, generator = torch.cat(found, 1), torch.Generator(device).manual_seed(0)
    if rows < capacity:
        statistics = statistics[:, torch.randint(rows, (capacity,), generator=generator, device=device)]
        noise = torch.randn(statistics.shape, generator=generator, device=device, dtype=statistics.dtype)
        statistics = statistics * (1 + 1e-3 * noise)
    for queue in queues:
        queue.push(*statistics[:, : queue.capacity])


def _endless_batches(trainer: Trainer) -> Iterator[tuple[Tensor, ...]]:
    """Batches of epochs from the last on, whose images have their last size."""
    return itertools.chain.from_iterable(map(trainer.batches.epoch, itertools.count(trainer.config.epochs - 1)))


def _alternating_steps(trainers: dict[str, Trainer]) -> dict[str, list[float]]:
    """Seconds of each step, of the trainers in turns."""
    batches = {}
    for name, trainer in trainers.items():
        endless = _endless_batches(trainer)
        batches[name] = [tuple(tensor.clone() for tensor in next(endless)) for _ in range(4)]
    times: dict[str, list[float]] = {name: [] for name in trainers}

    def step(name: str, turn: int) -> float:
        started = _time(trainers[name])
        trainers[name].train_step(batches[name][turn % 4], LEARNING_RATE)
        return _time(trainers[name]) - started

    for turn in range(WARM_UP_STEPS):
        for name in trainers:
            step(name, turn)
    end = time.perf_counter() + 2 * MAX_SECONDS
    ranks = trainers["ce"].ranks
    for turn in range(MAX_STEPS):
        for name in list(trainers)[:: 1 if turn % 2 else -1]:
            times[name].append(step(name, turn))
        # Agreed upon by all ranks, which must take equally many steps.
        if turn + 1 >= MIN_STEPS and ranks.max(int(time.perf_counter() > end)):
            break
    return times


def _validation_seconds(trainer: Trainer) -> float:
    """Seconds a validation takes for an image of all ranks; the first batch, with compilation, does not count."""
    started, seen = 0.0, 0

    def some(batches: Iterator[Images], steps: int) -> Generator[Images, None, None]:
        nonlocal started, seen
        for step, batch in enumerate(itertools.islice(batches, VALIDATION_STEPS)):
            if step <= 1:
                started, seen = _time(trainer), 0
            seen += len(batch[0])
            yield batch

    trainer.validator.validate(trainer.network, some)
    return (_time(trainer) - started) / (seen * trainer.ranks.world_size)


def _rate(trainer: Trainer, train: bool) -> tuple[float, float]:
    """Images per second of all ranks from the loader, or of training on them, and share of the time spent waiting."""
    batches = _endless_batches(trainer)
    started = waited = 0.0
    for step in range(-WARM_UP_STEPS, MAX_STEPS):
        if step == 0:
            started, waited = _time(trainer), 0.0
        before_batch = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before_batch
        if train:
            trainer.train_step(batch, LEARNING_RATE)
        if step + 1 >= MIN_STEPS and trainer.ranks.max(int(time.perf_counter() - started > MAX_SECONDS)):
            break
    seconds = _time(trainer) - started
    return (step + 1) * trainer.config.batch_size / seconds, waited / seconds


def _time(trainer: Trainer) -> float:
    """Time in seconds, after all work of the device."""
    if trainer.ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
