"""Image files through NVIDIA DALI, on the CPU or decoded by the GPU.

DALI's file reader keeps its own order, shards and padding; here it gets the plan's paths, boxes and mirroring one step
at a time instead. So it reads the same images as the PyTorch loader, no rank ever repeats one to fill a batch, and any
step can be the first: also the one that a file which does not decode has ended the pipeline in.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tal_fast.data.image_folder import ImageFiles, undecodable
from tal_fast.data.loader import ImageFormat, Step
from tal_fast.data.sampler import Batch, Plan

PREFETCH = 2
"""Steps made ahead."""


def available() -> bool:
    """Whether DALI can be imported."""
    try:
        import_module("nvidia.dali")
    except ImportError:
        return False
    return True


class DaliSource:
    """Image files, decoded, cut, resized and normalised by DALI; see ``tal_fast.data.loader.Source``.

    Args:
        plan: the steps to make.
        files: the split.
        form: of the batches.
        workers: decoding threads.
    """

    def __init__(self, plan: Plan, files: ImageFiles, form: ImageFormat, workers: int) -> None:
        self._plan = plan
        self._files = files
        self._form = form
        self._workers = max(1, workers)
        self._prober = _Prober(form)
        self._requests = _Requests(files, plan, self._prober)
        self._ready: tuple[int, Any] | None = None  # the size of images and the iterator of an epoch that is through

    def steps(self, epoch: int, start_step: int, image_size: int) -> Generator[Step, None, None]:
        """See ``Source``."""
        requests, step = self._requests, start_step
        while step < len(self._plan):
            requests.epoch, requests.start_step = epoch, step
            iterator = None
            try:
                iterator = self._iterator(image_size)
                for (outputs,) in iterator:
                    batch, unreadable = requests.pending.popleft()
                    yield Step(outputs["images"], torch.from_numpy(batch.indices), unreadable)
                    step += 1
            except RuntimeError:  # ends the pipeline, and does not say which file it was
                iterator = None
                if not self._find_suspects([batch for batch, _ in requests.pending]):
                    raise
                continue
            # Kept only once the epoch is through: an epoch left early leaves its next steps in the pipeline.
            self._ready = image_size, iterator

    def _iterator(self, image_size: int) -> Any:
        ready, self._ready = self._ready, None
        if ready is None or ready[0] != image_size:
            return self._build(image_size)  # takes some 40 ms
        ready[1].reset()  # not before now: it asks for the first steps at once
        return ready[1]

    def close(self) -> None:
        """See ``Source``."""
        self._ready = None
        self._prober.close()

    def _find_suspects(self, pending: list[Batch]) -> bool:
        """Find the files that do not decode in the first of the steps that has any; whether there is one."""
        for find in (self._refused_by_pillow, self._refused_by_dali):  # the first is faster and says why
            for batch in pending:
                found = find(batch)
                self._requests.suspects.update(found)
                if found:
                    return True
        return False

    def _refused_by_pillow(self, batch: Batch) -> dict[int, str]:
        paths, sizes = self._files.paths, self._files.sizes
        with ThreadPoolExecutor(self._workers) as pool:
            problems = list(pool.map(lambda i: undecodable(paths[i], sizes[i]), batch.indices))
        return {
            int(i): problem
            for i, box, problem in zip(batch.indices, batch.boxes, problems, strict=True)
            if problem is not None and int(i) not in self._requests.suspects and self._prober.refusal(paths[i], box)
        }

    def _refused_by_dali(self, batch: Batch) -> dict[int, str]:
        found = {}
        for i, box in zip(batch.indices, batch.boxes, strict=True):
            path = self._files.paths[i]
            if int(i) not in self._requests.suspects and (reason := self._prober.refusal(path, box)):
                found[int(i)] = f"{path} cannot be decoded (by DALI: {reason})"
        return found

    def _build(self, image_size: int) -> Any:
        # Any: DALI makes its operators at import, out of sight of type checkers.
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
            paths, corners, sizes, mirror = fn.external_source(
                source=self._requests,
                num_outputs=4,
                batch=True,
                cycle="raise",
                dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
                ndim=[1, 1, 1, 0],
            )
            images = fn.resize(
                _decode(dali, form, paths, corners, sizes),
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
    """Decodes one file at a time, to find the one that ended a pipeline."""

    def __init__(self, form: ImageFormat) -> None:
        self._form = form
        self._request: list[Any] = []
        self._pipeline: Any = None

    def refusal(self, path: str, box: np.ndarray) -> str | None:
        """Why DALI cannot cut a box out of a file; None if it can."""
        self._request[:] = [[_encoded(path)], [box[:2]], [box[2:]]]
        try:
            self._pipeline = self._pipeline or self._build()
            self._pipeline.run()
        except RuntimeError as error:
            self._pipeline = None
            return _gist(error)
        return None

    def close(self) -> None:
        """End its thread; the next file starts one anew."""
        self._pipeline = None

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
            paths, corners, sizes = dali.fn.external_source(source=lambda: request, num_outputs=3, batch=True)
            return _decode(dali, form, paths, corners, sizes)

        return pipeline()


class _Requests:
    """What DALI's external source asks for: an epoch's steps, from any on.

    Attributes:
        epoch, start_step: where the next iteration starts.
        pending: the steps that were asked for and have not come out of the pipeline yet, oldest first, each with
            row -> sentence for the files in whose place a black image is read.
        suspects: index -> sentence, of files that did not decode before. A truncated file may hold the box of another
            epoch whole, so that each time DALI is asked: what a run gets does not depend on what it met earlier.
    """

    def __init__(self, files: ImageFiles, plan: Plan, prober: _Prober) -> None:
        self._paths = files.paths
        self._plan = plan
        self._prober = prober
        self._blank = _BlankFile()
        self.epoch, self.start_step = 0, 0
        self.pending: deque[tuple[Batch, dict[int, str]]] = deque()
        self.suspects: dict[int, str] = {}

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        self.pending.clear()
        for batch in self._plan.batches(self.epoch, self.start_step):
            boxes = batch.boxes.copy()
            paths = [_encoded(self._paths[i]) for i in batch.indices]
            unreadable = self._unreadable(batch)
            for row in unreadable:
                paths[row], boxes[row] = _encoded(self._blank.path), (0, 0, 1, 1)
            self.pending.append((batch, unreadable))
            yield paths, np.ascontiguousarray(boxes[:, :2]), np.ascontiguousarray(boxes[:, 2:]), batch.mirror

    def _unreadable(self, batch: Batch) -> dict[int, str]:
        if not self.suspects:
            return {}
        return {
            row: self.suspects[int(i)]
            for row, i in enumerate(batch.indices)
            if int(i) in self.suspects and self._prober.refusal(self._paths[i], batch.boxes[row])
        }


class _BlankFile:
    """An image file of one black pixel, for as long as this object lives; made when it is first asked for."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def path(self) -> str:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tal-fast-")
            Image.new("RGB", (1, 1)).save(Path(self._folder.name) / "black.png")
        return str(Path(self._folder.name) / "black.png")


def _device_id(form: ImageFormat) -> int | None:
    return (form.device.index or 0) if form.device.type == "cuda" else None


def _decode(dali: Any, form: ImageFormat, paths: Any, corners: Any, sizes: Any) -> Any:
    """Boxes of files, (height, width, channels) uint8."""
    return dali.fn.decoders.image_slice(
        dali.fn.io.file.read(paths),
        corners,
        sizes,
        device="mixed" if form.device.type == "cuda" else "cpu",
        axis_names="HW",
        normalized_anchor=False,
        normalized_shape=False,
        output_type=dali.types.RGB if form.channels == 3 else dali.types.GRAY,
        adjust_orientation=False,  # as Pillow, and as the sizes the boxes were drawn for
    )


def _encoded(path: str) -> np.ndarray:
    """A path as DALI takes it: bytes in an array."""
    return np.frombuffer(path.encode(errors="surrogateescape"), np.uint8)


def _gist(error: Exception) -> str:
    """The line of DALI's report that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if "rror" in line and not line.startswith("Critical")), lines[0] if lines else ""
    )
