"""Detectors of pytorch-ood (extra ``ood``) on cached outputs: the scores ``ood:DETECTOR``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from tal_fast.scores.training_statistics import Training, principal_dimensions
from tal_fast.utils.arrays import BLOCK, Floats, by_blocks


def fit_detector(
    name: str, training: Training, samples: int | None, seed: int
) -> Callable[[NDArray[Any], NDArray[Any]], Floats]:
    """Fit ``ood:DETECTOR`` with its default options; returns the score, a function of logits and features.

    Detectors of feature maps (ReAct, ASH) take features as maps of 1 x 1. DICE, without a default, masks 90% of the
    weights. ``samples`` random training features are fitted on; None: all.

    Raises:
        ValueError: pytorch-ood is missing, has no such detector, or cannot fit it to outputs without the network.
    """
    try:
        from pytorch_ood import detector
    except ImportError:
        raise ValueError("it needs pytorch-ood; install it with: pip install 'tal-fast[ood]'") from None
    import torch

    classes = {n.lower(): getattr(detector, n) for n in detector.__all__ if inspect.isclass(getattr(detector, n))}
    if (kind := classes.get(name.removeprefix("ood:").lower())) is None:
        raise ValueError(f"pytorch-ood has no such detector; it has {', '.join(classes)}")
    if training.labels is None or training.weight is None:
        raise ValueError(f"{name} needs training labels and the weight (C, D) of the last Linear layer")
    part = next((p for p in ("logits", "features", "feature_maps") if hasattr(kind, f"predict_{p}")), "")
    weight = torch.tensor(training.weight).float()
    bias = torch.zeros(len(weight)) if training.bias is None else torch.tensor(training.bias).float()
    linear = torch.nn.Linear(weight.shape[1], len(weight)).requires_grad_(False)
    linear.load_state_dict({"weight": weight, "bias": bias})
    head = torch.nn.Sequential(torch.nn.Flatten(), linear) if part == "feature_maps" else linear
    known: dict[str, Any] = {"head": head, "w": weight, "b": bias, "d": principal_dimensions(weight.shape[1]), "p": 0.9}
    known |= dict.fromkeys(("model", "encoder", "backbone"))
    options = inspect.signature(kind).parameters.values()
    needed = {o.name for o in options if o.default is o.empty and o.kind is not o.VAR_KEYWORD}
    if not part or kind is detector.RankFeat or not needed <= known.keys():
        raise ValueError("it needs more than cached outputs; run it on the network with pytorch-ood itself")

    def tensor(rows: NDArray[Any]) -> torch.Tensor:
        x = torch.tensor(rows).float()
        return x[..., None, None] if part == "feature_maps" else x

    chosen = training.chosen(samples, seed)
    features, labels = tensor(training.choose(len(chosen), seed)), torch.tensor(training.labels[chosen]).long()
    try:
        fitted = kind(**{option: known[option] for option in needed})
        getattr(fitted, f"fit_{part}")(linear(features) if part == "logits" else features, labels)
    except Exception as error:  # of the library's own types
        raise ValueError(f"pytorch-ood cannot fit it ({error})") from error

    def score(rows: Floats) -> Floats:
        return -getattr(fitted, f"predict_{part}")(tensor(rows)).detach().double().numpy()

    # 64 rows at a time: DICE multiplies each with the whole layer.
    return lambda logits, features: by_blocks(score, logits if part == "logits" else features, BLOCK // 64)
