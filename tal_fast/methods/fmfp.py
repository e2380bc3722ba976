"""FMFP: flat minima by sharpness-aware steps and averaged weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tal_fast.config.schema import MethodConfig
from tal_fast.methods.base import Method, Task
from tal_fast.methods.ce import CrossEntropy

ANNEALED_OVER = 0.05
"""Share of the epochs in which the learning rate goes from the schedule's to ``swa_lr``: 10 of 200, as SWALR takes."""


class FlatMinima(Method):
    """SAM (Foret et al., ICLR 2021) and SWA (Izmailov et al., UAI 2018) under whatever loss the other class gives."""

    @dataclass
    class Options:
        """Of FMFP.

        Attributes:
            rho: ρ, how far sharpness-aware minimisation ascends, in the norm of all weights together.
            swa_from: share of the epochs after which the weights are averaged, one sample of them an epoch.
            swa_lr: learning rate while they are; None: half the peak, which is the released 0.05 for a peak of 0.1.
        """

        rho: float = 0.05
        swa_from: float = 0.6
        swa_lr: float | None = None

    def __init__(self, config: MethodConfig, task: Task) -> None:
        super().__init__(config, task)
        options = self.options
        if options.rho <= 0:
            raise ValueError(f"method.options.rho is {options.rho} but must be above 0, such as 0.05")
        if not 0 <= options.swa_from < 1:
            raise ValueError(f"method.options.swa_from is {options.swa_from} but must be in [0, 1), such as 0.6")
        if options.swa_lr is not None and options.swa_lr <= 0:
            raise ValueError(f"method.options.swa_lr is {options.swa_lr} but must be above 0, or null")
        self.radius, self.averages_from = options.rho, options.swa_from

    def learning_rate(self, rate: float, epoch: float) -> float:
        """See ``Method``: from the first averaged epoch on, towards ``swa_lr`` along a half cosine, then constant."""
        start = int(self.options.swa_from * self.task.epochs)
        if epoch < start:
            return rate
        final = self.options.swa_lr or self.task.learning_rate / 2
        done = min(1.0, (epoch - start) / max(ANNEALED_OVER * self.task.epochs, 1e-9))
        return final + (rate - final) * (1 + math.cos(math.pi * done)) / 2


class FMFP(FlatMinima, CrossEntropy):
    """Zhu et al., "Rethinking Confidence Calibration for Failure Prediction", ECCV 2022: cross-entropy under SAM and
    SWA, judged by the maximum softmax probability.
    """

    name = "fmfp"
    score = "msp"
