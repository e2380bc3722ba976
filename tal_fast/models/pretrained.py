"""Weights that a network starts from or is evaluated with, and the preprocessing they need."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import sys
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tal_fast.config.names import INTERPOLATIONS
from tal_fast.config.schema import Config, ModelConfig
from tal_fast.config.typed import one_line
from tal_fast.data.datasets import DataBundle
from tal_fast.data.image_folder import first_names
from tal_fast.models.build import build_model, timm_name
from tal_fast.models.features import feature_layer, head_path
from tal_fast.models.registry import NETWORKS
from tal_fast.models.weight_files import choose_state, read_content

logger = logging.getLogger(__name__)

PRETRAINED = "pretrained"
"""Name instead of a file, for torchvision's and timm's own weights."""

_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "student.")
"""Names of modules around a network in training code."""
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
"""Prefixes of classifiers that are for training only."""


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


@dataclass
class Weights:
    """Weights of a network."""

    state: dict[str, Tensor]  # parameters and buffers by name
    source: str  # where they come from, for messages
    key: str = ""  # key in the file that they were under, empty for a plain state dict
    preprocessing: dict[str, Any] = field(default_factory=dict)  # fields of ``DataConfig`` that they need
    class_names: list[str] | None = None  # names of their classes, where the file is of a run of this project


def read_weights(
    weights: str | Path, model: str, key: str | None = None, option: str = "--weights-key", channels: int = 3
) -> Weights:
    """Read the weights for a network.

    Args:
        weights: file of weights; ``pretrained`` for those of torchvision or timm, downloaded unless they are cached.
        model: name of the network.
        key, option: see ``tal_fast.models.weight_files.choose_state``.
        channels: channels of the images that the preprocessing is for.

    Raises:
        ValueError: there are none, or they cannot be read or downloaded.
    """
    own = str(weights) == PRETRAINED
    if own and key is not None:
        raise ValueError(f"{option} is for files of weights, not for {PRETRAINED}; leave it out")
    if own:
        found = Weights(_pretrained(model), f"the {PRETRAINED} {model}")
    else:
        content = read_content(weights)
        state, key = choose_state(content, weights, key, option)
        found = Weights(state, f"{weights} (under {key!r})" if key else str(weights), key)
        if isinstance(content, dict) and {"format", "config", "shape"} <= content.keys():
            _take_from_run(found, content)
    fields = found.preprocessing = found.preprocessing or preprocessing(model, {}, own)
    for name in {"mean", "std"} & fields.keys():
        if len(fields[name]) != channels:
            fields[name] = [sum(fields[name]) / len(fields[name])] * channels
    return found


def _take_from_run(weights: Weights, content: Mapping[str, Any]) -> None:
    """Set preprocessing and classes to those in a checkpoint of this project."""
    try:
        data, shape = Config.from_dict(content["config"]).data, content["shape"]
        mean, std = data.normalization()
        weights.class_names = list(shape["class_names"])
        weights.preprocessing = {
            "image_size": shape["image_size"], "mean": mean, "std": std, "crop_fraction": data.central_crop,
            "interpolation": data.resampling,
        }  # fmt: skip
    except (ValueError, KeyError, TypeError):
        logger.warning("%s has the options of another version; its preprocessing is not known", weights.source)


def load_weights(
    file: str | Path, model: ModelConfig, data: DataBundle, key: str | None = None
) -> tuple[nn.Module, str]:
    """Build a network for a data set and load its weights from a file, for an evaluation.

    Args:
        file, key: see ``read_weights``.
        model: name and width of the network.
        data: data set, which defines the number of classes, channels and the image size.

    Returns:
        Network in eval mode, of images (B, C, S, S) to logits (B, classes) and features (B, D), and the key.

    Raises:
        ValueError: the network or file is unknown, or the weights do not fit.
    """
    weights = read_weights(file, model.name, key)
    network = build_model(model, data.num_classes, data.channels, data.image_size)
    state = _fitted(network, weights)
    path, layer = feature_layer(network)
    head = state.get(f"{path}.weight")
    if head is not None and head.ndim == 2 and len(head) != layer.out_features:
        raise ValueError(
            f"{weights.source} is for {len(head)} classes ({path}.weight) but {data.config.root or data.config.dataset}"
            f" has {layer.out_features}; evaluate it on the classes it was trained on"
        )
    _load(network, state, weights.source)
    _check_class_order(weights, data.class_names)
    return network.eval(), weights.key


def _check_class_order(weights: Weights, names: Sequence[str]) -> None:
    """Warn where the outputs of a network may be in another order than the classes of the data."""
    theirs = weights.class_names
    if theirs is None and all(map(str.isdecimal, names)):
        theirs = sorted(names, key=int)
    if theirs is not None and list(theirs) != list(names):
        logger.warning(
            "the classes of %s may be in the order %s, ..., the data's are %s, ...; if so, give the "
            "folders names that sort like the outputs (00, 01, ...)",
            *(weights.source, ", ".join(theirs[:4]), ", ".join(names[:4])),
        )


def start_from(network: nn.Module, weights: Weights, class_names: Sequence[str]) -> None:
    """Load weights into a network that is to be trained further.

    For other classes than those of the weights, by number or, where they are known, by name, the network's own head
    stays, with initial weights no larger than twice those of ``nn.Linear``. A first convolution of three channels is
    summed for images of one.

    Raises:
        ValueError: other tensors do not fit.
    """
    state = _fitted(network, weights)
    path, (last, layer) = head_path(network), feature_layer(network)
    new = {f"{path}.{name}": value for name, value in network.get_submodule(path).state_dict().items()}
    theirs = next(
        (len(state[name]) for name in (f"{last}.weight", f"{path}.weight") if name in state and state[name].ndim), 0
    )
    other = weights.class_names is not None and weights.class_names != list(class_names)
    same_kind = new.keys() == {name for name in state if name.startswith(f"{path}.")}
    if other or theirs != layer.out_features or not same_kind:
        about = f"is for {theirs}{' other' * other} classes" if theirs else f"has no {last}.weight"
        if theirs == layer.out_features and not other:
            about = "has another kind of head"
        logger.info("%s %s: the head, for %d classes, is new", weights.source, about, layer.out_features)
        # EfficientNet and MobileNetV3 initialise it for 1,000 classes: with 10, a loss of 5.5 at first instead of 2.3.
        if layer.weight.std() > 2 * (3 * layer.in_features) ** -0.5:  # twice that of nn.Linear
            layer.reset_parameters()
        state = {name: value for name, value in state.items() if not name.startswith(f"{path}.")} | new
    stem, first = next(((p, m) for p, m in network.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
    kernel = state.get(f"{stem}.weight")
    if first is not None and kernel is not None and kernel.ndim == 4 and first.in_channels == 1 < kernel.shape[1]:
        logger.info("%s: %s.weight is summed over its %d channels", weights.source, stem, kernel.shape[1])
        state[f"{stem}.weight"] = kernel.float().sum(1, keepdim=True)
    _load(network, state, weights.source)


def _fitted(network: Any, weights: Weights) -> dict[str, Tensor]:
    """State dict with the network's names, and position embeddings resized to its image size."""
    wanted = {name: value.shape for name, value in network.state_dict().items()}
    state = _unwrapped(weights.state, wanted.keys(), weights.source)
    state = {name: value for name, value in state.items() if name in wanted or not name.startswith(_AUXILIARY)}
    module = type(network).__module__
    if module.startswith("tal_fast."):
        return _rename_layers(state)
    if {name: value.shape for name, value in state.items()} == wanted:
        return state
    with contextlib.suppress(Exception):  # of a file that does not fit, which is named when it is loaded
        if module == "torchvision.models.vision_transformer":
            from torchvision.models.vision_transformer import interpolate_embeddings

            return dict(interpolate_embeddings(network.image_size, network.patch_size, OrderedDict(state)))
        convert = getattr(sys.modules[module], "checkpoint_filter_fn", None)
        if module.startswith("timm.") and convert is not None:
            # timm's own: it knows the names of the papers' code, and resizes position embeddings.
            return dict(convert(dict(state), network))
    return state


