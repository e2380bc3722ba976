"""Weights from anywhere for evaluation: ``load_weights("resnet50.pth", "resnet50", data)``.

Reads state dicts of PyTorch (``.pt``, ``.pth``; tensors and plain values only, never code) and safetensors: plain,
under ``state_dict`` or ``model`` in a checkpoint, with the prefixes that DDP, ``torch.compile`` and averaged models
add. So the released TAL code's checkpoints load too.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tal_fast.config.names import INTERPOLATIONS
from tal_fast.config.schema import DataConfig, ModelConfig
from tal_fast.data import image_folder as files
from tal_fast.data.datasets import FOLDER_IMAGE_SIZE, DataBundle, build_data
from tal_fast.models.build import build_model, timm_name
from tal_fast.models.features import FeatureLinear
from tal_fast.models.registry import NETWORKS

PRETRAINED = "pretrained"
"""Instead of a file: torchvision's own weights, where its cache holds them."""

_UNDER = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")
# Classifiers for training only, which evaluation builds without.
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The parameters and buffers in a file, by name, without wrappers' prefixes.

    Raises:
        ValueError: there is no file, it cannot be read without running code, or it holds no state dict.
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
        except Exception as problem:  # its own type of error, not exported
            raise ValueError(f"{path} cannot be read as safetensors ({_one_line(problem)})") from None
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as problem:  # a damaged file can fail in any layer of unzipping and unpickling
            raise ValueError(
                f"{path} cannot be read as weights only ({_one_line(problem)}); save it with "
                f"torch.save(model.state_dict(), PATH)"
            ) from None
    state = _state_in(content)
    if state is None:
        held = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path} holds no state dict: neither itself nor under {', '.join(_UNDER)} (it has {held})")
    # AveragedModel counts beside its module.
    return {_plain(name): value for name, value in state.items() if name != "n_averaged"}


def _one_line(problem: Exception) -> str:
    first = str(problem).strip().splitlines()
    return first[0][:160] if first else type(problem).__name__


def _state_in(content: Any) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping):
        return None
    if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        return dict(content)
    return next((found for key in _UNDER if (found := _state_in(content.get(key))) is not None), None)


