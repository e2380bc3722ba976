"""Cost of ``tal-fast predict``: ``python -m bench.predict --out bench/results/predict_cpu.json``.

Throughput, in pairs that take turns: predictions of files beside bare decoding and forward passes, PyTorch's DataLoader
over the same files with as many workers, the same crop and network, and nothing else; small PNGs through the digits'
ResNet-8, JPEGs of ImageNet's size through a ResNet-18. Exports in ONNX Runtime beside eager PyTorch, forward passes
alone. Memory: resident MiB of a process after every tenth of many predictions of small images.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from bench.harness import environment, write_json
from bench.loaders import make_images
from tal_fast.config.schema import Config
from tal_fast.evaluation.classifier import Classifier
from tal_fast.evaluation.export import export_run
from tal_fast.models import build_model
from tal_fast.runs import checkpoint
from tal_fast.runs.load import load_run
from tests.helpers.checkpoints import content

CASES = {
    "digits": {"model": {"name": "cifar_resnet8"}, "data": {"image_size": 8, "channels": 1, "crop_fraction": 1.0}},
    "resnet18": {"model": {"name": "resnet18"}, "data": {"image_size": 224}},
}


def make_case(folder: Path, name: str, images: int) -> tuple[Path, list[str]]:
    """Run with random weights, and the paths of its images."""
    data = folder / "data"
    if name == "digits":
        pixels = np.random.default_rng(0).integers(256, size=(images, 8, 8), dtype=np.uint8)
        for i, image in enumerate(pixels):
            path = data / ("val" if i < 64 else "train") / f"class{i % 2}" / f"{i:06}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    else:
        make_images(data, images)
    case = CASES[name]
    config = Config.from_dict({
        "data": {"dataset": "folder", "root": str(data), "loader": "torch", "workers": 2, **case["data"]},
        "model": case["model"], "method": {"name": "tal"},
    })  # fmt: skip
    size, channels = case["data"]["image_size"], config.data.channels
    torch.manual_seed(0)
    model = build_model(config.model, 2, channels, size)
    shape = {"class_names": ["class0", "class1"], "channels": channels, "image_size": size, "train_images": images}
    state = content(config=config.to_dict(), model=model.state_dict(), shape=shape, history=[])
    checkpoint.save(folder / "run" / "checkpoints" / "best.pt", state)
    return folder / "run", sorted(map(str, (data / "train").rglob("*.*")))


class Files(Dataset):
    """Decoded files, as a user's own script reads them."""

    def __init__(self, paths: list[str], size: int, channels: int, fraction: float) -> None:
        self.paths, self.size, self.mode, self.fraction = paths, size, "RGB" if channels == 3 else "L", fraction

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as file:
            image = file.convert(self.mode)
        side = round(min(image.size) * self.fraction)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((self.size, self.size), 2)
        return torch.from_numpy(np.array(image).reshape(self.size, self.size, -1)).permute(2, 0, 1)


def bare(run: Path, paths: list[str], batch_size: int, workers: int) -> Callable[[], None]:
    """Decoding and forward passes without anything else."""
    opened = load_run(run)
    data = opened.config.data
    mean, std = (torch.tensor(v)[:, None, None] for v in data.normalization())
    loader = DataLoader(
        Files(paths, opened.image_size, data.channels, data.central_crop), batch_size, num_workers=workers
    )

    def work() -> None:
        with torch.inference_mode():
            for pixels in loader:
                opened.model(pixels.float().div_(255).sub_(mean).div_(std))[0].argmax(1)

    return work


def seconds(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of functions that take turns, once each without the clock."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def throughput(name: str, images: int, repeats: int, workers: int) -> dict[str, Any]:
    """Images per second of a case."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run, paths = make_case(folder, name, images)
        export_run(run, folder / "onnx", format="onnx")
        batch_size = 64
        eager = Classifier(run, device="cpu", workers=workers, batch_size=batch_size)
        exported = Classifier(folder / "onnx", workers=workers, batch_size=batch_size)
        size = eager.preprocessing.image_size
        batch = torch.randn(batch_size, eager.preprocessing.channels, size, size)
        files = seconds({
            "bare": bare(run, paths, batch_size, workers), "predict": lambda: eager(paths),
            "predict_onnx": lambda: exported(paths),
        }, repeats)  # fmt: skip
        forward = seconds(
            {"eager": lambda: eager._run_torch(batch), "onnxruntime": lambda: exported._run_onnx(batch)}, 4 * repeats
        )
    return {
        "case": name, "images": len(paths), "batch_size": batch_size, "workers": workers,
        "images_per_s": {k: len(paths) / v for k, v in files.items()},
        "predict_over_bare": files["bare"] / files["predict"],
        "forward_images_per_s": {k: batch_size / v for k, v in forward.items()},
    }  # fmt: skip


def resident() -> float:
    """Resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(images: int, workers: int) -> dict[str, Any]:
    """Resident memory after each tenth of ``images`` predictions of 1,000 small files, over and over."""
    with tempfile.TemporaryDirectory() as temporary:
        run, paths = make_case(Path(temporary), "digits", 1064)
        classifier = Classifier(run, device="cpu", workers=workers)
        endless: Iterable[str] = itertools.islice(itertools.cycle(paths), images)
        found: list[float] = []
        predictions: Iterator[Any] = classifier.stream(endless)
        for count, _ in enumerate(predictions, 1):
            if count % (images // 10) == 0:
                found.append(round(resident(), 1))
    return {"images": images, "resident_mib": found}


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput and memory of predictions.")
    parser.add_argument("--images", type=int, default=1000, help="files of each case; ten times as many digits")
    parser.add_argument("--memory-images", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = {
        "environment": environment(),
        "throughput": [
            throughput("digits", 10 * args.images, args.repeats, args.workers),
            throughput("resnet18", args.images, args.repeats, args.workers),
        ],
        "memory": memory(args.memory_images, args.workers),
    }
    for part in ("throughput", "memory"):
        print(result[part])
    if args.out is not None:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