def _unwrapped(state: Mapping[str, Tensor], wanted: Collection[str], source: str) -> dict[str, Tensor]:
    """State dict without the prefixes of modules around the network.

    If all of the network's tensors have one, those without are of its neighbours, such as a loss, and left out.
    """
    found: dict[str, Tensor] = {}
    wrapped = set()
    for name, value in state.items():
        own = name
        while own not in wanted and own.startswith(_WRAPPERS):
            own = own.partition(".")[2]
            wrapped.add(own)
        if own in found:
            raise ValueError(f"{source} has {own} twice, with and without a prefix such as {_WRAPPERS[0]}")
        found[own] = value
    outside = [name for name in found if name not in wrapped]
    if not outside or wrapped.isdisjoint(wanted) or not set(wanted).isdisjoint(outside):
        return found
    logger.info("%s: ignored, as the network has no such names: %s", source, first_names(outside, 3))
    return {name: value for name, value in found.items() if name in wrapped}


def _load(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict; raises ValueError if it does not fit."""
    wanted = network.state_dict()
    missing, unknown = [n for n in wanted if n not in state], [n for n in state if n not in wanted]
    # Old files lack BatchNorm's count of batches, which only its momentum of null uses.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unknown:
        parts = [
            f"{verb} {first_names(names, 3)}" for verb, names in (("lacks", missing), ("also has", unknown)) if names
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
    network.load_state_dict(state, strict=False)


def _pretrained(model: str) -> dict[str, Tensor]:
    """State dict of a network of torchvision or timm with its own weights, from its cache or downloaded."""
    if model in NETWORKS:
        raise ValueError(f"{PRETRAINED} weights are for networks of torchvision and timm, not {model}; name a file")
    name = timm_name(model)
    if name is not None:
        import timm
        from huggingface_hub import constants

        cache = constants.HF_HUB_CACHE
        if not timm.is_model_pretrained(name):
            raise ValueError(f"timm has no weights for {name}; name a file")
    else:
        published, cache = _published(model), str(Path(torch.hub.get_dir()) / "checkpoints")
        if published is None:
            raise ValueError(f"torchvision has no weights for {model!r}; name a file")
    try:
        if name is not None:
            return _timm_weights(name)
        return dict(published.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except Exception as error:  # of many types: no network, a proxy, a damaged file in the cache
        raise ValueError(
            f"the weights of {model} are not in {cache} and cannot be downloaded ({one_line(error)[:200]}); copy that "
            "folder from a machine that has them, or name a file of weights"
        ) from None


def _published(model: str) -> Any:
    """torchvision's weights of a network; None if it has none."""
    from torchvision import models

    with contextlib.suppress(ValueError, AttributeError):
        return models.get_model_weights(model).DEFAULT
    return None


def is_cached(model: str) -> bool:
    """Whether the weights of a network of torchvision or timm need no download."""
    name = None if model in NETWORKS else timm_name(model)
    if name is None:
        own = _published(model)
        return own is not None and (Path(torch.hub.get_dir()) / "checkpoints" / Path(own.url).name).is_file()
    import timm
    from huggingface_hub import try_to_load_from_cache

    hub = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None) or ""
    files = ("model.safetensors", "pytorch_model.bin") if hub else ()
    return any(isinstance(try_to_load_from_cache(hub, file), str) for file in files)


