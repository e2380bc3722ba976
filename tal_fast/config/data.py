"""Options of the images and their augmentation: section ``data`` of a run's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tal_fast.config.typed import check_at_least, check_range
from tal_fast.utils.own_code import DATA, absolute, in_file, installed

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)

DATASETS = ("folder", "webdataset", "huggingface", "digits", "cifar10", "cifar100", "fashion-mnist", "synthetic")
"""Kinds of data sets; others are the user's own."""

PREPROCESSING = ("image_size", "mean", "std", "crop_fraction", "interpolation")
"""Options of the data that follow the weights a run starts from, where they are not given."""


@dataclass
class DataConfig:
    """Images and their augmentation.

    Attributes:
        dataset: kind of data set, or FILE.py:NAME of your own (docs/data.md): ``folder`` has ``train/`` and ``val/``
            with one folder per class, ``webdataset`` .tar shards, ``huggingface`` parquet or Arrow files; ``digits`` is
            scikit-learn's, as image files; ``cifar10`` and ``cifar100`` are read from their binary files,
            ``fashion-mnist`` from IDX files; ``synthetic`` images are generated, for measurements.
        root: folder of the images, shards, binary files or IDX files; digits and synthetic need none. ``webdataset``
            also takes an address (``s3://``, ``https://``), ``huggingface`` a name on the hub.
        label_key: where the label of an image is. For ``webdataset`` the ending of its file (``cls``), or else an
            entry of its ``.json`` (``label``); for ``huggingface`` the column, by default the only one of classes.
        ood: out-of-distribution sets for the evaluation by name, also as ``--data.ood.NAME FOLDER``. Fashion-MNIST also
            takes folders of IDX files, CIFAR folders of CIFAR's binary files.
        split: share of the images of a folder of class folders, without ``train/`` and ``val/``, to validate on: the
            same share of each class, a random choice.
        split_seed: seed of the choice of ``data.split``.
        exif_rotation: turn images of files as their EXIF data say; by default they are read as they are stored.
        file_list: text file with one path per line, relative to the root, of the only image files to use.
            ``python -m tal_fast.check_data`` writes one.
        max_unreadable: training ends when a rank meets more undecodable files; by default 1% of the files, at least 10.
        loader: decoder of image files; ``auto`` takes DALI if it is installed.
        workers: decoding threads (DALI) or processes (torch) of each rank; 0 decodes in the training process (torch).
        timeout: seconds to wait for a step of the decoding threads or processes before training ends with an error.
        image_size: side of the square images in pixels; by default that of ``model.weights``, else 224 for a folder and
            the data set's own for others.
        channels: 3 for RGB, 1 for grayscale; images are converted.
        mean: mean of each channel, for pixel values in [0, 1]; by default that of ``model.weights``, else CIFAR's for
            CIFAR and ImageNet's for others.
        std: standard deviation of each channel, like the mean.
        crop_fraction: central share of the shorter side that validation images are cropped to; by default that of
            ``model.weights``, else 0.875.
        interpolation: antialiased filter that images are resized with; by default that of ``model.weights``, else
            bilinear.
        crop_area: range of the area that training crops take, as shares of the image; null crops as in validation.
        crop_ratio: range of the width-to-height ratio of training crops.
        flip: mirror each training image with probability 1/2.
        shift: largest random shift of in-memory training images in pixels, padded with zeros.
        augment: random operations on the pixels of training images. ``randaugment`` is timm's
            ``rand-mM-mstdS-inc1``, which DeiT uses: two of 15 operations, each with probability 1/2;
            ``trivialaugment`` is torchvision's TrivialAugmentWide: one of 14 operations at any strength.
        augment_magnitude: strength M of randaugment, in [0, 10]; torchvision's goes to 30.
        augment_std: standard deviation S of randaugment's strength between images.
        color_jitter: largest relative changes of brightness, contrast and saturation, and of hue as a share of the
            colour circle, such as 0.4, 0.4, 0.4, 0.1, in random order; null for none.
        erase: probability that a rectangle of 2 to 33% of a training image is replaced by noise (random erasing).
        sampling: ``shuffle`` reads each training image once an epoch, ``balanced`` draws as many with replacement, all
            classes equally often.
        repeats: copies of each training image in one batch, each augmented anew (repeated augmentation). An epoch
            keeps its length and has fewer different images.
        holdout: number of training images to validate on instead of the validation images. They are a fixed random
            choice that is not trained on, for choosing hyper-parameters.
        unseen_classes: names of classes, such as ``[bag, coat]``, that are neither trained nor validated on. Their
            validation images are the out-of-distribution set ``unseen``.
        train_limit: number of training images to use, a fixed random choice; by default all.
        synthetic_images: number of synthetic training images; validation has half as many.
        synthetic_classes: number of classes of synthetic images.
    """

    dataset: str = "folder"
    root: str | None = None
    ood: dict[str, str] = field(default_factory=dict)
    label_key: str | None = None
    split: float | None = None
    split_seed: int = 0
    exif_rotation: bool = False
    file_list: str | None = None
    max_unreadable: int | None = None
    loader: Literal["auto", "dali", "torch"] = "auto"
    workers: int = 4
    timeout: float = 120.0
    image_size: int | None = None
    channels: Literal[1, 3] = 3
    mean: list[float] | None = None
    std: list[float] | None = None
    crop_fraction: float | None = None
    interpolation: Literal["bilinear", "bicubic"] | None = None
    crop_area: tuple[float, float] | None = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    shift: int = 0
    augment: Literal["none", "randaugment", "trivialaugment"] = "none"
    augment_magnitude: float = 9.0
    augment_std: float = 0.5
    color_jitter: tuple[float, float, float, float] | None = None
    erase: float = 0.0
    sampling: Literal["shuffle", "balanced"] = "shuffle"
    repeats: int = 1
    holdout: int | None = None
    unseen_classes: list[str] = field(default_factory=list)
    train_limit: int | None = None
    synthetic_images: int = 2000
    synthetic_classes: int = 10

    def __post_init__(self) -> None:
        self.dataset = absolute(self.dataset)
        self.unseen_classes = sorted(set(self.unseen_classes))  # another order is no change

    def follow(self, values: Mapping[str, Any]) -> None:
        """Set the options of ``PREPROCESSING`` that are not given to other values."""
        for name in PREPROCESSING:
            if getattr(self, name) is None:
                setattr(self, name, values.get(name))

    @property
    def central_crop(self) -> float:
        """Central share of the shorter side that validation images are cropped to."""
        return 0.875 if self.crop_fraction is None else self.crop_fraction

    @property
    def resampling(self) -> str:
        """Filter that images are resized with, one of ``tal_fast.config.names.INTERPOLATIONS``."""
        return self.interpolation or "bilinear"

    def normalization(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, for pixel values in [0, 1]."""
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        mean, std = {"cifar10": (CIFAR10_MEAN, CIFAR10_STD), "cifar100": (CIFAR100_MEAN, CIFAR100_STD)}.get(
            self.dataset, (IMAGENET_MEAN, IMAGENET_STD)
        )
        if self.channels == 3:
            return list(mean), list(std)
        return [sum(mean) / 3], [sum(std) / 3]

    @property
    def changes_pixels(self) -> bool:
        """Whether training images are changed by operations of the torch loader alone."""
        return self.augment != "none" or self.color_jitter is not None

    @property
    def needs_torch_loader(self) -> bool:
        """Whether an option works in the torch loader alone."""
        return self.changes_pixels or self.exif_rotation

    def check(self) -> None:
        """Raise ValueError for a value outside its range."""
        if not in_file(self.dataset) and self.dataset not in (known := (*DATASETS, *installed(DATA))):
            raise ValueError(f"data.dataset is {self.dataset!r}; use {', '.join(known)}, or FILE.py:NAME of your own")
        check_range("data.split", self.split, "(0, 1)", ", such as 0.2, or null")
        if (self.mean is None) != (self.std is None):
            raise ValueError("data.mean and data.std go together: give both or neither")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"data.{name} has {len(values)} values but data.channels is {self.channels}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"data.std is {self.std} but must be above 0")
        limits = {
            "workers": 0, "split_seed": 0, "timeout": 1, "shift": 0, "image_size": 1, "holdout": 1, "train_limit": 1,
            "max_unreadable": 0, "synthetic_images": 2, "synthetic_classes": 2, "augment_std": 0, "repeats": 1,
        }  # fmt: skip
        for name, limit in limits.items():
            check_at_least(f"data.{name}", getattr(self, name), limit)
        check_range("data.crop_fraction", self.crop_fraction, "(0, 1]")
        if self.crop_area is not None and not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(f"data.crop_area is {list(self.crop_area)} but must be 0 < smallest <= largest <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"data.crop_ratio is {list(self.crop_ratio)} but must be 0 < smallest <= largest")
        check_range("data.augment_magnitude", self.augment_magnitude, "[0, 10]")
        check_range("data.erase", self.erase, "[0, 1]")
        if self.color_jitter is not None and not (min(self.color_jitter) >= 0 and self.color_jitter[3] <= 0.5):
            raise ValueError(
                f"data.color_jitter is {list(self.color_jitter)} but must be at least 0, and the last, hue, at most 0.5"
            )
