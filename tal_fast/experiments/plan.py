"""Experiments: methods, option grids and seeds, expanded to one job for each combination."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tal_fast.config.methods import option_names, option_path
from tal_fast.config.parse import merged, nest
from tal_fast.config.schema import Config

Values = dict[str, Any]


@dataclass
class CompareOptions:
    """Options of the result tables."""

    # Method, or row label, that differences are taken to; by default the first method. If the baseline has a grid, each
    # row is compared with the baseline's row of the same grid values.
    baseline: str | None = None
    bootstrap: int = 2000  # 0: intervals over seeds only; otherwise the number changes nothing
    over: Literal["images", "seeds", "both"] = "both"  # sources of variation that intervals cover, as far as runs allow
    metrics: list[str] = field(default_factory=lambda: ["aurc", "auroc", "fpr95"])
    score: str | None = None  # confidence score of all runs; by default each method's own
    units: Literal["natural", "paper"] = "natural"  # of the printed tables


@dataclass
class SelectOptions:
    """Criterion for the best grid point of each method, see ``tal_fast.experiments.select``."""

    # Names ``SETTING.METRIC``, such as ``new_fd/mnist.aurc``.
    metrics: list[str] = field(default_factory=lambda: ["old_fd.aurc", "new_fd.aurc"])
    accuracy_loss: float = 0.005  # largest allowed drop of the mean accuracy below the baseline's best, as a fraction


@dataclass(frozen=True)
class GridKey:
    """Dotted option of the grid, its values, and the methods it applies to (None: all)."""

    name: str
    values: tuple[Any, ...]
    methods: tuple[str, ...] | None

    def applies_to(self, method: str) -> bool:
        """Whether the values are tried with the method."""
        return self.methods is None or method in self.methods


@dataclass(frozen=True)
class Job:
    """One run to train and evaluate."""

    name: str  # of its folder
    label: str  # method and grid values, its row in the tables
    method: str
    grid: Values  # by dotted option
    seed: int
    config: Config  # lacks only ``output``

    @property
    def id(self) -> str:
        """Hash of the configuration; ``output``, ``data.root`` and the working folder do not count."""
        values = from_here(self.config.flat())
        for place in ("output", "resume", "data.root"):
            values.pop(place, None)
        return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:10]


def from_here(value: Any) -> Any:
    """A configuration whose files, own code and weights, are named from the working folder, for other machines."""
    if isinstance(value, dict):
        return {key: from_here(inner) for key, inner in value.items()}
    return value.removeprefix(os.getcwd() + os.sep) if isinstance(value, str) else value


@dataclass(frozen=True)
class Experiment:
    """Content of an experiment file."""

    base: Values  # nested values of the base configuration, overrides included
    methods: dict[str, Values]  # nested overrides by method name
    seeds: tuple[int, ...]
    grid: tuple[GridKey, ...]
    evaluate: tuple[str, ...]  # options of ``tal_fast.evaluate`` as command-line words
    evaluation: Namespace  # the same as its parser has them; ``ood`` and ``shift`` by name
    compare: CompareOptions
    select: SelectOptions | None  # criterion for the best grid point; None to choose nothing
    threads: int  # CPU threads of each job
    jobs: tuple[Job, ...] = ()  # in starting order: every method of the first seed comes first


def make_jobs(experiment: Experiment) -> tuple[Job, ...]:
    """Expand an experiment to its jobs.

    Raises ValueError for an option or value that a method does not accept, and for two jobs of the same name.
    """
    jobs: dict[str, Job] = {}
    for seed in experiment.seeds:
        for method in experiment.methods:
            for point in grid_points(experiment.grid, method):
                config = resolve(experiment, method, point, seed)
                if seed == experiment.seeds[0]:
                    _check_method(method, point, config)
                label = job_label(method, point, config)
                job = Job(f"{label}-seed{seed}", label, method, point, seed, config)
                other = jobs.setdefault(job.name, job)
                if other is not job:
                    raise ValueError(f"grid: {other.grid} and {job.grid} of {method} would share the folder {job.name}")
    return tuple(jobs.values())


def grid_points(grid: Sequence[GridKey], method: str) -> list[Values]:
    """Combinations of the grid values of a method, each as dotted option -> value."""
    keys = [key for key in grid if key.applies_to(method)]
    return [
        dict(zip((key.name for key in keys), values, strict=True))
        for values in itertools.product(*(key.values for key in keys))
    ]


def with_point(values: Values, point: Values) -> Values:
    """Nested values with those of a grid point put in."""
    for key, value in point.items():
        values = merged(values, nest({option_path(key): value}))
    return values


def resolve(experiment: Experiment, method: str, point: Values, seed: int = 0) -> Config:
    """Configuration of a run, without its ``output``; raises ValueError for an option or value it does not accept."""
    values = with_point(merged(experiment.base, experiment.methods[method]), point)
    values |= {"seed": seed, "threads": experiment.threads, "resume": "auto"}
    try:
        return Config.from_dict(values).check()
    except ValueError as error:
        raise ValueError(f"method {method}: {error}") from None


def _check_method(method: str, point: Values, config: Config) -> None:
    """Raise ValueError for options that the method would reject when it is built, or would ignore."""
    import torch

    from tal_fast.methods import Task, build_method, method_class
    from tal_fast.training.mixing import check_images
    from tal_fast.training.state import build_sam
    from tal_fast.training.weight_averaging import build_average

    options = config.method.options
    known = option_names(method_class(config.method.name).Options)
    for key in point:
        path = option_path(key)
        if path.startswith("method.options.") and path.split(".")[2] not in known:
            raise ValueError(
                f"grid.{key} changes nothing in {method}, which is {config.method.name}; name the methods it is for: "
                f"{{values: [...], methods: [...]}}"
            )
    method_config = config.method
    if "queue_size" in options:  # a short queue costs no memory
        method_config = replace(method_config, options={**options, "queue_size": min(options["queue_size"], 1)})
    weight = None if config.method.class_weight == "none" else torch.ones(2)
    network = torch.nn.Linear(1, 1)  # any
    try:
        built = build_method(method_config, Task(config.epochs, 2, 2, learning_rate=0.1, class_weight=weight))
        check_images(config, built)
        build_sam(network, config.optim, built)
        build_average(network, config.optim, built)
    except ValueError as error:
        raise ValueError(f"method {method}: {error}") from None


def job_label(method: str, point: Values, config: Config) -> str:
    """Row label such as ``tal-t_max=20-lr=0.1``; it depends on the method and its grid values alone."""
    keys = sorted(point)
    short_names = [key.rpartition(".")[2] for key in keys]
    parts = [method]
    for key, short in zip(keys, short_names, strict=True):
        value: Any = config.to_dict()
        for part in option_path(key).split("."):
            value = value[part]  # as the configuration converted it: 1e-3 may come as text
        parts.append(f"{short if short_names.count(short) == 1 else key}={_label_value(value)}")
    return "-".join(parts)


def _label_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", str(value)).strip("_")
