"""All splits of a data set behind one object: training, validation and out-of-distribution images."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from tal_fast.config.schema import DataConfig
from tal_fast.data import builtin as embedded
from tal_fast.data import cifar
from tal_fast.data import dali as dali_loader
from tal_fast.data import image_folder as files
from tal_fast.data.image_folder import OOD_LABEL, ImageFiles
from tal_fast.data.loader import ImageFormat, Loader, MemorySource, Source
from tal_fast.data.pillow import TorchSource
from tal_fast.data.pixels import as_channels
from tal_fast.data.sampler import Augmentation, Plan

FOLDER_IMAGE_SIZE = 224
SYNTHETIC_IMAGE_SIZE = 32
SYNTHETIC_POOL_BYTES = 32 * 2**20
"""Most that a split of ``synthetic`` holds: 222 images of 224 x 224 x 3, which take turns if more are asked for."""
MIN_UNREADABLE, UNREADABLE_SHARE = 10, 0.01
"""Files that a rank may fail to decode before training ends: a share of the split, but at least so many."""


@dataclass(frozen=True)
class MemoryImages:
    """A split in memory.

    Attributes:
        pixels: (P, H, W, C) uint8.
        labels: (N,) int64.
        rows: (N,) int64, where in ``pixels`` each image is; None: in order.
    """

    pixels: np.ndarray
    labels: np.ndarray
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> np.ndarray:
        """(N, 2) int32 (height, width)."""
        return np.broadcast_to(np.array(self.pixels.shape[1:3], np.int32), (len(self), 2))

    def subset(self, indices: np.ndarray) -> MemoryImages:
        """The images at ``indices``."""
        if self.rows is not None:
            return MemoryImages(self.pixels, self.labels[indices], self.rows[indices])
        return MemoryImages(self.pixels[indices], self.labels[indices])


Split = ImageFiles | MemoryImages


class DataBundle:
    """The splits of a data set; make one with ``build_data``.

    Attributes:
        config: what it was made from.
        class_names: a name for each label.
        num_classes: their number.
        ood_names: names of the out-of-distribution sets, which ``loader`` takes as splits.
        image_size: side of the images, in pixels.
        channels: 1 or 3.
        interpolation: that images are resized with, one of ``tal_fast.config.names.INTERPOLATIONS``. Bilinear, unless
            an evaluation of weights from elsewhere asks for what they were trained with.
    """

    def __init__(
        self,
        config: DataConfig,
        class_names: Sequence[str],
        image_size: int,
        train: Split,
        val: Split,
        ood: dict[str, Callable[[], Split]],
    ) -> None:
        self.config = config
        self.class_names = tuple(class_names)
        self.image_size = image_size
        self.interpolation = "bilinear"
        self._splits: dict[str, Split] = {"train": train, "train-eval": train, "val": val}
        self._ood = ood

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Of the images: 1 or 3."""
        return self.config.channels

    @property
    def ood_names(self) -> tuple[str, ...]:
        """Names of the out-of-distribution sets."""
        return tuple(self._ood)

    @cached_property
    def loader_name(self) -> str:
        """What reads the images: ``memory``, ``dali`` or ``torch``."""
        if isinstance(self._splits["train"], MemoryImages):
            return "memory"
        if self.config.loader == "auto":
            return "dali" if dali_loader.available() else "torch"
        return self.config.loader

    def summary(self) -> str:
        """The data set in a few words."""
        train, val = (len(self._splits[name]) for name in ("train", "val"))
        return f"{self.config.dataset}: {train:,} training and {val:,} validation images, {self.num_classes} classes"

    def split(self, name: str) -> Split:
        """The images of ``train``, ``train-eval``, ``val`` or one of ``ood_names``.

        Raises:
            ValueError: there is no such split.
        """
        if name not in self._splits:
            if name not in self._ood:
                raise ValueError(f"no split {name!r}; there are {', '.join([*self._splits, *self._ood])}")
            self._splits[name] = self._ood[name]()
        return self._splits[name]

    def replace(self, *, train: Split | None = None, val: Split | None = None) -> None:
        """Put other images of the same classes in a split's place."""
        if train is not None:
            self._splits["train"] = self._splits["train-eval"] = train
        if val is not None:
            self._splits["val"] = val

    def loader(
        self,
        split: str | Split,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
        skip_unreadable: bool = False,
        training: bool | None = None,
    ) -> Loader:
        """Iterable over (images, labels, indices) of one rank.

        Args:
            split: ``train`` (shuffled and augmented anew each epoch; what does not fill a step of all ranks is left
                out), ``train-eval`` (the same images in order, each once, not augmented), ``val`` or one of
                ``ood_names`` (as ``train-eval``; labels are -1). Or images from elsewhere, read as ``val``'s.
            batch_size: images of a step on this rank.
            rank, world_size: global rank and number of ranks; each rank gets its share.
            seed: of the order and augmentation of ``train``.
            device: where the images come out.
            skip_unreadable: go on past a file that does not decode: a black image with label -100, which losses
                ignore, takes its place, and ``Loader.unreadable`` names it.
            training: shuffle, augment and leave out as for ``train``; None: for ``train`` alone.

        Returns:
            A loader of images (B, C, S, S) float32, normalised; labels (B,) int64; indices (B,) int64, the image's
            place in the split.

        Raises:
            ValueError: no such split, or a training step larger than the split.
            UnreadableImage: while iterating, a file that does not decode, by its name; with ``skip_unreadable``, the
                one that is more than ``config.max_unreadable``.
        """
        images = self.split(split) if isinstance(split, str) else split
        config, device = self.config, torch.device(device)
        if training is None:
            training = isinstance(split, str) and split == "train"
        in_memory = isinstance(images, MemoryImages)
        plan = Plan(
            sizes=images.sizes,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            training=training,
            seed=seed,
            crop_fraction=config.crop_fraction,
            augmentation=Augmentation(
                crop_area=config.crop_area,
                crop_ratio=config.crop_ratio,
                flip=config.flip,
                shift=config.shift if in_memory else 0,
            ),
        )
        limit = config.max_unreadable
        if limit is None:
            limit = max(MIN_UNREADABLE, int(UNREADABLE_SHARE * len(images)))
        return Loader(
            self._source(images, plan, device),
            plan,
            images.labels,
            device,
            image_size=self.image_size,
            paths=() if isinstance(images, MemoryImages) else images.paths,
            max_unreadable=limit if skip_unreadable else 0,
            check_command=self._check_command(split),
        )

    def _check_command(self, split: str | Split) -> str:
        """What to run when files of a split do not decode."""
        if not isinstance(split, str):
            return "find the others with python -m tal_fast.check_data FOLDER"
        if split in self._ood:
            return f"find them with python -m tal_fast.check_data {shlex.quote(self.config.ood.get(split, split))}"
        root = shlex.quote(self.config.root or "FOLDER")
        return (
            f"list the others with python -m tal_fast.check_data {root} --out list.txt, "
            "then go on with --data.file_list list.txt --resume auto"
        )

    def _source(self, images: Split, plan: Plan, device: torch.device) -> Source:
        form = ImageFormat(self.channels, *self.config.normalization(), device, self.interpolation)
        if isinstance(images, MemoryImages):
            rows = None if images.rows is None else torch.from_numpy(images.rows)
            return MemorySource(plan, torch.from_numpy(images.pixels), rows, form)
        if self.loader_name == "dali":
            return dali_loader.DaliSource(plan, images, form, self.config.workers)
        return TorchSource(plan, images, form, self.config.workers)


