"""Training batches of one rank."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

from torch import Tensor

from tal_fast.config.schema import Config
from tal_fast.data.datasets import DataBundle
from tal_fast.data.loader import Images, Loader
from tal_fast.data.ood import ood_set
from tal_fast.training.mixing import Mixer


class TrainingBatches:
    """Batches of training images and, for methods that train on them, of outliers; ``len()`` is in steps an epoch.

    ``outliers`` are the method's, as ``ood_set`` takes them; ``batch_size`` is that of this rank; ``options`` are
    further ones of ``DataBundle.loader``. ``num_images`` is the number of images of an epoch over all ranks. Raises
    ValueError if there are too few for a step.
    """

    def __init__(
        self, config: Config, data: DataBundle, outliers: str | None, batch_size: int, options: dict[str, Any]
    ) -> None:
        self._config = config
        self._mixer = Mixer(config.mix, config.seed, options.get("rank", 0)) if config.mix.on else None
        self._images = data.loader("train", batch_size=batch_size, seed=config.seed, **options)
        self._outliers: Loader | None = None
        self.num_images = self._images.num_samples
        if outliers is not None:
            found = ood_set(outliers, data.image_size, data.channels)
            # Another seed than that of the images, or images and outliers would meet in the same pairs every epoch.
            seed = config.seed + 1
            try:
                self._outliers = data.loader(found, batch_size=batch_size, seed=seed, training=True, **options)
            except ValueError as problem:
                raise ValueError(f"the outliers {outliers}: {problem}") from None

    def __len__(self) -> int:
        return len(self._images)

    @property
    def unreadable(self) -> dict[str, dict[str, str]]:
        """Files that did not decode so far on this rank: loader -> path -> reason."""
        outliers = {} if self._outliers is None else {"outliers": self._outliers.unreadable}
        return {"train": self._images.unreadable, **outliers}

    def close(self) -> None:
        """End the processes and threads of the loaders; the next epoch starts new ones."""
        for loader in filter(None, (self._images, self._outliers)):
            loader.close()

    def epoch(self, epoch: int, first: int = 0) -> Generator[tuple[Tensor, ...], None, None]:
        """Batches of an epoch from step ``first`` on: images, labels, indices, and outliers or what ``Mixer`` adds.

        There are none if ``first`` is the number of steps. The outliers' own epochs follow one another across those of
        the images.
        """
        if first == len(self):
            return
        size = self._config.image_size_at(epoch)
        self._images.set_epoch(epoch, first, size)
        if self._mixer is not None:
            with closing(iter(self._images)) as batches:
                for step, (images, labels, indices) in enumerate(batches, first):
                    yield self._mixer(images, labels, indices, epoch, step)
            return
        if self._outliers is None:
            yield from self._images
            return
        outlier_batches = _endless(self._outliers, epoch * len(self) + first, size)
        for batch, (outliers, _, _) in zip(self._images, outlier_batches, strict=False):
            yield *batch, outliers

    def images(self, epoch: int, steps: int) -> Generator[Tensor, None, None]:
        """Training images (B, C, H, W) of the first ``steps`` steps of an epoch."""
        self._images.set_epoch(epoch, 0, self._config.image_size_at(epoch))
        with closing(iter(self._images)) as batches:
            for images, _, _ in itertools.islice(batches, steps):
                yield images


def _endless(loader: Loader, step: int, image_size: int | None) -> Iterator[Images]:
    """Batches of a loader from step ``step`` on, epoch after epoch."""
    while True:
        epoch, first = divmod(step, len(loader))
        loader.set_epoch(epoch, first, image_size)
        yield from loader
        step += len(loader) - first
