"""State of a training run: what a checkpoint saves and restores."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tal_fast import __version__
from tal_fast.config.schema import Config, MethodConfig, OptimConfig
from tal_fast.data.datasets import DataBundle
from tal_fast.data.digest import data_digest, newest_change
from tal_fast.loss import dispatch
from tal_fast.loss._extension import build_digest
from tal_fast.methods import Method, Task, build_method, method_class
from tal_fast.models import build_model, head_path
from tal_fast.models.blocks import freeze
from tal_fast.models.pretrained import Weights, start_from
from tal_fast.training.epoch_stats import EpochSums
from tal_fast.training.optim import build_optimizer
from tal_fast.training.runtime import Runtime
from tal_fast.training.sam import SAM
from tal_fast.training.weight_averaging import WeightAverage, build_average
from tal_fast.utils.environment import code_digest
from tal_fast.utils.own_code import file_digest
from tal_fast.utils.rng import rng_state, set_rng_state


@dataclass
class TrainingState:
    """Everything that changes while a run trains."""

    network: nn.Module  # what is trained, not wrapped by DDP: of a model whose features are cached, the head
    method: Method  # with this rank's state
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # disabled unless gradients are in float16
    average: WeightAverage | None
    sums: EpochSums  # of the current epoch on this rank
    sam: SAM | None = None
    whole: nn.Module | None = None  # the frozen model around the head, if its features are cached
    epoch: int = 0  # number of finished epochs
    step: int = 0  # number of finished steps in the current epoch
    history: list[dict[str, float]] = field(default_factory=list)  # a row of metrics.csv for each finished epoch
    best: dict[str, float] = field(default_factory=lambda: {"epoch": 0, "val_accuracy": -1.0})
    # Of each loader, path -> reason of the files that did not decode on this rank.
    unreadable: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def averaged(self) -> nn.Module | None:
        """Network with averaged weights, once there is one to use in place of ``network``."""
        return self.average.network if self.average is not None and self.average.epochs else None

    def finish_epoch(self, row: dict[str, float]) -> bool:
        """Append an epoch's row to the history; returns whether it is the best epoch so far."""
        self.history.append(row)
        # Networks from before the first average do not count: the method stands for averaged weights.
        averaged = 0 if self.average is None else self.average.epochs
        accuracy = row["val_accuracy"]  # NaN if it was not validated
        first_average = averaged > 0 and self.best["epoch"] <= self.epoch - averaged
        better = accuracy > self.best["val_accuracy"] or (first_average and not math.isnan(accuracy))
        if better:
            self.best = {"epoch": row["epoch"], "val_accuracy": accuracy}
        return better

    def rank_state(self) -> dict[str, Any]:
        """State that each rank has of its own: the method's, random generators, sums of the epoch, unreadable files."""
        own = {"method": self.method.state_dict(), "rng": rng_state(), "sums": self.sums.total}
        return own | {"unreadable": self.unreadable}

    def shared_state(self) -> dict[str, Any]:
        """State that all ranks have in common."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "model": self._whole_state(self.network),
            "average": None if self.averaged is None else self._whole_state(self.averaged),
            "averaged_epochs": 0 if self.average is None else self.average.epochs,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sam": {} if self.sam is None else self.sam.state_dict(),
            "best": self.best,
            "history": list(self.history),
        }

    def _whole_state(self, network: nn.Module) -> dict[str, Any]:
        """State of a network, within the frozen model if it is a head."""
        if self.whole is None:
            return network.state_dict()
        return {**self.whole.state_dict(), **network.state_dict(prefix=f"{head_path(self.whole)}.")}

    def restore(self, content: dict[str, Any], rank: int, world_size: int, step: int, same_images: bool) -> None:
        """Restore a checkpoint.

        Options of the optimizer are those of the configuration now. Another number of ranks shares out the ranks'
        states anew, and each counts the unreadable files of all. ``step`` is the number of finished steps of the epoch,
        0 to go on from its start; ``same_images`` tells whether the training images are those of the checkpoint.
        """
        (self.whole or self.network).load_state_dict(content["model"])
        if self.average is not None and content["average"] is not None:
            prefix = "" if self.whole is None else f"{head_path(self.whole)}."
            own = {k.removeprefix(prefix): v for k, v in content["average"].items() if k.startswith(prefix)}
            self.average.network.load_state_dict(own)
        if self.average is not None:  # version 0.2.0 did not save the number
            averaged = content.get("averaged_epochs", 0 if content["average"] is None else None)
            self.average.resume(content["epoch"], averaged)
        device = self.sums.total.device
        kept = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(content["optimizer"])
        for group, options in zip(self.optimizer.param_groups, kept, strict=True):
            group.update(options, lr=group["lr"].to(device))  # loaded to the CPU with the rest
        if content["scaler"]:  # empty if gradients were not scaled
            self.scaler.load_state_dict(content["scaler"])
        if self.sam is not None:
            self.sam.load_state_dict(content.get("sam", {}))
        self.epoch, self.step = content["epoch"], step
        self.history, self.best = content["history"], content["best"]
        ranks = content["ranks"]
        if len(ranks) == world_size:
            self.method.load_state_dict(ranks[rank]["method"])
            set_rng_state(ranks[rank]["rng"])
        else:
            self.method.load_state_dict(self.method.reshard([saved["method"] for saved in ranks], rank, world_size))
        self.method.resumed(not step, same_images)
        for saved in [ranks[rank]] if len(ranks) == world_size else ranks:
            for loader, files in saved.get("unreadable", {}).items():  # not in the checkpoints of version 0.2.0
                self.unreadable.get(loader, {}).update(files)
        if self.step:
            self.sums.load(ranks[rank]["sums"])


class Rollback:
    """Copy of what a step changes before the weights, for taking a failed step back.

    It holds the network's buffers, such as BatchNorm's statistics, and ``TrainingState.rank_state``, on their devices.
    """

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self._holders = [module._buffers for module in state.network.modules() if module._buffers]
        self._copies = [[torch.empty_like(buffer) for buffer in group] for group in self._buffers()]
        self._rank_state: dict[str, Any] = {}

    def _buffers(self) -> tuple[list[Tensor], list[Tensor]]:
        """Buffers that are floating-point numbers and others, which are faster to copy apart."""
        buffers = [buffer for holder in self._holders for buffer in holder.values() if buffer is not None]
        return [b for b in buffers if b.is_floating_point()], [b for b in buffers if not b.is_floating_point()]

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the state before a step; does not wait for the device."""
        for copies, buffers in zip(self._copies, self._buffers(), strict=True):
            if buffers:  # a head or a ViT has none
                torch._foreach_copy_(copies, buffers)
        own = self._state.rank_state()  # whose random generators' states are copies already
        method = tree_map_only(Tensor, Tensor.clone, own["method"])
        self._rank_state = {**own, "method": method, "sums": own["sums"].clone()}

    @torch.no_grad()
    def undo(self) -> dict[str, Any]:
        """Restore the buffers as of ``keep``; returns the ``rank_state`` of then."""
        for copies, buffers in zip(self._copies, self._buffers(), strict=True):
            if buffers:
                torch._foreach_copy_(buffers, copies)
        return self._rank_state

    def restore(self) -> None:
        """Restore the state as of ``keep``, after passes that did not change the weights or the epoch's sums."""
        own = self.undo()
        self._state.method.load_state_dict(own["method"])
        set_rng_state(own["rng"])


