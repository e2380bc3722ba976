"""What a run is made of, as typed dataclasses: presets, YAML files and checks, without any command-line library.

A run's resolved configuration lies beside its results as ``config.yaml`` and inside its checkpoints;
``Config.from_dict`` reads both.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

_NO_METHODS = ("__init__.py", "base.py")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


@dataclass
class DataConfig:
    """Images and how they are read.

    Attributes:
        dataset: ``folder`` (``train/`` and ``val/`` with one folder a class), ``digits`` (scikit-learn's, as image
            files), ``cifar10``, ``cifar100`` (their binary files), ``fashion-mnist`` (IDX files) or ``synthetic`` (made
            up, for measurements).
        root: folder of the images, binary or IDX files; digits and synthetic need none. ``--data-dir`` is short for it.
        ood: out-of-distribution sets for the evaluation: name -> folder of images (for fashion-mnist: of IDX files; for
            CIFAR also of CIFAR's binary files).
        file_list: of image files, the only ones to use: a text file with one path a line, relative to ``root``, as
            ``python -m tal_fast.check_data`` writes; None: all.
        max_unreadable: training ends when a rank has met more files than this that do not decode; None: 1% of the
            split's files, but at least 10.
        loader: ``dali``, ``torch``, or ``auto``: DALI where it is installed. For datasets that are files.
        workers: decoding threads (DALI) or processes (torch; 0: in the training process) of each rank.
        image_size: side of the square images the model sees, in pixels; None: 224 for a folder, else the set's own.
        channels: 3 (RGB) or 1 (grayscale); images are converted.
        mean, std: per channel, of pixel values scaled to [0, 1]; None: CIFAR's for CIFAR, else ImageNet's.
        crop_fraction: validation takes the central square of this share of the shorter side.
        crop_area: training takes a random box of between these shares of the image's area; None: as validation.
        crop_ratio: range of the random box's width / height.
        flip: training mirrors every second image, at random.
        shift: training moves images of in-memory datasets by up to this many pixels each way, zeros move in.
        holdout: keep this many training images, a fixed random choice, out of training and validate on them instead of
            on the validation images, which then nobody sees: for choosing hyper-parameters. None: none.
        train_limit: use only this many training images, a fixed random choice; None: all.
        synthetic_images, synthetic_classes: training images and classes of ``synthetic``; it validates on half as many.
    """

    dataset: Literal["folder", "digits", "cifar10", "cifar100", "fashion-mnist", "synthetic"] = "folder"
    root: str | None = None
    ood: dict[str, str] = field(default_factory=dict)
    file_list: str | None = None
    max_unreadable: int | None = None
    loader: Literal["auto", "dali", "torch"] = "auto"
    workers: int = 4
    image_size: int | None = None
    channels: Literal[1, 3] = 3
    mean: list[float] | None = None
    std: list[float] | None = None
    crop_fraction: float = 0.875
    crop_area: tuple[float, float] | None = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    shift: int = 0
    holdout: int | None = None
    train_limit: int | None = None
    synthetic_images: int = 2000
    synthetic_classes: int = 10

    def normalization(self) -> tuple[list[float], list[float]]:
        """(mean, std), one value a channel, for pixel values scaled to [0, 1]."""
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        mean, std = {"cifar10": (CIFAR10_MEAN, CIFAR10_STD), "cifar100": (CIFAR100_MEAN, CIFAR100_STD)}.get(
            self.dataset, (IMAGENET_MEAN, IMAGENET_STD)
        )
        if self.channels == 3:
            return list(mean), list(std)
        return [sum(mean) / 3], [sum(std) / 3]

    def check(self) -> None:
        """Raise ValueError for a value outside its range."""
        if (self.mean is None) != (self.std is None):
            raise ValueError("data.mean and data.std go together: give both or neither")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"data.{name} has {len(values)} values but data.channels is {self.channels}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"data.std is {self.std} but must be above 0")
        _at_least("data.workers", self.workers, 0)
        _at_least("data.shift", self.shift, 0)
        _at_least("data.image_size", self.image_size, 1)
        _at_least("data.holdout", self.holdout, 1)
        _at_least("data.train_limit", self.train_limit, 1)
        _at_least("data.max_unreadable", self.max_unreadable, 0)
        _at_least("data.synthetic_images", self.synthetic_images, 2)
        _at_least("data.synthetic_classes", self.synthetic_classes, 2)
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"data.crop_fraction is {self.crop_fraction} but must be in (0, 1]")
        if self.crop_area is not None and not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(f"data.crop_area is {list(self.crop_area)} but must be 0 < smallest <= largest <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"data.crop_ratio is {list(self.crop_ratio)} but must be 0 < smallest <= largest")


@dataclass
class ModelConfig:
    """The network.

    Attributes:
        name: one of the project's, for small images: ``cifar_resnet8``, ``cifar_resnet20``, ``cifar_resnet110``,
            ``cifar_resnet18``, ``cifar_preact_resnet110``, ``cifar_wrn28_10``, ``cifar_densenet_bc_100_12``,
            ``cifar_vgg16_bn``, ``cifar_convmixer``, ``cifar_convmixer_256_16``; or a classifier of torchvision
            (``resnet18``, ``resnet50``, ...) or, where it is installed, of timm (``timm/deit_small_patch16_224``).
        width: of a ``cifar_`` network: channels of the first stage, of ConvMixer's blocks, or a DenseNet's growth rate;
            None: its paper's.
        compile: ``torch.compile`` the step: network, loss and all; None: on GPUs.
        channels_last: keep images and weights in channels-last memory order; None: on GPUs. A quarter faster for the
            small ResNets on CPUs too, but on those without AVX-512, convolutions of stride 2 with fewer than 7 channels
            write out of bounds in that order (oneDNN of torch 2.14).
        sync_batchnorm: statistics of BatchNorm over all ranks; on GPUs.
    """

    name: str = "resnet50"
    width: int | None = None
    compile: bool | None = None
    channels_last: bool | None = None
    sync_batchnorm: bool = False

    def check(self) -> None:
        """Raise ValueError for a value outside its range."""
        _at_least("model.width", self.width, 1)


@dataclass
class OptimConfig:
    """The optimizer, its learning rate, and what else is done with gradients and weights.

    Attributes:
        name: ``sgd`` (with ``momentum`` and ``nesterov``) or ``adamw``.
        lr: peak learning rate, for the whole batch of all ranks.
        momentum, nesterov: of sgd.
        weight_decay: of weights; biases and normalisation layers do not decay unless ``decay_all`` says so.
        decay_all: see ``weight_decay``; the released TAL code decays all parameters.
        schedule: ``cosine`` to 0, ``step`` (times ``step_factor`` after every ``step_size`` epochs), ``multistep``
            (times ``step_factor`` at each epoch of ``step_epochs``) or ``constant``.
        step_size, step_epochs, step_factor: of ``step`` and ``multistep``.
        warmup_epochs: the learning rate rises linearly over these first epochs; fractions are fine.
        clip_norm: largest norm of the gradient; None: no clipping.
        accumulate: parts each rank's batch goes through the network in, one after the other; the optimizer steps once
            for all. Each part is a batch of its own to BatchNorm and to TAL's typicalness.
        ema_decay: validate and keep an exponential moving average of the weights, with this decay a step; None: none.
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
    ema_decay: float | None = None

    def check(self) -> None:
        """Raise ValueError for a value outside its range."""
        if self.lr <= 0:
            raise ValueError(f"optim.lr is {self.lr} but must be above 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum is {self.momentum} but must be in [0, 1)")
        if self.nesterov and self.momentum == 0 and self.name == "sgd":
            raise ValueError("optim.nesterov needs momentum above 0; set optim.nesterov to false")
        _at_least("optim.weight_decay", self.weight_decay, 0)
        _at_least("optim.warmup_epochs", self.warmup_epochs, 0)
        _at_least("optim.step_size", self.step_size, 1)
        _at_least("optim.accumulate", self.accumulate, 1)
        if self.schedule == "multistep" and not self.step_epochs:
            raise ValueError("optim.schedule is 'multistep' but optim.step_epochs is empty; name the epochs to step at")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"optim.clip_norm is {self.clip_norm} but must be above 0, or null for no clipping")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"optim.ema_decay is {self.ema_decay} but must be in (0, 1), or null for no average")


