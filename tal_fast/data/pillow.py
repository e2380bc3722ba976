"""Source of image files decoded by Pillow in the workers of PyTorch's DataLoader."""

from __future__ import annotations

import gc
import signal
from collections.abc import Generator, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tal_fast.data.image_folder import ImageFiles, undecodable
from tal_fast.data.loader import ImageBatch, ImageFormat, Normalizer, prefetch, to_device
from tal_fast.data.sampler import Batch, Plan


def _fork_workers(loader: DataLoader) -> Iterator:
    """Start the workers without any garbage of this process.

    A worker that collects the garbage of a DALI pipeline would wait forever for threads that only exist here.
    """
    if loader.num_workers == 0:
        return iter(loader)
    gc.collect()
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()


_Decoded = tuple[Tensor, Tensor, dict[int, str]]
"""Pixels (B, S, S, C) uint8, indices (B,), and row -> reason for files that do not decode."""


class _BatchDataset(Dataset):
    """Dataset whose items are decoded batches."""

    def __init__(self, files: ImageFiles, channels: int, interpolation: str) -> None:
        self._files = files
        self._channels = channels
        self._filter = Image.Resampling[interpolation.upper()]

    def __getitem__(self, request: tuple[Batch, int]) -> _Decoded:
        batch, size = request
        pixels = np.empty((len(batch.indices), size, size, self._channels), np.uint8)
        unreadable = {}
        for row, index in enumerate(batch.indices):
            path, stored = self._files.paths[index], self._files.sizes[index]
            try:
                pixels[row] = self._read(path, stored, batch.boxes[row], bool(batch.mirror[row]), size)
            except Exception:
                problem = undecodable(path, stored)
                if problem is None:
                    raise
                unreadable[row] = problem
                pixels[row] = 0
        return torch.from_numpy(pixels), torch.from_numpy(batch.indices), unreadable

    def _read(self, path: str, stored: np.ndarray, box: np.ndarray, mirror: bool, size: int) -> np.ndarray:
        top, left, height, width = (int(v) for v in box)
        with Image.open(path) as file:
            if (file.height, file.width) != tuple(stored):
                raise ValueError(f"{path} has changed its size")
            image = file.convert("RGB" if self._channels == 3 else "L")
        image = image.crop((left, top, left + width, top + height)).resize((size, size), self._filter)
        if mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image).reshape(size, size, self._channels)


class _BatchSampler(Sampler):
    """Sampler of the batches of one epoch."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.epoch, self.start_step, self.image_size = 0, 0, 1

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        for batch in self._plan.batches(self.epoch, self.start_step):
            yield batch, self.image_size

    def __len__(self) -> int:
        return len(self._plan)


def _ignore_first_signal(worker: int) -> None:
    """Keep a worker alive when Ctrl-C or torchrun's SIGTERM reaches it, so that training can finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class TorchSource:
    """Source of image files decoded by worker processes.

    Args:
        plan: order and crops of the images.
        files: images of the split.
        form: format of the batches.
        workers: number of processes; 0 decodes in this one.
    """

    def __init__(self, plan: Plan, files: ImageFiles, form: ImageFormat, workers: int) -> None:
        self._device = form.device
        self._sampler = _BatchSampler(plan)
        self._dataset = _BatchDataset(files, form.channels, form.interpolation)
        self._normalize = Normalizer(form)
        self._workers = min(workers, len(plan))
        self._loader: DataLoader | None = None

    def steps(self, epoch: int, start_step: int, image_size: int) -> Generator[ImageBatch, None, None]:
        sampler = self._sampler
        sampler.epoch, sampler.start_step, sampler.image_size = epoch, start_step, image_size
        if self._loader is None:
            self._loader = self._start()
            batches = _fork_workers(self._loader)
        else:
            batches = iter(self._loader)
        yield from prefetch(batches, self._make, lambda step: [step.images], self._device)

    def close(self) -> None:
        self._loader = None

    def _make(self, decoded: _Decoded) -> ImageBatch:
        pixels, indices, unreadable = decoded
        # Normalized on the device, which copies bytes instead of floats.
        return ImageBatch(self._normalize(to_device(pixels, self._device)), indices, unreadable)

    def _start(self) -> DataLoader:
        return DataLoader(
            self._dataset,
            batch_size=None,
            sampler=self._sampler,
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_ignore_first_signal,
            # The seed of the workers is drawn from this generator, not from the global one.
            generator=torch.Generator().manual_seed(0),
        )
