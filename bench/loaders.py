"""Throughput of the data loaders on JPEGs of ImageNet's size: ``python -m bench.loaders``.

Training batches of 224 x 224 with random crops and mirroring, normalised float32, with the same number of workers: this
package's DALI and torch loaders on a folder and on shards of it, the pipeline DALI's documentation builds on its own
file reader, and images in memory. They take turns, an epoch without the clock before each, which empties what was read
ahead while others ran.

The images are cut out of scikit-learn's two sample photos, at random, and saved with quality 90.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.harness import environment, write_json
from tal_fast.config.schema import DataConfig
from tal_fast.data import dali as dali_loader
from tal_fast.data.build import build_data
from tal_fast.data.pack import pack

SIZE = 224


def make_images(root: Path, count: int) -> None:
    """Write JPEGs of two classes into ``train/`` and ``val/``; sides of 333 to 500 pixels, most of them 500 x 375."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    random = np.random.default_rng(0)
    for i in range(count + 2):
        photo, share = photos[i % 2], random.uniform(0.6, 1.0)
        width, height = ((500, 375), (500, 375), (375, 500), (500, 333))[i // 2 % 4]
        cut = int(photo.width * share), int(photo.height * share)
        left, top = (int(random.integers(whole - part + 1)) for whole, part in zip(photo.size, cut, strict=True))
        folder = root / ("train" if i < count else "val") / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        image = photo.crop((left, top, left + cut[0], top + cut[1])).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:05}.jpg", quality=90)


def own_loader(batch_size: int, **options: Any) -> Callable[[int], Iterator[Tensor]]:
    """Batches of an epoch by a loader of this package."""
    loader = build_data(DataConfig(image_size=SIZE, **options)).loader("train", batch_size=batch_size)

    def images(epoch: int) -> Iterator[Tensor]:
        loader.set_epoch(epoch)
        return (images for images, _, _ in loader)

    return images


def dali_reader(root: Path, batch_size: int, workers: int) -> Callable[[int], Iterator[Tensor]]:
    """Batches of an epoch by DALI's file reader and its fused decoding of random crops."""
    dali: Any = import_module("nvidia.dali")
    plugin: Any = import_module("nvidia.dali.plugin.pytorch")
    fn, types = dali.fn, dali.types
    mean, std = DataConfig().normalization()

    @dali.pipeline_def(batch_size=batch_size, num_threads=workers, device_id=None, seed=0)
    def pipeline() -> Any:
        jpegs, labels = fn.readers.file(file_root=str(root / "train"), random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(
            jpegs, device="cpu", output_type=types.RGB, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(),
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * m for m in mean],
            std=[255 * s for s in std],
        ), labels

    iterator = plugin.DALIGenericIterator(
        pipeline(),
        ["images", "labels"],
        reader_name="reader",
        auto_reset=True,
        last_batch_policy=plugin.LastBatchPolicy.DROP,
    )

    def images(epoch: int) -> Iterator[Tensor]:
        return (outputs["images"] for (outputs,) in iterator)

    return images


def check_same(root: Path) -> dict[str, float]:
    """Difference between the two loaders' first images (of 255); exits when it is large."""
    first = {}
    for name in ("dali", "torch"):
        options: dict[str, Any] = {"mean": [0.0] * 3, "std": [1 / 255] * 3, "loader": name, "image_size": SIZE}
        loader = build_data(DataConfig(root=str(root), workers=0, **options)).loader("train", batch_size=16)
        first[name] = next(iter(loader))[0]
    error = (first["dali"] - first["torch"]).abs()
    if error.mean() > 1:
        raise SystemExit(f"the loaders differ by {float(error.mean()):.2f} of 255 on average; not timed")
    return {"mean": float(error.mean()), "max": float(error.max())}


def measure(contenders: dict[str, Callable[[int], Iterator[Tensor]]], rounds: int, epochs: int) -> dict[str, Any]:
    """Images per second of each loader, over turns of ``epochs`` epochs."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    epoch = dict.fromkeys(contenders, 0)
    for _ in range(rounds):
        for name, images in contenders.items():
            count, start = 0, 0.0
            for turn in range(epochs + 1):
                if turn == 1:
                    start = time.perf_counter()
                for batch in images(epoch[name]):
                    count += len(batch) if turn else 0
                epoch[name] += 1
            rates[name].append(count / (time.perf_counter() - start))
    results = {}
    for name, values in rates.items():
        low, middle, high = np.percentile(values, [20, 50, 80])
        results[name] = {"p20": float(low), "p50": float(middle), "p80": float(high), "turns": len(values)}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few images, to see that it runs")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    args = parser.parse_args()
    if args.smoke:
        args.images, args.batch, args.workers, args.rounds = 16, 4, 1, 1
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "what": f"images a second, training crops of {SIZE} x {SIZE} out of JPEGs of about 500 x 375 with quality 90",
        "environment": environment(),
        **{key: getattr(args, key) for key in ("images", "batch", "workers")},
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_images(root, args.images)
        files: dict[str, Any] = {"root": str(root), "workers": args.workers}
        pack(root, root / "shards", shard_mb=8)
        shards = {**files, "dataset": "webdataset", "root": str(root / "shards")}
        contenders = {
            "synthetic": own_loader(args.batch, dataset="synthetic", crop_area=None, synthetic_images=args.images),
            "torch": own_loader(args.batch, loader="torch", **files),
            "torch, shards": own_loader(args.batch, loader="torch", **shards),
        }
        if dali_loader.available():
            result["environment"]["dali"] = import_module("nvidia.dali").__version__
            result["difference_of_255"] = check_same(root)
            contenders["dali"] = own_loader(args.batch, loader="dali", **files)
            contenders["dali, shards"] = own_loader(args.batch, loader="dali", **shards)
            contenders["dali, its own reader"] = dali_reader(root, args.batch, args.workers)
        else:
            print("DALI is not installed: the torch loader alone")
        result["results"] = measure(contenders, args.rounds, 1 if args.smoke else 2)
    for name, row in result["results"].items():
        print(f"{name:22}  p50 {row['p50']:7.0f} images/s  (p20 {row['p20']:.0f}, p80 {row['p80']:.0f})")
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