@dataclass
class MethodConfig:
    """What a run trains with; all but the first three belong to ``tal`` and ``fmfp-tal``, as in ``tal_fast.TALLoss``.

    Attributes:
        name: ``ce`` (cross-entropy), ``tal`` (Typicalness-Aware Learning), ``logitnorm``, ``crl``, ``openmix``,
            ``fmfp`` or ``fmfp-tal``; each is a module of ``tal_fast.methods``, and docs/methods.md compares them.
        label_smoothing: in [0, 1), of every method's cross-entropy.
        options: of the method's own, such as ``tau`` of ``logitnorm``; its module's ``Options`` documents them.
        warmup_epochs: epochs with typicalness 1 while the queue fills; None: the first 5% of the epochs, rounded down.
        variant, queue_size, t_min, t_max, t_wrong, confidence_threshold, queue_scope, backend: see ``TALLoss``.
    """

    name: str = "tal"
    label_smoothing: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    warmup_epochs: int | None = None
    variant: Literal["paper", "released"] = "paper"
    queue_size: int = 20000
    t_min: float = 10.0
    t_max: float = 100.0
    t_wrong: float | None = 20.0
    confidence_threshold: float = 0.0
    queue_scope: Literal["local", "global"] = "local"
    backend: Literal["auto", "reference", "native", "triton"] = "auto"

    def check(self) -> None:
        """Raise ValueError for a value outside its range; ``TALLoss`` checks its own."""
        if self.name not in method_names():
            raise ValueError(f"method.name is {self.name!r}; use {' or '.join(map(repr, method_names()))}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"method.label_smoothing is {self.label_smoothing} but must be in [0, 1)")
        _at_least("method.warmup_epochs", self.warmup_epochs, 0)


@dataclass
class Config:
    """A whole run.

    Attributes:
        output: folder of the results: config.yaml, metrics.csv, checkpoints/, tensorboard/.
        resume: ``never``: refuse to touch a folder that holds a run; ``auto``: go on with the run in ``output`` if
            there is one; a path: go on from that checkpoint.
        epochs: passes over the training images.
        batch_size: images of a training step over all ranks together.
        eval_batch_size: images of a validation step on each rank.
        image_sizes: progressive resizing: pairs (epoch, side), ascending from epoch 0; from that epoch on, training
            images have this side in pixels. Empty: ``data.image_size``, which validation has always.
        seed: of the initial weights, the order of the images and their augmentation.
        device: ``auto``: a GPU if there is one.
        threads: of PyTorch on the CPU; None: as many as PyTorch takes. Small networks are as fast with one, and then
            give the same numbers however many cores a machine has.
        precision: of the network under autocast: ``bfloat16``, ``float16`` (with a gradient scaler), or ``float32``
            for none; ``auto``: bfloat16 on GPUs that have it, float16 on older ones, float32 on the CPU. Weights and
            the loss are in float32 always.
        cuda_graphs: replay forward, backward and update as one CUDA graph; for one GPU, not with float16.
        checkpoint_every_steps: save inside an epoch too, after every so many steps; None: after each epoch only.
        keep_every_epochs: keep the checkpoint of every so many epochs beside the last two and the best; None: none.
        logger: beside metrics.csv: ``tensorboard``, ``wandb``, ``all`` or ``none``. ``--log`` is short for it, but not
            under torchrun, which takes that for an option of its own.
        log_every_steps: steps between two readings of the loss from the device for the logs.
        progress: ``auto`` shows a bar on a terminal and a line an epoch elsewhere; ``lines``; ``none``.
        profile: ``start:stop``, steps of the first epoch trained to record as a Chrome trace under ``profile/``.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    output: str = "runs/latest"
    resume: str = "never"
    epochs: int = 90
    batch_size: int = 256
    eval_batch_size: int = 256
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    cuda_graphs: bool = False
    checkpoint_every_steps: int | None = None
    keep_every_epochs: int | None = None
    logger: Literal["none", "tensorboard", "wandb", "all"] = "tensorboard"
    log_every_steps: int = 50
    progress: Literal["auto", "lines", "none"] = "auto"
    profile: str | None = None

    def check(self) -> Config:
        """Self, if all values are within their ranges.

        Raises:
            ValueError: one is not; the sentence names it, its limit and the mend.
        """
        for part in (self.data, self.model, self.optim, self.method):
            part.check()
        positive = ("epochs", "batch_size", "eval_batch_size", "threads", "checkpoint_every_steps", "keep_every_epochs")
        for name in (*positive, "log_every_steps"):
            _at_least(name, getattr(self, name), 1)
        _at_least("seed", self.seed, 0)
        starts = [epoch for epoch, _ in self.image_sizes]
        if starts and (starts[0] != 0 or starts != sorted(set(starts)) or min(s for _, s in self.image_sizes) < 1):
            raise ValueError(
                f"image_sizes is {[list(pair) for pair in self.image_sizes]} but must be (epoch, side) pairs, the "
                "epochs ascending from 0, such as [[0, 160], [8, 192]]"
            )
        if self.profile is not None:
            self.profile_window()
        return self

    def profile_window(self) -> tuple[int, int]:
        """(first, last + 1) step to profile; (0, 0) for none."""
        start, colon, stop = (self.profile or "0:0").partition(":")
        if not (colon and start.isdecimal() and stop.isdecimal() and (self.profile is None or int(start) < int(stop))):
            raise ValueError(f"profile is {self.profile!r} but must be START:STOP with START < STOP, such as 10:15")
        return int(start), int(stop)

    def image_size_at(self, epoch: int) -> int | None:
        """Side of an epoch's training images where ``image_sizes`` says; epochs count from 0."""
        return next((size for start, size in reversed(self.image_sizes) if epoch >= start), None)

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts, lists and plain values, as in a YAML file."""
        return _plain(dataclasses.asdict(self))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Config:
        """The inverse of ``to_dict``; what is left out has its default.

        Raises:
            ValueError: an unknown name or a value of the wrong type.
        """
        return read(Config, values, "")

    def save(self, path: Path) -> None:
        """Write YAML."""
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))


def preset_names() -> list[str]:
    """Of the presets that come with the package."""
    folder = resources.files("tal_fast.config") / "presets"
    return sorted(f.name[: -len(".yaml")] for f in folder.iterdir() if f.name.endswith(".yaml"))


def method_names() -> list[str]:
    """Of the methods that come with the package: the modules of ``tal_fast.methods``, which are not imported here."""
    names = (f.name for f in (resources.files("tal_fast") / "methods").iterdir())
    return sorted(n[: -len(".py")].replace("_", "-") for n in names if n.endswith(".py") and n not in _NO_METHODS)


def find_config(name_or_path: str) -> str:
    """Text of a preset, or of a YAML file.

    Raises:
        ValueError: there is neither.
    """
    if name_or_path in preset_names():
        return (resources.files("tal_fast.config") / "presets" / f"{name_or_path}.yaml").read_text()
    path = Path(name_or_path)
    if path.is_file():
        return path.read_text()
    raise ValueError(f"no preset or file {name_or_path!r}; the presets are {', '.join(preset_names())}")


def load_config(name_or_path: str) -> Config:
    """A preset or YAML file as a ``Config``.

    Raises:
        ValueError: not found, not YAML, or with names or values that do not fit.
    """
    return Config.from_dict(parse_yaml(find_config(name_or_path), name_or_path))


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """The mapping in ``text``; ValueError naming ``source`` if it is none."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source} must be a mapping such as 'epochs: 10', not {type(values).__name__}")
    return values


