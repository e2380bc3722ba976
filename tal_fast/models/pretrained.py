"""Weights from files of other projects, and the preprocessing they need.

State dicts of PyTorch (``.pt``, ``.pth``, read without running code) and safetensors are read: plain, under
``state_dict`` or ``model`` in a checkpoint, and with the prefixes of DDP, ``torch.compile`` and averaged models.
Averaged weights, such as those under ``model_ema`` or ``ema.shadow``, are preferred. The checkpoints of the released
TAL code load, too.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tal_fast.config.names import INTERPOLATIONS
from tal_fast.config.schema import DataConfig, ModelConfig
from tal_fast.data import image_folder
from tal_fast.data.build import FOLDER_IMAGE_SIZE, PACKED, build_data, packed_data
from tal_fast.data.datasets import DataBundle
from tal_fast.models.build import build_model, timm_name
from tal_fast.models.features import FeatureLinear
from tal_fast.models.registry import NETWORKS
from tal_fast.utils.arrays import check_dense
from tal_fast.utils.io import check_zip

logger = logging.getLogger(__name__)

PRETRAINED = "pretrained"
"""Name instead of a file, for torchvision's own weights in its cache."""

_AVERAGED = ("ema", "average", "swa", "shadow")
"""Words in the keys of averaged weights."""
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "net", "module")
_PREFIXES = ("module.", "_orig_mod.")
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
"""Prefixes of classifiers that are for training only."""


