"""Image files through NVIDIA DALI, on the CPU or decoded by the GPU.

DALI's file reader keeps its own order, shards and padding; here it gets the plan's paths, boxes and mirroring one step
at a time instead. So it reads the same images as the PyTorch loader, no rank ever repeats one to fill a batch, and any
step can be the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
from torch import Tensor

from tal_fast.data.files import ImageFiles, UnreadableImage, first_unreadable
from tal_fast.data.loaders import ImageFormat
from tal_fast.data.plan import Plan

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
    """Image files, decoded, cut, resized and normalised by DALI; see ``tal_fast.data.loaders.Source``.

    Args:
        plan: the steps to make.
        files: the split.
        form: of the batches.
        workers: decoding threads.
    """

    def __init__(self, plan: Plan, files: ImageFiles, form: ImageFormat, workers: int) -> None:
        self._plan = plan
        self._requests = _Requests(files.paths, plan)
        self._form = form
        self._workers = max(1, workers)
        self._iterator: Any = None

    def images(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``Source``."""
        if start_step >= len(self._plan):
            return
        self._requests.epoch, self._requests.start_step = epoch, start_step
        # Kept only once the epoch is through: an epoch left early leaves its next steps in the pipeline.
        iterator, self._iterator = self._iterator or self._build(), None
        try:
            for (outputs,) in iterator:
                yield outputs["images"], outputs["indices"]
        except RuntimeError as error:
            culprit = first_unreadable(self._requests.recent_paths())
            if culprit is None:
                raise
            raise UnreadableImage(culprit) from error
        iterator.reset()
        self._iterator = iterator

    def _build(self) -> Any:
        # Any: DALI makes its operators at import, out of sight of type checkers.
        dali: Any = import_module("nvidia.dali")
        fn, types = dali.fn, dali.types
        torch_plugin: Any = import_module("nvidia.dali.plugin.pytorch")
        form = self._form
        on_gpu = form.device.type == "cuda"

        @dali.pipeline_def(
            batch_size=self._plan.batch_size,
            num_threads=self._workers,
            device_id=(form.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=PREFETCH,
        )
        def pipeline() -> tuple[Any, Any]:
            paths, corners, sizes, mirror, indices = fn.external_source(
                source=self._requests,
                num_outputs=5,
                batch=True,
                cycle="raise",
                dtype=[types.UINT8, types.INT32, types.INT32, types.INT32, types.INT64],
                ndim=[1, 1, 1, 0, 0],
            )
            images = fn.decoders.image_slice(
                fn.io.file.read(paths),
                corners,
                sizes,
                device="mixed" if on_gpu else "cpu",
                axis_names="HW",
                normalized_anchor=False,
                normalized_shape=False,
                output_type=types.RGB if form.channels == 3 else types.GRAY,
                adjust_orientation=False,  # as Pillow, and as the sizes the boxes were drawn for
            )
            images = fn.resize(
                images,
                resize_x=form.image_size,
                resize_y=form.image_size,
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            images = fn.crop_mirror_normalize(
                images,
                mirror=mirror,
                dtype=types.FLOAT,
                output_layout="CHW",
                mean=[255 * m for m in form.mean],
                std=[255 * s for s in form.std],
            )
            return images, indices

        return torch_plugin.DALIGenericIterator(
            pipeline(),
            ["images", "indices"],
            last_batch_policy=torch_plugin.LastBatchPolicy.PARTIAL,
            auto_reset=False,
            prepare_first_batch=False,
        )


class _Requests:
    """What DALI's external source asks for: an epoch's steps as lists of arrays, one an image."""

    def __init__(self, paths: Any, plan: Plan) -> None:
        self._paths = paths
        self._plan = plan
        self._recent: list[np.ndarray] = []
        self.epoch, self.start_step = 0, 0

    def __iter__(self) -> Iterator[tuple[list[np.ndarray], ...]]:
        for batch in self._plan.batches(self.epoch, self.start_step):
            self._recent = [*self._recent[-2 * PREFETCH - 1 :], batch.indices]
            yield (
                [np.frombuffer(self._paths[i].encode(errors="surrogateescape"), np.uint8) for i in batch.indices],
                list(np.ascontiguousarray(batch.boxes[:, :2])),
                list(np.ascontiguousarray(batch.boxes[:, 2:])),
                list(batch.mirror),
                list(batch.indices),
            )

    def recent_paths(self) -> list[str]:
        """Files of the steps that may be in the pipeline."""
        return [self._paths[i] for indices in self._recent for i in indices]
