"""Options of the training method, section ``method`` of a run's configuration; those of the built-in methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from reprlib import repr as short
from typing import Any, ClassVar, Literal

from tal_fast.config.typed import check_at_least, check_positive, check_range, read
from tal_fast.utils.own_code import METHODS, absolute, in_file, installed

OWN_THRESHOLD = {"paper": -1.0, "released": 0.0}
"""Default ``confidence_threshold`` of each variant of TAL: a cosine of 0 is a condition of the released code alone."""


@dataclass
class MethodOptions:
    """Base class of the options of a built-in method, and the options of a method that has none."""

    def check(self) -> None:
        """Raise ValueError for a value outside its range."""


@dataclass
class _QueueOptions(MethodOptions):
    """Options of every method with TAL's loss.

    Attributes:
        variant: ``paper`` weights each sample's losses by its own typicalness, ``released`` by the batch's mean.
        queue_size: number of past samples that typicalness compares with.
        t_min: temperature of the most typical sample of a batch.
        t_max: temperature of the least typical sample of a batch.
        confidence_threshold: a correct sample enters the queue if its cosine score exceeds this value; by default every
            correct sample does, and with ``released`` those above 0.
        queue_scope: ``local`` gives each rank its own queue, ``global`` makes all ranks share one.
        backend: implementation of the loss and the queue; ``auto`` takes the fastest one available.
        warmup_epochs: epochs with typicalness 1 while the queue fills; by default the first 5% of the epochs.
    """

    variant: Literal["paper", "released"] = "paper"
    queue_size: int = 20000
    t_min: float = 10.0
    t_max: float = 100.0
    confidence_threshold: float | None = None
    queue_scope: Literal["local", "global"] = "local"
    backend: Literal["auto", "reference", "native", "triton"] = "auto"
    warmup_epochs: int | None = None

    def check(self) -> None:
        check_at_least("method.options.warmup_epochs", self.warmup_epochs, 0)  # TALLoss checks its own options
        super().check()


@dataclass
class TALOptions(_QueueOptions):
    """Options of Typicalness-Aware Learning; ``tal_fast.TALLoss`` documents them in full.

    Attributes:
        t_wrong: temperature of misclassified samples, of ``tal`` alone; null keeps that of their typicalness.
    """

    t_wrong: float | None = 20.0


@dataclass
class LogitNormOptions(MethodOptions):
    """Options of LogitNorm.

    Attributes:
        tau: temperature τ that the normalised logits are divided by; the paper's 0.04 is for CIFAR-10.
    """

    tau: float = 0.04

    def check(self) -> None:
        check_positive("method.options.tau", self.tau, ", such as 0.04")


@dataclass
class CRLOptions(MethodOptions):
    """Options of CRL.

    Attributes:
        weight: weight λ of the ranking loss.
    """

    weight: float = 1.0

    def check(self) -> None:
        check_at_least("method.options.weight", self.weight, 0)


@dataclass
class OpenMixOptions(MethodOptions):
    """Options of OpenMix.

    Attributes:
        outliers: images of none of the classes: a folder, or another set that ``--ood`` of the evaluation takes.
        alpha: parameter of λ ~ Beta(α, α), drawn once a step.
        gamma: weight of the mixed images' loss.
    """

    outliers: str = ""
    alpha: float = 10.0
    gamma: float = 1.0

    def check(self) -> None:
        if not self.outliers:
            raise ValueError(
                "method.options.outliers is not set; name a folder of images that belong to none of the classes, or "
                "another set such as patches or npy:FILE.npy"
            )
        check_positive("method.options.alpha", self.alpha)
        check_positive("method.options.gamma", self.gamma)


@dataclass
class FMFPOptions(MethodOptions):
    """Options of FMFP.

    Attributes:
        rho: radius ρ of sharpness-aware minimisation, in the norm of all weights together.
        swa_from: share of the epochs after which the weights are averaged, once an epoch.
        swa_lr: learning rate while weights are averaged; by default half the peak, the released code's 0.05 for 0.1.
    """

    rho: float = 0.05
    swa_from: float = 0.6
    swa_lr: float | None = None

    def check(self) -> None:
        check_positive("method.options.rho", self.rho, ", such as 0.05")
        check_range("method.options.swa_from", self.swa_from, "[0, 1)", ", such as 0.6")
        check_positive("method.options.swa_lr", self.swa_lr, ", or null")


@dataclass
class FMFPTALOptions(_QueueOptions, FMFPOptions):
    """Options of FMFP with TAL's loss, in which misclassified samples keep the temperature of their typicalness."""

    t_wrong: ClassVar[None] = None


