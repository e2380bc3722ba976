"""Image files through Pillow and PyTorch's DataLoader."""

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
from tal_fast.data.loader import ImageFormat, Normalizer, Step, prefetch, to_device
from tal_fast.data.sampler import Batch, Plan


def _fork_workers(loader: DataLoader) -> Iterator:
    """``iter(loader)``, which forks the workers, with nothing left for their garbage collectors.

    A DALI pipeline that waits in this process as garbage would be collected in a worker, whose copy of it has no
    threads to shut down: the worker would wait for them for ever.
    """
    gc.collect()
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()


_Read = tuple[Tensor, Tensor, dict[int, str]]
"""(B, S, S, C) uint8, (B,) indices, and row -> sentence where a file does not decode."""


class _Reader(Dataset):
    """One item is one batch at one size of images."""

    def __init__(self, files: ImageFiles, channels: int, interpolation: str) -> None:
        self._files = files
        self._channels = channels
        self._filter = Image.Resampling[interpolation.upper()]

    def __getitem__(self, request: tuple[Batch, int]) -> _Read:
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
                raise ValueError(f"{path} is of another size than before")
            image = file.convert("RGB" if self._channels == 3 else "L")
        image = image.crop((left, top, left + width, top + height)).resize((size, size), self._filter)
        if mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image).reshape(size, size, self._channels)


class _Requests(Sampler):
    """What the DataLoader asks its dataset for: the steps of the epoch set last."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.epoch, self.start_step, self.image_size = 0, 0, 1

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        for batch in self._plan.batches(self.epoch, self.start_step):
            yield batch, self.image_size

    def __len__(self) -> int:
        return len(self._plan)


def _outlive_a_signal(worker: int) -> None:
    """Let the training process finish its step: Ctrl-C and torchrun's SIGTERM reach its workers as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class TorchSource:
    """Image files, decoded by worker processes; see ``tal_fast.data.loader.Source``.

    Args:
        plan: the steps to make.
        files: the split.
        form: of the batches.
        workers: processes; 0 decodes in this one.
    """

    def __init__(self, plan: Plan, files: ImageFiles, form: ImageFormat, workers: int) -> None:
        self._device = form.device
        self._requests = _Requests(plan)
        self._reader = _Reader(files, form.channels, form.interpolation)
        self._normalize = Normalizer(form)
        self._workers = min(workers, len(plan))
        self._loader: DataLoader | None = None

    def steps(self, epoch: int, start_step: int, image_size: int) -> Generator[Step, None, None]:
        """See ``Source``."""
        requests = self._requests
        requests.epoch, requests.start_step, requests.image_size = epoch, start_step, image_size
        if self._loader is None:
            self._loader = self._start()
            batches = _fork_workers(self._loader)
        else:
            batches = iter(self._loader)
        yield from prefetch(batches, self._make, lambda step: [step.images], self._device)

    def close(self) -> None:
        """See ``Source``."""
        self._loader = None

    def _make(self, read: _Read) -> Step:
        pixels, indices, unreadable = read
        # Normalised on the device, so that bytes travel to it, not floats.
        return Step(self._normalize(to_device(pixels, self._device)), indices, unreadable)

    def _start(self) -> DataLoader:
        return DataLoader(
            self._reader,
            batch_size=None,
            sampler=self._requests,
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_outlive_a_signal,
            # The DataLoader draws a seed for its workers; drawn from here, it leaves the global generator alone.
            generator=torch.Generator().manual_seed(0),
        )
