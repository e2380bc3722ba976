"""One training step: forward and loss as one module, and the update of the weights around it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tal_fast.config.schema import MixConfig, OptimConfig
from tal_fast.methods import Method
from tal_fast.models.blocks import is_frozen
from tal_fast.training.cuda_graph import GraphedStep
from tal_fast.training.epoch_stats import batch_sums
from tal_fast.training.optim import set_learning_rate
from tal_fast.training.runtime import Runtime
from tal_fast.training.state import Rollback, TrainingState


def check_parts(network: nn.Module, images: int) -> None:
    """Raise ValueError if ``images``, the size of a part of a rank's batch, is 1 and the network has BatchNorm.

    The variance over one image says nothing, and is refused by PyTorch where a map has one pixel.
    """
    if images > 1:
        return
    for name, module in network.named_modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and not is_frozen(module)
        if norm and not isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"BatchNorm ({name}) would see one image at a time in training; raise batch_size, lower "
                "optim.accumulate, or use fewer ranks, so that each part of a rank's batch has two images or more"
            )


class TrainStep(nn.Module):
    """Network and method as one module, which DDP wraps and ``torch.compile`` compiles as one graph.

    ``mix`` says how the batches are mixed, if they are.
    """

    def __init__(self, network: nn.Module, method: Method, runtime: Runtime, mix: MixConfig | None = None) -> None:
        super().__init__()
        self.network = network
        self.method = method
        self._runtime = runtime
        self._mix = mix if mix is not None and mix.on else None

    def train(self, mode: bool = True) -> TrainStep:
        """Set the training mode, of all but frozen parts of the network."""
        super().train(mode)
        for module in self.network.modules() if mode else ():
            if is_frozen(module):
                module.eval()
        return self

    def forward(self, images: Tensor, labels: Tensor, indices: Tensor, *further: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of a batch, and its sums for ``EpochSums``; does not wait for the device.

        Arguments as for ``Method.inputs`` and ``Method.forward``; ``further`` are the outliers, or with mixing what
        ``tal_fast.training.mixing.Mixer`` adds.
        """
        if self._mix is not None:
            return self._mixed(images, labels, indices, *further)
        with self._runtime.autocast():
            logits, features = self.network(self.method.inputs(images, further[0] if further else None))
        loss, samples = self.method(logits, features, labels, indices)
        with torch.no_grad():
            return loss, batch_sums(self.method, loss, samples, logits, labels)

    def _mixed(self, images: Tensor, labels: Tensor, indices: Tensor, *further: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and sums of a batch with mixed images, in place of the clean ones or beside them; see ``forward``."""
        assert self._mix is not None
        *mixed, pairs, share = further
        clean = self.method.inputs(images, None) if mixed else images
        with self._runtime.autocast():
            logits, features = self.network(torch.cat([clean, *mixed]) if mixed else clean)
        samples: dict[str, Tensor] = {}
        loss = self.method.mixed_loss(logits[-len(labels) :], pairs, share)
        if mixed:
            assert self._mix.weight is not None
            step = self.method(logits[: len(clean)], features[: len(clean)], labels, indices)
            loss, samples = step.loss + self._mix.weight * loss, step.samples
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
        self._sam = self.state.sam
        self._graph = GraphedStep(self._step, self._free_gradients) if self.graphed else None
        self._rollback = Rollback(self.state)
        self._running = ""  # part of a step: passes, at perturbed weights, or the update of the weights
        self._rehearses = isinstance(self.model, DistributedDataParallel) and self.model.process_group.size() > 2

    def __call__(self, batch: tuple[Tensor, ...], learning_rate: float) -> None:
        """Train on a batch of ``TrainingBatches``; does not wait for the device."""
        set_learning_rate(self.state.optimizer, learning_rate)
        batch = tuple(map(self.runtime.arrange, batch))
        self._rollback.keep()
        if self._rehearses:
            self._rehearse(batch)
        self._running = "update"
        if self._graph is None:
            self._step(*batch)
        else:
            self._graph(*batch, key=self.state.method.phase)
        self._running = ""

    def last_whole_step(self) -> dict[str, Any] | None:
        """Restore the network to the last whole step after an error; returns ``TrainingState.rank_state`` of then.

        Returns None if the error came while the weights changed.
        """
        if self._running == "update":
            return None
        if self._running == "perturbed" and self._sam is not None:
            self._sam.restore()
        return self._rollback.undo() if self._running else self.state.rank_state()

    def _rehearse(self, batch: tuple[Tensor, ...]) -> None:
        """Let DDP settle its buckets before this process's first step, by passes that are taken back.

        It orders the gradients anew after the first backward pass, and the rounding of a sum over three ranks or more
        depends on a gradient's place: a resumed run would leave the bits of an undisturbed one in its first step.
        """
        self._running = "passes"
        self._backward(batch)
        self._rollback.restore()
        self._rehearses = False

    def _step(self, *batch: Tensor) -> None:
        state = self.state
        self._free_gradients()
        self._running = "passes"
        if self._sam is None:
            state.sums.add(self._backward(batch))
        else:
            state.method.ascent_pass = True
            state.sums.add(self._backward(batch))
            state.method.ascent_pass = False
            self._running = "update"
            factor = state.scaler._scale if state.scaler.is_enabled() else None
            self._sam.perturb(1.0 if factor is None else factor)
            self._running = "perturbed"
            self._free_gradients()
            self._backward(batch)
            self._running = "update"
            self._sam.restore()
            self._sam.finish_step()
        if self.optim.clip_norm is not None:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.network.parameters(), self.optim.clip_norm)
        self._running = "update"
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