def _plain(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name[len(next(p for p in _PREFIXES if name.startswith(p))) :]
    return name


def _as_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a ``cifar_`` network as most public code for CIFAR names its layers, FMFP's and OpenMix's among it; names that
    are the project's already stay."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^(?:layer(\d)|block(\d)\.layer)\.", lambda m: f"stages.{int(m[1] or m[2]) - 1}.", name)
        name = re.sub(r"^trans(\d)\.", lambda m: f"transitions.{int(m[1]) - 1}.", name)
        name = name.replace(".downsample.", ".shortcut.").replace(".convShortcut.", ".shortcut.0.")
        name = re.sub(r"^(?:linear|classifier)\.", "fc.", re.sub(r"^bn\.(?=[^.]+$)", "bn1.", name))
        renamed[name] = value
    return renamed


def load_into(model: nn.Module, state: dict[str, Tensor], source: str, classes_from: str) -> None:
    """Load a state dict into a network whose features are exposed.

    Args:
        model: from ``build_model``.
        state: from ``read_state``.
        source: where the state is from, for errors.
        classes_from: what the number of classes is from, for errors.

    Raises:
        ValueError: another number of classes, or names or shapes that do not fit.
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
    # Old files lack the count of batches that BatchNorm has seen; evaluation does not use it.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unknown:
        parts = [f"{what} {_some(names)}" for what, names in (("lacks", missing), ("also has", unknown)) if names]
        raise ValueError(f"{source} does not fit this --model: it {' and '.join(parts)}; choose the network it is for")
    other = [n for n in wanted if n in state and state[n].shape != wanted[n].shape]
    if other:
        raise ValueError(
            f"{source} does not fit this --model: {other[0]} is of shape {tuple(state[other[0]].shape)}, not "
            f"{tuple(wanted[other[0]].shape)}; choose the network, width or --channels it is for"
        )
    model.load_state_dict(state, strict=False)


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def load_weights(file: str | Path, model: ModelConfig, data: DataBundle) -> nn.Module:
    """A network for a data set, with weights from a file.

    Args:
        file: see the module; or ``pretrained`` for torchvision's own weights, if they are in its cache.
        model: name and width of the network.
        data: gives the number of classes, channels and the image size.

    Returns:
        In eval mode; images (B, C, S, S) -> logits (B, classes), features (B, D).

    Raises:
        ValueError: no such network or file, or weights that do not fit.
    """
    if str(file) == PRETRAINED:
        file = _pretrained(model.name)
    state = read_state(file)
    network = build_model(model, data.num_classes, data.channels, data.image_size)
    if model.name in NETWORKS:
        state = _as_ours(state)
    where = data.config.root or data.config.dataset
    load_into(network, state, str(file), where)
    return network.eval()


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
    """How a network wants its images: as given, else as timm says of a network of timm and torchvision of its own
    weights, else the defaults (224 pixels out of 256, bilinear, ImageNet's mean and standard deviation).

    Args:
        model: its name.
        given: ``image_size``, ``mean``, ``std``, ``crop_fraction``, ``channels``, ``interpolation``; None where not
            given.
        pretrained: whether the weights are torchvision's own.

    Returns:
        Fields of ``DataConfig``, and ``interpolation``.
    """
    found: dict[str, Any] = {}
    # What is said of images in colour does not fit others.
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
    if own is None:  # a network without weights of its own says nothing about images
        return {}
    if own.crop_mode != "center":
        print(f"note: {name} was trained on images cut by {own.crop_mode!r}; here the centre is cut", file=sys.stderr)
    size = own.input_size[-1]
    return {
        "image_size": size, "mean": list(own.mean), "std": list(own.std),
        "crop_fraction": min(1.0, size / math.floor(size / own.crop_pct)),  # whole pixels, as timm resizes to
        "interpolation": own.interpolation if own.interpolation in INTERPOLATIONS else "bilinear",
    }  # fmt: skip


def _torchvision_preprocessing(name: str) -> dict[str, Any]:
    from torchvision import models

    try:
        own = models.get_model_weights(name).DEFAULT.transforms()
    except (ValueError, AttributeError):  # ``load_weights`` says that there are none
        return {}
    return {
        "image_size": own.crop_size[0], "mean": list(own.mean), "std": list(own.std),
        "crop_fraction": own.crop_size[0] / own.resize_size[0], "interpolation": own.interpolation.value,
    }  # fmt: skip


def evaluation_data(config: DataConfig, interpolation: str = "bilinear") -> DataBundle:
    """The data set that weights are evaluated on.

    Args:
        config: as for training. A ``folder`` needs only ``val/``: without ``train/`` there are no training images, and
            the classes are those of ``val/``.
        interpolation: that images are resized with, one of ``tal_fast.config.names.INTERPOLATIONS``.

    Raises:
        ValueError: as ``tal_fast.data.build_data``, or an unknown interpolation.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation is {interpolation!r}; choose from {', '.join(INTERPOLATIONS)}")
    bundle = _bundle(config)
    bundle.interpolation = interpolation
    return bundle


def _bundle(config: DataConfig) -> DataBundle:
    root = Path(config.root or "")
    if config.dataset != "folder" or config.root is None or (root / "train").is_dir() or not root.is_dir():
        return build_data(config)
    config.check()
    class_names = list(files.files_by_class(root, "val"))
    none = files.ImageFiles([], np.zeros(0, np.int64), np.zeros((0, 2), np.int32))
    val = files.read_split(root, "val", class_names)
    return DataBundle(config, class_names, config.image_size or FOLDER_IMAGE_SIZE, none, val, {})