def read_state(path: str | Path, key: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Read the parameters and buffers in a file by name, without the prefixes of wrappers.

    Args:
        path: the file.
        key: key of the weights in a checkpoint, with dots where it is nested; default averaged weights, if there are
            any, else ``state_dict``, ``model`` and the like.

    Returns:
        The tensors, and the key they were under, empty for a plain state dict.

    Raises:
        ValueError: the file is missing, cannot be read without running code, has no state dict, or has tensors that are
            not plain real numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file of weights {path}")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError(f"{path} needs safetensors; install it with: pip install safetensors") from None
        try:
            content: Any = load_file(path)
        except Exception as error:  # safetensors does not export its type of error
            raise ValueError(f"{path} cannot be read as safetensors ({_first_line(error)})") from None
    else:
        try:
            if zipfile.is_zipfile(path):
                check_zip(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about kinds of tensors, which are refused below
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # unzipping and unpickling raise many types of errors
            raise ValueError(
                f"{path} cannot be read as weights only ({_first_line(error)}); save it with "
                f"torch.save(model.state_dict(), PATH)"
            ) from None
    node = content
    for part in key.split(".") if key else ():
        node = node.get(part) if isinstance(node, Mapping) else None
    states = _states_in(node, key or "")
    prefix = len(key) if key else 0
    plain_keys = [k for k in states if all(part in _STATE_KEYS for part in filter(None, k[prefix:].split(".")))]
    plain_keys.sort(key=lambda k: [_STATE_KEYS.index(part) for part in filter(None, k[prefix:].split("."))])
    averaged = [k for k in states if _is_averaged(k[prefix:])]
    names = _names(states[plain_keys[0]]) if plain_keys else set()
    whole = [k for k in averaged if names <= _names(states[k])]
    if not whole and not plain_keys:
        keys = ", ".join(map(repr, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        where = f"under {key!r}" if key else f"neither itself nor under {', '.join((*_STATE_KEYS, *_AVERAGED))}"
        choice = f"; choose with --weights-key {' or '.join(list(states)[:8])}" if states else ""
        raise ValueError(f"{path} holds no state dict: {where} (it has {keys}){choice}")
    chosen = [*whole, *plain_keys][0]
    names = _names(states[chosen])
    others = [k for k in states if k != chosen and names & _names(states[k])]
    if others:
        logger.info(
            "%s: the weights under %r are used; it also has %s, which --weights-key chooses", path, chosen,
            " and ".join(map(repr, others)),
        )  # fmt: skip
    if chosen not in averaged:
        for name in averaged:
            logger.warning("%s: %r lacks some of the tensors under %r, which are used", path, name, chosen)
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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


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
        return {path: dict(content)}
    seen.add(id(content))
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in content.items():
        if isinstance(key, str):
            found |= _states_in(value, f"{path}.{key}" if path else key, depth - 1, seen)
    return found


def _without_prefixes(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name[len(next(p for p in _PREFIXES if name.startswith(p))) :]
    return name


def _rename_layers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a ``cifar_`` network with the layer names of public code, such as FMFP's and OpenMix's, renamed to
    the project's; the project's own names stay. Raises ValueError if two become one."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        name = re.sub(r"^(?:layer(\d)|block(\d)\.layer)\.", lambda m: f"stages.{int(m[1] or m[2]) - 1}.", name)
        name = re.sub(r"^trans(\d)\.", lambda m: f"transitions.{int(m[1]) - 1}.", name)
        name = name.replace(".downsample.", ".shortcut.").replace(".convShortcut.", ".shortcut.0.")
        name = re.sub(r"^(?:linear|classifier)\.", "fc.", re.sub(r"^bn\.(?=[^.]+$)", "bn1.", name))
        if name in renamed:
            raise ValueError(f"the weights have {name} under two names; remove one")
        renamed[name] = value
    return renamed


def load_into(model: nn.Module, state: dict[str, Tensor], source: str, classes_from: str) -> None:
    """Load a state dict from ``read_state`` into a network from ``build_model``; raises ValueError if it does not fit.

    Error messages name ``source``, the origin of the state, and ``classes_from``, that of the number of classes.
    """
    wanted = model.state_dict()
    state = {name: value for name, value in state.items() if name in wanted or not name.startswith(_AUXILIARY)}
    path, layer = [(p, m) for p, m in model.named_modules() if isinstance(m, FeatureLinear)][-1]
    head = state.get(f"{path}.weight")
    if head is not None and head.ndim == 2 and len(head) != layer.out_features:
        raise ValueError(
            f"{source} is for {len(head)} classes ({path}.weight) but {classes_from} has {layer.out_features}; "
            f"evaluate it on the classes it was trained on"
        )
    missing, unknown = [n for n in wanted if n not in state], [n for n in state if n not in wanted]
    # Old files lack BatchNorm's count of batches, which evaluation does not use.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unknown:
        parts = [
            f"{verb} {image_folder.first_names(names, 3)}"
            for verb, names in (("lacks", missing), ("also has", unknown))
            if names
        ]
        raise ValueError(f"{source} does not fit this --model: it {' and '.join(parts)}; choose the network it is for")
    kinds = [n for n in wanted if n in state and wanted[n].is_floating_point() and not state[n].is_floating_point()]
    if kinds:
        raise ValueError(f"{source}: {kinds[0]} is {state[kinds[0]].dtype}, not floating point; weights must be floats")
    other = [n for n in wanted if n in state and state[n].shape != wanted[n].shape]
    if other:
        raise ValueError(
            f"{source} does not fit this --model: {other[0]} is of shape {tuple(state[other[0]].shape)}, not "
            f"{tuple(wanted[other[0]].shape)}; choose the network, width or --channels it is for"
        )
    model.load_state_dict(state, strict=False)


def load_weights(
    file: str | Path, model: ModelConfig, data: DataBundle, key: str | None = None
) -> tuple[nn.Module, str]:
    """Build a network for a data set and load its weights from a file.

    Args:
        file: file of weights, or ``pretrained`` for torchvision's own weights in its cache.
        model: name and width of the network.
        data: data set, which defines the number of classes, channels and the image size.
        key: key of the weights in a checkpoint, see ``read_state``.

    Returns:
        Network in eval mode, of images (B, C, S, S) to logits (B, classes) and features (B, D), and the key.

    Raises:
        ValueError: the network or file is unknown, or the weights do not fit.
    """
    if str(file) == PRETRAINED:
        file = _pretrained(model.name)
    state, key = read_state(file, key)
    network = build_model(model, data.num_classes, data.channels, data.image_size)
    if model.name in NETWORKS:
        state = _rename_layers(state)
    source = f"{file} (under {key!r})" if key else str(file)
    load_into(network, state, source, data.config.root or data.config.dataset)
    return network.eval(), key


def _pretrained(name: str) -> Path:
    if name in NETWORKS or timm_name(name) is not None:
        raise ValueError(f"--weights pretrained is for networks of torchvision, not {name}; name a file")
    from torchvision import models

    try:
        url = models.get_model_weights(name).DEFAULT.url
    except (ValueError, AttributeError):
        raise ValueError(f"torchvision has no weights for {name!r}; name a file") from None
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        raise ValueError(f"torchvision's weights for {name} are not in {path}; download {url} to there")
    return path


def preprocessing(model: str, given: Mapping[str, Any], pretrained: bool = False) -> dict[str, Any]:
    """Preprocessing of the images of a network.

    Values that are not given are those of timm for a network of timm, or of torchvision for its own weights. Other
    fields are left out, so that the defaults of ``DataConfig`` apply.

    Args:
        model: name of the network.
        given: values of ``image_size``, ``mean``, ``std``, ``crop_fraction``, ``channels`` and ``interpolation``, or
            None.
        pretrained: whether the weights are torchvision's own.

    Returns:
        Fields of ``DataConfig``, and ``interpolation``.
    """
    found: dict[str, Any] = {}
    # timm's and torchvision's values are for colour images.
    if model not in NETWORKS and given.get("channels") in (None, 3):
        name = timm_name(model)
        if name is not None:
            found = _timm_preprocessing(name)
        elif pretrained:
            found = _torchvision_preprocessing(model)
    return {"interpolation": "bilinear", **found, **{key: value for key, value in given.items() if value is not None}}


def _timm_preprocessing(name: str) -> dict[str, Any]:
    import timm

    own = timm.get_pretrained_cfg(name)
    if own is None:  # a network without pretrained weights
        return {}
    if own.crop_mode != "center":
        logger.warning("%s was trained with the crop mode %r; evaluation crops the centre", name, own.crop_mode)
    size = own.input_size[-1]
    return {
        "image_size": size, "mean": list(own.mean), "std": list(own.std),
        "crop_fraction": min(1.0, size / math.floor(size / own.crop_pct)),  # timm resizes to whole pixels
        "interpolation": own.interpolation if own.interpolation in INTERPOLATIONS else "bilinear",
    }  # fmt: skip


def _torchvision_preprocessing(name: str) -> dict[str, Any]:
    from torchvision import models

    try:
        own = models.get_model_weights(name).DEFAULT.transforms()
    except (ValueError, AttributeError):  # load_weights raises the error
        return {}
    return {
        "image_size": own.crop_size[0], "mean": list(own.mean), "std": list(own.std),
        "crop_fraction": own.crop_size[0] / own.resize_size[0], "interpolation": own.interpolation.value,
    }  # fmt: skip


def evaluation_data(config: DataConfig, interpolation: str = "bilinear") -> DataBundle:
    """Build the data set that weights are evaluated on, with a filter of ``INTERPOLATIONS`` to resize images with.

    A ``folder`` without ``train/`` has no training images and the classes of ``val/``. Raises ValueError as
    ``build_data`` does, or if the interpolation is unknown.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation is {interpolation!r}; choose from {', '.join(INTERPOLATIONS)}")
    bundle = _data_without_training(config) or build_data(config)
    bundle.interpolation = interpolation
    return bundle


def _data_without_training(config: DataConfig) -> DataBundle | None:
    """Data set without training images: shards, or a folder that has no ``train/``; None for other data sets."""
    root = Path(config.root or "")
    if config.dataset in PACKED:
        config.check()
        return packed_data(config, training=False)
    if config.dataset != "folder" or config.root is None or (root / "train").is_dir() or not root.is_dir():
        return None
    config.check()
    class_names = list(image_folder.files_by_class(root, "val"))
    none = image_folder.ImageFiles([], np.zeros(0, np.int64), np.zeros((0, 2), np.int32))
    val = image_folder.read_split(root, "val", class_names)
    return DataBundle(config, class_names, config.image_size or FOLDER_IMAGE_SIZE, none, val, {})