def not_finite(values: Any, name: str = "") -> set[str]:
    """Names, joined by dots, of the tensors in nested dicts and lists that hold NaN or infinity; waits for devices."""
    if isinstance(values, Tensor):
        # A finite sum shows it at once, 14 times as fast: 23 ms for a ResNet-50 with its momentum on one core.
        return set() if bool(values.sum().isfinite()) or bool(values.isfinite().all()) else {name}
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return {found for key, value in pairs for found in not_finite(value, f"{name}.{key}".lstrip("."))}


def build_state(config: Config, data: DataBundle, runtime: Runtime, weights: Weights | None = None) -> TrainingState:
    """Initial state of a run, from random weights or given ones.

    Raises ValueError for unsuitable options of the network or the method, or weights that do not fit the network.
    """
    outputs = data.num_classes + method_class(config.method.name).extra_classes
    network = build_model(config.model, outputs, data.channels, data.image_size)
    if weights is not None:
        start_from(network, weights, data.class_names)
    if config.model.sync_batchnorm:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if runtime.channels_last:
        network = network.to(memory_format=torch.channels_last)
    network = network.to(runtime.device)
    whole = None
    if config.model.cache_features:
        whole, network = network.requires_grad_(False), network.get_submodule(head_path(network)).requires_grad_()
    else:
        freeze(network, config.model.freeze)
    optimizer = build_optimizer(config.optim, network)
    weight = class_weight(config.method, data)
    task = Task(config.epochs, data.num_classes, len(data.split("train")), config.optim.lr, weight)
    method = build_method(config.method, task).to(runtime.device)
    learned = [name for name, parameter in method.named_parameters() if parameter.requires_grad]
    if learned:
        raise ValueError(
            f"the method {config.method.name} has the parameter {learned[0]}, which no optimizer updates; put "
            "learned parameters into the network, and other state into get_extra_state"
        )
    average = build_average(network, config.optim, method)
    if average is not None and average.takes_statistics and config.model.freeze != "none" and whole is None:
        raise ValueError(
            f"{method.name} recomputes BatchNorm's statistics, which model.freeze {config.model.freeze} keeps; "
            "set model.freeze to none"
        )
    return TrainingState(
        network=network,
        method=method,
        optimizer=optimizer,
        # In float16 gradients would underflow.
        scaler=torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype is torch.float16),
        average=average,
        sums=EpochSums(method, runtime.device),
        sam=build_sam(network, config.optim, method),
        whole=whole,
    )


