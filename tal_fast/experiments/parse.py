"""Reading and checking of experiment files."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tal_fast.config.methods import upgrade
from tal_fast.config.names import METRICS, check_scores
from tal_fast.config.parse import merged, nest, preset_names, read_config, read_yaml
from tal_fast.config.typed import check_at_least, check_range, one_line, read
from tal_fast.experiments.plan import CompareOptions, Experiment, GridKey, SelectOptions, Values, make_jobs
from tal_fast.metrics.settings import means_of

KEYS = ("base", "overrides", "seeds", "methods", "grid", "evaluate", "compare", "select", "threads")
_RESERVED = {
    "seed": "list seeds under 'seeds'",
    "output": "name the folder with --output",
    "resume": "jobs resume by themselves",
    "threads": "give 'threads' at the top of the file",
}
"""Fields of a run's configuration that the scheduler sets -> what to use instead."""
_METHOD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def read_experiment(path: str | Path) -> Experiment:
    """Read and check an experiment file; raises ValueError if it cannot be read, or a key or value does not fit."""
    path = Path(path)
    content = read_yaml(path)
    unknown = [key for key in content if key not in KEYS]
    if unknown:
        raise ValueError(f"{path}: {unknown[0]!r} is not a key of an experiment; there are {', '.join(KEYS)}")
    for key in ("base", "methods", "seeds"):
        if key not in content:
            raise ValueError(f"{path} has no {key!r}; an experiment needs base, methods and seeds")
    try:
        return _experiment(content, path.parent)
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


def _experiment(content: Values, folder: Path) -> Experiment:
    methods = _methods(content["methods"], folder)
    compare = read(CompareOptions, _mapping(content.get("compare"), "compare"), "compare")
    select = None
    if "select" in content:
        select = read(SelectOptions, _mapping(content["select"], "select"), "select")
    words, args = _evaluate_words(_mapping(content.get("evaluate"), "evaluate"))
    experiment = Experiment(
        base=merged(_base(content["base"], folder), _overrides(content.get("overrides"), "overrides")),
        methods=methods,
        seeds=_seeds(content["seeds"]),
        grid=_grid(content.get("grid"), methods),
        evaluate=words,
        evaluation=args,
        compare=compare,
        select=select,
        threads=_whole_number(content.get("threads", 1), "threads", 1),
    )
    experiment = replace(experiment, jobs=make_jobs(experiment))
    _check_compare(experiment)
    if select is not None:
        check_selection(select)
    return experiment


def _base(name: Any, folder: Path) -> Values:
    """Values of a preset, or of a file next to the experiment's."""
    if not isinstance(name, str):
        raise ValueError(f"base is {name!r} but must be the name of a preset or file")
    source = name if name in preset_names() else str(folder / name)
    if source != name and not Path(source).is_file():
        raise ValueError(f"base {name!r} is neither a preset ({', '.join(preset_names())}) nor a file in {folder}")
    values = upgrade(read_config(source))
    return {key: value for key, value in values.items() if key not in _RESERVED}


def _methods(methods: Any, folder: Path) -> dict[str, Values]:
    """Overrides by method, given directly or as the name of a file that holds them, such as ``selected.yaml``."""
    if isinstance(methods, str):
        source = folder / methods
        methods = read_yaml(source).get("methods")
        if methods is None:
            raise ValueError(f"{source} has no 'methods'")
    methods = _mapping(methods, "methods")
    if not methods:
        raise ValueError("methods is empty; name at least one, such as 'ce: {method: {name: ce}}'")
    for name in methods:
        if not isinstance(name, str) or not _METHOD_NAME.fullmatch(name):
            raise ValueError(f"the method {name!r} must have a name of letters, digits and . _ + -, for its folders")
    return {name: _overrides(values, f"methods.{name}") for name, values in methods.items()}


def _mapping(value: Any, name: str) -> Values:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r} but must be a mapping")
    return value


def _whole_number(value: Any, name: str, minimum: int) -> int:
    if type(value) is not int or value < minimum:
        raise ValueError(f"{name} is {value!r} but must be a whole number of at least {minimum}")
    return value


def _seeds(seeds: Any) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not seeds:
        raise ValueError(f"seeds is {seeds!r} but must be a list such as [0, 1, 2]")
    numbers = tuple(_whole_number(seed, "a seed", 0) for seed in seeds)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"seeds is {seeds} but must have each seed once")
    return numbers


def _overrides(values: Any, name: str) -> Values:
    """Nested options, from nested or dotted keys."""
    nested = upgrade(nest(_mapping(values, name), name))
    for key, instead in _RESERVED.items():
        if key in nested:
            raise ValueError(f"{name}.{key} is set by the scheduler; {instead}")
    return nested


