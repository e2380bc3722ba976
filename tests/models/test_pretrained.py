"""Weights of other projects: their files, names and preprocessing."""

from __future__ import annotations

import argparse
import io
import json
import logging
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from tal_fast import evaluate
from tal_fast.config.schema import DataConfig, ModelConfig
from tal_fast.data.build import build_data
from tal_fast.data.datasets import DataBundle
from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.evaluation.sources import evaluate_weights
from tal_fast.models import build_model, pretrained
from tal_fast.models.features import feature_layer, head_path
from tal_fast.models.pretrained import load_weights, preprocessing, read_weights, start_from
from tal_fast.models.registry import NETWORKS
from tal_fast.models.weight_files import choose_state, read_content
from tal_fast.runs.predictions import weights_hash
from tests.helpers.fuzz import FUZZ, mutations, reads_or_refuses

SMALL = ModelConfig("cifar_resnet8", width=4)
DIGITS = DataConfig(dataset="synthetic", crop_area=None, image_size=16, channels=1)


def evaluation_data(config: DataConfig) -> DataBundle:
    return build_data(config, training=False)


def read_state(path: str | Path, key: str | None = None) -> tuple[dict[str, Tensor], str]:
    return choose_state(read_content(path), path, key)


def network(classes: int = 10, channels: int = 1, config: ModelConfig = SMALL) -> nn.Module:
    torch.manual_seed(3)
    return build_model(config, classes, channels, 16)


def folder(root: Path, *splits: str, classes: tuple[str, ...] = ("cat", "dog", "emu")) -> Path:
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(
                    root / split / name / f"{i}.png"
                )
    return root


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("under", [None, "state_dict", "model"])
def test_states_are_found_under_any_wrapper(tmp_path: Path, prefix: str, under: str | None) -> None:
    model = network()
    state: dict[str, Any] = prefixed(model.state_dict(), prefix)
    content = state if under is None else {"epoch": 3, under: state, "optimizer": {"lr": 0.1}}
    torch.save(content, tmp_path / "weights.pth")
    loaded, _ = load_weights(tmp_path / "weights.pth", SMALL, evaluation_data(DIGITS))
    assert weights_hash(loaded) == weights_hash(model)
    assert not loaded.training


@pytest.mark.parametrize(
    ("names", "warned"),
    [([str(i) for i in range(12)], True), ([f"{i:02}" for i in range(12)], False), (["7", "3", "x"], False)],
)
def test_numbers_in_the_order_of_text_are_remarked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: list[str], warned: bool
) -> None:
    for name in names:
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "val" / name / "0.png")
    torch.save(network(len(names), 3).state_dict(), tmp_path / "weights.pt")
    data = build_data(DataConfig(dataset="folder", root=str(tmp_path), image_size=16), training=False)
    load_weights(tmp_path / "weights.pt", SMALL, data)
    assert [message.partition("; if")[0] for message in caplog.messages] == warned * [
        f"the classes of {tmp_path / 'weights.pt'} may be in the order 0, 1, 2, 3, ..., the data's are "
        "0, 1, 10, 11, ..."
    ]


def test_weights_of_a_run_with_other_classes_are_remarked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = pretrained.Weights({}, "best.pt", class_names=["b", "a"])
    pretrained._check_class_order(weights, ["b", "a"])
    assert caplog.messages == []
    pretrained._check_class_order(weights, ["a", "b"])
    assert caplog.messages[0].startswith(
        "the classes of best.pt may be in the order b, a, ..., the data's are a, b, ..."
    )