OPTIONS: dict[str, type[MethodOptions]] = {
    "ce": MethodOptions,
    "tal": TALOptions,
    "logitnorm": LogitNormOptions,
    "crl": CRLOptions,
    "openmix": OpenMixOptions,
    "fmfp": FMFPOptions,
    "fmfp-tal": FMFPTALOptions,
}
"""Option classes of the built-in methods."""

TAL_OPTIONS = frozenset(field.name for field in dataclasses.fields(TALOptions))
"""Names that version 0.1.0 kept directly under ``method``, and wrote for every method."""


def method_names() -> list[str]:
    """Names of all methods: the modules of ``tal_fast.methods``, which are not imported, and other packages' own."""
    return sorted({*package_methods(), *installed(METHODS)})


def package_methods() -> list[str]:
    """Names of the methods of this package."""
    files = (file.name for file in (resources.files("tal_fast") / "methods").iterdir())
    modules = (name.removesuffix(".py") for name in files if name.endswith(".py"))
    return [name.replace("_", "-") for name in modules if name not in ("__init__", "base")]


def option_names(kind: type) -> set[str]:
    """Names of a method's options."""
    return {field.name for field in dataclasses.fields(kind)}


def read_options(method: str, kind: type, given: Mapping[str, Any]) -> Any:
    """Convert the given options of a method to an instance of its option class.

    TAL's options are left out for methods that do not have them: 0.1.0 wrote them for every method, and a preset for
    TAL is used with other methods too. Raises ValueError for an unknown name or a value of the wrong type.
    """
    own = option_names(kind)
    given = {name: value for name, value in given.items() if name in own or name not in TAL_OPTIONS}
    if given and not own:
        raise ValueError(f"method.options has {short(next(iter(given)))} but {method} has no options of its own")
    return read(kind, given, "method.options")


def option_values(options: Any) -> dict[str, Any]:
    """Name -> value of a method's options, with the variant's own threshold where none is given."""
    values = dataclasses.asdict(options)
    if values.get("confidence_threshold", 0.0) is None:
        values["confidence_threshold"] = OWN_THRESHOLD[values["variant"]]
    return values


def option_path(name: str) -> str:
    """The dotted name of an option: ``method.t_min`` of 0.1.0 is ``method.options.t_min``."""
    section, _, option = name.partition(".")
    return f"method.options.{option}" if section == "method" and option in TAL_OPTIONS else name


def upgrade(values: dict[str, Any]) -> dict[str, Any]:
    """A nested configuration with TAL's options moved from ``method``, where 0.1.0 had them, to ``method.options``."""
    method = values.get("method")
    if not isinstance(method, dict) or not TAL_OPTIONS & method.keys():
        return values
    options = dict(read(dict[str, Any], method.get("options", {}), "method.options"))
    for name in [name for name in method if name in TAL_OPTIONS]:
        if options.setdefault(name, method[name]) != method[name]:
            raise ValueError(
                f"method.{name} is {short(method[name])} but method.options.{name} is {short(options[name])}; "
                "both name the same option, so give one of them"
            )
    kept = {key: value for key, value in method.items() if key not in TAL_OPTIONS}
    return {**values, "method": {**kept, "options": options}}


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
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    class_weight: Any = "none"  # or "balanced", or list[float]

    def __post_init__(self) -> None:
        self.name = absolute(self.name)
        if isinstance(self.class_weight, (list, tuple)):
            self.class_weight = read(list[float], self.class_weight, "method.class_weight")
        if self.name in OPTIONS:
            self.options = dataclasses.asdict(read_options(self.name, OPTIONS[self.name], self.options))

    def check(self) -> None:
        """Raise ValueError for a value outside its range."""
        if not in_file(self.name) and self.name not in method_names():
            names = " or ".join(map(repr, method_names()))
            raise ValueError(f"method.name is {self.name!r}; use {names}, or FILE.py:CLASS for one of your own")
        check_range("method.label_smoothing", self.label_smoothing, "[0, 1)")
        weight = self.class_weight
        if isinstance(weight, list):
            if min(weight, default=0) < 0 or max(weight, default=0) == 0:
                raise ValueError(f"method.class_weight is {weight} but must be at least 0, and above 0 for some class")
        elif weight not in ("none", "balanced"):
            raise ValueError(f"method.class_weight is {weight!r}; use none, balanced or a list with a number a class")
        if self.name in OPTIONS:
            read_options(self.name, OPTIONS[self.name], self.options).check()
