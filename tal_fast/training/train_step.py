"""One training step: forward and loss as one module, and the update of the weights around it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tal_fast.config.schema import OptimConfig
from tal_fast.methods import Method
from tal_fast.training.cuda_graph import GraphedStep
from tal_fast.training.epoch_stats import batch_sums
from tal_fast.training.optim import set_learning_rate
from tal_fast.training.runtime import Runtime
from tal_fast.training.sam import SAM
from tal_fast.training.state import TrainingState


class TrainStep(nn.Module):
    """Network and method as one module, which DDP wraps and ``torch.compile`` compiles as one graph."""

    def __init__(self, network: nn.Module, method: Method, runtime: Runtime) -> None:
        super().__init__()
        self.network = network
        self.method = method
        self._runtime = runtime

    def forward(
        self, images: Tensor, labels: Tensor, indices: Tensor, outliers: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss of a batch, and its sums for ``EpochSums``; does not wait for the device.

        Arguments as for ``Method.inputs`` and ``Method.forward``.
        """
        with self._runtime.autocast():
            logits, features = self.network(self.method.inputs(images, outliers))
        loss, samples = self.method(logits, features, labels, indices)
        with torch.no_grad():
            return loss, batch_sums(self.method, loss, samples, logits, labels)


@dataclass
class Update:
    """Update of the weights by one batch: gradients, clipping, optimizer, moving average."""

    model: nn.Module  # a ``TrainStep``, or DDP around it
    state: TrainingState  # updated in place
    optim: OptimConfig  # clipping and gradient accumulation
    runtime: Runtime
    graphed: bool  # replay the step as a CUDA graph

    def __post_init__(self) -> None:
        radius = self.state.method.radius
        self._sam = None if radius is None else SAM(self.state.network.parameters(), radius)
        self._graph = GraphedStep(self._step, self._free_gradients) if self.graphed else None

    def __call__(self, batch: tuple[Tensor, ...], learning_rate: float) -> None:
        """Train on a batch of ``TrainingBatches``; does not wait for the device."""
        set_learning_rate(self.state.optimizer, learning_rate)
        images, labels, indices, *outliers = batch
        batch = (self.runtime.arrange(images), labels, indices, *map(self.runtime.arrange, outliers))
        if self._graph is None:
            self._step(*batch)
        else:
            self._graph(*batch, key=self.state.method.phase)

    def _step(self, *batch: Tensor) -> None:
        state = self.state
        self._free_gradients()
        if self._sam is None:
            state.sums.add(self._backward(batch))
        else:
            state.method.ascent_pass = True
            state.sums.add(self._backward(batch))
            state.method.ascent_pass = False
            self._sam.perturb()
            self._free_gradients()
            self._backward(batch)
            self._sam.restore()
        if self.optim.clip_norm is not None:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.network.parameters(), self.optim.clip_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.average is not None:
            state.average.update_after_step(state.network)

    def _backward(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Accumulate the gradients of a batch, part by part; returns its sums for ``EpochSums``."""
        count = self.optim.accumulate
        sums = []
        for number, part in enumerate(zip(*(tensor.chunk(count) for tensor in batch), strict=True)):
            synchronise = number == count - 1 or not isinstance(self.model, DistributedDataParallel)
            with contextlib.nullcontext() if synchronise else self.model.no_sync():  # type: ignore[operator]
                loss, part_sums = self.model(*part)
                self.state.scaler.scale(loss if count == 1 else loss / count).backward()
            sums.append(part_sums)
        return sums[0] if count == 1 else torch.stack(sums).sum(0)

    def _free_gradients(self) -> None:
        self.state.optimizer.zero_grad(set_to_none=True)
