"""Configuration of a run: typed dataclasses with range checks, one module a section.

A run saves its configuration as ``config.yaml`` beside its results and inside its checkpoints; ``Config.from_dict``
reads both, those of version 0.1.0 too. The first sentence about each attribute is its help on the command line.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from tal_fast.config.data import DataConfig
from tal_fast.config.methods import MethodConfig, upgrade
from tal_fast.config.mix import MixConfig
from tal_fast.config.model import ModelConfig
from tal_fast.config.optim import OptimConfig
from tal_fast.config.typed import check_at_least, check_positive, read, to_plain
from tal_fast.utils.io import write_text

OWN_OF_A_RANK = frozenset({
    "output", "device", "threads", "progress", "logger", "data.root", "data.ood", "data.file_list", "data.workers",
    "method.options.outliers",
})  # fmt: skip
"""Options that the ranks of one run may differ in: folders and resources of their machines."""

TRAINING_IMAGES = "training_images"
"""Name by which ``Config.allow`` allows other training images."""


@dataclass
class Config:
    """Options of a run.

    Attributes:
        output: folder of the results: config.yaml, metrics.csv, checkpoints/, tensorboard/.
        resume: ``never`` refuses a folder that holds a run, ``auto`` continues it, a path continues that checkpoint.
        allow: options that a resumed run may change although they change its result, such as optim.lr,optim.clip_norm;
            training-images allows other images. docs/training.md lists what each option needs.
        extend: a resumed run may have more epochs than before; schedules are then those of a run of the new length.
        epochs: number of passes over the training images.
        batch_size: images of a training step over all ranks together.
        eval_batch_size: images of a validation step on each rank.
        image_sizes: progressive resizing, as pairs of (epoch, side of the training images from there on). Epochs ascend
            from 0; validation images always have ``data.image_size``.
        seed: seed of the initial weights, the order of the images and their augmentation.
        device: ``auto`` takes a GPU if there is one.
        threads: PyTorch threads on the CPU; by default PyTorch's choice. Small networks are as fast with one, and then
            give the same numbers however many cores a machine has.
        rank_timeout: seconds after which a rank that waits for another in training ends with exit code 75 and names it.
            Before the first step they wait for 30 minutes.
        precision: precision of the network under autocast; weights and the loss are always float32. ``auto`` is
            bfloat16 on GPUs that have it, float16 with a gradient scaler on older ones, float32 on the CPU.
        cuda_graphs: replay forward, backward and update as one CUDA graph, on one GPU and not with float16.
        checkpoint_every_steps: save within an epoch too, after every so many steps.
        validate_every: epochs from one validation to the next; the last epoch is always validated.
        keep_every_epochs: keep the checkpoint of every so many epochs beside the last two and the best.
        logger: where numbers are logged beside metrics.csv; under torchrun, spell the option ``--logger``.
        log_every_steps: number of steps between two readings of the loss for the logs.
        progress: ``auto`` shows a bar on a terminal and one line per epoch elsewhere.
        profile: START:STOP, steps of the first epoch to record as a Chrome trace under ``profile/``.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    output: str = "runs/latest"
    resume: str = "never"
    allow: list[str] = field(default_factory=list)
    extend: bool = False
    epochs: int = 90
    batch_size: int = 256
    eval_batch_size: int = 256
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    rank_timeout: float = 300.0
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    cuda_graphs: bool = False
    checkpoint_every_steps: int | None = None
    validate_every: int = 1
    keep_every_epochs: int | None = None
    logger: Literal["none", "tensorboard", "wandb", "all"] = "tensorboard"
    log_every_steps: int = 50
    progress: Literal["auto", "lines", "none"] = "auto"
    profile: str | None = None

    def __post_init__(self) -> None:
        self.output = os.path.expanduser(self.output)

    def check(self) -> Config:
        """Raise ValueError for a value outside its range; returns the configuration itself."""
        read(Config, self.to_dict(), "")  # types and finite numbers, for a configuration that was made in Python
        for section in (self.data, self.model, self.optim, self.method, self.mix):
            section.check()
        if self.model.cache_features and (self.model.freeze not in ("none", "backbone") or self.optim.head_epochs):
            raise ValueError(
                "model.cache_features trains the head alone; set model.freeze to backbone and optim.head_epochs to 0"
            )
        if 0 < self.epochs <= self.optim.head_epochs:
            few = f"optim.head_epochs is {self.optim.head_epochs} of {self.epochs} epochs: the head alone would train"
            raise ValueError(f"{few}; set model.freeze to backbone for that, or epochs higher")
        for name, value in {
            "model.freeze": self.model.freeze, "optim.head_epochs": self.optim.head_epochs,
            "model.cache_features": self.model.cache_features or "none",
        }.items():  # fmt: skip
            if value not in ("none", 0) and self.model.weights is None:
                raise ValueError(f"{name} is {value} but the weights are random; name some with model.weights")
        for name in (
            "epochs", "batch_size", "eval_batch_size", "threads", "checkpoint_every_steps", "keep_every_epochs",
            "log_every_steps", "validate_every",
        ):  # fmt: skip
            check_at_least(name, getattr(self, name), 1)
        check_at_least("seed", self.seed, 0)
        if not self.output.strip():
            raise ValueError("output is empty; name a folder for the results")
        check_positive("rank_timeout", self.rank_timeout)
        known = {*self.flat(), TRAINING_IMAGES}
        unknown = [name for name in self.allow if name.replace("-", "_") not in known]
        if unknown:
            raise ValueError(f"allow names {unknown[0]!r}, which is no option; name those to allow as optim.lr,epochs")
        starts = [epoch for epoch, _ in self.image_sizes]
        if starts and (starts[0] != 0 or starts != sorted(set(starts)) or min(s for _, s in self.image_sizes) < 1):
            raise ValueError(
                f"image_sizes is {[list(pair) for pair in self.image_sizes]} but must be (epoch, side) pairs, the "
                "epochs ascending from 0, such as [[0, 160], [8, 192]]"
            )
        if self.model.cache_features and (starts or self.data.changes_pixels or self.data.erase or self.mix.on):
            raise ValueError(
                "image_sizes, data.augment, data.color_jitter, data.erase and mix need images in training; leave them "
                "out, or set model.cache_features to false"
            )
        if self.data.sampling == "balanced" and self.method.class_weight == "balanced":
            raise ValueError(
                "data.sampling and method.class_weight are both balanced, which would weight rare classes twice; set "
                "one of them to its default"
            )
        if self.profile is not None:
            self.profile_window()
        return self

    def profile_window(self) -> tuple[int, int]:
        """First and last + 1 step to profile; (0, 0) for none."""
        start, colon, stop = (self.profile or "0:0").partition(":")
        if not (colon and start.isdecimal() and stop.isdecimal() and (self.profile is None or int(start) < int(stop))):
            raise ValueError(f"profile is {self.profile!r} but must be START:STOP with START < STOP, such as 10:15")
        return int(start), int(stop)

    def image_size_at(self, epoch: int) -> int | None:
        """Side of the training images of an epoch, counted from 0; None if ``image_sizes`` is empty."""
        return next((size for start, size in reversed(self.image_sizes) if epoch >= start), None)

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts, lists and plain values, as in a YAML file."""
        return to_plain(asdict(self))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Config:
        """Inverse of ``to_dict``; options that are left out have their defaults.

        Raises ValueError for an unknown name or a value of the wrong type.
        """
        return read(Config, upgrade(values), "")

    def flat(self) -> dict[str, Any]:
        """Dotted name -> plain value of every option, such as ``method.options.t_min``; ``data.ood`` is one option."""
        return flatten(self.to_dict())

    def save(self, path: Path) -> None:
        """Write the configuration as YAML, atomically."""
        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted names; ``ood`` stays one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "ood":
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
