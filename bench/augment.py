"""CPU time of the augmentations for each image, on one thread: ``python -m bench.augment``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_sample_images

from tal_fast.config.schema import DataConfig
from tal_fast.data.augment import PixelAugmentation
from tal_fast.data.erasing import Eraser
from tal_fast.data.sampler import Plan

OPTIONS: dict[str, dict[str, Any]] = {
    "data.augment randaugment": {"augment": "randaugment"},
    "data.augment trivialaugment": {"augment": "trivialaugment"},
    "data.color_jitter [0.4,0.4,0.4,0.1]": {"color_jitter": (0.4, 0.4, 0.4, 0.1)},
}
IMAGES = 256


def milliseconds(run: Callable[[int], Any]) -> float:
    """Median over five rounds of the CPU time of ``run`` for each of ``IMAGES`` images."""
    seconds = []
    for number in range(5):
        start = time.process_time()
        run(number)
        seconds.append(time.process_time() - start)
    return 1e3 * float(np.median(seconds)) / IMAGES


def main() -> None:
    torch.set_num_threads(1)
    photo = np.asarray(load_sample_images().images[0])
    for side, channels, kind in ((224, 3, "RGB"), (28, 1, "grey")):
        pixels = torch.from_numpy(photo[:side, :side, :channels].copy()).expand(IMAGES, -1, -1, -1).contiguous()
        for title, options in OPTIONS.items():
            augment = PixelAugmentation(DataConfig(channels=channels, mean=None, std=None, **options))
            draws = np.random.default_rng(0).random((5, IMAGES, augment.draws), np.float32)
            found = milliseconds(lambda number, a=augment, p=pixels, d=draws: a.batch(p, d[number]))
            print(f"{title}, {side} pixels, {kind}: {found:.3f} ms")
        eraser = Eraser(Plan(np.full((IMAGES, 2), side, np.int32), IMAGES, training=True), 0.25, torch.device("cpu"))
        images = torch.randn(IMAGES, channels, side, side)
        found = milliseconds(lambda number, e=eraser, i=images: e(i, np.arange(IMAGES), number, 0))
        print(f"data.erase 0.25, {side} pixels, {kind}: {found:.3f} ms")


if __name__ == "__main__":
    main()
