"""Random erasing of training images, on the device, for every loader."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tal_fast.data.loader import to_device
from tal_fast.data.sampler import Plan, random_boxes

AREA, RATIO = (0.02, 1 / 3), (0.3, 3.3)
"""Range of the rectangle's share of the image, and of its width-to-height ratio, as in timm."""

STREAM = 3


class Eraser:
    """Random erasing (Zhong et al., AAAI 2020) with probability ``probability`` for an image.

    A rectangle is replaced by standard normal noise, timm's mode ``pixel``. Rectangles are a function of (seed, epoch,
    image), the noise of (seed, epoch, step, rank) and the kind of device.
    """

    def __init__(self, plan: Plan, probability: float, device: torch.device) -> None:
        self._plan, self._probability, self._device = plan, probability, device
        self._noise = torch.Generator(device)
        self._epoch: int | None = None

    def __call__(self, images: Tensor, indices: np.ndarray, epoch: int, step: int) -> None:
        """Erase in place in the normalized images (B, C, S, S) of a step; does not wait for the device."""
        plan, size = self._plan, images.shape[-1]
        if self._epoch != epoch:
            self._epoch, self._draws = epoch, plan.draws(epoch, STREAM, 5)
        draws = self._draws[plan.rows(step, indices)]
        chosen = np.flatnonzero(draws[:, 4] < self._probability)
        boxes = random_boxes(np.full((len(chosen), 2), float(size)), AREA, RATIO, draws[chosen, :4])
        top, left, height, width = to_device(torch.from_numpy(boxes), self._device).T[..., None]
        at = torch.arange(size, device=self._device)
        inside = ((at >= top) & (at < top + height))[:, :, None] & ((at >= left) & (at < left + width))[:, None, :]
        seed = np.random.SeedSequence([plan.seed, epoch, STREAM, step, plan.rank]).generate_state(1, np.uint32)
        noise = images.new_empty(len(chosen), *images.shape[1:])
        noise.normal_(generator=self._noise.manual_seed(int(seed[0])))
        rows = to_device(torch.from_numpy(chosen), self._device)
        images[rows] = torch.where(inside[:, None], noise, images[rows])