def _at_least(name: str, value: float | None, limit: float) -> None:
    if value is not None and value < limit:
        raise ValueError(f"{name} is {value} but must be at least {limit}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def read(kind: Any, value: Any, name: str) -> Any:
    """``value``, as YAML gives it, as the annotated type ``kind``.

    Raises:
        ValueError: an unknown name or a value of the wrong type; the sentence begins with ``name``.
    """
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{name or 'the configuration'} is {value!r} but must be a mapping")
        hints = typing.get_type_hints(kind)
        prefix = f"{name}." if name else ""
        unknown = [key for key in value if key not in hints]
        if unknown:
            raise ValueError(f"{prefix}{unknown[0]} is not an option; there are {', '.join(prefix + h for h in hints)}")
        return typing.cast(Any, kind)(**{key: read(hints[key], v, prefix + key) for key, v in value.items()})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (kind,) = (a for a in args if a is not type(None))
        return read(kind, value, name)
    if origin is Literal:
        if value not in args or type(value) not in {type(a) for a in args}:
            raise ValueError(f"{name} is {value!r}; use {' or '.join(map(repr, args))}")
        return value
    if origin is list and isinstance(value, (list, tuple)):
        return [read(args[0], v, name) for v in value]
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(args):
        return tuple(read(a, v, name) for a, v in zip(args, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {read(args[0], k, name): read(args[1], v, name) for k, v in value.items()}
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # PyYAML reads 1e-3 as text
        except ValueError:
            pass
    elif kind in (int, bool, str) and type(value) is kind:
        return value
    wanted = kind.__name__ if isinstance(kind, type) and origin is None else str(kind).replace("typing.", "")
    raise ValueError(f"{name} is {value!r} but must be {wanted}")