def build_sam(network: nn.Module, config: OptimConfig, method: Method) -> SAM | None:
    """SAM of the method or of ``optim.sam_radius``, or None; raises ValueError for both."""
    if method.radius is None:
        options = (config.sam_sigma, config.sam_decay, True)
        return None if config.sam_radius is None else SAM(network, config.sam_radius, *options)
    if config.sam_radius is not None:
        raise ValueError(
            f"optim.sam_radius is {config.sam_radius} but {method.name} has a radius of its own; set it to null"
        )
    return SAM(network, method.radius)


def class_weight(config: MethodConfig, data: DataBundle) -> Tensor | None:
    """Weights of the classes (C,) float32; None for none. Raises ValueError if they do not fit the classes."""
    given = config.class_weight
    if given == "none":
        return None
    if given != "balanced":
        if len(given) != data.num_classes:
            raise ValueError(
                f"method.class_weight has {len(given)} numbers but the data {data.num_classes} classes; give one each"
            )
        return torch.tensor(given)
    counts = torch.bincount(torch.from_numpy(data.split("train").labels), minlength=data.num_classes)
    if not counts.all():
        name = data.class_names[int(counts.argmin())]
        raise ValueError(f"method.class_weight is balanced but class {name!r} has no training image; list the weights")
    return counts.sum() / (data.num_classes * counts.float())


def data_shape(data: DataBundle, train_images: int) -> dict[str, Any]:
    """Properties of the data that a model is built from, besides the configuration, and digests of the images."""
    return {
        "class_names": list(data.class_names),
        "channels": data.channels,
        "image_size": data.image_size,
        "train_images": train_images,
        "digests": data_digest(data),
    }


def conditions(config: Config, data: DataBundle, runtime: Runtime) -> dict[str, Any]:
    """Resolved values, by name, of the options and defaults that change the bits of a result on this machine."""
    device = runtime.device
    on_cpu = device.type == "cpu"
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if on_cpu:
        processor += f" {torch.backends.cpu.get_cpu_capability()}"
    backend = config.method.options.get("backend")
    return {
        "device": processor,
        "threads": torch.get_num_threads() if on_cpu else None,
        "precision": str(runtime.dtype or torch.float32).removeprefix("torch."),
        "model.compile": runtime.compile,
        "model.channels_last": runtime.channels_last,
        "method.options.backend": dispatch.for_device(backend, device).name if backend in dispatch.NAMES else backend,
        "data.loader": data.loader_name,
        "last change of an image file": newest_change(data),
        "torch": str(torch.__version__),
        "C++ extension": build_digest(),
        "tal_fast": f"{__version__} ({code_digest()[:8]})",
        "the method's file": file_digest(config.method.name),
        "the data set's file": file_digest(config.data.dataset),
    }
