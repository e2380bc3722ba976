"""CUDA graph of a training step, so that small steps are not bound by kernel launches."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

WARM_UP = 3
"""Number of eager steps before the capture, in which cuDNN chooses its algorithms and ``torch.compile`` compiles."""


class GraphedStep:
    """Training step that runs eagerly at first, is captured, and then replayed; every call trains.

    Args:
        step: (images, *other tensors) -> None: forward, backward and update in place, without waiting for the device.
            It must leave gradients None or overwrite them.
        before_capture: called once before the capture to free the gradients, so that the graph owns them.
    """

    def __init__(self, step: Callable[..., None], before_capture: Callable[[], None]) -> None:
        self._step = step
        self._before_capture = before_capture
        self._key: Hashable = None
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._stream = torch.cuda.Stream()

    def __call__(self, *batch: Tensor, key: Hashable = None) -> None:
        """Train on a batch; another ``key``, or another shape of the images, means a new capture."""
        key = (key, batch[0].shape, batch[0].dtype)
        if key != self._key:
            self._key, self._steps, self._graph, self._inputs = key, 0, None, []
        if self._graph is None and self._steps < WARM_UP:
            self._steps += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._step(*batch)
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if self._graph is None:
            self._inputs = [tensor.clone() for tensor in batch]
            self._before_capture()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._step(*self._inputs)
        for static, tensor in zip(self._inputs, batch, strict=True):
            static.copy_(tensor)
        self._graph.replay()
