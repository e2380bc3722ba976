"""Backend in plain PyTorch."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from tal_fast.loss import reference
from tal_fast.loss.autograd import differentiate
from tal_fast.loss.backends.base import Backend, BatchStatistics, LossInputs
from tal_fast.loss.reference import TALStats
from tal_fast.loss.ring import RingBuffer

_LOCK = threading.Lock()


def _exclusive() -> AbstractContextManager:
    """Context that one thread at a time is in: a queue's tensors are written one after the other."""
    return nullcontext() if torch.compiler.is_compiling() else _LOCK


class PyTorchBackend(Backend):
    """Backend that computes the definition, on any device and without waiting for it."""

    name = "reference"

    def statistics_distance(
        self, features: Tensor, labels: Tensor, ring: RingBuffer, ignore_index: int, class_weight: Tensor | None = None
    ) -> BatchStatistics:
        mean, std = reference.feature_statistics(features, ring.mean.dtype)
        return BatchStatistics(mean, std, self.nearest(ring, mean, std), None)

    def complete_summary(self, inputs: LossInputs) -> Tensor:
        options = inputs.options
        return reference.batch_summary(
            inputs.logits, inputs.labels, inputs.distance,
            confidence_threshold=options.confidence_threshold, ignore_index=options.ignore_index,
            class_weight=inputs.class_weight,
        )  # fmt: skip

    def loss(self, inputs: LossInputs) -> tuple[Tensor, TALStats]:
        return reference.tal_loss(
            inputs.logits, inputs.labels, inputs.distance, inputs.options,
            warmup=inputs.warmup, summary=inputs.summary, class_weight=inputs.class_weight,
        )  # fmt: skip

    def loss_and_gradient(self, inputs: LossInputs) -> tuple[Tensor, Tensor, TALStats]:
        return differentiate(lambda z: self.loss(replace(inputs, logits=z)), inputs.logits)

    def push(self, ring: RingBuffer, mean: Tensor, std: Tensor, accepted: Tensor | None) -> None:
        """Append the accepted rows with shapes that do not depend on the data.

        Kept rows are sorted to the front, and a fixed number of slots is rewritten: those beyond the kept rows with
        their old values.
        """
        rows, capacity = mean.numel(), ring.capacity
        if rows == 0:
            return
        keep = mean.isfinite() & std.isfinite()
        if accepted is not None:
            keep = keep & accepted
        order = torch.argsort(~keep, stable=True)
        kept = keep.sum()
        skip = (kept - capacity).clamp(min=0)  # the oldest of more rows than slots never get in
        offset = torch.arange(min(rows, capacity), device=mean.device) + skip
        source = order[offset.clamp(max=rows - 1)]
        with _exclusive():
            ring.check()
            head, length = ring.cursor[0], ring.cursor[1]
            slots = (head + offset) % capacity
            for entries, values in ((ring.mean, mean), (ring.std, std)):
                entries[slots] = torch.where(offset < kept, values[source], entries[slots])
            ring.cursor.copy_(torch.stack([(head + kept) % capacity, (length + kept).clamp(max=capacity)]))

    def nearest(self, ring: RingBuffer, mean: Tensor, std: Tensor) -> Tensor:
        with _exclusive():
            ring.check()
            return reference.nearest_distance(mean, std, ring.mean, ring.std, ring.cursor[1])
