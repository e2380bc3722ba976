"""Weight averages, which validation, the best checkpoint and the evaluator use in place of the network."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from tal_fast.config.schema import OptimConfig
from tal_fast.methods import Method

STATISTICS_IMAGES = 50_000
"""Number of training images from which the BatchNorm statistics of averaged weights are taken: CIFAR's whole training
set, as in the released FMFP code, and enough for a mean over batches on larger sets."""


class WeightAverage:
    """Average of a network's weights over a run."""

    network: nn.Module  # copy of the network with the averaged weights
    epochs: float = math.inf  # number of the last epochs after which it replaced the network
    takes_statistics: bool  # whether it takes its BatchNorm statistics from training images after an epoch

    def update_after_step(self, network: nn.Module) -> None:
        """Take in the weights after a step of the optimizer; must not wait for the device."""

    def update_after_epoch(self, network: nn.Module, epochs: int, batches: Iterable[Tensor]) -> None:
        """Take in the weights after ``epochs`` epochs; ``batches`` of training images are for BatchNorm statistics."""

    def counts(self, epoch: int) -> bool:
        """Whether the weights after an epoch, counted from 1, enter the average."""
        return True

    def resume(self, epochs: int, averaged: float | None) -> None:
        """Continue after ``epochs`` epochs, ``averaged`` of which are in ``network``; None: as many as options now say.

        If the options begin to average later than that, the average starts anew.
        """


class MovingAverage(WeightAverage):
    """Exponential moving average of the parameters: ``average += (1 - decay) · (weights - average)``.

    Buffers, such as the running statistics of BatchNorm, are averages already and are copied, unless they are to be
    taken anew after each epoch. Unlike ``torch.optim.swa_utils``, it does not read a counter from the device at every
    step.
    """

    def __init__(self, network: nn.Module, decay: float, takes_statistics: bool = False) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.decay, self.takes_statistics = decay, takes_statistics

    @torch.no_grad()
    def update_after_step(self, network: nn.Module) -> None:
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - self.decay)
        for averaged, current in zip(self.network.buffers(), network.buffers(), strict=True):
            averaged.copy_(current)

    def update_after_epoch(self, network: nn.Module, epochs: int, batches: Iterable[Tensor]) -> None:
        if self.takes_statistics:
            update_bn(batches, self.network)
            self.network.eval()


class StochasticAverage(WeightAverage):
    """Stochastic weight averaging (Izmailov et al., UAI 2018): mean of the weights at the ends of epochs.

    ``first_epoch``, counted from 0, is the first one whose final weights count.
    """

    takes_statistics = True

    def __init__(self, network: nn.Module, first_epoch: int) -> None:
        self._average = AveragedModel(network).requires_grad_(False)
        self._first_epoch = first_epoch
        self.network, self.epochs = self._average.module, 0

    def update_after_epoch(self, network: nn.Module, epochs: int, batches: Iterable[Tensor]) -> None:
        if not self.counts(epochs):
            return
        self._average.n_averaged.fill_(int(self.epochs))
        self._average.update_parameters(network)
        update_bn(batches, self.network)
        self.network.eval()
        self.epochs += 1

    def counts(self, epoch: int) -> bool:
        return epoch > self._first_epoch

    def resume(self, epochs: int, averaged: float | None) -> None:
        since = max(epochs - self._first_epoch, 0)
        self.epochs = since if averaged is None or not since else averaged


def build_average(network: nn.Module, config: OptimConfig, method: Method) -> WeightAverage | None:
    """Moving average for ``optim.ema_decay``, epoch average for a method that has one, or None; not both."""
    decay = config.ema_decay
    if method.averages_from is None:
        return None if decay is None else MovingAverage(network, decay, config.ema_statistics)
    if decay is not None:
        raise ValueError(f"optim.ema_decay is {decay} but {method.name} averages the weights itself; set it to null")
    return StochasticAverage(network, int(method.averages_from * method.task.epochs))
