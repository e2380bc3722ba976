"""Stability of TAL on a small folder of images, by training settings: ``python -m bench.small_folder FOLDER``.

Writes 400 training and 300 validation images of Fashion-MNIST as PNG files under FOLDER, and trains on them by the
preset ``folder-tal`` (ResNet-18) at 28 pixels for 15 epochs of 6 steps, one thread, with each of ``SETTINGS`` and
three seeds; goes on where it was stopped. Writes bench/results/methods/small_folder.json and prints its table, which
docs/methods.md has.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.harness import environment, write_json
from bench.report.results import ROOT
from bench.report.text import table
from tal_fast.config.parse import parse_training
from tal_fast.data.builtin import fashion_mnist
from tal_fast.training.trainer import Trainer

RESULT = ROOT / "bench" / "results" / "methods" / "small_folder.json"
IMAGES = {"train": 400, "val": 300}
SEEDS = (0, 1, 2)
ALWAYS = (
    "--config folder-tal --data.image-size 28 --data.loader torch --data.workers 0 --epochs 15 --batch-size 64 "
    "--threads 1 --device cpu --logger none --progress none --resume auto"
)
PLAIN = "--optim.clip-norm null --optim.warmup-epochs 2"
PAPER = "--method.options.t-min 10 --method.options.t-max 100 --method.options.t-wrong 20"
FEW = "--method.options.t-min 5 --method.options.t-max 20 --method.options.t-wrong 10"
SETTINGS = {
    "T 10 to 100": f"{PLAIN} {PAPER} --method.options.warmup-epochs 1",
    "T 10 to 100, clip 1": f"{PLAIN} {PAPER} --method.options.warmup-epochs 1 --optim.clip-norm 1",
    "T 5 to 20": f"{PLAIN} {FEW} --method.options.warmup-epochs 1",
    "T 5 to 20, longer warm-ups": f"{PLAIN} {FEW} --method.options.warmup-epochs 4 --optim.warmup-epochs 4",
    "T 5 to 20, clip 1": f"{PLAIN} {FEW} --method.options.warmup-epochs 1 --optim.clip-norm 1",
    "cross-entropy": f"--method.name ce {PLAIN}",
    "cross-entropy, clip 1": f"--method.name ce {PLAIN} --optim.clip-norm 1",
}


def write_images(folder: Path) -> None:
    """Write the images that are missing, a fixed random choice, as SPLIT/CLASS/NUMBER.png."""
    for split, (pixels, labels) in fashion_mnist(None).items():
        for i in np.random.default_rng(0).permutation(len(labels))[: IMAGES[split]]:
            path = folder / split / f"class{labels[i]}" / f"{i:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                Image.fromarray(np.squeeze(pixels[i])).save(path)


def train(folder: Path, name: str, seed: int) -> dict[str, float]:
    """Train by a setting; the last row of metrics.csv."""
    output = folder / "runs" / f"{list(SETTINGS).index(name)}-seed{seed}"
    words = [*ALWAYS.split(), *SETTINGS[name].split(), "--seed", str(seed)]
    trainer = Trainer(parse_training([*words, "--data-dir", str(folder), "--output", str(output)])[0])
    trainer.fit()
    return trainer.history[-1]


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Accuracy, AURC by the method's own score, and share of the correct samples accepted, of each seed."""
    result = {name: [row[name] for row in rows] for name in ("val_accuracy", "val_loss", "aurc")}
    accepted = [row["accepted"] / row["train_accuracy"] for row in rows if "accepted" in row]
    return {**result, **({"accepted": accepted} if accepted else {})}


def lines(settings: dict[str, Any]) -> str:
    """Table in Markdown."""

    def cell(values: list[float], form: str) -> str:
        return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}" if values else "–"

    rows = [
        [
            name,
            cell([100 * x for x in found["val_accuracy"]], ".1f"),
            cell([1000 * x for x in found["aurc"]], ".0f"),
            cell(found["val_loss"], ".2f"),
            cell([100 * x for x in found.get("accepted", [])], ".0f"),
        ]
        for name, found in settings.items()
    ]
    return table(["setting", "accuracy, %", "AURC × 1000", "cross-entropy on val", "accepted of correct, %"], rows)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.small_folder", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="for the images and the runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    write_images(args.folder)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    for seed in SEEDS:  # every setting has a seed before the next one begins
        for name in SETTINGS:
            print(f"seed {seed}, {name}", flush=True)
            rows[name].append(train(args.folder, name, seed))
    settings = {name: summary(found) for name, found in rows.items()}
    made = {"images": IMAGES, "seeds": SEEDS, "always": ALWAYS, "options": SETTINGS, "environment": environment()}
    write_json(RESULT, {**made, "settings": settings})
    print(lines(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
