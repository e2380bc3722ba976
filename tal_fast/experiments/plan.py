"""An experiment's file, read and checked, and the jobs it stands for: each method, grid point and seed one."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tal_fast.config.methods import option_names, option_path, upgrade
from tal_fast.config.parse import find_config, merged, parse_yaml, preset_names
from tal_fast.config.schema import Config
from tal_fast.config.typed import read
from tal_fast.metrics.failure import METRICS

Values = dict[str, Any]

KEYS = ("base", "overrides", "seeds", "methods", "grid", "evaluate", "compare", "select", "threads")
# Fields of a run's configuration that the runner sets, and what to do instead.
_RUNNERS = {
    "seed": "list seeds under 'seeds'",
    "output": "name the folder with --output",
    "resume": "jobs go on by themselves",
    "threads": "give 'threads' at the top of the file",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass
class CompareOptions:
    """How the table is made, see ``tal_fast.compare``.

    Attributes:
        baseline: the method, or the method with its grid values as the table names it, that differences are taken to;
            None: the first. Of a method with a grid it is the point that has the values of the row compared.
        bootstrap: resamples of the test images; 0: intervals over seeds only.
        over: what intervals of differences are over, as far as the runs allow it.
        metrics: columns.
        score: judge all runs by this one; None: each by its method's own.
        units: of the printed table.
    """

    baseline: str | None = None
    bootstrap: int = 2000
    over: Literal["images", "seeds", "both"] = "both"
    metrics: list[str] = field(default_factory=lambda: ["aurc", "auroc", "fpr95"])
    score: str | None = None
    units: Literal["natural", "paper"] = "natural"


@dataclass
class SelectOptions:
    """How each method's best grid point is chosen, see ``tal_fast.experiments.select``.

    Attributes:
        metrics: ``SETTING.METRIC``, such as ``old_fd.aurc``, ``new_fd.aurc`` or ``new_fd/mnist.aurc``.
        accuracy_loss: a point's mean accuracy may be this much (a fraction) below the baseline's best.
    """

    metrics: list[str] = field(default_factory=lambda: ["old_fd.aurc", "new_fd.aurc"])
    accuracy_loss: float = 0.005


@dataclass(frozen=True)
class GridKey:
    """A dotted option, its values, and the methods they are tried for (None: all)."""

    name: str
    values: tuple[Any, ...]
    methods: tuple[str, ...] | None

    def applies_to(self, method: str) -> bool:
        """Whether the method is tried with these values."""
        return self.methods is None or method in self.methods


@dataclass(frozen=True)
class Job:
    """A run to train and evaluate.

    Attributes:
        name: of its folder.
        label: of its row in the table: method and grid values.
        method: its name in the file.
        grid: dotted option -> value.
        seed: of the run.
        config: the resolved configuration, but for ``output``.
    """

    name: str
    label: str
    method: str
    grid: Values
    seed: int
    config: Config


@dataclass(frozen=True)
class Experiment:
    """A file's content.

    Attributes:
        base: values of the preset or file that ``base`` names, with ``overrides``.
        methods: name -> overrides, nested.
        seeds: one run each.
        grid: see ``GridKey``.
        evaluate: options of ``tal_fast.evaluate``, as the words of its command line.
        compare, select: see there; ``select`` None: nothing is chosen.
        threads: of each job.
        jobs: in the order they are started: all methods of the first seed first.
    """

    base: Values
    methods: dict[str, Values]
    seeds: tuple[int, ...]
    grid: tuple[GridKey, ...]
    evaluate: tuple[str, ...]
    compare: CompareOptions
    select: SelectOptions | None
    threads: int
    jobs: tuple[Job, ...] = ()


def read_experiment(path: str | Path) -> Experiment:
    """Read and check a file.

    Raises:
        ValueError: it cannot be read, or one of its keys or values does not fit; the sentence names it.
    """
    path = Path(path)
    content = _read_yaml(path)
    unknown = [key for key in content if key not in KEYS]
    if unknown:
        raise ValueError(f"{path}: {unknown[0]!r} is not a key of an experiment; there are {', '.join(KEYS)}")
    for key in ("base", "methods", "seeds"):
        if key not in content:
            raise ValueError(f"{path} has no {key!r}; an experiment needs base, methods and seeds")
    try:
        return _experiment(content, path.parent)
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None


def _read_yaml(path: Path) -> Values:
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; docs/experiments.md shows what is in one") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path} cannot be read ({problem})") from None


def _experiment(content: Values, folder: Path) -> Experiment:
    methods = _methods(content["methods"], folder)
    compare = read(CompareOptions, _mapping(content.get("compare"), "compare"), "compare")
    select = None
    if "select" in content:
        select = read(SelectOptions, _mapping(content["select"], "select"), "select")
    experiment = Experiment(
        base=merged(_base(content["base"], folder), _overrides(content.get("overrides"), "overrides")),
        methods=methods,
        seeds=_seeds(content["seeds"]),
        grid=_grid(content.get("grid"), methods),
        evaluate=_evaluate_words(_mapping(content.get("evaluate"), "evaluate")),
        compare=compare,
        select=select,
        threads=_whole(content.get("threads", 1), "threads", 1),
    )
    experiment = replace(experiment, jobs=_jobs(experiment))
    _check_compare(experiment)
    if select is not None:
        check_selection(select, experiment)
    return experiment


def _base(name: Any, folder: Path) -> Values:
    """A preset's values, or those of a file beside the experiment's."""
    if not isinstance(name, str):
        raise ValueError(f"base is {name!r} but must be the name of a preset or file")
    where = name if name in preset_names() else str(folder / name)
    if where != name and not Path(where).is_file():
        raise ValueError(f"base {name!r} is neither a preset ({', '.join(preset_names())}) nor a file in {folder}")
    values = upgrade(parse_yaml(find_config(where), where))
    for key in _RUNNERS:
        values.pop(key, None)
    return values


def _methods(methods: Any, folder: Path) -> dict[str, Values]:
    """Name -> overrides; given as they are, or as the name of a file that has them, such as a ``selected.yaml``."""
    if isinstance(methods, str):
        source = folder / methods
        methods = _read_yaml(source).get("methods")
        if methods is None:
            raise ValueError(f"{source} has no 'methods'")
    methods = _mapping(methods, "methods")
    if not methods:
        raise ValueError("methods is empty; name one at least, such as 'ce: {method: {name: ce}}'")
    for name in methods:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"the method {name!r} must have a name of letters, digits and . _ + -, for its folders")
    return {name: _overrides(values, f"methods.{name}") for name, values in methods.items()}


def _mapping(value: Any, name: str) -> Values:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r} but must be a mapping")
    return value


def _whole(value: Any, name: str, limit: int) -> int:
    if type(value) is not int or value < limit:
        raise ValueError(f"{name} is {value!r} but must be a whole number of at least {limit}")
    return value


def _seeds(seeds: Any) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not seeds:
        raise ValueError(f"seeds is {seeds!r} but must be a list such as [0, 1, 2]")
    found = tuple(_whole(seed, "a seed", 0) for seed in seeds)
    if len(set(found)) < len(found):
        raise ValueError(f"seeds is {seeds} but must have each seed once")
    return found


def _overrides(values: Any, name: str) -> Values:
    """Nested options, of nested or dotted keys."""
    nested = upgrade(nest(_mapping(values, name), name))
    for key, instead in _RUNNERS.items():
        if key in nested:
            raise ValueError(f"{name}.{key} is the runner's own; {instead}")
    return nested


def nest(values: Mapping[Any, Any], name: str = "") -> Values:
    """``{"optim.lr": 0.1, "optim": {"momentum": 0}}`` -> ``{"optim": {"lr": 0.1, "momentum": 0}}``.

    Raises:
        ValueError: a key that is no text, or one option given twice.
    """
    found: Values = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise ValueError(f"{name}: the key {key!r} must be text")
        first, _, rest = key.partition(".")
        inner = {rest: value} if rest else value
        # The keys below data.ood are the user's own names, dots and all.
        if isinstance(inner, dict) and name.rpartition(".")[2] != "data":
            inner = nest(inner, f"{name}.{first}" if name else first)
        before = found.get(first)
        if isinstance(before, dict) and isinstance(inner, dict) and not before.keys() & inner.keys():
            inner = {**before, **inner}
        elif first in found:
            raise ValueError(f"{name}: {key} is given twice")
        found[first] = inner
    return found


def _grid(grid: Any, methods: Mapping[str, Any]) -> tuple[GridKey, ...]:
    found = []
    for name, values in _mapping(grid, "grid").items():
        where = f"grid.{name}"
        only = None
        if isinstance(values, dict):
            unknown = [key for key in values if key not in ("values", "methods")]
            if unknown or "values" not in values:
                what = f"has {unknown[0]!r}" if unknown else "has no 'values'"
                raise ValueError(f"{where} {what}; give a list of values, or 'values' and 'methods'")
            only, values = values.get("methods"), values["values"]
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where} is {values!r} but must be a list of values")
        if only is not None:
            if not isinstance(only, list) or not only:
                raise ValueError(f"{where}.methods is {only!r} but must be a list of names of methods")
            strangers = [method for method in only if method not in methods]
            if strangers:
                raise ValueError(
                    f"{where}.methods: there is no method {strangers[0]!r}; there are {', '.join(methods)}"
                )
        for value in values:
            nested = _overrides({name: value}, "grid")
            if "ood" in nested.get("data", ()):
                raise ValueError(f"{where}: OOD sets do not make other runs; name them all under 'evaluate'")
        found.append(GridKey(str(name), tuple(values), None if only is None else tuple(only)))
    return tuple(found)


def points(grid: Sequence[GridKey], method: str) -> list[Values]:
    """The product of the values that a method is tried with, as dotted option -> value."""
    keys = [key for key in grid if key.applies_to(method)]
    return [
        dict(zip((key.name for key in keys), values, strict=True))
        for values in itertools.product(*(key.values for key in keys))
    ]


def resolve(experiment: Experiment, method: str, point: Values, seed: int = 0) -> Config:
    """The configuration of a run, but for its ``output``.

    Raises:
        ValueError: an option or value that the configuration does not know.
    """
    values = merged(experiment.base, experiment.methods[method])
    for key, value in point.items():
        values = merged(values, nest({option_path(key): value}))
    values |= {"seed": seed, "threads": experiment.threads, "resume": "auto"}
    try:
        return Config.from_dict(values).check()
    except ValueError as problem:
        # base and overrides alone may be what is wrong, but the method is where a reader sees it.
        raise ValueError(f"method {method}: {problem}") from None


def _check_method(method: str, point: Values, config: Config) -> None:
    """Raise ValueError for what the method would refuse when it is built, or would not read."""
    from tal_fast.methods import Task, build_method, method_class

    options = config.method.options
    own = option_names(method_class(config.method.name).Options)
    for key in point:
        path = option_path(key)
        if path.startswith("method.options.") and path.split(".")[2] not in own:
            raise ValueError(
                f"grid.{key} changes nothing in {method}, which is {config.method.name}; name those it is for: "
                f"{{values: [...], methods: [...]}}"
            )
    method_config = config.method
    if "queue_size" in options:  # a short queue is as good for the check
        method_config = replace(method_config, options={**options, "queue_size": min(options["queue_size"], 1)})
    try:
        build_method(method_config, Task(config.epochs, num_classes=2, train_images=2, learning_rate=0.1))
    except ValueError as problem:
        raise ValueError(f"method {method}: {problem}") from None


def _jobs(experiment: Experiment) -> tuple[Job, ...]:
    jobs = []
    for seed in experiment.seeds:
        for method in experiment.methods:
            for point in points(experiment.grid, method):
                config = resolve(experiment, method, point, seed)
                if seed == experiment.seeds[0]:
                    _check_method(method, point, config)
                label = label_of(method, point, config)
                jobs.append(Job(f"{label}-seed{seed}", label, method, point, seed, config))
    names: dict[str, Job] = {}
    for job in jobs:
        other = names.setdefault(job.name, job)
        if other is not job:
            raise ValueError(f"grid: {other.grid} and {job.grid} of {job.method} would share the folder {job.name}")
    return tuple(jobs)


def label_of(method: str, point: Values, config: Config) -> str:
    """``tal-t_max=20-lr=0.1``: of nothing but method and values, whatever else the file has, and in what order."""
    keys = sorted(point)
    lasts = [key.rpartition(".")[2] for key in keys]
    parts = [method]
    for key, last in zip(keys, lasts, strict=True):
        value: Any = config.to_dict()
        for part in option_path(key).split("."):
            value = value[part]  # as the configuration reads it: 1e-3 may come as text
        parts.append(f"{last if lasts.count(last) == 1 else key}={_text(value)}")
    return "-".join(parts)


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", str(value)).strip("_")


def _evaluate_words(options: Values) -> tuple[str, ...]:
    """Options as words of the command line of ``tal_fast.evaluate``, which checks them."""
    from tal_fast.config.names import check_scores
    from tal_fast.data.ood import parse_named
    from tal_fast.evaluation import command

    parser = command.parser()
    taken = {"help", "run", "weights", "npz", "output", "cache", *command.WEIGHTS_OPTIONS}
    actions = {action.dest: action for action in parser._actions if action.dest not in taken}
    words: list[str] = []
    for key, value in options.items():
        dest = str(key).replace("-", "_")
        if dest not in actions:
            raise ValueError(
                f"evaluate.{key} is not an option of tal_fast.evaluate --run; there are {', '.join(actions)}"
            )
        option = f"--{dest.replace('_', '-')}"
        if actions[dest].nargs == 0:
            if not isinstance(value, bool):
                raise ValueError(f"evaluate.{key} is {value!r} but must be true or false")
            words += [option] if value else []
        elif dest in ("ood", "shift"):
            for name, where in _mapping(value, f"evaluate.{key}").items():
                words += [option, f"{name}={where}"]
        else:
            words += [option, *map(str, value if isinstance(value, list) else [value])]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = parser.parse_args(["--run", "RUN", *words])
        parse_named(args.ood, "--ood")
        parse_named(args.shift, "--shift")
        check_scores([name for group in args.scores for name in group.split(",") if name])
    except SystemExit:
        raise ValueError(f"evaluate: {said.getvalue().strip().rpartition('error: ')[2]}") from None
    except ValueError as problem:
        raise ValueError(f"evaluate: {problem}") from None
    return tuple(words)


def check_selection(select: SelectOptions, experiment: Experiment) -> None:
    """Raise ValueError for a criterion that cannot be, or is over a set that no run is evaluated on."""
    words = experiment.evaluate
    named = [words[i + 1].partition("=")[0] for i, word in enumerate(words) if word in ("--ood", "--shift")]
    sets = list(dict.fromkeys([*(name for job in experiment.jobs for name in job.config.data.ood), *named]))
    if not select.metrics:
        raise ValueError("select.metrics is empty; name one at least, such as old_fd.aurc")
    for name in select.metrics:
        setting, _, metric = name.rpartition(".")
        if setting.partition("/")[0] not in ("old_fd", "ood", "new_fd", "shift") or metric not in METRICS:
            raise ValueError(
                f"select.metrics: {name!r} must be SETTING.METRIC, such as old_fd.aurc or new_fd/mnist.auroc; settings "
                f"are old_fd, ood, new_fd, shift, metrics {', '.join(METRICS)}"
            )
        if metric.startswith("eaurc"):
            raise ValueError(f"select.metrics: {name} may be below 0, where ratios mean nothing; use aurc or augrc")
        one = setting.partition("/")[2]
        if one and one not in sets:
            raise ValueError(f"select.metrics: no run is evaluated on {one!r}; on {', '.join(sets) or 'no set at all'}")
    if not 0 <= select.accuracy_loss <= 1:
        raise ValueError(f"select.accuracy_loss is {select.accuracy_loss} but must be a fraction in [0, 1]")


def _check_compare(experiment: Experiment) -> None:
    from tal_fast.config.names import check_scores

    compare = experiment.compare
    if compare.bootstrap < 0:
        raise ValueError(f"compare.bootstrap is {compare.bootstrap} but must be at least 0")
    strangers = [metric for metric in compare.metrics if metric not in METRICS]
    if strangers or not compare.metrics:
        what = f"{strangers[0]!r} is not a metric" if strangers else "is empty"
        raise ValueError(f"compare.metrics: {what}; there are {', '.join(METRICS)}")
    if compare.score is not None:
        try:
            check_scores([compare.score])
        except ValueError as problem:
            raise ValueError(f"compare.score: {problem}") from None
    labels = list(dict.fromkeys(job.label for job in experiment.jobs))
    if compare.baseline is not None and compare.baseline not in (*experiment.methods, *labels):
        raise ValueError(
            f"compare.baseline is {compare.baseline!r} but must be one of {', '.join([*experiment.methods, *labels])}"
        )
