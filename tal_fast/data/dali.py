"""Source of image files decoded by NVIDIA DALI, on the CPU or the GPU.

DALI's own file reader would choose order, shards and padding. Instead its external source passes paths, crops and
mirroring of the plan one step at a time. So the images are those of the PyTorch loader, no image is repeated to fill a
batch, and reading can start at any step, also after a file that does not decode has ended the pipeline.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image

from tal_fast.data.cache import cache_dir, make_folder_once
from tal_fast.data.image_folder import ImageFiles, undecodable
from tal_fast.data.loader import ImageBatch, ImageFormat
from tal_fast.data.packed import PackedImages
from tal_fast.data.sampler import Batch, Plan
from tal_fast.data.waiting import CallingThread, LoaderFailed

PREFETCH = 2
"""Number of steps that are prepared in advance."""


def available() -> bool:
    """Whether DALI can be imported."""
    try:
        import_module("nvidia.dali")
    except ImportError:
        return False
    return True


class DaliSource:
    """Source of image files decoded, cropped, resized and normalized by DALI in ``workers`` threads.

    The other arguments are those of ``tal_fast.data.pillow.TorchSource``.
    """

    def __init__(self, plan: Plan, files: ImageFiles, form: ImageFormat, workers: int, timeout: float) -> None:
        self._plan, self._files, self._form = plan, files, form
        self._workers, self._timeout = max(1, workers), timeout
        self._thread: CallingThread | None = None
        self._prober = _Prober(form, isinstance(files, PackedImages))
        self._requests = _Requests(files, plan, self._prober)
        self._ready: tuple[int, Any] | None = None  # image size and iterator of a finished epoch

    def steps(self, epoch: int, start_step: int, image_size: int) -> Generator[ImageBatch, None, None]:
        requests, step = self._requests, start_step
        while step < len(self._plan):
            requests.epoch, requests.start_step = epoch, step
            iterator = None
            try:
                iterator = self._iterator(image_size)
                while (outputs := self._next(iterator)) is not None:
                    batch, unreadable = requests.pending.popleft()
                    yield ImageBatch(outputs["images"], torch.from_numpy(batch.indices), unreadable)
                    step += 1
            except RuntimeError:  # DALI ends the pipeline without naming the file
                iterator = None
                if not self._find_suspects([batch for batch, _ in requests.pending]):
                    raise
                continue
            # Reused only after a finished epoch: otherwise the pipeline still holds the next steps.
            self._ready = image_size, iterator

    def _iterator(self, image_size: int) -> Any:
        ready, self._ready = self._ready, None
        if ready is None or ready[0] != image_size:
            return self._build(image_size)  # takes some 40 ms
        ready[1].reset()  # requests the first steps at once
        return ready[1]

    def _next(self, iterator: Any) -> dict[str, Any] | None:
        """Next step of an iterator; None at the end."""
        device = self._form.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

        def call() -> dict[str, Any] | None:
            with torch.cuda.stream(stream):
                return next(iterator, (None,))[0]

        self._thread = self._thread or CallingThread(self._timeout)
        try:
            return self._thread.call(call)
        except LoaderFailed:
            self._thread = None
            for pipeline in (*iterator._pipes, self._prober.pipeline):
                _abandon(pipeline)
            self._prober.pipeline = None
            raise

    def close(self) -> None:
        self._ready = self._thread = self._prober.pipeline = None

    def _find_suspects(self, pending: list[Batch]) -> bool:
        """Find the files that do not decode in the first step that has any; returns whether there are some."""
        for find in (self._rejected_by_pillow, self._rejected_by_dali):  # Pillow is faster and gives the reason
            for batch in pending:
                found = find(batch)
                self._requests.suspects.update(found)
                if found:
                    return True
        return False

    def _rejected_by_pillow(self, batch: Batch) -> dict[int, str]:
        with ThreadPoolExecutor(self._workers) as pool:
            problems = list(pool.map(partial(undecodable, self._files), batch.indices))
        suspects, error = self._requests.suspects, self._prober.error
        return {
            int(i): problem
            for i, box, problem in zip(batch.indices, batch.boxes, problems, strict=True)
            if problem is not None and int(i) not in suspects and error(_request(self._files, i), box)
        }

    def _rejected_by_dali(self, batch: Batch) -> dict[int, str]:
        found = {}
        for i, box in zip(batch.indices, batch.boxes, strict=True):
            file = _request(self._files, i)
            if int(i) not in self._requests.suspects and (reason := self._prober.error(file, box)):
                found[int(i)] = f"{self._files.paths[i]} cannot be decoded (by DALI: {reason})"
        return found

    def _build(self, image_size: int) -> Any:
        # Any: DALI creates its operators at import, unseen by type checkers.
        dali: Any = import_module("nvidia.dali")
        fn, types = dali.fn, dali.types
        torch_plugin: Any = import_module("nvidia.dali.plugin.pytorch")
        form = self._form

        @dali.pipeline_def(
            batch_size=self._plan.batch_size,
            num_threads=self._workers,
            device_id=_device_id(form),
            prefetch_queue_depth=PREFETCH,
        )
        def pipeline() -> Any:
            files, corners, sizes, mirror = fn.external_source(
                source=self._requests,
                num_outputs=4,
                batch=True,
                cycle="raise",
                dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
                ndim=[1, 1, 1, 0],
            )
            images = fn.resize(
                _decode(dali, form, self._prober.packed, files, corners, sizes),
                resize_x=image_size,
                resize_y=image_size,
                interp_type={"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[form.interpolation],
                antialias=True,
            )
            return fn.crop_mirror_normalize(
                images,
                mirror=mirror,
                dtype=types.FLOAT,
                output_layout="CHW",
                mean=[255 * m for m in form.mean],
                std=[255 * s for s in form.std],
            )

        return torch_plugin.DALIGenericIterator(
            pipeline(),
            ["images"],
            last_batch_policy=torch_plugin.LastBatchPolicy.PARTIAL,
            auto_reset=False,
            prepare_first_batch=False,
        )


class _Prober:
    """Pipeline that decodes one file at a time, to find the one that ended another pipeline."""

    def __init__(self, form: ImageFormat, packed: bool) -> None:
        self._form, self.packed = form, packed
        self._request: list[Any] = []
        self.pipeline: Any = None  # the next file starts a new one

    def error(self, file: np.ndarray, box: np.ndarray) -> str | None:
        """Reason that DALI cannot decode a box of a file, given as by ``_request``; None if it can."""
        self._request[:] = [[file], [box[:2]], [box[2:]]]
        try:
            self.pipeline = self.pipeline or self._build()
            self.pipeline.run()
        except RuntimeError as error:
            self.pipeline = None
            return _error_line(error)
        return None

    def _build(self) -> Any:
        dali: Any = import_module("nvidia.dali")
        form, request = self._form, self._request

        @dali.pipeline_def(
            batch_size=1,
            num_threads=1,
            device_id=_device_id(form),
            prefetch_queue_depth=1,
            exec_async=False,
            exec_pipelined=False,
        )
        def pipeline() -> Any:
            files, corners, sizes = dali.fn.external_source(source=lambda: request, num_outputs=3, batch=True)
            return _decode(dali, form, self.packed, files, corners, sizes)

        return pipeline()


class _Requests:
    """External source of a pipeline: the steps of an epoch."""

    def __init__(self, files: ImageFiles, plan: Plan, prober: _Prober) -> None:
        self._files = files
        self._plan = plan
        self._prober = prober
        self._black: np.ndarray | None = None
        self.epoch, self.start_step = 0, 0  # of the next iteration
        # Steps that have entered the pipeline but not left it, oldest first, each with row -> reason for the files that
        # a black image replaces.
        self.pending: deque[tuple[Batch, dict[int, str]]] = deque()
        # Index -> reason of files that did not decode before. They are tried again each time, because a truncated file
        # may contain the box of another epoch: a resumed run must read the same images.
        self.suspects: dict[int, str] = {}

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        self.pending.clear()
        for batch in self._plan.batches(self.epoch, self.start_step):
            boxes = batch.boxes.copy()
            files = [_request(self._files, i) for i in batch.indices]
            unreadable = self._unreadable(batch, files)
            for row in unreadable:
                files[row], boxes[row] = self._black_file(), (0, 0, 1, 1)
            self.pending.append((batch, unreadable))
            yield files, np.ascontiguousarray(boxes[:, :2]), np.ascontiguousarray(boxes[:, 2:]), batch.mirror

    def _black_file(self) -> np.ndarray:
        """Request of an image file of one black pixel."""
        if self._black is None:
            folder = make_folder_once(cache_dir() / "black-1", lambda f: Image.new("RGB", (1, 1)).save(f / "black.png"))
            path = folder / "black.png"
            self._black = np.frombuffer(path.read_bytes() if self._prober.packed else os.fsencode(path), np.uint8)
        return self._black

    def _unreadable(self, batch: Batch, files: list[np.ndarray]) -> dict[int, str]:
        return {
            row: self.suspects[int(i)]
            for row, i in enumerate(batch.indices)
            if int(i) in self.suspects and self._prober.error(files[row], batch.boxes[row])
        }


def _abandon(pipeline: Any) -> None:
    """Leave a pipeline whose threads hang as it is: ending it, which DALI does at exit too, would hang this thread."""
    if pipeline is not None and pipeline._pipe:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pipeline._pipe))
        pipeline._pipe = None


def _device_id(form: ImageFormat) -> int | None:
    return (form.device.index or 0) if form.device.type == "cuda" else None


def _decode(dali: Any, form: ImageFormat, packed: bool, files: Any, corners: Any, sizes: Any) -> Any:
    """Decode boxes of files to (height, width, channels) uint8."""
    return dali.fn.decoders.image_slice(
        files if packed else dali.fn.io.file.read(files),
        corners,
        sizes,
        device="mixed" if form.device.type == "cuda" else "cpu",
        axis_names="HW",
        normalized_anchor=False,
        normalized_shape=False,
        output_type=dali.types.RGB if form.channels == 3 else dali.types.GRAY,
        adjust_orientation=False,  # as in Pillow, and in the sizes that the boxes are for
    )


def _request(files: ImageFiles, index: int) -> np.ndarray:
    """Bytes of an image's path, which DALI reads, or of a packed image's content; one zero if there is none."""
    if not isinstance(files, PackedImages):
        return np.frombuffer(files.paths[index].encode(errors="surrogateescape"), np.uint8)
    try:
        content = files.read(index)
    except OSError:  # reported when it does not decode
        content = b""
    return np.frombuffer(content or b"\0", np.uint8)


def _error_line(error: Exception) -> str:
    """Line of a DALI report that names the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if "rror" in line and not line.startswith("Critical")), lines[0] if lines else ""
    )
