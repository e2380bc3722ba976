"""Operations on the pixels of a training image: RandAugment, TrivialAugment and colour jitter, by torchvision.

Which operations at which strengths is a function of random numbers that the caller passes, so that an image does not
depend on the loader's workers and a run resumes at any step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tal_fast.config.schema import DataConfig

_OPERATIONS = 2
"""Operations of RandAugment on an image."""


@cache
def _torchvision() -> Any:
    """torchvision's transforms, which take a second to import and which training without them does not need."""
    return import_module("torchvision.transforms.v2")


_COLORS = ("brightness", "contrast", "saturation", "sharpness")
_SIGNED = ("rotate", "shear_x", "shear_y", *_COLORS, "translate_x", "translate_y")
_Policy = dict[str, Callable[[float, int], float]]  # operation -> (strength in [0, 1], side in pixels) -> value


def _policy(
    others: _Policy, rotation: float, shear: float, color: float, shift: Callable[[float, int], float]
) -> _Policy:
    """Operations ``others``, and those of either sign up to ``rotation`` degrees and so on."""
    largest = {"rotate": rotation, "shear_x": shear, "shear_y": shear, **dict.fromkeys(_COLORS, color)}
    signed = {name: partial(lambda limit, a, side: limit * a, limit) for name, limit in largest.items()}
    return {**others, **signed, "translate_x": shift, "translate_y": shift}


RANDAUGMENT = _policy(
    {
        **dict.fromkeys(("autocontrast", "equalize", "invert"), lambda a, side: 0.0),
        "posterize": lambda a, side: max(1, 4 - int(4 * a)),  # 0 bits, timm's at magnitude 10, would be black
        "solarize": lambda a, side: 256 - int(256 * a),
        "solarize_add": lambda a, side: int(110 * a),
    },
    30.0, 0.3, 0.9, lambda a, side: 0.45 * a * side,
)  # fmt: skip
"""The operations of timm's ``rand-...-inc1``, whose strengths all increase with the magnitude."""

TRIVIALAUGMENT = _policy(
    {
        **dict.fromkeys(("identity", "autocontrast", "equalize"), lambda a, side: 0.0),
        "posterize": lambda a, side: 8 - round(6 * a),
        "solarize": lambda a, side: 255 - 255 * a,
    },
    135.0, 0.99, 0.99, lambda a, side: int(32 * a),
)  # fmt: skip
"""The operations of TrivialAugment's wide space, as in torchvision (Müller and Hutter, ICCV 2021)."""


class PixelAugmentation:
    """Augmentation of the pixels of one image: ``data.augment``, then ``data.color_jitter``.

    What an operation leaves empty has the mean colour. ``draws`` is the number of random numbers for an image.
    """

    def __init__(self, config: DataConfig) -> None:
        _torchvision()  # before the workers start, or each would import it
        self._config = config
        self._fill = [round(255 * value) for value in config.normalization()[0]]
        self._policy_draws = {"none": 0, "randaugment": 4 * _OPERATIONS, "trivialaugment": 3}[config.augment]
        self.draws = self._policy_draws + (0 if config.color_jitter is None else 8)

    def __call__(self, image: Image.Image, draws: np.ndarray) -> Image.Image:
        """Augment an image of mode RGB or L by (``draws``,) random numbers in [0, 1)."""
        config, numbers = self._config, draws.tolist()
        if config.augment == "randaugment":
            for i in range(_OPERATIONS):
                which, happens, deviation, sign = numbers[4 * i : 4 * i + 4]
                if happens < 0.5:
                    deviation = NormalDist().inv_cdf(max(deviation, 1e-9)) * config.augment_std
                    strength = min(max((config.augment_magnitude + deviation) / 10, 0.0), 1.0)
                    image = self._operate(image, RANDAUGMENT, which, strength, sign)
        elif config.augment == "trivialaugment":
            which, strength, sign = numbers[:3]
            image = self._operate(image, TRIVIALAUGMENT, which, int(31 * strength) / 30, sign)
        if config.color_jitter is not None:
            image = _jitter(image, config.color_jitter, numbers[self._policy_draws :])
        return image

    def batch(self, pixels: Tensor, draws: np.ndarray) -> Tensor:
        """Augment images (B, H, W, C) uint8 on the CPU by (B, ``draws``) random numbers."""
        images = (Image.fromarray(image) for image in (pixels[..., 0] if pixels.shape[3] == 1 else pixels).numpy())
        changed = [np.asarray(self(image, row)) for image, row in zip(images, draws, strict=True)]
        return torch.from_numpy(np.stack(changed)).reshape(pixels.shape)

    def _operate(self, image: Image.Image, policy: _Policy, which: float, strength: float, sign: float) -> Image.Image:
        """Apply an operation, chosen by ``which`` in [0, 1), at a strength in [0, 1]."""
        name = list(policy)[int(which * len(policy))]
        value = policy[name](strength, max(image.size))
        return apply(name, image, -value if name in _SIGNED and sign >= 0.5 else value, self._fill)


def apply(name: str, image: Image.Image, value: float, fill: list[int]) -> Image.Image:
    """Apply an operation by name; colours change by the factor 1 + ``value``, a shear is a slope."""
    functional, bilinear = _torchvision().functional, _torchvision().InterpolationMode.BILINEAR
    if name == "identity":
        return image
    if name in _COLORS:
        return getattr(functional, f"adjust_{name}")(image, 1 + value)
    if name == "rotate":
        return functional.rotate(image, value, bilinear, fill=fill)
    if name.startswith(("shear", "translate")):
        shear, shift = [0.0, 0.0], [0.0, 0.0]
        axis = int(name.endswith("y"))
        if name.startswith("shear"):
            shear[axis] = math.degrees(math.atan(value))
        else:
            shift[axis] = value
        return functional.affine(image, 0.0, shift, 1.0, shear, bilinear, fill=fill, center=[0, 0])
    if name in ("posterize", "solarize"):
        return getattr(functional, name)(image, value)
    if name == "solarize_add":
        return image.point([min(255, i + int(value)) if i < 128 else i for i in range(256)] * len(image.getbands()))
    return getattr(functional, name)(image)


def _jitter(image: Image.Image, ranges: tuple[float, ...], numbers: list[float]) -> Image.Image:
    """Change brightness, contrast, saturation and hue in a random order, as torchvision's ColorJitter."""
    names = ("brightness", "contrast", "saturation", "hue")
    for i in sorted(range(4), key=lambda i: numbers[4 + i]):
        change = ranges[i] * (2 * numbers[i] - 1)
        if ranges[i]:
            value = change if names[i] == "hue" else max(0.0, 1 + change)
            image = getattr(_torchvision().functional, f"adjust_{names[i]}")(image, value)
    return image
