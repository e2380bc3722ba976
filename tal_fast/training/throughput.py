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
from typing import Any

import torch
from torch import Tensor

from tal_fast.config.schema import Config, DataConfig
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
"""Data set -> training images, validation images, classes and side that synthetic images have in its place; a folder's
are ImageNet's."""


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a few steps say of a whole training.

    Attributes:
        images_per_s: of training on images from the loader, over all ranks.
        data_wait: share of that time spent waiting for images.
        hours: of all steps, validations and passes for BatchNorm statistics, without start, saving and evaluation.
        note: what stands in for data that are not there.
    """

    images_per_s: float
    data_wait: float
    hours: float
    note: str = ""


def measure(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Measure the throughput of all ranks together, in plain values for JSON; nothing is written to ``output``."""
    other = "tal" if config.method.name == "ce" else config.method.name
    trainers: dict[str, Trainer] = {}
    for name in ("ce", other):
        run = _to_measure(config)
        if name != config.method.name:
            run.method = dataclasses.replace(config.method, name=name, options={})
            if run.mix.on and run.mix.weight is None and method_class(name).mixes != "alone":
                run.mix.weight = 1.0  # what the method would have to train with
        trainers[name] = Trainer(run, ranks)
    for trainer in trainers.values():
        _as_trained(trainer)
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
    """What a few steps of a configuration say of its whole training.

    Synthetic images stand in for data that cannot be read, if ``STAND_INS`` has their number, and noise for outliers.
    Raises ValueError for a configuration that works with neither.
    """
    note, val_images = "", None
    try:
        trainer = Trainer(_to_measure(config), ranks)
    except ValueError as absent:
        if config.data.dataset not in STAND_INS:
            raise
        val_images = config.data.holdout or STAND_INS[config.data.dataset][1]
        note = f"on synthetic images in memory, which need no decoding, as {absent}"
        try:
            trainer = Trainer(_to_measure(stand_in(config)), ranks)
        except ValueError:
            raise absent from None
    _as_trained(trainer)
    return dataclasses.replace(expected(trainer, val_images), note=note)


def stand_in(config: Config) -> Config:
    """Configuration with as many synthetic images of the same size in place of the data, and noise as outliers."""
    config = copy.deepcopy(config)
    train, _, classes, side = STAND_INS[config.data.dataset]
    config.data = DataConfig(
        dataset="synthetic", synthetic_images=train, synthetic_classes=classes, crop_area=None,
        image_size=config.data.image_size or side,
        **{key: getattr(config.data, key) for key in ("channels", "flip", "shift", "holdout", "train_limit")},
    )  # fmt: skip
    if "outliers" in config.method.options:
        config.method.options["outliers"] = f"uniform:{config.batch_size}"
    return config


def expected(trainer: Trainer, val_images: int | None = None) -> Expected:
    """What a few steps of a trainer say of its whole training, by default with the validation images it has."""
    config, average = trainer.config, trainer.state.average
    images = len(trainer.batches) * config.batch_size
    starts = [start for start, _ in config.image_sizes] or [0]
    step_seconds = waited = 0.0
    for start, end in zip(starts, [*starts[1:], config.epochs], strict=True):
        if start < config.epochs:
            rate, wait = _rate(trainer, train=True, epoch=start)
            seconds = (min(end, config.epochs) - start) * images / rate
            step_seconds, waited = step_seconds + seconds, waited + wait * seconds
    epochs = range(1, config.epochs + 1)
    passes = sum(epoch % config.validate_every == 0 or epoch == config.epochs for epoch in epochs)
    forward = passes * (trainer.validator.loader.num_samples if val_images is None else val_images)
    if average is not None and average.takes_statistics:
        forward += sum(map(average.in_use, epochs)) * min(images, STATISTICS_IMAGES)
    total = step_seconds + forward * _validation_seconds(trainer)
    return Expected(config.epochs * images / step_seconds, waited / step_seconds, total / 3600)


def _to_measure(config: Config) -> Config:
    """The configuration with the steps of most epochs, and nothing written to ``output``."""
    run = copy.deepcopy(config)
    run.optim.head_epochs = 0
    run.resume, run.output = "never", str(Path(tempfile.gettempdir()) / "tal-fast-bench")
    return run


def _as_trained(trainer: Trainer) -> None:
    """Bring the method to where most epochs are: queues full, warm-up over."""
    trainer.model.train()
    fill_queues(trainer)
    trainer.method.start_epoch(max(0, trainer.config.epochs - 1))


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


def _endless_batches(trainer: Trainer, epoch: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Batches of one epoch after another, or of one again and again."""
    epochs = itertools.count() if epoch is None else itertools.repeat(epoch)
    return itertools.chain.from_iterable(map(trainer.batches.epoch, epochs))


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
    marks: list[float] = []
    seen = 0

    def some(batches: Iterator[Images], steps: int) -> Generator[Images, None, None]:
        nonlocal seen
        for step, batch in enumerate(itertools.islice(batches, VALIDATION_STEPS)):
            if step <= 1:
                marks.append(_time(trainer))
                seen = 0
            seen += len(batch[0])
            yield batch

    trainer.validator.validate(trainer.network, some)
    return (_time(trainer) - marks[-1]) / (seen * trainer.ranks.world_size)


def _rate(trainer: Trainer, train: bool, epoch: int | None = None) -> tuple[float, float]:
    """Images per second of all ranks from the loader, or of training on them, and share of the time spent waiting."""
    batches = _endless_batches(trainer, epoch)
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