def test_averaged_models_and_safetensors(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    model = network()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.save(averaged.state_dict(), tmp_path / "swa.pt")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    for name in ("swa.pt", "weights.safetensors"):
        loaded, _ = load_weights(tmp_path / name, SMALL, evaluation_data(DIGITS))
        assert weights_hash(loaded) == weights_hash(model), name


def test_layer_names_of_public_cifar_code(tmp_path: Path) -> None:
    config = ModelConfig("cifar_resnet18", width=4)
    model = network(config=config)
    foreign = {}
    for name, value in model.state_dict().items():
        for stage in range(4):
            name = name.replace(f"stages.{stage}.", f"layer{stage + 1}.")
        foreign[name.replace("fc.", "linear.")] = value
    assert "layer1.0.conv1.weight" in foreign
    torch.save({"state_dict": prefixed(foreign, "module.")}, tmp_path / "released.pth")
    loaded, _ = load_weights(tmp_path / "released.pth", config, evaluation_data(DIGITS))
    assert weights_hash(loaded) == weights_hash(model)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        (
            "cifar_preact_resnet110",
            {
                "layer2.0.bn1.weight": "stages.1.0.bn1.weight",
                "layer2.0.downsample.0.weight": "stages.1.0.shortcut.0.weight",
                "layer3.17.conv2.weight": "stages.2.17.conv2.weight",
                "bn.running_var": "bn1.running_var",
                "fc.bias": "fc.bias",
            },
        ),
        (
            "cifar_wrn28_10",
            {
                "block1.layer.0.convShortcut.weight": "stages.0.0.shortcut.0.weight",
                "block3.layer.3.bn2.bias": "stages.2.3.bn2.bias",
                "bn1.weight": "bn1.weight",
            },
        ),
        (
            "cifar_densenet_bc_100_12",
            {
                "conv1.weight": "conv1.weight",
                "block2.layer.15.conv2.weight": "stages.1.15.conv2.weight",
                "trans2.bn1.running_mean": "transitions.1.bn1.running_mean",
                "trans1.conv1.weight": "transitions.0.conv1.weight",
            },
        ),
        ("cifar_vgg16_bn", {"features.40.weight": "features.40.weight", "classifier.weight": "fc.weight"}),
    ],
)
def test_layer_names_of_public_failure_detection_code(name: str, theirs: dict[str, str]) -> None:
    with torch.device("meta"):
        ours = NETWORKS[name](num_classes=10, in_channels=3).state_dict()
    for public, own in theirs.items():
        assert own in ours
        assert list(pretrained._rename_layers({public: torch.zeros(1)})) == [own]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_names_of_the_project_stay(name: str) -> None:
    with torch.device("meta"):
        ours = NETWORKS[name](num_classes=10, in_channels=3).state_dict()
    assert list(pretrained._rename_layers(ours)) == list(ours)


