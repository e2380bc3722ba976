"""``python -m tal_fast.train --bench``: where a run's time goes, as JSON.

Four rates of the configuration at hand: images from the loader alone; training steps on images that are on the device
already, by cross-entropy and by the run's method (TAL, if that is cross-entropy); training from the loader. The two
kinds of step take turns, so that whatever else slows the machine slows both; what the method costs over cross-entropy
is the median of the differences within a turn.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from tal_fast.config.schema import Config
from tal_fast.methods.tal import TAL
from tal_fast.training.progress import memory_in_use
from tal_fast.training.trainer import Trainer
from tal_fast.utils.distributed import Ranks
from tal_fast.utils.environment import environment

WARM_UP_STEPS = 5
"""Compiling, cuDNN's search and the first batches of the workers happen in these."""

MAX_STEPS = 200
MAX_SECONDS = 30.0
"""Of each measurement, whichever comes first; a step of a large network on the CPU takes seconds."""


def measure(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Rates of all ranks together.

    Args:
        config: of a run; nothing is trained in its ``output``.
        ranks: this process among the others.

    Returns:
        Plain values for JSON; times in ms, rates in images/s.
    """
    trainers: dict[str, Trainer] = {}
    other = "tal" if config.method.name == "ce" else config.method.name
    for name in ("ce", other):
        own = copy.deepcopy(config)
        own.resume, own.output = "never", str(Path(config.output) / "bench")
        if name != config.method.name:
            own.method = dataclasses.replace(config.method, name=name, options={})
        trainers[name] = Trainer(own, ranks)
    method = trainers[other].method
    if isinstance(method, TAL):
        _fill(method)
    for trainer in trainers.values():
        trainer.model.train()
        trainer.method.start_epoch(max(0, config.epochs - 1))  # past any warm-up
    loader = _loader_alone(trainers["ce"])
    steps = _steps_in_turns(trainers, ranks)
    both = _training(trainers[config.method.name], ranks)
    ce, difference = statistics.median(steps["ce"]), _median_difference(steps["ce"], steps[other])
    batch = config.batch_size
    return {
        "what": "training throughput",
        "environment": environment(),
        "configuration": config.to_dict(),
        "ranks": ranks.world_size,
        "execution": trainers["ce"].execution.summary(),
        "batch_size": batch,
        "turns": len(steps["ce"]),
        "loader_alone_images_per_s": ranks.world_size * loader,
        "step_ms": {name: 1e3 * statistics.median(times) for name, times in steps.items()},
        "compute_alone_images_per_s": {name: batch / statistics.median(times) for name, times in steps.items()},
        "training_images_per_s": both["images_per_s"],
        "training_data_wait": both["data_wait"],
        f"{other}_over_ce_percent": 100 * difference / ce,
        "memory_GiB": memory_in_use(ranks.device) / 2**30,
    }


def _fill(method: TAL) -> None:
    """A full queue, as after the first epochs: a search among few would be too cheap."""
    queue = method.loss_fn.queue
    generator = torch.Generator().manual_seed(0)
    mean, std = (0.3 + 0.2 * torch.rand(queue.capacity, generator=generator) for _ in range(2))
    queue.push(mean.to(queue.device), std.to(queue.device))


def _loader_alone(trainer: Trainer) -> float:
    """Images a second on this rank."""
    batches = _endless(trainer)
    for _ in range(WARM_UP_STEPS):
        next(batches)
    _finish(trainer.ranks)
    started = time.perf_counter()
    images = steps = 0
    while steps < MAX_STEPS and (steps < 3 or time.perf_counter() - started < MAX_SECONDS):
        images += len(next(batches)[0])
        steps += 1
    _finish(trainer.ranks)
    return images / (time.perf_counter() - started)


def _endless(trainer: Trainer) -> Any:
    epoch = 0
    while True:
        yield from trainer.batches(epoch)
        epoch += 1


def _steps_in_turns(trainers: dict[str, Trainer], ranks: Ranks) -> dict[str, list[float]]:
    """Seconds of each step, CE's and TAL's in turns, each turn on images of its own."""
    kept = {}
    for name, trainer in trainers.items():
        batches = _endless(trainer)
        kept[name] = [tuple(t.clone() for t in next(batches)) for _ in range(4)]
    times: dict[str, list[float]] = {name: [] for name in trainers}

    def step(name: str, turn: int) -> float:
        batch = kept[name][turn % 4]
        _finish(ranks)
        started = time.perf_counter()
        trainers[name]._train_step(batch, 1e-4)
        _finish(ranks)
        return time.perf_counter() - started

    for turn in range(WARM_UP_STEPS):
        for name in trainers:
            step(name, turn)

    def turn_of_both() -> None:
        turn = len(times["ce"])
        order = list(trainers) if turn % 2 else list(trainers)[::-1]
        for name in order:
            times[name].append(step(name, turn))

    ends = time.perf_counter() + 2 * MAX_SECONDS
    while len(times["ce"]) < MAX_STEPS:
        turn_of_both()
        # All ranks must make equally many steps.
        if len(times["ce"]) >= 3 and ranks.max(int(time.perf_counter() > ends)):
            break
    return times


def _median_difference(ce: list[float], other: list[float]) -> float:
    return statistics.median(b - a for a, b in zip(ce, other, strict=True))


def _training(trainer: Trainer, ranks: Ranks) -> dict[str, float]:
    """Steps on images from the loader, as a run makes them."""
    batches = _endless(trainer)
    for _ in range(WARM_UP_STEPS):
        trainer._train_step(next(batches), 1e-4)
    _finish(ranks)
    started = time.perf_counter()
    waited, steps = 0.0, 0
    while steps < MAX_STEPS:
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        trainer._train_step(batch, 1e-4)
        steps += 1
        if steps >= 3 and ranks.max(int(time.perf_counter() - started > MAX_SECONDS)):
            break
    _finish(ranks)
    seconds = time.perf_counter() - started
    return {"images_per_s": steps * trainer.config.batch_size / seconds, "data_wait": waited / seconds}


def _finish(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