def _grid(grid: Any, methods: Mapping[str, Any]) -> tuple[GridKey, ...]:
    keys = []
    for name, values in _mapping(grid, "grid").items():
        where = f"grid.{name}"
        only = None
        if isinstance(values, dict):
            unknown = [key for key in values if key not in ("values", "methods")]
            if unknown or "values" not in values:
                problem = f"has {unknown[0]!r}" if unknown else "has no 'values'"
                raise ValueError(f"{where} {problem}; give a list of values, or 'values' and 'methods'")
            only, values = values.get("methods"), values["values"]
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where} is {values!r} but must be a list of values")
        if only is not None:
            if not isinstance(only, list) or not only:
                raise ValueError(f"{where}.methods is {only!r} but must be a list of method names")
            unknown = [method for method in only if method not in methods]
            if unknown:
                raise ValueError(f"{where}.methods: there is no method {unknown[0]!r}; there are {', '.join(methods)}")
        if any("ood" in _overrides({name: value}, "grid").get("data", ()) for value in values):
            raise ValueError(f"{where}: OOD sets do not change the training; list them under 'evaluate'")
        keys.append(GridKey(str(name), tuple(values), None if only is None else tuple(only)))
    return tuple(keys)


def _evaluate_words(options: Values) -> tuple[tuple[str, ...], argparse.Namespace]:
    """Command-line words for options of ``tal_fast.evaluate``, and what its parser makes of them."""
    from tal_fast.data.ood import parse_named
    from tal_fast.evaluation import command

    parser = command.parser()
    excluded = {"help", "run", "weights", "npz", "ensemble", "output", "cache", *command.WEIGHTS_OPTIONS}
    actions = {action.dest: action for action in parser._actions if action.dest not in excluded}
    words: list[str] = []
    for key, value in options.items():
        dest = str(key).replace("-", "_")
        if dest not in actions:
            raise ValueError(
                f"evaluate.{key} is not an option of tal_fast.evaluate --run; there are {', '.join(actions)}"
            )
        option = f"--{dest.replace('_', '-')}"
        if value is None or value == []:
            raise ValueError(f"evaluate.{key} is empty; give a value, or leave it out")
        if actions[dest].nargs == 0:
            if not isinstance(value, bool):
                raise ValueError(f"evaluate.{key} is {value!r} but must be true or false")
            words += [option] if value else []
        elif dest in ("ood", "shift"):
            for name, source in _mapping(value, f"evaluate.{key}").items():
                words += [option, f"{name}={source}"]
        else:
            words += [option, *map(str, value if isinstance(value, list) else [value])]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            args = parser.parse_args(["--run", "RUN", *words])
        args.ood, args.shift = parse_named(args.ood, "--ood"), parse_named(args.shift, "--shift")
        command.options_of(args)
    except SystemExit:
        raise ValueError(f"evaluate: {errors.getvalue().strip().rpartition('error: ')[2]}") from None
    except ValueError as error:
        raise ValueError(f"evaluate: {error}") from None
    return tuple(words), args


def check_selection(select: SelectOptions) -> None:
    """Raise ValueError for an unusable criterion."""
    if not select.metrics:
        raise ValueError("select.metrics is empty; name at least one, such as old_fd.aurc")
    for name in select.metrics:
        setting, _, metric = name.rpartition(".")
        kind = setting.partition("/")[0]
        if kind not in ("old_fd", "ood", "new_fd", "shift") or metric not in METRICS:
            raise ValueError(
                f"select.metrics: {name!r} must be SETTING.METRIC, such as old_fd.aurc or new_fd/mnist.auroc; settings "
                f"are old_fd, ood, new_fd, shift, metrics {', '.join(METRICS)}"
            )
        if metric.startswith("eaurc"):
            raise ValueError(f"select.metrics: {name} may be below 0, where ratios mean nothing; use aurc or augrc")
    check_range("select.accuracy_loss", select.accuracy_loss, "[0, 1]")


def check_settings(select: SelectOptions, ood: Sequence[str], shifts: Sequence[str]) -> None:
    """Raise ValueError for a criterion in a setting that runs with these OOD sets and shifted sets do not have."""
    settings = {"old_fd": None}
    for kind, names in (("ood", ood), ("new_fd", ood), ("shift", shifts)):
        keys = [f"{kind}/{name}" for name in names]
        means = [mean for key in keys for mean in means_of(key)] if len(names) > 1 else [kind] * len(names)
        settings |= dict.fromkeys([*means, *keys])
    for name in select.metrics:
        setting = name.rpartition(".")[0]
        if setting not in settings:
            raise ValueError(f"select.metrics: no run has a setting {setting!r}; there are {', '.join(settings)}")


def _check_compare(experiment: Experiment) -> None:
    compare = experiment.compare
    check_at_least("compare.bootstrap", compare.bootstrap, 0)
    known = [*METRICS, *(name.rpartition(":")[2] for name in experiment.evaluation.metrics)]
    unknown = [metric for metric in compare.metrics if metric not in known]
    if unknown or not compare.metrics:
        problem = f"{unknown[0]!r} is not a metric" if unknown else "is empty"
        raise ValueError(f"compare.metrics: {problem}; there are {', '.join(known)}; evaluate.metrics may name more")
    if compare.score is not None:
        try:
            check_scores([compare.score])
        except ValueError as error:
            raise ValueError(f"compare.score: {error}") from None
    rows = [*experiment.methods, *dict.fromkeys(job.label for job in experiment.jobs)]
    if compare.baseline is not None and compare.baseline not in rows:
        raise ValueError(f"compare.baseline is {compare.baseline!r} but must be one of {', '.join(rows)}")
