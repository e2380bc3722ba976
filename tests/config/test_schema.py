"""Configurations: ranges of their values, and files they are saved to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tal_fast.config.data import CIFAR100_MEAN, IMAGENET_STD
from tal_fast.config.parse import load_config
from tal_fast.config.schema import OWN_OF_A_RANK, Config, DataConfig, MethodConfig, OptimConfig


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    config = load_config("imagenet-resnet50-tal")
    config.data.ood = {"textures": "/data/dtd"}
    config.save(tmp_path / "config.yaml")
    assert load_config(str(tmp_path / "config.yaml")) == config
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"epochs": 0}, "epochs is 0 but must be at least 1"),
        ({"seed": -1}, "seed is -1 but must be at least 0"),
        ({"keep_every_epochs": 0}, "keep_every_epochs is 0"),
        ({"profile": "5:5"}, "profile is '5:5' but must be START:STOP"),
        ({"image_sizes": [[1, 64]]}, "image_sizes is [[1, 64]] but must be (epoch, side) pairs"),
        ({"image_sizes": [[0, 64], [0, 96]]}, "image_sizes is [[0, 64], [0, 96]]"),
        ({"data": {"mean": [0.1]}}, "data.mean and data.std go together"),
        ({"data": {"mean": [0.1], "std": [0.1]}}, "data.mean has 1 values but data.channels is 3"),
        ({"data": {"channels": 1, "mean": [0.1], "std": [0.0]}}, "data.std is [0.0] but must be above 0"),
        ({"data": {"workers": -1}}, "data.workers is -1 but must be at least 0"),
        ({"data": {"synthetic_classes": 1}}, "data.synthetic_classes is 1 but must be at least 2"),
        ({"data": {"crop_fraction": 1.5}}, "data.crop_fraction is 1.5 but must be in (0, 1]"),
        ({"data": {"crop_area": [0.5, 0.1]}}, "data.crop_area is [0.5, 0.1]"),
        ({"data": {"crop_ratio": [0, 1]}}, "data.crop_ratio is [0.0, 1.0]"),
        ({"data": {"augment_magnitude": 11}}, "data.augment_magnitude is 11.0 but must be in [0, 10]"),
        ({"data": {"augment_std": -1}}, "data.augment_std is -1.0 but must be at least 0"),
        ({"data": {"erase": 1.5}}, "data.erase is 1.5 but must be in [0, 1]"),
        ({"data": {"color_jitter": [0.4, 0.4, 0.4, 0.6]}}, "data.color_jitter is [0.4, 0.4, 0.4, 0.6] but must be at"),
        ({"data": {"repeats": 0}}, "data.repeats is 0 but must be at least 1"),
        ({"model": {"width": 0}}, "model.width is 0 but must be at least 1"),
        (
            {"optim": {"head_epochs": 3}, "epochs": 3},
            "optim.head_epochs is 3 of 3 epochs: the head alone would train; set model.freeze to backbone",
        ),
        ({"optim": {"lr": 0}}, "optim.lr is 0.0 but must be above 0"),
        ({"optim": {"momentum": 1}}, "optim.momentum is 1.0 but must be in [0, 1)"),
        ({"optim": {"momentum": 0}}, "optim.nesterov needs momentum above 0"),
        ({"optim": {"accumulate": 0}}, "optim.accumulate is 0 but must be at least 1"),
        ({"optim": {"schedule": "multistep"}}, "optim.schedule is 'multistep' but optim.step_epochs is empty"),
        ({"optim": {"clip_norm": 0}}, "optim.clip_norm is 0.0 but must be above 0, or null for no clipping"),
        ({"optim": {"ema_decay": 1}}, "optim.ema_decay is 1.0 but must be in (0, 1), or null for no average"),
        ({"method": {"class_weight": "even"}}, "method.class_weight is 'even'; use none, balanced or a list"),
        ({"method": {"class_weight": [1, -1]}}, "method.class_weight is [1.0, -1.0] but must be at least 0"),
        ({"method": {"class_weight": []}}, "method.class_weight is [] but must be at least 0, and above 0 for some"),
        (
            {"method": {"class_weight": "balanced"}, "data": {"sampling": "balanced"}},
            "data.sampling and method.class_weight are both balanced",
        ),
        ({"mix": {"mixup": -0.1}}, "mix.mixup is -0.1 but must be at least 0"),
        ({"mix": {"switch_prob": 1.1}}, "mix.switch_prob is 1.1 but must be in [0, 1]"),
        ({"mix": {"mixup": 1, "weight": 0}}, "mix.weight is 0.0 but must be above 0, or null for mixed images"),
        ({"mix": {"weight": 1}}, "mix.weight is 1.0 but no images are mixed; set mix.mixup or mix.cutmix"),
        ({"method": {"label_smoothing": 1}}, "method.label_smoothing is 1.0 but must be in [0, 1)"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(values: dict[str, Any], sentence: str) -> None:
    config = Config.from_dict(values)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared in the next line
        config.check()
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"optim": {"lr": ".nan"}}, "optim.lr is '.nan' but must be a finite number"),
        ({"optim": {"lr": float("nan")}}, "optim.lr is nan but must be a finite number"),
        ({"optim": {"clip_norm": float("inf")}}, "optim.clip_norm is inf but must be a finite number"),
        ({"data": {"crop_area": [0.1, "nan"]}}, "data.crop_area is 'nan' but must be a finite number"),
        ({"method": {"options": {"t_max": float("inf")}}}, "method.options.t_max is inf but must be a finite number"),
        ({"optim": {"weight_decay": 10**400}}, "optim.weight_decay is 1000"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_by_name(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared in the next line
        Config.from_dict(values)
    assert str(caught.value).startswith(sentence)


def test_a_configuration_made_in_python_is_checked_alike() -> None:
    with pytest.raises(ValueError, match="optim.lr is nan but must be a finite number"):
        Config(optim=OptimConfig(lr=float("nan"))).check()
    with pytest.raises(ValueError, match="epochs is '4' but must be a whole number"):
        Config(epochs="4").check()  # type: ignore[arg-type]


def test_training_images_grow_at_the_given_epochs() -> None:
    config = Config.from_dict({"image_sizes": [[0, 128], [4, 160]]}).check()
    assert [config.image_size_at(epoch) for epoch in (0, 3, 4, 9)] == [128, 128, 160, 160]
    assert Config().image_size_at(3) is None


def test_the_window_of_the_profiler() -> None:
    assert Config(profile="10:15").check().profile_window() == (10, 15)
    assert Config().profile_window() == (0, 0)


def test_default_normalization_is_that_of_the_data_set() -> None:
    assert DataConfig(dataset="cifar100").normalization()[0] == list(CIFAR100_MEAN)
    assert DataConfig(channels=1).normalization()[1] == [pytest.approx(sum(IMAGENET_STD) / 3)]
    assert DataConfig(channels=1, mean=[0.3], std=[0.2]).normalization() == ([0.3], [0.2])


def test_every_option_has_a_dotted_name() -> None:
    flat = Config.from_dict(
        {"method": {"name": "logitnorm", "options": {"tau": 0.5}}, "data": {"ood": {"a": "/a"}}}
    ).flat()
    assert (flat["method.options.tau"], flat["data.ood"], flat["epochs"]) == (0.5, {"a": "/a"}, 90)
    assert Config(method=MethodConfig("openmix")).flat().keys() > OWN_OF_A_RANK


def test_an_output_below_the_home_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert Config.from_dict({"output": "~/runs"}).output == "/home/someone/runs"