def _timm_weights(name: str) -> dict[str, Tensor]:
    import timm
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:  # the cache first, which needs no network
        return dict(timm.create_model(name, pretrained=True).state_dict())
    except Exception:  # an error of the hub, of several types; the next attempt raises the others again
        if offline:
            raise
    finally:
        constants.HF_HUB_OFFLINE = offline
    with contextlib.suppress(urllib.error.HTTPError):  # which is an answer
        urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()  # the hub retries for 46 s without a network
    return dict(timm.create_model(name, pretrained=True).state_dict())


def preprocessing(model: str, given: Mapping[str, Any], pretrained: bool = False) -> dict[str, Any]:
    """Preprocessing of the images of a network, as fields of ``DataConfig``.

    Values that are not given are those of timm for a network of timm, or of torchvision for its own weights. Other
    fields are left out, so that the defaults of ``DataConfig`` apply.

    Args:
        model: name of the network.
        given: values of ``image_size``, ``mean``, ``std``, ``crop_fraction``, ``channels`` and ``interpolation``, or
            None.
        pretrained: whether the weights are torchvision's own.
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
    weights = _published(name)
    if weights is None:  # read_weights raises the error
        return {}
    own = weights.transforms()
    # The weights of the Inception networks are for pixels in [-1, 1], to which torchvision's forward pass turns others.
    half = [0.5, 0.5, 0.5] if name in ("googlenet", "inception_v3") else None
    return {
        "image_size": own.crop_size[0], "mean": half or list(own.mean), "std": half or list(own.std),
        "crop_fraction": own.crop_size[0] / own.resize_size[0], "interpolation": own.interpolation.value,
    }  # fmt: skip
