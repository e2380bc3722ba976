"""Options of the optimizer and the learning rate: section ``optim`` of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tal_fast.config.typed import check_at_least, check_positive, check_range


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule.

    Attributes:
        name: optimizer.
        lr: peak learning rate, for the whole batch of all ranks.
        momentum: momentum of sgd.
        nesterov: Nesterov momentum for sgd.
        weight_decay: weight decay of weight matrices and kernels.
        decay_all: apply weight decay to biases and normalisation layers too, as the released TAL code does.
        schedule: learning-rate schedule; ``cosine`` decays to 0. ``step`` multiplies by ``step_factor`` after every
            ``step_size`` epochs, ``multistep`` at each epoch of ``step_epochs``.
        step_size: epochs between two steps of the schedule ``step``.
        step_epochs: epochs of the steps of the schedule ``multistep``.
        step_factor: factor on the learning rate at each step of the schedule.
        warmup_epochs: number of first epochs in which the learning rate rises linearly; fractions are fine.
        clip_norm: largest norm of the gradient; by default it is not clipped.
        accumulate: number of parts of each rank's batch whose gradients are added up for one optimizer step. Each part
            is a batch of its own to BatchNorm and to TAL's typicalness.
        layer_decay: factor on the learning rate from each block of the network to the one before it, in (0, 1]; by
            default all blocks have the same.
        head_epochs: number of first epochs in which only the head trains.
        ema_decay: decay per step of an exponential moving average of the weights, which is then validated and kept.
        ema_statistics: recompute BatchNorm's statistics for the averaged weights on training images after each epoch.
        sam_radius: radius of sharpness-aware minimisation, which takes two passes a step and updates BatchNorm's
            statistics in the first; by default it is off.
        sam_sigma: share of the average of earlier gradients that friendly SAM takes off the gradient; 0 is SAM.
        sam_decay: decay per step of that average, in [0, 1).
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay_all: bool = False
    schedule: Literal["cosine", "step", "multistep", "constant"] = "cosine"
    step_size: int = 30
    step_epochs: list[int] = field(default_factory=list)
    step_factor: float = 0.1
    warmup_epochs: float = 0.0
    clip_norm: float | None = None
    accumulate: int = 1
    layer_decay: float | None = None
    head_epochs: int = 0
    ema_decay: float | None = None
    ema_statistics: bool = False
    sam_radius: float | None = None
    sam_sigma: float = 0.0
    sam_decay: float = 0.8

    def check(self) -> None:
        """Raise ValueError for a value outside its range."""
        check_positive("optim.lr", self.lr)
        check_range("optim.momentum", self.momentum, "[0, 1)")
        if self.nesterov and self.momentum == 0 and self.name == "sgd":
            raise ValueError("optim.nesterov needs momentum above 0; set optim.nesterov to false")
        check_range("optim.layer_decay", self.layer_decay, "(0, 1]")
        limits = {"weight_decay": 0, "warmup_epochs": 0, "head_epochs": 0, "step_size": 1, "accumulate": 1}
        for name, limit in limits.items():
            check_at_least(f"optim.{name}", getattr(self, name), limit)
        if self.schedule == "multistep" and not self.step_epochs:
            raise ValueError("optim.schedule is 'multistep' but optim.step_epochs is empty; name the epochs to step at")
        check_positive("optim.clip_norm", self.clip_norm, ", or null for no clipping")
        check_range("optim.ema_decay", self.ema_decay, "(0, 1)", ", or null for no average")
        if self.ema_statistics and self.ema_decay is None:
            raise ValueError("optim.ema_statistics is true but there is no average; set optim.ema_decay, such as 0.999")
        check_positive("optim.sam_radius", self.sam_radius, ", such as 0.05, or null")
        check_at_least("optim.sam_sigma", self.sam_sigma, 0)
        if self.sam_sigma and self.sam_radius is None:
            raise ValueError(f"optim.sam_sigma is {self.sam_sigma} without SAM; set optim.sam_radius, such as 0.2")
        check_range("optim.sam_decay", self.sam_decay, "[0, 1)")
