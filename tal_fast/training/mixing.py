"""Mixing of the images of a batch: mixup, CutMix, and RegMixup, which adds mixed images to the clean ones."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tal_fast.config.schema import Config, MixConfig
from tal_fast.data.loader import IGNORED_LABEL, to_device
from tal_fast.methods import Method

STREAM = 4


def check_images(config: Config, method: Method) -> None:
    """Raise ValueError if the method cannot train on images that are mixed or read more than once an epoch."""
    mix, name = config.mix, config.method.name
    if mix.on and method.mixes == "never":
        raise ValueError(f"method.name is {name!r}, which mixes images by itself; set mix.mixup and mix.cutmix to 0")
    if mix.on and mix.weight is None and method.mixes != "alone":
        raise ValueError(
            f"mix.weight is null, so that there are mixed images alone, but {name} judges images of one class; set "
            "mix.weight to 1, which trains on clean and mixed images, twice as many a step, or method.name to ce"
        )
    if method.once_an_epoch and (config.data.sampling != "shuffle" or config.data.repeats > 1):
        raise ValueError(
            f"method.name is {name!r}, which needs each image at most once an epoch; set data.sampling to shuffle and "
            "data.repeats to 1"
        )


class Mixer:
    """Mixer of the images of each batch with a permutation of them, on their device and without waiting for it.

    mixup (Zhang et al., ICLR 2018), CutMix (Yun et al., ICCV 2019) or, by batch, one of them, as in timm: one share λ,
    and one rectangle, for the batch of a rank. They are a function of (seed, epoch, step, rank).
    """

    def __init__(self, config: MixConfig, seed: int, rank: int) -> None:
        self._config, self._seed, self._rank = config, seed, rank

    def __call__(self, images: Tensor, labels: Tensor, indices: Tensor, epoch: int, step: int) -> tuple[Tensor, ...]:
        """A batch with mixed images.

        Returns:
            images (B, C, H, W), labels (B,), indices (B,): the clean ones with ``mix.weight``, else the mixed ones with
                the label of the larger share.
            mixed: (B, C, H, W), with ``mix.weight`` alone.
            pairs, share: as ``Method.mixed_loss`` takes them.
        """
        config = self._config
        random = np.random.default_rng([self._seed, epoch, STREAM, step, self._rank])
        order = to_device(torch.from_numpy(random.permutation(len(images))), images.device)
        share, box = self._draw(random, *images.shape[2:])
        if box is None:
            mixed = torch.lerp(images[order], images, share)
        else:
            rows, columns = box
            mixed = images.clone()
            mixed[..., rows, columns] = images[order][..., rows, columns]
        pairs = torch.stack([labels, labels[order]], dim=1)
        pairs = torch.where((pairs == IGNORED_LABEL).any(1, keepdim=True), IGNORED_LABEL, pairs)
        shares = torch.full((len(images),), share, device=images.device)
        if config.weight is None:
            return mixed, pairs[:, 0 if share >= 0.5 else 1], indices, pairs, shares
        return images, labels, indices, mixed, pairs, shares

    def _draw(self, random: np.random.Generator, height: int, width: int) -> tuple[float, list[slice] | None]:
        """Share of an image's own pixels and, for CutMix, the rows and the columns of the other's."""
        config = self._config
        cuts = config.cutmix > 0
        if config.mixup and config.cutmix:
            cuts = random.random() < config.switch_prob
        alpha = config.cutmix if cuts else config.mixup
        share = float(random.beta(alpha, alpha))
        if not cuts:
            return share, None
        # A rectangle of the share 1 - λ around a uniform centre; what lies outside of the image is cut off.
        box = []
        for side in (height, width):
            half, centre = int(side * math.sqrt(1 - share)) // 2, int(random.integers(side))
            box.append(slice(max(0, centre - half), min(side, centre + half)))
        return 1 - math.prod(s.stop - s.start for s in box) / (height * width), box
