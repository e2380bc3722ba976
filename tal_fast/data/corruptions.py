"""Covariate shift: six image corruptions at five severities.

They follow ImageNet-C (Hendrycks and Dietterich, 2019) but do not replace its files: the strengths below are for images
of any size, the published ones for 224 or 32 pixels. A corrupted image depends on the seed, the image's index and the
corruption alone, not on batch size, ranks or earlier reads.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tal_fast.config.names import CORRUPTIONS
from tal_fast.data.loader import ImageFormat, Normalizer

Pixels = NDArray[np.uint8]

SEVERITIES = (1, 2, 3, 4, 5)


def _gaussian_noise(pixels: Pixels, strength: float, random: np.random.Generator) -> Any:
    return pixels + 255 * strength * random.standard_normal(pixels.shape)


def _blur(pixels: Pixels, strength: float, random: np.random.Generator) -> Any:
    from PIL import ImageFilter

    radius = strength * min(pixels.shape[:2])
    return _through_pillow(pixels, lambda image: image.filter(ImageFilter.GaussianBlur(radius)))


def _contrast(pixels: Pixels, strength: float, random: np.random.Generator) -> Any:
    mean = pixels.mean(axis=(0, 1), keepdims=True)
    return mean + strength * (pixels - mean)


def _brightness(pixels: Pixels, strength: float, random: np.random.Generator) -> Any:
    return pixels + 255 * strength


def _jpeg(pixels: Pixels, strength: float, random: np.random.Generator) -> Any:
    def compress(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(strength))
        return Image.open(file)

    return _through_pillow(pixels, compress)


def _pixelate(pixels: Pixels, strength: float, random: np.random.Generator) -> Any:
    def coarsen(image: Image.Image) -> Image.Image:
        width, height = (max(1, round(strength * side)) for side in image.size)
        return image.resize((width, height), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)

    return _through_pillow(pixels, coarsen)


def _through_pillow(pixels: Pixels, change: Callable[[Image.Image], Image.Image]) -> Pixels:
    gray = pixels.shape[2] == 1
    image = change(Image.fromarray(pixels[:, :, 0] if gray else pixels))
    return np.asarray(image).reshape(pixels.shape)


_KINDS: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
    "gaussian-noise": (_gaussian_noise, (0.04, 0.08, 0.12, 0.18, 0.26)),
    "blur": (_blur, (0.01, 0.02, 0.03, 0.045, 0.06)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "jpeg": (_jpeg, (60, 40, 25, 15, 8)),
    "pixelate": (_pixelate, (0.8, 0.65, 0.5, 0.4, 0.3)),
}
"""Corruption -> function and its strength at severities 1 to 5: share of full scale (noise, brightness), standard
deviation as a share of the side (blur), remaining share (contrast, resolution of pixelate), quality (jpeg)."""


@dataclass(frozen=True)
class Corruption:
    """One corruption at one severity.

    ``kind`` is one of ``tal_fast.config.names.CORRUPTIONS``, ``severity`` is 1 to 5, ``seed`` that of the noise.
    """

    kind: str
    severity: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"unknown corruption {self.kind!r}; choose from {', '.join(CORRUPTIONS)}")
        if self.severity not in SEVERITIES:
            raise ValueError(f"the severity of a corruption is 1 to 5, not {self.severity}")

    def image(self, pixels: Pixels, index: int) -> Pixels:
        """Corrupt an image (H, W, C) uint8, C 1 or 3, whose index in its split is ``index``."""
        function, strengths = _KINDS[self.kind]
        random = np.random.default_rng([self.seed, index, CORRUPTIONS.index(self.kind), self.severity])
        changed = function(pixels, strengths[self.severity - 1], random)
        return np.clip(np.round(changed), 0, 255).astype(np.uint8)

    def of_batches(self, loader: Iterable[Any], mean: list[float], std: list[float]) -> Iterator[Any]:
        """Corrupt the images (B, C, S, S) of a loader's (images, labels, indices), normalized by ``mean`` and ``std``.

        They are converted back to bytes first, which rounds those that were resized as floats.
        """
        normalize = Normalizer(ImageFormat(3 if len(mean) == 3 else 1, mean, std, torch.device("cpu")))
        scale, offset = (torch.tensor(v).view(1, -1, 1, 1) for v in (std, mean))
        for images, labels, indices in loader:
            restored: Tensor = (images.cpu() * scale + offset) * 255
            pixels = restored.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
            corrupted = np.stack([self.image(p, int(i)) for p, i in zip(pixels, indices, strict=True)])
            yield normalize(torch.from_numpy(corrupted)).to(images.device), labels, indices
