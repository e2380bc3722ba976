"""Conversion to grayscale."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tal_fast.data.pixels import as_channels

RNG = np.random.default_rng(0)


def test_gray_is_that_of_pillow() -> None:
    images = RNG.integers(256, size=(5000, 3, 3, 3), dtype=np.uint8)
    want = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])
    np.testing.assert_array_equal(as_channels(images, 1)[..., 0], want)
