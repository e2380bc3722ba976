"""FMFP: flat minima by sharpness-aware minimisation and averaged weights."""

from __future__ import annotations

import math

from tal_fast.config.methods import FMFPOptions
from tal_fast.config.schema import MethodConfig
from tal_fast.methods.base import Method, Task
from tal_fast.methods.ce import CrossEntropy

ANNEALING_SHARE = 0.05
"""Share of the epochs over which the learning rate goes from the schedule's to ``swa_lr``: 10 of 200, as in SWALR."""


class FlatMinima(Method):
    """SAM (Foret et al., ICLR 2021) and SWA (Izmailov et al., UAI 2018), to combine with the loss of another method."""

    def __init__(self, config: MethodConfig, task: Task) -> None:
        super().__init__(config, task)
        self.radius, self.averages_from = self.options.rho, self.options.swa_from

    def learning_rate(self, rate: float, epoch: float) -> float:
        # From the first averaged epoch on, a half cosine towards swa_lr, then constant.
        start = int(self.options.swa_from * self.task.epochs)
        if epoch < start:
            return rate
        final = self.options.swa_lr or self.task.learning_rate / 2
        done = min(1.0, (epoch - start) / max(ANNEALING_SHARE * self.task.epochs, 1e-9))
        return final + (rate - final) * (1 + math.cos(math.pi * done)) / 2


class FMFP(FlatMinima, CrossEntropy):
    """FMFP (Zhu et al., "Rethinking Confidence Calibration for Failure Prediction", ECCV 2022).

    Cross-entropy under SAM and SWA, judged by the maximum softmax probability.
    """

    name = "fmfp"
    score = "msp"
    Options = FMFPOptions
