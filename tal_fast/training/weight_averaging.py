"""Averages of a network's weights, which validation, the best checkpoint and the evaluator use in their place."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

STATISTICS_IMAGES = 50_000
"""That batch statistics of averaged weights are taken from: CIFAR's whole training set, as the released FMFP does, and
enough for a mean over batches where there are more images."""


class MovingAverage:
    """Exponential moving average of a network's parameters: ``average += (1 - decay) · (weights - average)``.

    Buffers, such as BatchNorm's statistics, are averages already and are copied. ``torch.optim.swa_utils`` has this
    too, but reads a counter from the device at every step.

    Args:
        network: to follow; the average starts from its weights.
        decay: in (0, 1).

    Attributes:
        network: a copy with the averaged weights.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Follow a step of the optimizer; does not wait for the device."""
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - self.decay)
        for mine, current in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(current)


class StochasticAverage:
    """Stochastic weight averaging (Izmailov et al., UAI 2018): the mean of the weights at the ends of some epochs.

    Args:
        network: to average.
        first_epoch: the first one, from 0, whose end counts.

    Attributes:
        network: a copy with the averaged weights.
    """

    def __init__(self, network: nn.Module, first_epoch: int) -> None:
        self._average = AveragedModel(network).requires_grad_(False)
        self._first_epoch = first_epoch

    @property
    def network(self) -> nn.Module:
        """See the class."""
        return self._average.module

    def epochs_averaged(self, epochs: int) -> int:
        """Weights in the mean after this many epochs of the run."""
        return max(0, epochs - self._first_epoch)

    def update(self, network: nn.Module, epochs: int, batches: Iterable[Tensor]) -> None:
        """Take in the weights at an epoch's end, if it counts, and give the mean's BatchNorm layers statistics.

        Args:
            network: with the weights of now.
            epochs: of the run that have ended.
            batches: training images (B, C, H, W) for the statistics, which the layers have none of for averaged
                weights; not asked for where there are no such layers.
        """
        count = self.epochs_averaged(epochs)
        if count:
            self._average.n_averaged.fill_(count - 1)  # so that a resumed run needs no counter
            self._average.update_parameters(network)
            update_bn(batches, self.network)
            self.network.eval()
