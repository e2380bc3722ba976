"""Conversion of pixel arrays between grayscale and colour, and to images."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from tal_fast.data.headers import MODES

_LUMA = np.array([19595, 38470, 7471], np.uint32)
"""ITU-R 601 luma of red, green and blue in 16-bit fixed point, as in Pillow."""
_BLOCK = 4096
"""Images converted at a time: the sums need four times the memory of the pixels."""


def as_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Convert images to (N, H, W, channels) uint8, contiguous and writable: gray is repeated, colour becomes its luma.

    They are (N, H, W), (N, H, W, 1) or (N, H, W, 3) uint8; ``channels`` is 1 or 3.
    """
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.shape[3] == channels:
        return np.require(pixels, requirements=["C", "W", "E"])
    if channels == 3:
        return np.repeat(pixels, 3, axis=3)
    luma = np.empty((*pixels.shape[:3], 1), np.uint8)
    for i in range(0, len(pixels), _BLOCK):
        luma[i : i + _BLOCK, ..., 0] = (pixels[i : i + _BLOCK].astype(np.uint32) @ _LUMA + 0x8000) >> 16
    return luma


def as_image(image: Any) -> Image.Image:
    """Pillow image of an array (H, W), (H, W, 1) or (H, W, 3) uint8, or as it is; ValueError for more than 8 bits."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim < 2 or image.shape[2:] not in ((), (1,), (3,)):
            raise ValueError(f"an array must be (H, W), (H, W, 1) or (H, W, 3) uint8, not {image.shape} {image.dtype}")
        image = Image.fromarray(as_channels(image[None], 3)[0])
    if not isinstance(image, Image.Image):
        raise ValueError(f"an image must be a path, a PIL image or an array, not {type(image).__name__}")
    if image.mode not in MODES:
        raise ValueError(f"an image of mode {image.mode} has no standard conversion to 8 bits; convert it to RGB")
    return image
