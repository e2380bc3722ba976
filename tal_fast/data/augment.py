"""Operations on the pixels of a training image: RandAugment, TrivialAugment and colour jitter, by torchvision.

Which operations at which strengths is a function of random numbers that the caller passes, so that an image does not
depend on the loader's workers and a run resumes at any step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tal_fast.config.schema import DataConfig

_RANDAUGMENT_OPERATIONS = 2
_MAX_MAGNITUDE = 10.0
_TRIVIALAUGMENT_STRENGTHS = 31


@cache
def _torchvision() -> Any:
    """torchvision's transforms, which take a second to import and which training without them does not need."""
    return import_module("torchvision.transforms.v2")


@dataclass(frozen=True)
class _Policy:
    """Operations and their strengths; ``signed`` has largest values, of either sign."""

    signed: Mapping[str, float]
    unsigned: Mapping[str, Callable[[float], float]]  # strength in [0, 1] -> value
    translation: Callable[[float, int], float]  # strength, side of the image in pixels -> translation in pixels

    @property
    def operations(self) -> tuple[str, ...]:
        return (*self.unsigned, *self.signed, "translate_x", "translate_y")


def _none(strength: float) -> float:
    return 0.0


_COLORS = ("brightness", "contrast", "saturation", "sharpness")

RANDAUGMENT = _Policy(
    {"rotate": 30.0, "shear_x": 0.3, "shear_y": 0.3, **dict.fromkeys(_COLORS, 0.9)},
    {
        **dict.fromkeys(("autocontrast", "equalize", "invert"), _none),
        "posterize": lambda a: max(1, 4 - int(4 * a)),  # 0 bits, timm's at magnitude 10, would be black
        "solarize": lambda a: 256 - int(256 * a),
        "solarize_add": lambda a: int(110 * a),
    },
    lambda a, side: 0.45 * a * side,
)
"""The operations of timm's ``rand-...-inc1``, whose strengths all increase with the magnitude."""

TRIVIALAUGMENT = _Policy(
    {"rotate": 135.0, "shear_x": 0.99, "shear_y": 0.99, **dict.fromkeys(_COLORS, 0.99)},
    {
        **dict.fromkeys(("identity", "autocontrast", "equalize"), _none),
        "posterize": lambda a: 8 - round(6 * a),
        "solarize": lambda a: 255 - 255 * a,
    },
    lambda a, side: int(32 * a),
)
"""The operations of TrivialAugment's wide space, as in torchvision (Müller and Hutter, ICCV 2021)."""


class PixelAugmentation:
    """Augmentation of the pixels of one image: ``data.augment``, then ``data.color_jitter``.

    What an operation leaves empty has the mean colour. ``draws`` is the number of random numbers for an image.
    """

    def __init__(self, config: DataConfig) -> None:
        _torchvision()  # before the workers start, or each would import it
        self._config = config
        self._fill = [round(255 * value) for value in config.normalization()[0]]
        draws = {"none": 0, "randaugment": 4 * _RANDAUGMENT_OPERATIONS, "trivialaugment": 3}
        self._policy_draws = draws[config.augment]
        self.draws = self._policy_draws + (0 if config.color_jitter is None else 8)

    def __call__(self, image: Image.Image, draws: np.ndarray) -> Image.Image:
        """Augment an image of mode RGB or L by (``draws``,) random numbers in [0, 1)."""
        config, numbers = self._config, draws.tolist()
        if config.augment == "randaugment":
            for i in range(_RANDAUGMENT_OPERATIONS):
                which, happens, deviation, sign = numbers[4 * i : 4 * i + 4]
                if happens < 0.5:
                    deviation = NormalDist().inv_cdf(max(deviation, 1e-9)) * config.augment_std
                    magnitude = min(max(config.augment_magnitude + deviation, 0.0), _MAX_MAGNITUDE)
                    image = self._operate(image, RANDAUGMENT, which, magnitude / _MAX_MAGNITUDE, sign)
        elif config.augment == "trivialaugment":
            which, strength, sign = numbers[:3]
            steps = _TRIVIALAUGMENT_STRENGTHS
            image = self._operate(image, TRIVIALAUGMENT, which, int(strength * steps) / (steps - 1), sign)
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
        name = policy.operations[int(which * len(policy.operations))]
        if name in policy.unsigned:
            return apply(name, image, policy.unsigned[name](strength), self._fill)
        if name in policy.signed:
            value = strength * policy.signed[name]
        else:
            value = policy.translation(strength, max(image.size))
        return apply(name, image, value if sign < 0.5 else -value, self._fill)


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
    if name == "posterize":
        return functional.posterize(image, int(value))
    if name == "solarize":
        return functional.solarize(image, value)
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
