"""YAML files, presets and the command line of training."""

from __future__ import annotations

import argparse
import copy
import inspect
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal, get_args, get_origin

import yaml

from tal_fast.config.methods import OPTIONS, TALOptions, option_names, upgrade
from tal_fast.config.schema import Config, flatten
from tal_fast.config.typed import field_types, not_none, one_line, suggestion
from tal_fast.utils.arguments import help_formatter, with_hyphens

FITTED = {"folder-ce", "folder-tal"}
"""Presets whose network, image size and schedule are chosen by the data and the machine, where they are not given."""

_ALIASES = {"data.root": "--data-dir", "logger": "--log"}
_BUILT_IN_OPTIONS = frozenset[str]().union(*map(option_names, OPTIONS.values()))


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    files = (file.name for file in (resources.files("tal_fast.config") / "presets").iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def load_config(name_or_path: str) -> Config:
    """Read the configuration in a preset or a YAML file; raises ValueError if there is none, or it is not valid."""
    return Config.from_dict(read_config(name_or_path))


def read_config(name_or_path: str) -> dict[str, Any]:
    """Read the mapping in a preset or a YAML file, whose key ``base`` may name a preset that has the rest.

    Raises ValueError if there is no such preset or file.
    """
    path = Path(name_or_path)
    if name_or_path in preset_names():
        path = Path(str(resources.files("tal_fast.config") / "presets" / f"{name_or_path}.yaml"))
    elif not path.is_file():
        hint = suggestion(name_or_path, preset_names(), f"the presets are {', '.join(preset_names())}")
        raise ValueError(f"no preset or file {name_or_path!r}{hint}")
    values = read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    if base not in preset_names():
        raise ValueError(f"base is {short(base)} in {path} but must be a preset: {', '.join(preset_names())}")
    return merged(read_config(base), upgrade(values))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file, in UTF-8, or in UTF-16 with a byte-order mark.

    Raises ValueError if there is no such file, or it cannot be read, is not YAML or not a mapping, or names a key
    twice.
    """
    try:
        values = yaml.load(path.read_bytes(), _Loader)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except Exception as error:  # PyYAML raises errors of many types for malformed values, such as dates
        reason = one_line(error).replace('in "<byte string>", ', "at ")
        if isinstance(error, RecursionError):
            reason = "too deeply nested"
        remedy = "; save it as UTF-8" if isinstance(error, yaml.reader.ReaderError) else ""
        raise ValueError(f"{path} is not YAML: {reason}{remedy}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping such as 'epochs: 10', not {type(values).__name__}")
    return values


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses a key given twice in a mapping, and values that contain themselves."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        return super().construct_object(node, deep=True)  # only deep construction notices a value within itself

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def merged(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Nested configuration with overrides in their place, option by option; neither is changed.

    Overrides that name a built-in method remove the options that only other built-in methods have, so that naming
    another method is enough.
    """
    values = copy.deepcopy(values)
    method, override = values.get("method"), overrides.get("method")
    if isinstance(method, dict) and isinstance(override, dict) and override.get("name") in OPTIONS:
        foreign = _BUILT_IN_OPTIONS - option_names(OPTIONS[override["name"]])
        if isinstance(method.get("options"), dict):
            method["options"] = {name: v for name, v in method["options"].items() if name not in foreign}
    return _merge(values, overrides)


def _merge(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    for key, value in overrides.items():
        inner = values.get(key)
        values[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return values


def nest(values: Mapping[Any, Any], name: str = "") -> dict[str, Any]:
    """Nested dictionary from nested or dotted keys: ``{"optim.lr": 0.1}`` -> ``{"optim": {"lr": 0.1}}``.

    Raises ValueError if a key is no text, or an option is given twice.
    """
    nested: dict[str, Any] = {}
    _nest_into(nested, values, name)
    return nested


def _nest_into(nested: dict[str, Any], values: Mapping[Any, Any], name: str) -> None:
    for key, value in values.items():
        if not isinstance(key, str):
            raise ValueError(f"{name}: the key {key!r} must be text" if name else f"the key {key!r} must be text")
        first, _, rest = key.partition(".")
        inner = {rest: value} if rest else value
        path = f"{name}.{first}" if name else first
        # Keys under data.ood are the user's own names and may hold dots.
        if not isinstance(inner, dict) or name.rpartition(".")[2] == "data":
            if first in nested:
                raise ValueError(f"{path} is given twice")
            nested[first] = inner
        elif isinstance(before := nested.setdefault(first, {}), dict):
            _nest_into(before, inner, path)
        else:
            raise ValueError(f"{path} is given twice")


def parse_training(
    argv: Sequence[str], program: str = "python -m tal_fast.train"
) -> tuple[Config, bool, frozenset[str] | None]:
    """Read a command line of training: configuration, whether to measure (``--bench``), and names of the given options.

    The names, beside those of a preset of ``FITTED``, are for ``tal_fast.training.fit``; None without such a preset.
    Each ``--config`` overrides the ones before it, the other options override them all. Hyphens and underscores in
    their names are the same. Raises ValueError for an unknown preset, option or value.
    """
    # Names of data sets are the user's own.
    words = [word if word.startswith("--data.ood.") else with_hyphens(word) for word in argv]
    known, unknown = (parser := _parser(words, program)).parse_known_args(words)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        hint = suggestion(unknown[0].partition("=")[0], flags)
        raise ValueError(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    given = vars(known)
    files, bench = given.pop("config"), given.pop("bench")
    values: dict[str, Any] = {}
    given_names: set[str] = set()
    for file in files:
        content = upgrade(read_config(file))
        given_names |= set() if file in FITTED else flatten(content).keys()
        values = merged(values, content)
    if "data.ood" in given:  # all sets as one mapping
        values.get("data", {}).pop("ood", None)
    options: dict[str, Any] = {}
    for name, value in given.items():
        for part in reversed(name.split(".", 2)):
            value = {part: value}
        options = _merge(options, value)
    options = upgrade(options)
    names = frozenset(given_names | flatten(options).keys()) if FITTED & set(files) else None
    return Config.from_dict(merged(values, options)).check(), bench, names


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(message)


def _parser(words: Sequence[str], program: str) -> argparse.ArgumentParser:
    """Parser of all options, with those whose names only the command line itself has."""
    parser = _Parser(
        prog=program,
        usage="%(prog)s [--config PRESET|FILE] [--output FOLDER] [options]",
        description=f"Train a classifier. Presets: {', '.join(preset_names())}.",
        formatter_class=help_formatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    common = parser.add_argument_group("options")
    common.add_argument("-h", "--help", action="help", help="show this help and exit")
    common.add_argument(
        "--config", action="append", default=[], metavar="PRESET|FILE",
        help="name of a preset, or YAML file; may be given more than once, later ones override earlier ones",
    )  # fmt: skip
    common.add_argument(
        "--bench", action="store_true", default=False, help="measure the throughput instead of training, as JSON"
    )
    known: set[str] = set()
    for title, prefix, kind in _sections():
        group = parser.add_argument_group(title)
        help_texts = attribute_help(kind)
        for field, field_kind in zip(fields(kind), field_types(kind).values(), strict=True):
            if field.name not in inspect.get_annotations(kind):  # of a base, which has a group of its own
                continue
            name = prefix + field.name
            if is_dataclass(field_kind):  # a section, as a YAML mapping
                parser.add_argument(f"--{name}", type=_load_yaml, help=argparse.SUPPRESS)
                continue
            default = "" if field.default in (None, "", MISSING) else f" (default: {_default(field.default)})"
            shown: dict[str, Any] = {
                "metavar": _metavar(field_kind), "help": f"{help_texts[field.name]}{default}".replace("%", "%%"),
            }  # fmt: skip
            alone: dict[str, Any] = {"nargs": "?", "const": True} if field_kind is bool else {}
            if name not in known:
                group.add_argument(*_flags(name), dest=name, type=partial(_from_text, field_kind), **alone, **shown)
            else:  # another method's option of the same name: argparse takes it once, so this is for the help alone
                group._group_actions.append(argparse.Action(_flags(name), name, **shown))
            known.add(name)
    for name, kind in field_types(TALOptions).items():  # as 0.1.0 spelled them
        parser.add_argument(*_flags(f"method.{name}"), type=partial(_from_text, kind), help=argparse.SUPPRESS)
    for word in dict.fromkeys(word.partition("=")[0] for word in words):
        if word.startswith("--data.ood."):
            parser.add_argument(word, dest=word[2:], help=argparse.SUPPRESS)
        elif word.startswith("--method.options.") and word[2:].replace("-", "_") not in known:
            parser.add_argument(word, dest=word[2:].replace("-", "_"), type=_load_yaml, help=argparse.SUPPRESS)
    return parser


def _sections() -> Iterator[tuple[str, str, Any]]:
    """Title, prefix of the names, and dataclass of each group of options."""
    yield "run", "", Config
    for name, kind in field_types(Config).items():
        if is_dataclass(kind):
            yield name, f"{name}.", kind
    for kind in dict.fromkeys(base for options in OPTIONS.values() for base in reversed(options.__mro__)):
        if is_dataclass(kind) and option_names(kind) & inspect.get_annotations(kind).keys():
            users = [name for name, options in OPTIONS.items() if issubclass(options, kind)]
            yield f"options of {' and '.join(users)}", "method.options.", kind


def _flags(name: str) -> list[str]:
    flag = f"--{name}".replace("_", "-")
    return [flag, _ALIASES[name]] if name in _ALIASES else [flag]


def attribute_help(kind: type) -> dict[str, str]:
    """First sentence about each attribute in the docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        for name, description in re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", text, re.MULTILINE):
            sentence = re.split(r"(?<=\.) (?=[A-Z`])", " ".join(description.split()))[0]
            found[name] = sentence.removesuffix(".").replace("``", "")
    return found


def _metavar(kind: Any) -> str:
    kind = not_none(kind)
    if get_origin(kind) is Literal:
        return f"{{{','.join(map(str, get_args(kind)))}}}"
    if get_origin(kind) is types.UnionType:
        return "|".join(map(_metavar, get_args(kind)))
    names = {bool: "{true,false}", int: "INT", float: "FLOAT", str: "TEXT"}
    return names.get(kind) or {dict: "MAPPING"}.get(get_origin(kind), "LIST")


def _from_text(kind: Any, text: str) -> Any:
    """Value of a word of the command line, as a YAML file would give it for a type."""
    inner = not_none(kind)
    if inner is str or (get_origin(inner) is Literal and isinstance(get_args(inner)[0], str)):
        return None if text == "null" and inner is not kind else text
    if inner == list[str] and not text.startswith("["):
        return [name.strip() for name in text.split(",")]
    return _load_yaml(text, yaml.BaseLoader if inner == list[str] else _Loader)  # of names every scalar is text


def _load_yaml(text: str, loader: Any = _Loader) -> Any:
    try:
        return yaml.load(text, loader)
    except Exception:
        return text  # the check of the type refuses it, and names the option


def _default(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_default, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