def test_a_network_of_torchvision_and_one_of_timm(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    data = evaluation_data(DataConfig(root=str(folder(tmp_path / "data", "val")), image_size=32, crop_area=None))
    images = torch.randn(2, 3, 32, 32)
    # timm has the network of torchvision, with the same names.
    for name in ("resnet18", "timm/resnet18"):
        config = ModelConfig(name)
        model = network(3, 3, config)
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        loaded, _ = load_weights(tmp_path / "weights.pt", config, data)
        with torch.inference_mode():
            logits, features = loaded(images)
            want = model.eval()(images)
        assert logits.shape == (2, 3)
        torch.testing.assert_close((logits, features), want)
    assert type(model).__module__.startswith("timm.")


def test_the_auxiliary_classifier_of_training_is_dropped(tmp_path: Path) -> None:
    model = network()
    torch.save({**model.state_dict(), "AuxLogits.fc.weight": torch.zeros(3, 3)}, tmp_path / "weights.pt")
    assert weights_hash(load_weights(tmp_path / "weights.pt", SMALL, evaluation_data(DIGITS))[0]) == weights_hash(model)


def changed(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    merged = {**state, **changes}
    return {name: value for name, value in merged.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: network(7).state_dict(), "is for 7 classes (fc.weight) but synthetic has 10; evaluate it on"),
        (lambda s: changed(s, **{"conv1.weight": None}), "does not fit this --model: it lacks conv1.weight; choose"),
        (lambda s: changed(s, extra=torch.zeros(1)), "it also has extra; choose the network it is for"),
        (lambda s: network(10, 3).state_dict(), "conv1.weight is of shape (4, 3, 3, 3), not (4, 1, 3, 3)"),
        (lambda s: {"epoch": 3}, "holds no state dict: neither itself nor under state_dict, model_state_dict"),
        (lambda s: [1, 2], "holds no state dict"),
        (lambda s: {"model": network()}, "cannot be read as weights only"),
    ],
)
def test_weights_that_do_not_fit_are_rejected(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content(network().state_dict()), tmp_path / "weights.pt")
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        load_weights(tmp_path / "weights.pt", SMALL, evaluation_data(DIGITS))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def with_layer(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    state = network().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated
        return {**state, "fc.weight": change(state["fc.weight"])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: torch.complex(w, w), "fc.weight in .* must be real numbers, not torch.complex64"),
        (lambda w: w.to_sparse(), "fc.weight in .* must be dense, not nested, quantized or sparse"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "fc.weight in .* must be dense|weights only"),
        (lambda w: w.to("meta"), "fc.weight has no values \\(device meta\\); save it once they are loaded"),
        (lambda w: torch.full_like(w, torch.nan), "fc.weight has NaN; training had diverged"),
        (lambda w: w.to(torch.float8_e5m2).fill_(torch.nan), "fc.weight has NaN"),
        (lambda w: (100 * w).to(torch.int8), "fc.weight is torch.int8, not floating point"),
        (lambda w: w > 0, "fc.weight is torch.bool, not floating point"),
        (lambda w: w[0, 0], r"fc.weight is of shape \(\), not"),
        (lambda w: w[:0], "is for 0 classes"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(
    tmp_path: Path, change: Callable[[Tensor], Tensor], message: str
) -> None:
    torch.save(with_layer(change), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message) as refusal:
        load_weights(tmp_path / "weights.pt", SMALL, evaluation_data(DIGITS))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_another_precision_are_read_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    state = with_layer(lambda weight: weight.t().contiguous().t().to(dtype))
    torch.save(state, tmp_path / "weights.pt")
    loaded, _ = load_weights(tmp_path / "weights.pt", SMALL, evaluation_data(DIGITS))
    torch.testing.assert_close(loaded.state_dict()["fc.weight"], state["fc.weight"].float(), rtol=0, atol=0)


def test_a_name_with_and_without_a_prefix_is_refused(tmp_path: Path) -> None:
    state = network().state_dict()
    torch.save({**state, "module.fc.bias": state["fc.bias"] + 1}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"has fc\.bias twice, with and without a prefix such as module\."):
        read_state(tmp_path / "weights.pt")
    torch.save({**state, "linear.bias": state["fc.bias"] + 1}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"the weights have fc\.bias under two names"):
        load_weights(tmp_path / "weights.pt", SMALL, evaluation_data(DIGITS))


RAW, EMA = ({"w": torch.full((2,), value)} for value in (1.0, 2.0))


@pytest.mark.parametrize(
    ("content", "key", "found", "value"),
    [
        ({"model": RAW, "model_ema": prefixed(EMA, "module."), "epoch": 3}, None, "model_ema", 2),  # torchvision
        ({"state_dict": RAW, "state_dict_ema": EMA}, None, "state_dict_ema", 2),  # timm
        ({"net": RAW, "ema": {"n_averaged": torch.tensor(4), **prefixed(EMA, "module.")}}, None, "ema", 2),
        ({"model": RAW, "average": EMA}, None, "average", 2),  # this project's trainer
        ({"model": RAW, "ema_weights": EMA}, None, "ema_weights", 2),
        ({"model": RAW, "model_averaged": {"state_dict": EMA}}, None, "model_averaged.state_dict", 2),
        ({"model": RAW, "ema": {"decay": 0.9, "shadow": EMA}}, None, "ema.shadow", 2),
        ({"model": RAW, "ema": {"module": prefixed(EMA, "module."), "updates": 3}}, None, "ema.module", 2),
        ({"model": RAW, "shadow": {"model": EMA}, "semantic": {"x": torch.zeros(1)}}, None, "shadow.model", 2),
        ({"optimizer": {"state": {0: EMA}}, "ema_decay": 0.9, "model": RAW, "average": None}, None, "model", 1),
        ({"checkpoint": 1, "model": {"state_dict": RAW, "ema_state_dict": EMA}}, None, "model.ema_state_dict", 2),
        ({"model": RAW, "model_ema": EMA}, "model", "model", 1),
        ({"model": {"state_dict": RAW, "ema": EMA}}, "model.state_dict", "model.state_dict", 1),
        ({"model": RAW, "teacher": EMA}, "teacher", "teacher", 2),
        ({"state_dict": {**prefixed(RAW, "model."), **prefixed(EMA, "ema_model.")}}, None, "state_dict.ema_model", 2),
        ({"state_dict": {**prefixed(RAW, "model."), **prefixed(EMA, "ema.")}}, "state_dict", "state_dict", 1),
        ({"state_dict": {**prefixed(RAW, "net."), **prefixed(EMA, "ema.")}}, "state_dict.ema", "state_dict.ema", 2),
        (RAW, None, "", 1),
    ],
)
def test_averaged_weights_are_preferred_and_any_can_be_chosen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: Any, key: str | None, found: str, value: float
) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with caplog.at_level(logging.INFO):
        state, chosen = read_state(tmp_path / "checkpoint.pt", key)
    assert chosen == found
    ((name, tensor),) = state.items()
    assert (name.rpartition(".")[2], tensor.tolist()) == ("w", [value, value])
    assert (f"the weights under '{found}' are used; it also has" in caplog.text) == (value == 2 and key is None)


def test_averaged_weights_that_are_no_state_dict_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"model": RAW, "ema": {"decay": 0.9, "shadow_params": list(EMA.values())}}, tmp_path / "a.pt")
    assert read_state(tmp_path / "a.pt")[1] == "model"
    assert "'ema' holds no state dict; the weights under 'model' are used" in caplog.text
    caplog.clear()
    whole = {**RAW, "running_mean": torch.zeros(2)}
    torch.save({"model": whole, "teacher": RAW, "ema": {"shadow": EMA}}, tmp_path / "b.pt")
    with caplog.at_level(logging.INFO):
        assert read_state(tmp_path / "b.pt")[1] == "model"
    assert "it also has 'teacher' and 'ema.shadow', which --weights-key chooses" in caplog.text
    assert "'ema.shadow' lacks tensors and is not used; 'model' is" in caplog.text
    torch.save({"student": RAW, "teacher": EMA}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="; choose with --weights-key student or teacher"):
        read_state(tmp_path / "c.pt")
    with pytest.raises(ValueError, match="holds no state dict: under 'net'"):
        read_state(tmp_path / "a.pt", "net")


