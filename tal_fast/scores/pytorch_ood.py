"""Detectors of pytorch-ood (extra ``ood``) on cached outputs, as the scores ``ood:DETECTOR``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tal_fast.scores.training_statistics import Training
from tal_fast.utils.arrays import BLOCK, Floats, by_blocks

DICE_SPARSITY = 0.9
"""Share of the last layer's weights that DICE masks, as its paper does for CIFAR; the one number without a default."""


def fit_detector(
    name: str, training: Training, principal: int, samples: int | None, seed: int
) -> Callable[[NDArray[Any], NDArray[Any]], Floats]:
    """Fit a detector on training features; returns the score, a function of (n, C) logits and (n, D) features.

    Detectors of feature maps, such as ReAct and ASH, take the features as maps of 1 x 1.

    Args:
        name: class of ``pytorch_ood.detector``, in any case.
        training: with labels and the last layer's weight.
        principal: number of principal directions, for its ViM.
        samples, seed: number of training features fitted on, chosen at random; None: all.

    Raises:
        ValueError: pytorch-ood is missing, has no such detector, or cannot fit it to outputs without the network.
    """
    try:
        from pytorch_ood import detector
    except ImportError:
        raise ValueError(f"ood:{name} needs pytorch-ood; install it with: pip install 'tal-fast[ood]'") from None
    import torch

    made_by = {n.lower(): getattr(detector, n) for n in detector.__all__ if inspect.isclass(getattr(detector, n))}
    if (kind := made_by.get(name.lower())) is None:
        raise ValueError(f"pytorch-ood has no detector {name!r}; it has {', '.join(sorted(made_by))}")
    if training.labels is None or training.weight is None:
        raise ValueError(f"ood:{name} needs training labels and the weight (C, D) of the last Linear layer")
    part = next((p for p in ("logits", "features", "feature_maps") if hasattr(kind, f"predict_{p}")), "")
    weight = torch.tensor(training.weight, dtype=torch.float32)
    bias = torch.zeros(len(weight)) if training.bias is None else torch.tensor(training.bias, dtype=torch.float32)
    linear = torch.nn.Linear(*reversed(weight.shape)).requires_grad_(False)
    linear.weight, linear.bias = (torch.nn.Parameter(x, requires_grad=False) for x in (weight, bias))
    head = torch.nn.Sequential(torch.nn.Flatten(), linear) if part == "feature_maps" else linear
    known = {"model": None, "encoder": None, "backbone": None, "head": head, "w": weight, "b": bias}
    known |= {"d": principal, "p": DICE_SPARSITY}
    needed = [
        n for n, p in inspect.signature(kind).parameters.items() if p.default is p.empty and p.kind != p.VAR_KEYWORD
    ]
    if not part or kind is detector.RankFeat or not set(needed) <= set(known):
        raise ValueError(f"ood:{name} needs the network itself or more than its outputs; run it with pytorch-ood")

    def tensor(rows: NDArray[Any]) -> torch.Tensor:
        x = torch.tensor(rows, dtype=torch.float32)
        return x[..., None, None] if part == "feature_maps" else x

    chosen = training.chosen(training.features.shape[0] if samples is None else samples, seed)
    features, labels = (
        tensor(training.choose(len(chosen), seed)),
        torch.from_numpy(training.labels[chosen].astype(np.int64)),
    )
    try:
        fitted = kind(**{n: known[n] for n in needed})
        getattr(fitted, f"fit_{part}")(linear(features) if part == "logits" else features, labels)
    except Exception as error:  # of the library's own types
        raise ValueError(f"pytorch-ood cannot fit {name} ({error})") from error
    predict = getattr(fitted, f"predict_{part}")

    def score(rows: Floats) -> Floats:
        return -predict(tensor(rows)).detach().double().numpy()

    # 64 rows at a time: DICE multiplies each with the whole layer.
    return lambda logits, features: by_blocks(score, logits if part == "logits" else features, BLOCK // 64)
