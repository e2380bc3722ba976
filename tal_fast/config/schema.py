"""Configuration of a run: typed dataclasses with range checks.

A run saves its configuration as ``config.yaml`` beside its results and inside its checkpoints; ``Config.from_dict``
reads both, those of version 0.1.0 too. The first sentence about each attribute is its help on the command line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from tal_fast.config.methods import OPTIONS, method_names, read_options, upgrade
from tal_fast.config.typed import check_at_least, check_positive, read, to_plain
from tal_fast.utils.io import write_text
from tal_fast.utils.own_code import DATA, absolute, in_file, installed

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)

OWN_OF_A_RANK = frozenset({
    "output", "device", "threads", "progress", "logger", "data.root", "data.ood", "data.file_list", "data.workers",
    "method.options.outliers",
})  # fmt: skip
"""Options that the ranks of one run may differ in: folders and resources of their machines."""

DATASETS = (
    "folder", "webdataset", "huggingface", "digits", "cifar10", "cifar100", "fashion-mnist", "synthetic",
)  # fmt: skip
"""Kinds of data sets; others are the user's own."""

PREPROCESSING = ("image_size", "mean", "std", "crop_fraction", "interpolation")
"""Options of the data that follow the weights a run starts from, where they are not given."""

TRAINING_IMAGES = "training_images"
"""Name by which ``Config.allow`` allows other training images."""


