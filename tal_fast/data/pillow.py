"""Source of image files decoded by Pillow in the workers of PyTorch's DataLoader."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator
from functools import partial
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torch.utils.data._utils import signal_handling

from tal_fast.data.augment import PixelAugmentation
from tal_fast.data.headers import size_of
from tal_fast.data.image_folder import ImageFiles, undecodable
from tal_fast.data.loader import ImageBatch, ImageFormat, Normalizer, prefetch, to_device
from tal_fast.data.sampler import Batch, Plan
from tal_fast.data.waiting import CallingThread, LoaderFailed
from tal_fast.utils.process import no_garbage


def _fork_workers(loader: DataLoader) -> Any:
    """Start the processes of a loader; returns its iterator."""
    if loader.num_workers == 0:
        return iter(loader)
    others = set(multiprocessing.active_children())
    try:
        with no_garbage():
            batches = iter(loader)
    except OSError as error:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
            worker.join()
        raise LoaderFailed(
            f"the {loader.num_workers} processes of data.workers cannot be started ({error.strerror}); lower it"
        ) from error
    # PyTorch would raise an error wherever the process is when a worker is killed; the next call finds it out anyway.
    signal_handling._remove_worker_pids(id(batches))
    signal_handling._set_worker_pids(id(batches), ())
    return batches


def _end_workers(workers: list[Any]) -> None:
    """Kill workers: they only read, and a stopped one sees no other signal."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


_Decoded = tuple[Tensor, Tensor, dict[int, str]]
"""Pixels (B, S, S, C) uint8, indices (B,), and row -> reason for files that do not decode."""


class _BatchDataset(Dataset):
    """Dataset whose items are decoded batches."""

    def __init__(self, files: ImageFiles, channels: int, interpolation: str, augment: PixelAugmentation | None) -> None:
        self._files = files
        self._augment = augment
        self._channels = channels
        self._filter = Image.Resampling[interpolation.upper()]

    def __getitem__(self, request: tuple[Batch, int]) -> _Decoded | str:
        batch, size = request
        pixels = np.empty((len(batch.indices), size, size, self._channels), np.uint8)
        unreadable = {}
        for row, index in enumerate(batch.indices):
            try:
                image = self._read(index, batch.boxes[row], bool(batch.mirror[row]), size)
                if self._augment is not None and batch.draws is not None:
                    image = self._augment(image, batch.draws[row])
                pixels[row] = np.asarray(image).reshape(size, size, self._channels)
            except Exception:
                problem = undecodable(self._files, index)
                if problem is None:
                    raise
                unreadable[row] = problem
                pixels[row] = 0
        images = torch.from_numpy(pixels)
        if get_worker_info() is not None:
            # The queue would do this in a thread, whose failure nobody would notice.
            try:
                images.share_memory_()
            except RuntimeError as error:
                return f"a process of the loader has no shared memory for {pixels.nbytes / 2**20:.1f} MiB ({error})"
        return images, torch.from_numpy(batch.indices), unreadable

    def _read(self, index: int, box: np.ndarray, mirror: bool, size: int) -> Image.Image:
        with Image.open(self._files.open(index)) as file:
            upright = self._files.upright
            if size_of(file, upright) != tuple(self._files.sizes[index]):
                raise ValueError(f"{self._files.paths[index]} has changed its size")
            image = resized_crop(
                ImageOps.exif_transpose(file) if upright else file, self._channels, box, size, self._filter
            )
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image


def resized_crop(
    image: Image.Image, channels: int, box: np.ndarray, size: int, filter: Image.Resampling
) -> Image.Image:
    """RGB or grayscale image of ``size`` x ``size`` pixels from a box (top, left, height, width) of an image."""
    top, left, height, width = (int(v) for v in box)
    image = image.convert("RGB" if channels == 3 else "L")
    return image.crop((left, top, left + width, top + height)).resize((size, size), filter)


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
    """Source of image files decoded by ``workers`` processes; with 0 in this one.

    ``plan`` has their order and crops, ``form`` is the format of the batches, and a step is waited for ``timeout``
    seconds. ``augment`` changes the images of a training plan.
    """

    def __init__(
        self, plan: Plan, files: ImageFiles, form: ImageFormat, workers: int, timeout: float,
        augment: PixelAugmentation | None = None,
    ) -> None:  # fmt: skip
        self._device = form.device
        self._sampler = _BatchSampler(plan)
        self._dataset = _BatchDataset(files, form.channels, form.interpolation, augment)
        self._normalize = Normalizer(form)
        self._workers = min(workers, len(plan))
        self._timeout = timeout
        self._loader: DataLoader | None = None
        self._running: Any = None  # the loader's only iterator, which has the processes
        self._end: Finalize | None = None  # ends the processes
        self._thread: CallingThread | None = None

    def steps(self, epoch: int, start_step: int, image_size: int) -> Generator[ImageBatch, None, None]:
        sampler = self._sampler
        sampler.epoch, sampler.start_step, sampler.image_size = epoch, start_step, image_size
        if self._loader is None:
            self._loader, self._thread = self._start(), CallingThread(self._timeout)
            self._running = running = _fork_workers(self._loader)
            if self._workers > 0:
                # Called at exit before multiprocessing sends each process one SIGTERM, which these ignore, and waits
                # for it; and before a garbage collection that has closed the queues through which PyTorch ends them.
                self._end = Finalize(running, _end_workers, (running._workers,), exitpriority=100)
        else:
            self._running = self._call(partial(iter, self._loader))
        batches = iter(partial(self._call, partial(next, self._running, None)), None)
        yield from prefetch(batches, self._make, self._device)

    def close(self) -> None:
        if self._end is not None:
            self._running._shutdown_workers()
            self._end()  # those that have not ended
        self._loader = self._running = self._thread = self._end = None

    def _call(self, function: Callable[[], Any]) -> Any:
        """Result of a function that waits for the processes; one sentence if they end or do not deliver."""
        assert self._thread is not None
        try:
            result = self._thread.call(function)
        except LoaderFailed:
            if self._end is not None:
                self._end()
            raise
        except (RuntimeError, OSError, EOFError) as error:
            if self._workers == 0 or str(error).startswith("Caught "):  # an error in a process, with its traceback
                raise
            raise LoaderFailed(
                f"a process of the loader failed ({error}); if memory has run out, lower data.workers"
            ) from error
        if isinstance(result, str):
            raise LoaderFailed(f"{result}; enlarge /dev/shm (docker run --shm-size), or set data.workers to 0")
        return result

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
