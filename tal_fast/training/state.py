"""State of a training run: what a checkpoint saves and restores."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tal_fast.config.schema import Config
from tal_fast.data import DataBundle
from tal_fast.methods import Method, Task, build_method, method_class
from tal_fast.models import build_model
from tal_fast.runs.checkpoint import snapshot
from tal_fast.runs.resume import changed_conditions, refuse_other_data
from tal_fast.training.epoch_stats import EpochSums
from tal_fast.training.optim import build_optimizer
from tal_fast.training.runtime import Runtime
from tal_fast.training.weight_averaging import WeightAverage, build_average
from tal_fast.utils.rng import rng_state, set_rng_state


@dataclass
class TrainingState:
    """Everything that changes while a run trains."""

    network: nn.Module  # not wrapped by DDP
    method: Method  # with this rank's state
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # disabled unless gradients are in float16
    average: WeightAverage | None
    sums: EpochSums  # of the current epoch on this rank
    epoch: int = 0  # number of finished epochs
    step: int = 0  # number of finished steps in the current epoch
    history: list[dict[str, float]] = field(default_factory=list)  # a row of metrics.csv for each finished epoch
    best: dict[str, float] = field(default_factory=lambda: {"epoch": 0, "val_accuracy": -1.0})

    @property
    def averaged(self) -> nn.Module | None:
        """Network with averaged weights, once there is one to use in place of ``network``."""
        return self.average.network if self.average is not None and self.average.in_use(self.epoch) else None

    def finish_epoch(self, row: dict[str, float]) -> bool:
        """Append an epoch's row to the history; returns whether it is the best epoch so far."""
        self.history.append(row)
        average = self.average
        # Networks from before the first average do not count: the method stands for averaged weights.
        first_average = average is not None and average.in_use(self.epoch) and not average.in_use(self.epoch - 1)
        better = first_average or row["val_accuracy"] > self.best["val_accuracy"]
        if better:
            self.best = {"epoch": row["epoch"], "val_accuracy": row["val_accuracy"]}
        return better

    def rank_snapshot(self) -> dict[str, Any]:
        """Copy of what each rank has of its own: the method's state, random generators, sums of the epoch."""
        return snapshot({"method": self.method.state_dict(), "rng": rng_state(), "sums": self.sums.total})

    def shared_snapshot(self) -> dict[str, Any]:
        """Copy of what all ranks have in common."""
        averaged = self.averaged
        return snapshot(
            {
                "epoch": self.epoch,
                "step": self.step,
                "model": self.network.state_dict(),
                "average": averaged.state_dict() if averaged is not None else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "best": self.best,
                "history": list(self.history),
            }
        )

    def restore(
        self, content: dict[str, Any], path: Path, shape: dict[str, Any], rank: int, world_size: int
    ) -> list[str]:
        """Restore a checkpoint.

        With another number of ranks or training images the run goes on from the start of the epoch, and no longer bit
        for bit; another number of ranks shares out the ranks' states anew.

        Args:
            content: the checkpoint.
            path: its file, for messages.
            shape: ``data_shape`` of the data now; ValueError is raised if classes or image size have changed.

        Returns:
            The changed conditions, such as ``ranks 2 -> 1``.
        """
        refuse_other_data(content["shape"], shape, path)
        self.network.load_state_dict(content["model"])
        if self.average is not None and content["average"] is not None:
            self.average.network.load_state_dict(content["average"])
        self.optimizer.load_state_dict(content["optimizer"])
        device = self.sums.total.device
        for group in self.optimizer.param_groups:  # loaded to the CPU with the rest
            group["lr"] = group["lr"].to(device)
        if content["scaler"]:  # empty if gradients were not scaled
            self.scaler.load_state_dict(content["scaler"])
        self.epoch, self.step = content["epoch"], content["step"]
        self.history, self.best = content["history"], content["best"]
        ranks = content["ranks"]
        if len(ranks) == world_size:
            self.method.load_state_dict(ranks[rank]["method"])
            set_rng_state(ranks[rank]["rng"])
        else:
            self.method.load_state_dict(self.method.reshard([saved["method"] for saved in ranks], rank, world_size))
        changed = changed_conditions(content, world_size, shape["train_images"])
        if changed:
            self.step = 0  # the steps of an epoch no longer hold the same images
        if self.step:
            self.sums.load(ranks[rank]["sums"])
        return changed


def build_state(config: Config, data: DataBundle, runtime: Runtime) -> TrainingState:
    """Initial state of a run; raises ValueError for unsuitable options of the network or the method."""
    network = build_model(
        config.model,
        data.num_classes + method_class(config.method.name).extra_classes,
        data.channels,
        data.image_size,
    )
    if config.model.sync_batchnorm:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if runtime.channels_last:
        network = network.to(memory_format=torch.channels_last)
    network = network.to(runtime.device)
    optimizer = build_optimizer(config.optim, network)
    task = Task(config.epochs, data.num_classes, len(data.split("train")), config.optim.lr)
    method = build_method(config.method, task).to(runtime.device)
    learned = [name for name, parameter in method.named_parameters() if parameter.requires_grad]
    if learned:
        raise ValueError(
            f"the method {config.method.name} has the parameter {learned[0]}, which no optimizer steps; keep state "
            "in get_extra_state, and what is learned in the network"
        )
    return TrainingState(
        network=network,
        method=method,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(runtime.device.type, enabled=runtime.scales_gradients),
        average=build_average(network, config.optim.ema_decay, method),
        sums=EpochSums(method, runtime.device),
    )


def data_shape(data: DataBundle, train_images: int) -> dict[str, Any]:
    """Properties of the data that a model is built from, besides the configuration."""
    return {
        "class_names": list(data.class_names),
        "channels": data.channels,
        "image_size": data.image_size,
        "train_images": train_images,
    }