def test_other_files_are_rejected(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    for name, message in (
        ("x.pt", "cannot be read as weights only"),
        ("x.safetensors", "cannot be read as safetensors"),
    ):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(ValueError, match=message):
            read_state(tmp_path / name)
    with pytest.raises(ValueError, match="there is no file of weights"):
        read_state(tmp_path / "gone.pt")


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


SMALL_STATE = {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.zeros(2), "n": torch.tensor(3)}
CHECKPOINT = saved({"epoch": 3, "model": SMALL_STATE})


def read_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    if reads_or_refuses(read_state, tmp_path / name):
        found = read_state(tmp_path / name)[0]
        assert all(isinstance(value, Tensor) for value in found.values())
        if zipfile.is_zipfile(tmp_path / name):  # the other formats have no checksums
            for tensor, value in SMALL_STATE.items():
                torch.testing.assert_close(found[tensor], value, rtol=0, atol=0)


@FUZZ
@example(saved(SMALL_STATE, _use_new_zipfile_serialization=False)[:-1])
@example(saved({"model": {1: torch.zeros(1)}}))
@example(saved({"model": {}, "state_dict": []}))
@example(saved({"model_ema": None, "model": torch.zeros(1)}))
@example(CHECKPOINT.replace(torch.arange(6.0).numpy().tobytes(), torch.ones(6).numpy().tobytes()))
@given(mutations(CHECKPOINT))
def test_damaged_checkpoints_are_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    read_file(tmp_path, "weights.pt", content)


@FUZZ
@given(mutations(saved(SMALL_STATE, _use_new_zipfile_serialization=False)))
def test_damaged_old_files_are_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    read_file(tmp_path, "weights.pt", content)


@FUZZ
@given(st.data())
def test_damaged_safetensors_are_refused_in_one_sentence(tmp_path: Path, data: st.DataObject) -> None:
    save = pytest.importorskip("safetensors.torch").save
    read_file(tmp_path, "weights.safetensors", data.draw(mutations(save(SMALL_STATE))))


def test_a_checkpoint_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {"epoch": 3}
    content["model"] = content
    torch.save(content, tmp_path / "weights.pt")
    assert not reads_or_refuses(read_state, tmp_path / "weights.pt")


def test_old_files_without_batch_counts_load(tmp_path: Path) -> None:
    state = {k: v for k, v in network().state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "weights.pt")
    load_weights(tmp_path / "weights.pt", SMALL, evaluation_data(DIGITS))


def test_preprocessing_of_timm_networks() -> None:
    timm = pytest.importorskip("timm")
    cfg = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    found = preprocessing("timm/vit_tiny_patch16_224", {"image_size": None, "mean": None})
    assert found == {
        "image_size": 224, "mean": list(cfg.mean), "std": list(cfg.std), "crop_fraction": 224 / 248,
        "interpolation": "bicubic",
    }  # fmt: skip
    assert found["mean"] == [0.5, 0.5, 0.5]
    assert cfg.crop_pct == 0.9  # timm resizes to 224 / 0.9 = 248.9 pixels, rounded down
    own = preprocessing("timm/vit_tiny_patch16_224", {"image_size": 96, "interpolation": "bilinear"})
    assert (own["image_size"], own["interpolation"]) == (96, "bilinear")


def test_preprocessing_of_torchvision_weights() -> None:
    given = {"std": [1.0, 1.0, 1.0], "mean": None}
    assert preprocessing("resnet50", given) == {"std": [1.0, 1.0, 1.0], "interpolation": "bilinear"}
    found = preprocessing("efficientnet_b3", given, pretrained=True)
    assert (found["image_size"], found["interpolation"], found["std"]) == (300, "bicubic", [1.0, 1.0, 1.0])
    assert found["crop_fraction"] == 300 / 320
    assert preprocessing("cifar_resnet8", given, pretrained=True) == preprocessing("resnet50", given)


def test_images_equal_those_of_timms_transform(tmp_path: Path) -> None:
    """Compare a cropped and resized photo with timm's own transform."""
    pytest.importorskip("timm")
    from sklearn.datasets import load_sample_images
    from timm.data import create_transform, resolve_data_config

    # The central crop of this size has whole pixels in both.
    photo = Image.fromarray(load_sample_images().images[0]).crop((200, 50, 510, 360))
    for name in ("train", "val"):
        (tmp_path / name / "a").mkdir(parents=True)
        photo.save(tmp_path / name / "a" / "0.png")
    model = "timm/vit_tiny_patch16_224"
    fields = preprocessing(model, {})
    interpolation = fields.pop("interpolation")
    config = DataConfig(root=str(tmp_path), crop_area=None, workers=0, loader="torch", **fields)
    transform = create_transform(**resolve_data_config({}, pretrained_cfg=timm_cfg(model)))
    want = transform(photo)
    error = {}
    for ours in (interpolation, "bilinear"):
        ((images, _, _),) = evaluation_data(replace(config, interpolation=ours)).loader("val", batch_size=1)
        # of 255, without the border, where timm's filter reaches beyond the crop
        error[ours] = float((images[0] - want)[:, 2:-2, 2:-2].abs().mean()) * 255 * 0.5
    assert error["bicubic"] < 1.0
    assert error["bilinear"] > 2 * error["bicubic"]


def timm_cfg(name: str) -> dict[str, Any]:
    import timm

    return timm.get_pretrained_cfg(name.removeprefix("timm/")).to_dict()


def test_unknown_timm_names_are_rejected() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="timm has no model 'resnet1'; did you mean resnet"):
        network(config=ModelConfig("timm/resnet1"))


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder(tmp_path / "data", "train", "val")
    torch.save(prefixed(network(3, 3).state_dict(), "module."), tmp_path / "tal.pth")
    args = [
        "--weights", str(tmp_path / "tal.pth"), "--model", "cifar_resnet8", "--width", "4", "--data-dir", str(data),
        "--image-size", "16", "--device", "cpu", "--loader", "torch", "--workers", "0", "--scores", "msp",
        "mahalanobis", "--ood", "noise=uniform:20", "--shift", "foggy=contrast:5", "--mix", "all",
    ]  # fmt: skip
    assert evaluate.main(args) == 0
    found = json.loads((tmp_path / "tal-report" / "report.json").read_text())
    assert found["model"] == "cifar_resnet8"
    assert found["counts"] == {
        "id": 12, "id_right": found["counts"]["id_right"], "ood": {"noise": 20}, "shift": {"foggy": 12},
    }  # fmt: skip
    assert found["shift_names"] == ["foggy"]
    assert found["samples"]["shift"] == {**found["samples"]["old_fd"], "errors": found["samples"]["shift"]["errors"]}
    assert found["fitted"]["training_samples"] == 12
    assert {path.name for path in (tmp_path / "tal-report" / "eval-cache").iterdir()} == {
        "val", "train-eval", "ood-noise", "shift-foggy",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "Old FD under shift (foggy)\n12 ID, " in printed
    assert f"{tmp_path / 'tal.pth'}: cifar_resnet8" in printed
    assert "mahalanobis" in found["settings"]["shift"]


def test_without_training_images_scores_that_need_them_are_left_out(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", "val")
    torch.save(network(3, 3).state_dict(), tmp_path / "w.pt")
    config = DataConfig(root=str(data), image_size=16, crop_area=None, loader="torch", workers=0)
    options = EvaluationOptions(scores=["msp", "knn", "gradnorm"])
    evaluation = evaluate_weights(tmp_path / "w.pt", SMALL, config, options=options)
    assert evaluation is not None
    assert list(evaluation.report["settings"]["old_fd"]) == ["msp", "gradnorm"]
    assert evaluation.report["left_out"] == {"knn": "it needs training features, and there are none"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--weights", "x.pt", "--model", "resnet18", "--data-dir", "/gone/data"], "/gone/data is not a folder"),
        (["--weights", "x.pt", "--model", "resnet18", "--dataset", "cifar"], "data.dataset is 'cifar'; use"),
        (["--run", "x", "--ood", "folder"], "--ood takes NAME=WHERE"),
        (["--run", "x", "--shift", "a=b", "--shift", "a=c"], "--shift names 'a' twice"),
    ],
)
def test_sets_that_cannot_be_read_are_refused(
    capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert evaluate.main(args) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


TINY = "timm/test_vit"


def tiny(classes: int = 5, channels: int = 3, side: int = 80, name: str = TINY) -> nn.Module:
    pytest.importorskip("timm")
    return build_model(ModelConfig(name), classes, channels, side)


def assert_same_but_head(one: nn.Module, other: nn.Module) -> None:
    """Compare a network from ``build_model`` with another."""
    wanted, found = other.state_dict(), one.state_dict()
    assert wanted.keys() == found.keys()
    head = head_path(one)
    assert all(torch.equal(found[name], wanted[name]) for name in found if not name.startswith(f"{head}."))


@pytest.mark.parametrize(
    "prefixes",
    [
        ("model.",), ("net.",), ("network.",), ("backbone.",), ("student.",), ("module.", "model."),
        ("model.", "backbone."), ("_orig_mod.", "module.", "student.", "backbone."), ("model.", "_orig_mod."),
    ],
)  # fmt: skip
def test_prefixes_of_training_code_are_removed(tmp_path: Path, prefixes: tuple[str, ...]) -> None:
    theirs, ours = tiny(7), tiny()
    state = prefixed(theirs.state_dict(), "".join(prefixes))
    torch.save({"state_dict": state, "hyper_parameters": {"lr": 0.1}}, tmp_path / "last.ckpt")
    start_from(ours, read_weights(tmp_path / "last.ckpt", TINY), "abcde")
    assert_same_but_head(ours, theirs)


def test_what_is_beside_the_network_in_training_code_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs, ours = tiny(7), tiny()
    others = {"criterion.weight": torch.ones(7), "train_acc.tp": torch.zeros(7)}
    torch.save({"state_dict": prefixed(theirs.state_dict(), "model.") | others}, tmp_path / "last.ckpt")
    with caplog.at_level(logging.INFO):
        start_from(ours, read_weights(tmp_path / "last.ckpt", TINY), "abcde")
    assert "ignored, as the network has no such names: criterion.weight" in caplog.text
    assert_same_but_head(ours, theirs)
    torch.save({"state_dict": theirs.state_dict() | others}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"does not fit this --model: it also has criterion\.weight"):
        start_from(ours, read_weights(tmp_path / "last.ckpt", TINY), "abcde")


def test_weights_without_a_head_start_a_new_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs, ours = tiny(7), tiny()
    torch.save({n: v for n, v in theirs.state_dict().items() if not n.startswith("head")}, tmp_path / "w.pt")
    with caplog.at_level(logging.INFO):
        start_from(ours, read_weights(tmp_path / "w.pt", TINY), "abcde")
    assert "has no head.weight: the head, for 5 classes, is new" in caplog.text
    assert_same_but_head(ours, theirs)


@pytest.mark.parametrize("name", ["efficientnet_b0", "timm/tf_efficientnet_lite0", "timm/vit_tiny_patch16_224"])
def test_a_new_head_has_small_logits(tmp_path: Path, name: str) -> None:
    if "/" in name:
        pytest.importorskip("timm")
    theirs, ours = build_model(ModelConfig(name), 7, 3, 64), build_model(ModelConfig(name), 5, 3, 64)
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    own = feature_layer(ours)[1].weight.clone()
    start_from(ours, read_weights(tmp_path / "w.pt", name), "abcde")
    weight = feature_layer(ours)[1].weight
    assert weight.std() < 2 * (3 * weight.shape[1]) ** -0.5
    if name.endswith("vit_tiny_patch16_224"):  # zeros, which stay
        assert torch.equal(weight, own)


@pytest.mark.parametrize(
    ("name", "sides"),
    [(TINY, (64, 96)), ("vit_b_32", (64, 96)), ("timm/swin_tiny_patch4_window7_224", (64, 56))],
)
def test_position_embeddings_are_resized(tmp_path: Path, name: str, sides: tuple[int, int]) -> None:
    if "/" in name:
        pytest.importorskip("timm")
    theirs, ours = (build_model(ModelConfig(name), 5, 3, side) for side in sides)
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    start_from(ours, read_weights(tmp_path / "w.pt", name), "abcde")
    before, after = theirs.state_dict(), ours.state_dict()
    resized = {n for n in before if before[n].shape != after[n].shape}
    assert resized or "swin" in name
    assert all(torch.equal(before[n], after[n]) for n in before.keys() & after.keys() - resized)
    for position in resized:  # a smooth map stays one: the mean over the grid hardly moves
        assert after[position].shape != before[position].shape
        torch.testing.assert_close(after[position].mean(), before[position].mean(), atol=0.01, rtol=0)
    with pytest.raises(ValueError, match="does not fit this --model"):
        start_from(tiny(), read_weights(tmp_path / "w.pt", TINY), "abcde") if name != TINY else load_weights(
            tmp_path / "w.pt", SMALL, evaluation_data(DIGITS)
        )


class Runs:
    """A class that is in no list; unpickling it would write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("pwned"),))


@pytest.mark.parametrize("zipped", [True, False])
def test_options_and_numbers_beside_the_weights_are_ignored(
    tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = argparse.Namespace(lr=0.1, output=tmp_path, best=np.float64(3.5), device=torch.device("cpu"))
    beside = {"args": options, "accuracy": np.float32(0.5), "history": np.arange(3), "epoch": np.int64(4)}
    state = network().state_dict()
    torch.save({"state_dict": state, **beside}, "w.pt", _use_new_zipfile_serialization=zipped)
    found, _ = read_state("w.pt")
    assert all(torch.equal(found[name], value) for name, value in state.items())
    torch.save({"state_dict": state, "args": argparse.Namespace(x=Runs())}, "w.pt")
    with pytest.raises(ValueError, match="it holds a .*(pathlib|getattr).*, which only running code could make"):
        read_state("w.pt")
    assert not Path("pwned").exists()


def test_a_namespace_runs_nothing(tmp_path: Path) -> None:
    """Its attributes are dropped, even one that unpickling would call."""
    calls = argparse.Namespace()
    calls.__dict__["__setstate__"] = torch.device
    torch.save({"state_dict": {"w": torch.ones(2)}, "args": calls}, tmp_path / "w.pt")
    assert read_state(tmp_path / "w.pt")[0]["w"].tolist() == [1, 1]
    content = read_content(tmp_path / "w.pt")
    assert type(content["args"]) is not argparse.Namespace
    assert not vars(content["args"])


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(SMALL_STATE, tmp_path / "a.bin")
    torch.save(SMALL_STATE, tmp_path / "b.safetensors")
    torch.save(SMALL_STATE, tmp_path / "c.safetensors", _use_new_zipfile_serialization=False)
    for name in ("a.bin", "b.safetensors", "c.safetensors"):
        assert torch.equal(read_state(tmp_path / name)[0]["fc.weight"], SMALL_STATE["fc.weight"]), name
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132735352\n"
    (tmp_path / "d.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match="d.safetensors is a pointer of Git LFS, not the weights; fetch them with"):
        read_state(tmp_path / "d.safetensors")


def no_network(*args: Any, **options: Any) -> Any:
    raise urllib.error.URLError("no network")


def test_timms_own_weights_come_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm, hub = pytest.importorskip("timm"), pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(ValueError, match=rf"weights of timm/test_vit are not in {tmp_path} and cannot be downloaded"):
        read_weights("pretrained", TINY)
    assert not hub.constants.HF_HUB_OFFLINE
    theirs = timm.create_model("test_vit", num_classes=1000)
    saved_to = tmp_path / "models--timm--test_vit.r160_in1k"
    (saved_to / "refs").mkdir(parents=True)
    (saved_to / "refs" / "main").write_text("0" * 40)
    (saved_to / "snapshots" / ("0" * 40)).mkdir(parents=True)
    pytest.importorskip("safetensors.torch").save_file(
        theirs.state_dict(), saved_to / "snapshots" / ("0" * 40) / "model.safetensors"
    )
    weights = read_weights("pretrained", TINY, channels=1)
    assert weights.preprocessing == {
        "image_size": 160, "mean": [0.5], "std": [0.5], "crop_fraction": 160 / 168, "interpolation": "bicubic",
    }  # fmt: skip
    ours = tiny(side=160)
    start_from(ours, weights, "abcde")
    assert_same_but_head(ours, theirs)
    with pytest.raises(ValueError, match=r"timm has no weights for vgg11_bn|are not in"):
        read_weights("pretrained", "timm/resnet10t")
    with pytest.raises(ValueError, match="--weights-key is for files of weights, not for pretrained"):
        read_weights("pretrained", TINY, "model")


def test_torchvisions_own_weights_come_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    with pytest.raises(ValueError, match=rf"weights of squeezenet1_1 are not in {tmp_path}/checkpoints and cannot"):
        read_weights("pretrained", "squeezenet1_1")
    theirs = models.get_model("shufflenet_v2_x0_5", weights=None)
    path = tmp_path / "checkpoints" / "shufflenetv2_x0.5-f707e7126e.pth"
    path.parent.mkdir(exist_ok=True)
    torch.save(theirs.state_dict(), path)
    weights = read_weights("pretrained", "shufflenet_v2_x0_5")
    assert weights.preprocessing["crop_fraction"] == 224 / 256
    ours = build_model(ModelConfig("shufflenet_v2_x0_5"), 5, 3, 64)
    start_from(ours, weights, "abcde")
    assert_same_but_head(ours, theirs)
    with pytest.raises(ValueError, match="weights are for networks of torchvision and timm, not cifar_resnet8"):
        read_weights("pretrained", "cifar_resnet8")
