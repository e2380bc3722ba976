"""Image files through Pillow and PyTorch's DataLoader."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tal_fast.data.files import ImageFiles, UnreadableImage, first_unreadable
from tal_fast.data.loaders import ImageFormat, normalize
from tal_fast.data.plan import Batch, Plan


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


class _Reader(Dataset):
    """One item is one batch: (B, S, S, C) uint8 and (B,) indices; or a sentence saying which file does not decode."""

    def __init__(self, files: ImageFiles, image_size: int, channels: int) -> None:
        self._files = files
        self._size = (image_size, image_size)
        self._channels = channels

    def __getitem__(self, batch: Batch) -> tuple[Tensor, Tensor] | str:
        pixels = np.empty((len(batch.indices), *self._size, self._channels), np.uint8)
        for row, index in enumerate(batch.indices):
            path = self._files.paths[index]
            try:
                pixels[row] = self._read(path, batch.boxes[row], bool(batch.mirror[row]))
            except Exception:
                # Not raised here: from a worker process it would arrive wrapped in that process's traceback.
                problem = first_unreadable([path])
                if problem is None:
                    raise
                return problem
        return torch.from_numpy(pixels), torch.from_numpy(batch.indices)

    def _read(self, path: str, box: np.ndarray, mirror: bool) -> np.ndarray:
        top, left, height, width = (int(v) for v in box)
        with Image.open(path) as file:
            image = file.convert("RGB" if self._channels == 3 else "L")
        image = image.crop((left, top, left + width, top + height)).resize(self._size, Image.Resampling.BILINEAR)
        if mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image).reshape(*self._size, self._channels)


class _Steps(Sampler):
    """What the DataLoader asks its dataset for: the steps of the epoch set last."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.epoch, self.start_step = 0, 0

    def __iter__(self) -> Iterator[Batch]:
        return self._plan.batches(self.epoch, self.start_step)

    def __len__(self) -> int:
        return len(self._plan)


def _outlive_a_signal(worker: int) -> None:
    """Let the training process finish its step: Ctrl-C and torchrun's SIGTERM reach its workers as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class TorchSource:
    """Image files, decoded by worker processes; see ``tal_fast.data.loaders.Source``.

    Args:
        plan: the steps to make.
        files: the split.
        form: of the batches.
        workers: processes; 0 decodes in this one.
    """

    def __init__(self, plan: Plan, files: ImageFiles, form: ImageFormat, workers: int) -> None:
        self._form = form
        self._steps = _Steps(plan)
        self._reader = _Reader(files, form.image_size, form.channels)
        self._workers = min(workers, len(plan))
        self._loader: DataLoader | None = None

    def images(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``Source``."""
        form = self._form
        self._steps.epoch, self._steps.start_step = epoch, start_step
        if self._loader is None:
            self._loader = self._start()
            batches = _fork_workers(self._loader)
        else:
            batches = iter(self._loader)
        problem = None
        for item in batches:
            if isinstance(item, str):
                problem = item
                break
            pixels, indices = item
            # On the device, so that bytes travel to it, not floats.
            yield normalize(pixels.to(form.device, non_blocking=True), form.mean, form.std), indices
        if problem is not None:
            del batches
            self._loader = None  # end the workers now: collected as garbage, they would be waited for in vain
            raise UnreadableImage(problem)

    def _start(self) -> DataLoader:
        return DataLoader(
            self._reader,
            batch_size=None,
            sampler=self._steps,
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            pin_memory=self._form.device.type == "cuda",
            worker_init_fn=_outlive_a_signal,
            # The DataLoader draws a seed for its workers; drawn from here, it leaves the global generator alone.
            generator=torch.Generator().manual_seed(0),
        )