def build_data(config: DataConfig) -> DataBundle:
    """Find and check the images of a data set.

    Reads the header of each image file once (the result is kept in the cache), so that a file that is no image is
    named before training starts.

    Raises:
        ValueError: a missing or empty folder, a class that only validation has, a class without images, a file that
            is no image, or an option that does not fit the data set.
    """
    config.check()
    if config.loader == "dali" and not dali_loader.available():
        raise ValueError(
            "data.loader is 'dali' but DALI cannot be imported; install nvidia-dali-cuda130 or set data.loader to torch"
        )
    if config.file_list is not None and config.dataset != "folder":
        raise ValueError(f"data.file_list is for data.dataset folder, not {config.dataset}; set it to null")
    make = {
        "folder": _folder,
        "digits": _digits,
        "cifar10": _cifar,
        "cifar100": _cifar,
        "fashion-mnist": _fashion_mnist,
        "synthetic": _synthetic,
    }
    bundle = make[config.dataset](config)
    train = bundle.split("train")
    if config.holdout is not None:
        if config.holdout >= len(train):
            raise ValueError(
                f"data.holdout is {config.holdout} but there are {len(train)} training images; leave some to train on"
            )
        order = np.random.default_rng(1).permutation(len(train))
        held_out, rest = (np.sort(part) for part in np.split(order, [config.holdout]))
        bundle.replace(train=train.subset(rest), val=train.subset(held_out))
        train = bundle.split("train")
    if config.train_limit is not None and config.train_limit < len(train):
        kept = np.sort(np.random.default_rng(0).permutation(len(train))[: config.train_limit])
        bundle.replace(train=train.subset(kept))
    return bundle


