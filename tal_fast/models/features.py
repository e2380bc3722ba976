"""Penultimate features: the input of a classifier's last Linear layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tal_fast.config.typed import one_line

Model = TypeVar("Model", bound=nn.Module)


class FeatureLinear(nn.Linear):
    """Linear layer that returns ``(logits, features)``, where the features are its input.

    Parameters and state-dict keys are those of ``nn.Linear``.
    """

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Logits (B, C), and the features (B, D) themselves."""
        return F.linear(input, self.weight, self.bias), input


def expose_features(model: Model, images: Tensor | None = None) -> Model:
    """Make ``model(images)`` return ``(logits, features)`` instead of logits, in place.

    The model's last ``nn.Linear`` is replaced by a ``FeatureLinear`` with the same parameters. There are no hooks, so
    the model works under ``torch.compile``, DDP and ``torch.export``. It must return that layer's output unchanged.
    Where it returns an object with the field ``logits``, as the models of transformers do, that field becomes the pair:
    ``logits, features = model(images).logits``.

    Args:
        model: classifier that returns logits (B, C), or an object with such ``logits``.
        images: small batch to test the model on, in eval mode; by default zeros (2, 3, 64, 64), or of the size that the
            configuration of a model of timm, torchvision or transformers names if that one does not fit.

    Returns:
        The same model; it is unchanged if its features are exposed already.

    Raises:
        ValueError: the model has no ``nn.Linear``, or changes the last one's output; the model is then unchanged.
    """
    name = type(model).__name__
    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(
            f"{name} has no nn.Linear layer whose input could be the features; end it with one that returns the logits"
        )
    path, last = linears[-1]
    if isinstance(last, FeatureLinear):
        return model
    if path == "":
        raise ValueError("the model is a single nn.Linear; put it into an nn.Sequential")
    exposed = FeatureLinear.__new__(FeatureLinear)
    exposed.__dict__ = last.__dict__
    model.set_submodule(path, exposed)
    for batch in _trial_batches(model) if images is None else [images]:
        problem = _output_problem(model, exposed, batch)
        if problem is None:
            return model
    model.set_submodule(path, last)
    heads = [path for path, module in linears if module.out_features == last.out_features][-2:]
    if len(heads) == 2 and any("dist" in head for head in heads):  # head_dist in timm, distillation_classifier
        raise ValueError(
            f"{name} averages the logits of two layers ({' and '.join(heads)}), as distilled networks do, so they have "
            "no features in common; take a network without distillation, such as timm's deit_tiny_patch16_224 or "
            "transformers' DeiTForImageClassification"
        )
    raise ValueError(
        f"{name} does not return the output of its last nn.Linear ({path}) as it is, tried on images "
        f"{tuple(batch.shape)}: {problem}; give images of the size it expects, return logits and features yourself, or "
        "end the model with that layer"
    )


def _trial_batches(model: nn.Module) -> list[Tensor]:
    """Images to test a model on: small ones, and those that its configuration names."""
    config = getattr(model, "config", model)  # of transformers; torchvision's vision transformers have image_size alone
    channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", None)
    shapes = [(channels, 64, 64)]
    if size is not None:
        shapes.append((channels, *size) if isinstance(size, (list, tuple)) else (channels, size, size))
    settings = getattr(model, "pretrained_cfg", None)  # of timm
    if isinstance(settings, dict) and settings.get("input_size"):
        shapes.append(settings["input_size"])
    return [torch.zeros(2, *shape) for shape in shapes]


class TwoLayerHead(nn.Sequential):
    """Classifier of two layers: Linear (D, D), ReLU, and a ``FeatureLinear`` (D, C)."""


COSINE_SCALE = 8.0
"""Factor of the cosines in ``CosineLinear``, as in the code of SURE."""


class CosineLinear(FeatureLinear):
    """Cosine classifier: logits are the scaled cosines of the features and the classes' weights, without a bias.

    As in SURE (Li et al., CVPR 2024). The features that it returns are its input, not normalised.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Logits (B, C) in [-``COSINE_SCALE``, ``COSINE_SCALE``], and the features (B, D) themselves."""
        return F.linear(F.normalize(input), COSINE_SCALE * F.normalize(self.weight)), input


class _Inputs(nn.Module):
    """Stand-in for a head: no logits, and the head's input as features."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return input[:, :0], input


def feature_layer(model: nn.Module) -> tuple[str, FeatureLinear]:
    """Name and module of the ``FeatureLinear`` of a model from ``expose_features``."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, FeatureLinear)][-1]


def head_path(model: nn.Module) -> str:
    """Name of the head in a model from ``expose_features``: its ``FeatureLinear`` or the ``TwoLayerHead`` around it."""
    path = feature_layer(model)[0]
    parent = path.rpartition(".")[0]
    return parent if isinstance(model.get_submodule(parent), TwoLayerHead) else path


def replace_head(model: nn.Module, kind: str) -> None:
    """Replace the head of a model from ``expose_features`` by one of ``model.head`` with new weights, in place."""
    path, last = feature_layer(model)
    if kind == "linear":
        return
    if kind == "cosine":
        model.set_submodule(path, CosineLinear(last.in_features, last.out_features))
        return
    hidden = nn.Linear(last.in_features, last.in_features)
    model.set_submodule(path, TwoLayerHead(hidden, nn.ReLU(), FeatureLinear(last.in_features, last.out_features)))


@contextlib.contextmanager
def without_head(model: nn.Module) -> Iterator[nn.Module]:
    """The model, returning no logits (B, 0) and its head's input (B, D); the head is put back at the end."""
    path = head_path(model)
    head = model.get_submodule(path)
    model.set_submodule(path, _Inputs())
    try:
        yield model
    finally:
        model.set_submodule(path, head)


def keep_classes(model: nn.Module, num_classes: int) -> None:
    """Keep the first ``num_classes`` logits of a model from ``expose_features``, in place."""
    last = feature_layer(model)[1]
    if num_classes < last.out_features:
        last.weight = nn.Parameter(last.weight.detach()[:num_classes].clone())
        if last.bias is not None:
            last.bias = nn.Parameter(last.bias.detach()[:num_classes].clone())
        last.out_features = num_classes


def _output_problem(model: nn.Module, last: FeatureLinear, images: Tensor) -> str | None:
    """Difference between the model's outputs and (logits, features) of its last layer; None if there is none."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            output = model(images.to(last.weight))
        output = getattr(output, "logits", output)
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error)}"
    finally:
        for module, training in modes:
            module.training = training
    if not (isinstance(output, tuple) and len(output) == 2 and all(isinstance(o, Tensor) for o in output)):
        return f"it returns {type(output).__name__}"
    shapes = [tuple(o.shape) for o in output]
    wanted = [(len(images), last.out_features), (len(images), last.in_features)]
    if shapes != wanted:
        return f"it returns shapes {shapes}, not {wanted}"
    if not torch.equal(F.linear(output[1], last.weight, last.bias), output[0]):
        return "its logits are not that layer's"
    return None


def last_layer(model: nn.Module) -> tuple[Any, Any]:
    """Weight (C, D) and bias (C,), or None, of the layer that exposes the features, as float64 arrays.

    The weight of a ``CosineLinear`` is the one that multiplies normalised features.
    """
    layer = feature_layer(model)[1]
    bias = None if layer.bias is None else layer.bias.detach().cpu().double().numpy()
    weight = layer.weight.detach().cpu().double()
    if isinstance(layer, CosineLinear):
        weight = COSINE_SCALE * F.normalize(weight)
    return weight.numpy(), bias
