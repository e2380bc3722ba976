"""Overhead of the trainer over a bare PyTorch loop: ``python -m bench.trainer_overhead FOLDER``.

Loops train the same network in turns, an epoch each: the trainer; a bare loop over this package's loader, with its loss
and ``torch.optim``; and, for cross-entropy on a folder of images, a loop over timm's loader and network. timm's wheel
has no ``train.py``: the loop does what a step of that script does without options. An epoch's time is that of its
steps, without validation and checkpoints. Writes bench/results/trainer_overhead_cpu.json: medians over the epochs, and
of the ratios of epochs that followed one another.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.harness import environment, write_json
from bench.loaders import make_images
from bench.report.results import ROOT
from tal_fast import TALLoss
from tal_fast.config.methods import TAL_OPTIONS
from tal_fast.config.parse import parse_training
from tal_fast.config.schema import Config
from tal_fast.data.build import build_data
from tal_fast.models import build_model
from tal_fast.training.trainer import Trainer

RESULT = ROOT / "bench" / "results" / "trainer_overhead_cpu.json"
IMAGES = 256  # of a folder, 500 x 375 JPEGs
FOLDER = "--config folder-tal --data.image-size 128 --data.loader torch --data.workers 1 --batch-size 32"
CASES = {
    "digits": "--config digits-tal --data.workers 0",
    "fashion-mnist": "--config fashion-mnist-tal --data.train-limit 2000 --data.workers 0",
    "folder, resnet18": FOLDER,
    "folder, resnet18, ce": f"{FOLDER} --method.name ce",
}
ALWAYS = "--device cpu --threads 1 --logger none --progress none"


def bare_loop(config: Config, trainer: Trainer) -> Callable[[int], float]:
    """Loop that a user would write, over the trainer's kind of loader; returns the seconds of an epoch."""
    data = build_data(config.data)
    loader = data.loader("train", batch_size=config.batch_size, seed=config.seed, device=torch.device("cpu"))
    network = build_model(config.model, data.num_classes, data.channels, data.image_size)
    network.load_state_dict(trainer.network.state_dict())
    order = torch.channels_last if trainer.runtime.channels_last else torch.contiguous_format
    network.to(memory_format=order)  # type: ignore[call-overload]
    optim, tal = config.optim, config.method.name == "tal"
    options = vars(trainer.method.options) if tal else {}
    loss_fn = TALLoss(**{name: options[name] for name in TAL_OPTIONS - {"warmup_epochs"}}) if tal else None
    optimizer = torch.optim.SGD(
        network.parameters(),
        optim.lr,
        optim.momentum,
        weight_decay=optim.weight_decay,
        nesterov=optim.nesterov,
        fused=True,
    )

    def epoch(number: int) -> float:
        network.train()
        start = time.perf_counter()
        loader.set_epoch(number)
        for images, labels, _ in loader:
            logits, features = network(images.contiguous(memory_format=order))
            if loss_fn is None:
                loss = nn.functional.cross_entropy(logits, labels)
            else:
                loss = loss_fn(logits, features, labels, warmup=number < 1)
            optimizer.zero_grad()
            loss.backward()
            if optim.clip_norm is not None:
                nn.utils.clip_grad_norm_(network.parameters(), optim.clip_norm)
            optimizer.step()
        return time.perf_counter() - start

    return epoch


def timm_loop(config: Config) -> Callable[[int], float]:
    """Step of timm's training script, over its loader of the same folder."""
    import timm
    import timm.data
    import timm.optim
    import timm.utils

    size, optim = config.data.image_size, config.optim
    data = timm.data.create_dataset("", root=config.data.root, split="train", is_training=True)
    loader = timm.data.create_loader(
        data, (3, size, size), config.batch_size, is_training=True, use_prefetcher=False,
        num_workers=config.data.workers, interpolation="bilinear", persistent_workers=True,
    )  # fmt: skip
    network = timm.create_model(config.model.name, num_classes=len(data.reader.class_to_idx))
    optimizer = timm.optim.create_optimizer_v2(network, "sgd", optim.lr, optim.weight_decay, optim.momentum)
    losses = timm.utils.AverageMeter()

    def epoch(number: int) -> float:
        network.train()
        start = time.perf_counter()
        for images, labels in loader:
            loss = nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            if optim.clip_norm is not None:
                timm.utils.dispatch_clip_grad(network.parameters(), optim.clip_norm)
            optimizer.step()
            losses.update(loss.item(), len(images))
        return time.perf_counter() - start

    return epoch


def measure(config: Config) -> dict[str, Any]:
    """Milliseconds a step of each loop, and the trainer's ratio to each other one with a 95% interval."""
    seconds: dict[str, list[float]] = {}
    loops: dict[str, Callable[[int], float]] = {}

    class Interrupted(Trainer):
        """Trainer that lets the other loops run after each epoch, when its checkpoint is written."""

        def _finish_epoch(self, row: dict[str, float], histograms: Any) -> None:
            super()._finish_epoch(row, histograms)
            self._writer.finish()
            seconds.setdefault("trainer", []).append(row["seconds"])
            for name, loop in loops.items():
                seconds.setdefault(name, []).append(loop(int(row["epoch"]) - 1))

    trainer = Interrupted(config)
    loops["bare"] = bare_loop(config, trainer)
    if config.data.dataset == "folder" and config.method.name == "ce":
        loops["timm"] = timm_loop(config)
    trainer.fit()
    steps, random = len(trainer.batches), np.random.default_rng(0)
    result: dict[str, Any] = {"steps": steps, "epochs": config.epochs - 1, "batch_size": config.batch_size}
    own = np.array(seconds["trainer"][1:])  # the first has the allocator's and the threads' start
    for name, taken in seconds.items():
        ratios = own / np.array(taken[1:])
        medians = np.median(random.choice(ratios, (1000, len(ratios))), axis=1)
        result[name] = {"step_ms": float(1e3 * np.median(taken[1:]) / steps)}
        if name != "trainer":
            low, high = np.percentile(medians, [2.5, 97.5])
            result[name] |= {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high)}
    return result


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.trainer_overhead", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="for images and runs")
    parser.add_argument("--epochs", type=int, default=30, help="of each loop; the first is not counted")
    parser.add_argument("--only", choices=CASES, help="one case, whose result is printed and not written")
    args = parser.parse_args(argv)
    images = args.folder / "images"
    if not images.exists():
        make_images(images, IMAGES)
    results = {}
    for name, words in CASES.items() if args.only is None else [(args.only, CASES[args.only])]:
        output = args.folder / "runs" / f"{name.replace(', ', '-')}-{time.time_ns()}"
        data = f" --data-dir {images}" if name.startswith("folder") else ""
        options = f"{words} {ALWAYS}{data} --epochs {args.epochs} --output {output}"
        results[name] = {"options": f"{words} {ALWAYS}", **measure(parse_training(options.split())[0])}
        for loop in ("bare", "timm"):
            if loop in results[name]:
                own, other = results[name]["trainer"], results[name][loop]
                print(
                    f"{name}: trainer {own['step_ms']:.2f} ms a step, {loop} {other['step_ms']:.2f}; "
                    f"ratio {other['ratio']:.3f} [{other['low']:.3f}, {other['high']:.3f}]"
                )
    if args.only is None:
        write_json(RESULT, {"environment": environment(), "images": IMAGES, "cases": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