def _folder(config: DataConfig) -> DataBundle:
    if config.root is None:
        raise ValueError("data.root is not set; name the folder that holds train/ and val/ with --data.root FOLDER")
    if config.shift:
        raise ValueError("data.shift is for in-memory data sets; set it to 0 and use data.crop_area for image files")
    root = Path(config.root)
    class_names = files.class_folders(root, "train")
    if not (root / "val").is_dir():
        files.class_folders(root, "val")  # which says so
    listed = None if config.file_list is None else files.read_list(Path(config.file_list), root)
    train = files.read_split(root, "train", class_names, listed)
    val = files.read_split(root, "val", class_names, listed)
    ood = {name: files.read_flat(Path(path), name) for name, path in config.ood.items()}
    return DataBundle(
        config,
        class_names,
        config.image_size or FOLDER_IMAGE_SIZE,
        train,
        val,
        {name: _constant(images) for name, images in ood.items()},
    )


def _constant(images: Split) -> Callable[[], Split]:
    return lambda: images


def _digits(config: DataConfig) -> DataBundle:
    folder = embedded.digits_folder()
    ood = {"photos": str(folder / "ood" / "photos"), **config.ood}
    bundle = _folder(
        dataclasses.replace(config, root=str(folder), ood=ood, image_size=config.image_size or 8),
    )
    bundle.config = config
    return bundle


def _cifar(config: DataConfig) -> DataBundle:
    _refuse_crops(config)
    splits = {}
    for split in ("train", "val"):
        images, labels = cifar.read(config.dataset, config.root, split)
        splits[split] = MemoryImages(as_channels(images, config.channels), labels)

    def ood_set(name: str, path: str) -> Split:
        for dataset in cifar.LAYOUTS:
            if cifar.find_folder(dataset, path) is not None:
                images, labels = cifar.read(dataset, path, "val")
                ood_labels = np.full(len(labels), OOD_LABEL, np.int64)
                return MemoryImages(as_channels(images, config.channels), ood_labels)
        return files.read_flat(Path(path), name)

    return DataBundle(
        config,
        cifar.class_names(config.dataset, config.root),
        config.image_size or cifar.SIDE,
        splits["train"],
        splits["val"],
        {name: partial(ood_set, name, path) for name, path in config.ood.items()},
    )


def _fashion_mnist(config: DataConfig) -> DataBundle:
    _refuse_crops(config)
    splits = {
        split: MemoryImages(as_channels(images, config.channels), labels)
        for split, (images, labels) in embedded.fashion_mnist(config.root).items()
    }
    unknown = [name for name in config.ood if name != "mnist"]
    if unknown:
        raise ValueError(f"data.ood {unknown[0]!r} is not an out-of-distribution set of fashion-mnist; it has 'mnist'")
    root = config.ood.get("mnist")

    def mnist() -> Split:
        images = embedded.mnist(root)
        return MemoryImages(as_channels(images, config.channels), np.full(len(images), OOD_LABEL, np.int64))

    ood: dict[str, Callable[[], Split]] = {"mnist": mnist} if embedded.mnist_available(root) else {}
    return DataBundle(config, embedded.FASHION_CLASSES, config.image_size or 28, splits["train"], splits["val"], ood)


def _synthetic(config: DataConfig) -> DataBundle:
    _refuse_crops(config)
    size, channels, classes = config.image_size or SYNTHETIC_IMAGE_SIZE, config.channels, config.synthetic_classes
    pool = max(1, SYNTHETIC_POOL_BYTES // (size * size * channels))
    counts = {"train": config.synthetic_images, "val": config.synthetic_images // 2}

    def images(split: str) -> Split:
        count = counts[split]
        pixels, labels = embedded.synthetic(split, min(count, pool), size, channels, classes)
        if count <= pool:
            return MemoryImages(pixels, labels)
        rows = np.arange(count) % pool
        return MemoryImages(pixels, labels[rows], rows)

    def noise() -> Split:
        pixels = embedded.synthetic_noise(min(1000, pool), size, channels)
        return MemoryImages(pixels, np.full(len(pixels), OOD_LABEL, np.int64))

    names = [f"bars-{c}" for c in range(classes)]
    return DataBundle(config, names, size, images("train"), images("val"), {"noise": noise})


def _refuse_crops(config: DataConfig) -> None:
    if config.crop_area is not None:
        raise ValueError(
            f"data.crop_area is for image files, {config.dataset} is in memory; set data.crop_area to null and use "
            "data.shift"
        )
