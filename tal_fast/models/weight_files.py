"""State dicts in files of any project, read without running code.

Files of ``torch.save``, old ones too, and safetensors are told apart by their content. State dicts are found plain,
under ``state_dict`` or ``model`` in a checkpoint, and with the prefixes of DDP, ``torch.compile`` and averaged models.
Averaged weights, such as those under ``model_ema`` or ``ema.shadow``, are preferred. The checkpoints of the released
TAL code load, too.
"""

from __future__ import annotations

import logging
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tal_fast.utils.arrays import check_dense
from tal_fast.utils.io import check_zip

logger = logging.getLogger(__name__)

_AVERAGED = ("ema", "average", "swa", "shadow")
"""Words in the keys of averaged weights."""
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "net", "module")
_PREFIXES = ("module.", "_orig_mod.")
_MODULES = ("model", "net", "network", "module", "student", "backbone")
"""Names of the network in training code."""


class _Ignored:
    """Stand-in for an object beside the weights in a checkpoint; what was saved of it is dropped, and no code runs."""

    def __new__(cls, *args: Any, **options: Any) -> _Ignored:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


_IGNORED: list[Any] = [
    (_Ignored, name)
    for name in (
        "argparse.Namespace", "pathlib.Path", "pathlib.PosixPath", "pathlib._local.PosixPath", "numpy.dtype",
        "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    )
]  # fmt: skip
"""Kinds of objects that trainers save beside the weights: options, times and accuracies."""


def read_content(path: str | Path) -> Any:
    """Read what a file of weights holds: a state dict, or a checkpoint.

    Raises:
        ValueError: the file is missing, a pointer of Git LFS, or cannot be read without running code.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file of weights {path}")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS, not the weights; fetch them with: git lfs pull")
    try:
        if _is_safetensors(path, start):
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            check_zip(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_IGNORED), path.open("rb") as file:
            warnings.simplefilter("ignore")  # about kinds of tensors, which are refused below
            return torch.load(file, map_location="cpu", weights_only=True)  # by a path it goes by the ending
    except ImportError:
        raise ValueError(f"{path} needs safetensors; install it with: pip install safetensors") from None
    except Exception as error:  # unzipping and unpickling raise many types of errors, and safetensors exports none
        kind = "safetensors" if _is_safetensors(path, start) else "weights only"
        unknown = re.search(r"GLOBAL (\S+)", str(error))
        first_line = str(error).strip().partition("\n")[0][:160] or type(error).__name__
        reason = f"it holds a {unknown[1]}, which only running code could make" if unknown else first_line
        raise ValueError(
            f"{path} cannot be read as {kind} ({reason}); save it with torch.save(model.state_dict(), PATH)"
        ) from None


def _is_safetensors(path: Path, start: bytes) -> bool:
    """Whether a file, of which these are the first bytes, is of safetensors: a length, then a JSON header."""
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and 8 + length <= path.stat().st_size:
        return True
    return path.suffix == ".safetensors" and not start.startswith((b"PK", b"\x80"))  # zip, pickle


def choose_state(
    content: Any, path: str | Path, key: str | None = None, option: str = "--weights-key"
) -> tuple[dict[str, Tensor], str]:
    """Choose a state dict in the content of a file.

    Args:
        content: result of ``read_content``.
        path: the file, for messages.
        key: key of the weights in a checkpoint, with dots where it is nested; default averaged weights, if there are
            any, else ``state_dict``, ``model`` and the like.
        option: option that sets the key, for messages.

    Returns:
        The tensors by name, without the prefixes of DDP and compilation, and the key they were under, empty for a plain
        state dict.

    Raises:
        ValueError: there is no state dict, or it has tensors that are not plain real numbers.
    """
    path = Path(path)
    node, states = content, _states_in(content)
    for part in key.split(".") if key else ():
        node = node.get(part) if isinstance(node, Mapping) else None
    if key:
        states = {key: states[key]} if key in states else _states_in(node, key)
    prefix = len(key) if key else 0
    plain_keys = [k for k in states if all(part in _STATE_KEYS for part in filter(None, k[prefix:].split(".")))]
    plain_keys.sort(key=lambda k: [_STATE_KEYS.index(part) for part in filter(None, k[prefix:].split("."))])
    averaged = [k for k in states if _is_averaged(k[prefix:])]
    names = _names(states[plain_keys[0]]) if plain_keys else set()
    whole = [k for k in averaged if names <= _names(states[k])]
    if not whole and not plain_keys:
        keys = ", ".join(map(repr, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        where = f"under {key!r}" if key else f"neither itself nor under {', '.join((*_STATE_KEYS, *_AVERAGED))}"
        choice = f"; choose with {option} {' or '.join(list(states)[:8])}" if states else ""
        raise ValueError(f"{path} holds no state dict: {where} (it has {keys}){choice}")
    chosen = [*whole, *plain_keys][0]
    names = _names(states[chosen])
    others = [k for k in states if k != chosen and names & _names(states[k])]
    if others:
        logger.info(
            "%s: the weights under %r are used; it also has %s, which %s chooses", path, chosen,
            " and ".join(map(repr, others)), option,
        )  # fmt: skip
    if chosen not in averaged:
        for name in averaged:
            logger.warning("%s: %r lacks tensors and is not used; %r is", path, name, chosen)
    if not key and isinstance(content, Mapping):
        for name, value in content.items():
            if _is_averaged(name) and isinstance(value, (Mapping, list, tuple)) and not _states_in(value, name):
                logger.warning("%s: %r holds no state dict; the weights under %r are used", path, name, chosen)
    # n_averaged is a counter of AveragedModel.
    state = {name: value for name, value in states[chosen].items() if name != "n_averaged"}
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        _check_plain(name, value, path)
        if _without_prefixes(name) in plain:
            raise ValueError(f"{path} has {_without_prefixes(name)} twice, with and without a prefix such as module.")
        plain[_without_prefixes(name)] = value
    return plain, chosen


def _check_plain(name: str, tensor: Tensor, path: Path) -> None:
    """Raise a ValueError unless a tensor is dense, has values, and holds real numbers or booleans without NaN."""
    if tensor.is_meta:
        raise ValueError(f"{path} cannot be used: {name} has no values (device meta); save it once they are loaded")
    if tensor.dtype != torch.bool:
        check_dense(tensor, f"{name} in {path}")
    if tensor.is_floating_point() and bool(tensor.double().isnan().any()):
        raise ValueError(f"{path} cannot be used: {name} has NaN; training had diverged: take an earlier checkpoint")


def _is_averaged(key: Any) -> bool:
    return any(word in str(key).lower() for word in _AVERAGED)


def _names(state: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that a network needs, without prefixes."""
    return {_without_prefixes(name) for name in state if not name.endswith(("n_averaged", "num_batches_tracked"))}


def _states_in(
    content: Any, path: str = "", depth: int = 4, seen: set[int] | None = None
) -> dict[str, dict[str, Tensor]]:
    """Key path -> state dict, for all in a checkpoint, in its order."""
    seen = set() if seen is None else seen  # mappings that were looked into
    if not isinstance(content, Mapping) or not depth or id(content) in seen:
        return {}
    if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        return _parted(dict(content), path)
    seen.add(id(content))
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in content.items():
        if isinstance(key, str):
            found |= _states_in(value, f"{path}.{key}" if path else key, depth - 1, seen)
    return found


def _parted(state: dict[str, Tensor], path: str) -> dict[str, dict[str, Tensor]]:
    """A state dict under its key path, and apart from it averaged weights that it holds too, such as ``ema_model.fc``.

    They are modules of their own in a LightningModule, beside one with the same tensors.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        module, _, own = name.partition(".")
        modules.setdefault(module, {})[own] = value
    averaged = [module for module in modules if _is_averaged(module)]
    raw = next((module for module in modules if module in _MODULES), None)
    if raw is None or any(_names(modules[raw]) != _names(modules[module]) for module in averaged):
        return {path: state}
    rest = {name: value for name, value in state.items() if name.partition(".")[0] not in averaged}
    states = {path: rest}
    for module in averaged:
        averages = {f"{raw}.{name}": value for name, value in modules[module].items()}
        states[f"{path}.{module}".lstrip(".")] = rest | averages
    return states


def _without_prefixes(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name