@dataclass
class DataConfig:
    """Images and their augmentation.

    Attributes:
        dataset: kind of data set, ``folder``, ``webdataset``, ``huggingface``, ``digits``, ``cifar10``, ``cifar100``,
            ``fashion-mnist`` or ``synthetic``, or FILE.py:NAME of your own (docs/data.md). ``folder`` has ``train/``
            and ``val/`` with one folder per class; ``webdataset`` has .tar shards, ``huggingface`` parquet or Arrow
            files; ``digits`` is scikit-learn's, as image files; CIFAR is read from its binary files, Fashion-MNIST from
            IDX files; ``synthetic`` images are generated, for measurements.
        root: folder of the images, shards, binary files or IDX files; digits and synthetic need none, a data set
            of your own is given it. ``webdataset``
            also takes an address (``s3://``, ``https://``), ``huggingface`` a name on the hub.
        label_key: where the label of an image is. For ``webdataset`` the ending of its file (``cls``), or else an
            entry of its ``.json`` (``label``); for ``huggingface`` the column, by default the only one of classes.
        ood: out-of-distribution sets for the evaluation by name, also as ``--data.ood.NAME FOLDER``. Fashion-MNIST also
            takes folders of IDX files, CIFAR folders of CIFAR's binary files.
        split: share of the images of a folder of class folders, without ``train/`` and ``val/``, to validate on: the
            same share of each class, a random choice.
        split_seed: seed of the choice of ``data.split``.
        exif_rotation: turn images of files as their EXIF data say; by default they are read as they are stored.
        file_list: text file with one path per line, relative to the root, of the only image files to use.
            ``python -m tal_fast.check_data`` writes one.
        max_unreadable: training ends when a rank meets more undecodable files; by default 1% of the files, at least 10.
        loader: decoder of image files; ``auto`` takes DALI if it is installed.
        workers: decoding threads (DALI) or processes (torch) of each rank; 0 decodes in the training process (torch).
        timeout: seconds to wait for a step of the decoding threads or processes before training ends with a sentence.
        image_size: side of the square images in pixels; by default that of ``model.weights``, else 224 for a folder and
            the data set's own for others.
        channels: 3 for RGB, 1 for grayscale; images are converted.
        mean: mean of each channel, for pixel values in [0, 1]; by default that of ``model.weights``, else CIFAR's for
            CIFAR and ImageNet's for others.
        std: standard deviation of each channel, like the mean.
        crop_fraction: central share of the shorter side that validation images are cropped to; by default that of
            ``model.weights``, else 0.875.
        interpolation: antialiased filter that images are resized with; by default that of ``model.weights``, else
            bilinear.
        crop_area: range of the area that training crops take, as shares of the image; null crops as in validation.
        crop_ratio: range of the width-to-height ratio of training crops.
        flip: mirror each training image with probability 1/2.
        shift: largest random shift of in-memory training images in pixels, padded with zeros.
        augment: random operations on the pixels of training images. ``randaugment`` is timm's
            ``rand-mM-mstdS-inc1``, which DeiT uses: two of 15 operations, each with probability 1/2;
            ``trivialaugment`` is torchvision's TrivialAugmentWide: one of 14 operations at any strength.
        augment_magnitude: strength M of randaugment, in [0, 10]; torchvision counts to 30.
        augment_std: standard deviation S of randaugment's strength between images.
        color_jitter: largest relative changes of brightness, contrast and saturation, and of hue as a share of the
            colour circle, such as 0.4, 0.4, 0.4, 0.1, in random order; null for none.
        erase: probability that a rectangle of 2 to 33% of a training image is replaced by noise (random erasing).
        sampling: ``shuffle`` reads each training image once an epoch, ``balanced`` draws as many with replacement, all
            classes equally often.
        repeats: readings of each training image in one batch, each augmented anew (repeated augmentation). An epoch
            keeps its length and has fewer different images.
        holdout: number of training images to validate on instead of the validation images. They are a fixed random
            choice that is not trained on, for choosing hyper-parameters.
        train_limit: number of training images to use, a fixed random choice; by default all.
        synthetic_images: number of synthetic training images; validation has half as many.
        synthetic_classes: number of classes of synthetic images.
    """

    dataset: str = "folder"
    root: str | None = None
    ood: dict[str, str] = field(default_factory=dict)
    label_key: str | None = None
    split: float | None = None
    split_seed: int = 0
    exif_rotation: bool = False
    file_list: str | None = None
    max_unreadable: int | None = None
    loader: Literal["auto", "dali", "torch"] = "auto"
    workers: int = 4
    timeout: float = 120.0
    image_size: int | None = None
    channels: Literal[1, 3] = 3
    mean: list[float] | None = None
    std: list[float] | None = None
    crop_fraction: float | None = None
    interpolation: Literal["bilinear", "bicubic"] | None = None
    crop_area: tuple[float, float] | None = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    shift: int = 0
    augment: Literal["none", "randaugment", "trivialaugment"] = "none"
    augment_magnitude: float = 9.0
    augment_std: float = 0.5
    color_jitter: tuple[float, float, float, float] | None = None
    erase: float = 0.0
    sampling: Literal["shuffle", "balanced"] = "shuffle"
    repeats: int = 1
    holdout: int | None = None
    train_limit: int | None = None
    synthetic_images: int = 2000
    synthetic_classes: int = 10

    def __post_init__(self) -> None:
        self.dataset = absolute(self.dataset)

    def follow(self, values: Mapping[str, Any]) -> None:
        """Set the options of ``PREPROCESSING`` that are not given to other values."""
        for name in PREPROCESSING:
            if getattr(self, name) is None:
                setattr(self, name, values.get(name))

    @property
    def central_crop(self) -> float:
        """Central share of the shorter side that validation images are cropped to."""
        return 0.875 if self.crop_fraction is None else self.crop_fraction

    @property
    def resampling(self) -> str:
        """Filter that images are resized with, one of ``tal_fast.config.names.INTERPOLATIONS``."""
        return self.interpolation or "bilinear"

    def normalization(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, for pixel values in [0, 1]."""
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        mean, std = {"cifar10": (CIFAR10_MEAN, CIFAR10_STD), "cifar100": (CIFAR100_MEAN, CIFAR100_STD)}.get(
            self.dataset, (IMAGENET_MEAN, IMAGENET_STD)
        )
        if self.channels == 3:
            return list(mean), list(std)
        return [sum(mean) / 3], [sum(std) / 3]

    @property
    def changes_pixels(self) -> bool:
        """Whether training images are changed by operations of the torch loader alone."""
        return self.augment != "none" or self.color_jitter is not None

    @property
    def needs_torch_loader(self) -> bool:
        """Whether an option works in the torch loader alone."""
        return self.changes_pixels or self.exif_rotation

    def check(self) -> None:
        """Raise ValueError for a value outside its range."""
        if not in_file(self.dataset) and self.dataset not in (*DATASETS, *installed(DATA)):
            names = " or ".join(map(repr, (*DATASETS, *installed(DATA))))
            raise ValueError(f"data.dataset is {self.dataset!r}; use {names}, or FILE.py:NAME for one of your own")
        if self.split is not None and not 0 < self.split < 1:
            raise ValueError(f"data.split is {self.split} but must be in (0, 1), such as 0.2, or null")
        if (self.mean is None) != (self.std is None):
            raise ValueError("data.mean and data.std go together: give both or neither")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"data.{name} has {len(values)} values but data.channels is {self.channels}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"data.std is {self.std} but must be above 0")
        limits = {
            "workers": 0, "split_seed": 0, "timeout": 1, "shift": 0, "image_size": 1, "holdout": 1, "train_limit": 1,
            "max_unreadable": 0, "synthetic_images": 2, "synthetic_classes": 2, "augment_std": 0, "repeats": 1,
        }  # fmt: skip
        for name, limit in limits.items():
            check_at_least(f"data.{name}", getattr(self, name), limit)
        if not 0 < self.central_crop <= 1:
            raise ValueError(f"data.crop_fraction is {self.crop_fraction} but must be in (0, 1]")
        if self.crop_area is not None and not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(f"data.crop_area is {list(self.crop_area)} but must be 0 < smallest <= largest <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"data.crop_ratio is {list(self.crop_ratio)} but must be 0 < smallest <= largest")
        for name, largest in {"augment_magnitude": 10, "erase": 1}.items():
            if not 0 <= getattr(self, name) <= largest:
                raise ValueError(f"data.{name} is {getattr(self, name)} but must be in [0, {largest}]")
        if self.color_jitter is not None and not (min(self.color_jitter) >= 0 and self.color_jitter[3] <= 0.5):
            raise ValueError(
                f"data.color_jitter is {list(self.color_jitter)} but must be at least 0, and the last, hue, at most 0.5"
            )


@dataclass
class ModelConfig:
    """Network.

    Attributes:
        name: one of the project's networks for small images, or a classifier of torchvision or timm. The project's are
            ``cifar_resnet8``, ``cifar_resnet20``, ``cifar_resnet110``, ``cifar_resnet18``, ``cifar_preact_resnet110``,
            ``cifar_wrn28_10``, ``cifar_densenet_bc_100_12``, ``cifar_vgg16_bn``, ``cifar_convmixer`` and
            ``cifar_convmixer_256_16``; ``resnet50`` is torchvision's, ``timm/deit_small_patch16_224`` timm's.
        width: width of one of the project's networks; by default that of its paper. It is the number of channels of the
            first stage, of ConvMixer's blocks, or a DenseNet's growth rate.
        weights: weights to start from, ``pretrained`` for torchvision's or timm's own, a file, or the folder of a run;
            by default random. A file may be a state dict, safetensors or a checkpoint, also of another trainer.
        weights_key: key of the weights in a checkpoint, with dots where it is nested; by default averaged weights, if
            there are any.
        freeze: part that keeps its weights, ``none``, ``backbone`` (all but the head), or a number N for the stem and
            the first N stages (of a transformer, blocks). It runs as in validation, BatchNorm and dropout included.
        drop_path: largest rate of stochastic depth of a network of timm or torchvision; by default the network's own.
        head: classifier on top of the network; ``mlp`` has a hidden layer as wide as the network's features,
            and ``cosine`` takes 8 times the cosine of features and weights as logits, as SURE does.
        cache_features: freeze the network but for the head, run it once over the training and validation images without
            random augmentation, keep its features on disk, and train the head on them. The result is the whole network.
        compile: compile the network and the loss with ``torch.compile``; by default on GPUs.
        channels_last: keep images and weights in channels-last memory order; by default on GPUs. On CPUs it makes the
            small ResNets a quarter faster, but without AVX-512, convolutions of stride 2 with fewer than 7 channels
            write out of bounds in that order (oneDNN of torch 2.14).
        sync_batchnorm: compute BatchNorm statistics over all ranks, on GPUs.
    """

    name: str = "resnet50"
    width: int | None = None
    weights: str | None = None
    weights_key: str | None = None
    freeze: int | Literal["none", "backbone"] = "none"
    drop_path: float | None = None
    head: Literal["linear", "mlp", "cosine"] = "linear"
    cache_features: bool = False
    compile: bool | None = None
    channels_last: bool | None = None
    sync_batchnorm: bool = False

    def __post_init__(self) -> None:
        if self.weights not in (None, "pretrained"):
            self.weights = os.path.abspath(os.path.expanduser(self.weights))

    def check(self) -> None:
        """Raise ValueError for a value outside its range."""
        check_at_least("model.width", self.width, 1)
        if self.weights_key is not None and self.weights is None:
            raise ValueError(f"model.weights_key is {self.weights_key!r} but there is no file; set model.weights too")
        if isinstance(self.freeze, int):
            check_at_least("model.freeze", self.freeze, 1)
        if self.drop_path is not None and not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path is {self.drop_path} but must be in [0, 1)")


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
        accumulate: number of parts that each rank's batch is split into, for one optimizer step together. Each part
            is a batch of its own to BatchNorm and to TAL's typicalness.
        layer_decay: factor on the learning rate from each block of the network to the one before it, in (0, 1]; by
            default all blocks have the same.
        head_epochs: number of first epochs in which only the head trains.
        ema_decay: decay per step of an exponential moving average of the weights, which is then validated and kept.
        ema_statistics: take BatchNorm's statistics for the average anew from training images after each epoch.
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
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum is {self.momentum} but must be in [0, 1)")
        if self.nesterov and self.momentum == 0 and self.name == "sgd":
            raise ValueError("optim.nesterov needs momentum above 0; set optim.nesterov to false")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay is {self.layer_decay} but must be in (0, 1]")
        limits = {"weight_decay": 0, "warmup_epochs": 0, "head_epochs": 0, "step_size": 1, "accumulate": 1}
        for name, limit in limits.items():
            check_at_least(f"optim.{name}", getattr(self, name), limit)
        if self.schedule == "multistep" and not self.step_epochs:
            raise ValueError("optim.schedule is 'multistep' but optim.step_epochs is empty; name the epochs to step at")
        check_positive("optim.clip_norm", self.clip_norm, ", or null for no clipping")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"optim.ema_decay is {self.ema_decay} but must be in (0, 1), or null for no average")
        if self.ema_statistics and self.ema_decay is None:
            raise ValueError("optim.ema_statistics is true but there is no average; set optim.ema_decay, such as 0.999")
        check_positive("optim.sam_radius", self.sam_radius, ", such as 0.05, or null")
        check_at_least("optim.sam_sigma", self.sam_sigma, 0)
        if self.sam_sigma and self.sam_radius is None:
            raise ValueError(f"optim.sam_sigma is {self.sam_sigma} without SAM; set optim.sam_radius, such as 0.2")
        if not 0 <= self.sam_decay < 1:
            raise ValueError(f"optim.sam_decay is {self.sam_decay} but must be in [0, 1)")


@dataclass
class MethodConfig:
    """Training method.

    Attributes:
        name: ``ce`` (cross-entropy), ``tal`` (Typicalness-Aware Learning) or another; docs/methods.md compares them.
            ``FILE.py:CLASS`` is one of your own (docs/adding-a-method.md).
        label_smoothing: label smoothing of every method's cross-entropy, in [0, 1).
        options: options of the method, by name. ``tal_fast.config.methods`` has those of the built-in methods, whose
            defaults are filled in.
        class_weight: factors of the images' losses by class, as in ``F.cross_entropy``: ``none``, ``balanced``
            (N / (C n) for a class with n of N training images) or a list with one for each class.
    """

    name: str = "tal"
    label_smoothing: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    class_weight: Any = "none"  # or "balanced", or list[float]

    def __post_init__(self) -> None:
        self.name = absolute(self.name)
        if isinstance(self.class_weight, (list, tuple)):
            self.class_weight = read(list[float], self.class_weight, "method.class_weight")
        if self.name in OPTIONS:
            self.options = asdict(read_options(self.name, OPTIONS[self.name], self.options))

    def check(self) -> None:
        """Raise ValueError for a value outside its range."""
        if not in_file(self.name) and self.name not in method_names():
            names = " or ".join(map(repr, method_names()))
            raise ValueError(f"method.name is {self.name!r}; use {names}, or FILE.py:CLASS for one of your own")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"method.label_smoothing is {self.label_smoothing} but must be in [0, 1)")
        weight = self.class_weight
        if isinstance(weight, list):
            if min(weight, default=0) < 0 or max(weight, default=0) == 0:
                raise ValueError(f"method.class_weight is {weight} but must be at least 0, and above 0 for some class")
        elif weight not in ("none", "balanced"):
            raise ValueError(f"method.class_weight is {weight!r}; use none, balanced or a list with a number a class")
        if self.name in OPTIONS:
            read_options(self.name, OPTIONS[self.name], self.options).check()


@dataclass
class MixConfig:
    """Mixing of the images of a batch with one another.

    Attributes:
        mixup: parameter α of mixup, whose images are λ x + (1 - λ) x' with one λ ~ Beta(α, α) a batch; 0 for none.
        cutmix: parameter α of CutMix, which replaces a rectangle of the share 1 - λ by another image; 0 for none.
        switch_prob: share of the batches that CutMix takes where mixup is on too.
        weight: weight of the mixed images' loss beside that of the clean ones, as in RegMixup; a step then has twice
            the images. By default the mixed images take the place of the clean ones.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    switch_prob: float = 0.5
    weight: float | None = None

    @property
    def on(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def check(self) -> None:
        """Raise ValueError for a value outside its range."""
        for name in ("mixup", "cutmix"):
            check_at_least(f"mix.{name}", getattr(self, name), 0)
        if not 0 <= self.switch_prob <= 1:
            raise ValueError(f"mix.switch_prob is {self.switch_prob} but must be in [0, 1]")
        check_positive("mix.weight", self.weight, ", or null for mixed images in place of the clean ones")
        if self.weight is not None and not self.on:
            raise ValueError(f"mix.weight is {self.weight} but no images are mixed; set mix.mixup or mix.cutmix")

    def summary(self, images: int) -> str:
        """Kind and cost of mixing, for ``images`` images a step."""
        kinds = (("mixup", self.mixup), ("CutMix", self.cutmix))
        text = " or ".join(f"{name} (alpha {alpha:g})" for name, alpha in kinds if alpha)
        if self.weight is None:
            return f"{text} in place of the images"
        return f"{text} beside the images, weight {self.weight:g}: {2 * images} images a step, not {images}"


@dataclass
class Config:
    """Run.

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
