"""Construction of a data set from its configuration."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from reprlib import repr as short

import numpy as np

from tal_fast.config.schema import DataConfig
from tal_fast.config.typed import suggestion
from tal_fast.data import builtin, cifar, dali, image_folder
from tal_fast.data.datasets import FOLDER_IMAGE_SIZE, DataBundle, MemoryImages, Split
from tal_fast.data.image_folder import ImageFiles
from tal_fast.data.own import own_data
from tal_fast.data.packed import SPLITS
from tal_fast.data.pixels import as_channels
from tal_fast.data.sources import PACKED, flat_images
from tal_fast.utils.logs import say

SYNTHETIC_IMAGE_SIZE = 32
UNSEEN = "unseen"
"""Name of the OOD set of ``data.unseen_classes``."""
SYNTHETIC_POOL_BYTES = 32 * 2**20
"""Memory limit of a split of ``synthetic``: 222 images of 224 x 224 x 3, which repeat if more are configured."""


def build_data(config: DataConfig, training: bool = True) -> DataBundle:
    """Find and check the images of a data set.

    Unless it is for ``training``, shards need no training split, and a folder no ``train/``, whose classes are then
    those of ``val/``.

    The header of each image file is read once and its size kept in the cache, so that a file that is no image is
    reported before training starts. Raises ValueError for a missing or empty folder, a class that only validation has,
    a class without images, a file that is no image, or an option that does not fit the data set.
    """
    config.check()
    if config.loader == "dali" and not dali.available():
        raise ValueError(
            "data.loader is 'dali' but DALI cannot be imported; install nvidia-dali-cuda130 or set data.loader to torch"
        )
    if config.loader == "dali" and config.needs_torch_loader:
        raise ValueError(
            "data.loader is 'dali' but data.augment, data.color_jitter and data.exif_rotation work in the torch loader "
            "alone; set data.loader to torch, or data.augment to none, data.color_jitter to null and "
            "data.exif_rotation to false"
        )
    kinds = {"split": ["folder"], "file_list": ["folder", *PACKED], "label_key": [*PACKED]}
    for name, own in kinds.items():
        if getattr(config, name) is not None and config.dataset not in own:
            raise ValueError(f"data.{name} is for data.dataset {', '.join(own)}, not {config.dataset}; set it to null")
    make: dict[str, Callable[[DataConfig], DataBundle]] = {
        "folder": partial(_folder, training=training),
        "digits": _digits,
        "cifar10": _cifar,
        "cifar100": _cifar,
        "fashion-mnist": _fashion_mnist,
        "synthetic": _synthetic,
        "webdataset": partial(_packed, training=training),
        "huggingface": partial(_packed, training=training),
    }
    bundle = make.get(config.dataset, partial(own_data, training=training))(config)
    if bundle.loader_name == "memory" and config.crop_area is not None:
        raise ValueError(
            f"data.crop_area is for image files, {config.dataset} is in memory; set data.crop_area to null and use "
            "data.shift"
        )
    if bundle.loader_name != "memory" and config.shift:
        raise ValueError("data.shift is for in-memory data sets; set it to 0 and use data.crop_area for image files")
    if bundle.loader_name == "dali" and any(
        isinstance(split, ImageFiles) and split.torch_only for split in map(bundle.split, ("train", "val"))
    ):
        raise ValueError(
            "data.loader is 'dali', which reads neither HEIC files nor map-style datasets; set data.loader to torch"
        )
    if config.needs_torch_loader and config.loader == "auto" and bundle.loader_name == "torch" and dali.available():
        names = "data.augment, data.color_jitter and data.exif_rotation"
        say(f"{names} work in the torch loader only, which is used", logging.INFO)
    train = bundle.split("train")
    if config.holdout is not None:
        if config.holdout >= len(train):
            raise ValueError(
                f"data.holdout is {config.holdout} but there are {len(train)} training images; leave some to train on"
            )
        order = np.random.default_rng(1).permutation(len(train))
        held_out, rest = (np.sort(part) for part in np.split(order, [config.holdout]))
        bundle.replace(train=train.subset(rest), val=train.subset(held_out))
    if config.unseen_classes:
        bundle = _without_classes(bundle, config.unseen_classes)
    train = bundle.split("train")
    if config.train_limit is not None and config.train_limit < len(train):
        kept = np.sort(np.random.default_rng(0).permutation(len(train))[: config.train_limit])
        bundle.replace(train=train.subset(kept))
    return bundle


def _without_classes(bundle: DataBundle, unseen: Sequence[str]) -> DataBundle:
    """Data set of the other classes, with the validation images of the ``unseen`` ones as an OOD set of this name."""
    unknown = sorted(set(unseen) - set(bundle.class_names))
    if unknown:
        hint = suggestion(unknown[0], bundle.class_names, f"there are {short(bundle.class_names)}")
        raise ValueError(f"data.unseen_classes names {unknown[0]!r}, which is no class{hint}")
    kept = [label for label, name in enumerate(bundle.class_names) if name not in unseen]
    if len(kept) < 2:
        raise ValueError(f"data.unseen_classes leaves {len(kept)} of {bundle.num_classes} classes; leave at least 2")
    if UNSEEN in bundle.ood_names:
        raise ValueError(f"data.ood has a set {UNSEEN!r}, the name of the images of data.unseen_classes; rename it")
    place = np.full(bundle.num_classes, image_folder.OOD_LABEL)
    place[kept] = np.arange(len(kept))

    def only(split: Split, chosen: np.ndarray) -> Split:
        images = split.subset(np.flatnonzero(chosen))
        return dataclasses.replace(images, labels=place[images.labels])

    train, val = bundle.split("train"), bundle.split("val")
    ood: dict[str, Callable[[], Split]] = {name: partial(bundle.split, name) for name in bundle.ood_names}
    ood[UNSEEN] = partial(only, val, place[val.labels] < 0)
    names = [bundle.class_names[label] for label in kept]
    train, val = only(train, place[train.labels] >= 0), only(val, place[val.labels] >= 0)
    return DataBundle(bundle.config, names, bundle.image_size, train, val, ood)


def _folder(config: DataConfig, training: bool = True) -> DataBundle:
    root = Path(_root(config))
    val_alone = not training and config.split is None and root.is_dir() and not (root / "train").is_dir()
    class_names = [] if val_alone else image_folder.class_folders(root, "train" if config.split is None else "")
    if config.split is None and not (root / "val").is_dir():
        image_folder.class_folders(root, "val")  # raises the error
    listed = None if config.file_list is None else image_folder.read_list(Path(config.file_list), root)
    if config.split is not None:
        return _file_bundle(config, class_names, *_split(root, class_names, listed, config.split, config.split_seed))
    class_names = class_names or list(image_folder.files_by_class(root, "val", listed))
    train = None if val_alone else image_folder.read_split(root, "train", class_names, listed)
    return _file_bundle(config, class_names, train, image_folder.read_split(root, "val", class_names, listed))


def _packed(config: DataConfig, training: bool) -> DataBundle:
    """Data set in shards or of Hugging Face; it needs a validation split unless ``config.holdout`` chooses images."""
    source = PACKED[config.dataset](_root(config), config.label_key)
    found = {split: source.split(split) for split in ("train", "val")}
    for split, needed in (("train", training), ("val", config.holdout is None)):
        if found[split] is None and needed:
            remedy = "" if split == "train" else "; add one, or validate on training images with data.holdout"
            raise ValueError(f"{source.root} has no split {' or '.join(SPLITS[split])}{remedy}")
    if config.file_list is not None:
        root = f"{config.dataset}:{source.root}"
        names = [os.path.normpath(line) for line in image_folder.list_lines(Path(config.file_list), root)]
        listed = frozenset(name if name.startswith(source.root) else f"{source.root}/{name}" for name in names)
        missing = listed.difference(*(images.names for images in found.values() if images is not None))
        image_folder.refuse_missing(sorted(missing), "images", Path(config.file_list), root)
        found = {split: images and images.only(listed) for split, images in found.items()}
    first = found["train"] or found["val"]
    assert first is not None
    class_names = source.class_names() or first.class_names()
    train, val = (None if images is None else images.images(class_names) for images in found.values())
    return _file_bundle(config, class_names, train, val)


def _root(config: DataConfig) -> str:
    if config.root is None:
        raise ValueError("data.root is not set; name the folder that holds train/ and val/ with --data.root FOLDER")
    return config.root


def _file_bundle(
    config: DataConfig, class_names: Sequence[str], train: ImageFiles | None, val: ImageFiles | None
) -> DataBundle:
    some = train or val
    assert some is not None
    none = some.subset(np.zeros(0, np.int64))
    ood = {name: flat_images(spec, name) for name, spec in config.ood.items()}
    getters: dict[str, Callable[[], Split]] = {name: partial(ood.__getitem__, name) for name in ood}
    return DataBundle(config, class_names, config.image_size or FOLDER_IMAGE_SIZE, train or none, val or none, getters)


def _split(
    root: Path, class_names: list[str], listed: Mapping[str, tuple[int, int]] | None, share: float, seed: int
) -> tuple[ImageFiles, ImageFiles]:
    """Training and validation images of a folder of class folders: of each class the same share, at least one image."""
    if {"train", "val"} <= set(class_names) or set(class_names) <= {"train", "val", "test"}:
        raise ValueError(
            f"{root} holds {' and '.join(class_names)}, which data.split would take for classes; set data.split to "
            "null, or name a folder of class folders with data.root"
        )
    images = image_folder.read_split(root, "", class_names, listed)
    chosen = np.zeros(len(images), dtype=bool)
    for label in range(len(class_names)):
        rows = np.random.default_rng([seed, label]).permutation(np.flatnonzero(images.labels == label))
        chosen[rows[: min(max(1, round(share * len(rows))), len(rows) - 1)]] = True
    if not chosen.any():
        raise ValueError(f"no class of {root} has two images, which data.split needs for training and validation")
    return images.subset(np.flatnonzero(~chosen)), images.subset(np.flatnonzero(chosen))


def _digits(config: DataConfig) -> DataBundle:
    folder = builtin.digits_folder()
    ood = {"photos": str(folder / "ood" / "photos"), **config.ood}
    bundle = _folder(dataclasses.replace(config, root=str(folder), ood=ood, image_size=config.image_size or 8))
    bundle.config = config
    return bundle


def _cifar(config: DataConfig) -> DataBundle:
    train, val = (
        MemoryImages(as_channels(images, config.channels), labels)
        for images, labels in (cifar.read(config.dataset, config.root, split) for split in ("train", "val"))
    )

    def ood_set(name: str, path: str) -> Split:
        for dataset in cifar.LAYOUTS:
            if cifar.find_folder(dataset, path) is not None:
                return MemoryImages.unlabelled(cifar.read(dataset, path, "val")[0], config.channels)
        return flat_images(path, name)

    ood: dict[str, Callable[[], Split]] = {name: partial(ood_set, name, path) for name, path in config.ood.items()}
    names = cifar.class_names(config.dataset, config.root)
    return DataBundle(config, names, config.image_size or cifar.SIDE, train, val, ood)


def _fashion_mnist(config: DataConfig) -> DataBundle:
    train, val = (
        MemoryImages(as_channels(images, config.channels), labels)
        for images, labels in builtin.fashion_mnist(config.root).values()
    )
    unknown = [name for name in config.ood if name != "mnist"]
    if unknown:
        raise ValueError(f"data.ood {unknown[0]!r} is not an out-of-distribution set of fashion-mnist; it has 'mnist'")
    root = config.ood.get("mnist")
    ood: dict[str, Callable[[], Split]] = {}
    if builtin.mnist_available(root):
        ood["mnist"] = lambda: MemoryImages.unlabelled(builtin.mnist(root), config.channels)
    return DataBundle(config, builtin.FASHION_CLASSES, config.image_size or 28, train, val, ood)


def _synthetic(config: DataConfig) -> DataBundle:
    size, channels, classes = config.image_size or SYNTHETIC_IMAGE_SIZE, config.channels, config.synthetic_classes
    pool = max(1, SYNTHETIC_POOL_BYTES // (size * size * channels))

    def images(split: str, count: int) -> Split:
        pixels, labels = builtin.synthetic(split, min(count, pool), size, channels, classes)
        if count <= pool:
            return MemoryImages(pixels, labels)
        rows = np.arange(count) % pool
        return MemoryImages(pixels, labels[rows], rows)

    train, val = images("train", config.synthetic_images), images("val", config.synthetic_images // 2)
    noise: dict[str, Callable[[], Split]] = {
        "noise": lambda: MemoryImages.unlabelled(builtin.synthetic_noise(min(1000, pool), size, channels), channels)
    }
    return DataBundle(config, [f"bars-{c}" for c in range(classes)], size, train, val, noise)
