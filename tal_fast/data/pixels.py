"""Arrays of pixels made alike."""

from __future__ import annotations

import numpy as np


def as_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """(N, H, W), (N, H, W, 1) or (N, H, W, 3) uint8 to (N, H, W, channels): grey repeated, or colour's luma."""
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.shape[3] == channels:
        return np.ascontiguousarray(pixels)
    if channels == 3:
        return np.repeat(pixels, 3, axis=3)
    # Pillow's: ITU-R 601 in 16-bit fixed point, rounded. A block at a time, for the sums are four times as wide.
    luma = np.empty((*pixels.shape[:3], 1), np.uint8)
    for i in range(0, len(pixels), 4096):
        block = pixels[i : i + 4096].astype(np.uint32)
        luma[i : i + 4096, ..., 0] = (block @ np.array([19595, 38470, 7471], np.uint32) + 0x8000) >> 16
    return luma
