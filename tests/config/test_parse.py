"""Presets, YAML files and the command line of training."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given

from tal_fast.config import parse as parse_module
from tal_fast.config.methods import OPTIONS, TAL_OPTIONS, MethodOptions
from tal_fast.config.parse import attribute_help, load_config, merged, parse_training, preset_names
from tal_fast.config.schema import Config, DataConfig, MethodConfig, MixConfig, ModelConfig, OptimConfig
from tests.helpers.fuzz import FUZZ, mutations, reads_or_refuses

PRESETS = [
    "cifar100-resnet110-ce",
    "cifar100-resnet110-fmfp-tal",
    "cifar100-resnet110-tal",
    "digits-ce",
    "digits-tal",
    "fashion-mnist-ce",
    "fashion-mnist-tal",
    "folder-ce",
    "folder-tal",
    "imagenet-deit-small",
    "imagenet-resnet50-ce",
    "imagenet-resnet50-tal",
    "imagenet-resnet50-tal-fast",
    "sure-plus-no-pixmix",
    "sure-plus-no-pixmix-tal",
]


def parse(words: str) -> Config:
    return parse_training(words.split())[0]


def refusal(words: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared by the caller
        parse(words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_presets_hold_what_their_names_say() -> None:
    assert preset_names() == PRESETS
    for name in PRESETS:
        config = load_config(name).check()
        named = [method for method in ("ce", "fmfp-tal") if name.endswith(f"-{method}")]
        plain = name in ("imagenet-deit-small", "sure-plus-no-pixmix")
        assert config.method.name == ("ce" if plain else named[0] if named else "tal")
        assert parse(f"--config {name}").to_dict() == config.to_dict()
    assert load_config("imagenet-resnet50-tal").method.options["queue_size"] == 880880


def test_the_preset_of_deit_is_its_recipe_and_fits_tal() -> None:
    deit = load_config("imagenet-deit-small")
    assert (deit.data.augment, deit.data.augment_magnitude, deit.data.augment_std) == ("randaugment", 9, 0.5)
    assert (deit.data.erase, deit.data.repeats, deit.data.interpolation) == (0.25, 3, "bicubic")
    assert (deit.mix, deit.model.drop_path) == (MixConfig(mixup=0.8, cutmix=1), 0.1)
    assert (deit.method, deit.optim.clip_norm) == (MethodConfig("ce", 0.1), None)
    (words,) = re.findall(
        r"^#   \.\.\. (.*)$", Path("tal_fast/config/presets/imagenet-deit-small.yaml").read_text(), re.M
    )
    tal = parse(f"--config imagenet-deit-small {words}")
    assert (tal.mix.weight, tal.method.options["queue_size"], tal.method.options["warmup_epochs"]) == (1, 880880, 15)


RELEASED = {"cifar100-resnet110-fmfp-tal", "cifar100-resnet110-tal", "imagenet-resnet50-tal"}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_tal_start_gently_unless_they_are_as_released(name: str) -> None:
    config = load_config(name)
    options = config.method.options
    if name in RELEASED:
        assert (options["t_min"], options["t_max"], options["warmup_epochs"]) == (10, 100, None)
        assert (options["variant"], options["confidence_threshold"], config.optim.clip_norm) == ("released", None, None)
    elif config.method.name == "tal":
        assert options["warmup_epochs"] >= 1
        assert config.optim.clip_norm == 1 or options["t_max"] <= 20


@pytest.mark.parametrize("data", ["digits", "fashion-mnist", "cifar100-resnet110", "imagenet-resnet50"])
def test_presets_that_are_compared_differ_in_the_method_alone(data: str) -> None:
    ce, tal = load_config(f"{data}-ce").to_dict(), load_config(f"{data}-tal").to_dict()
    assert {key for key in ce if ce[key] != tal[key]} == {"method"}


def test_the_presets_of_sure_plus_differ_in_the_method_alone() -> None:
    ce, tal = (load_config(f"sure-plus-no-pixmix{end}").to_dict() for end in ("", "-tal"))
    assert {key for key in ce if ce[key] != tal[key]} == {"method"}
    assert ce["mix"] == {"mixup": 10.0, "cutmix": 0.0, "switch_prob": 0.5, "weight": 1.0}


def test_options_of_every_kind_can_be_set() -> None:
    config = parse(
        "--config digits-tal --data.loader torch --data.mean [0.1] --data.std=[0.2] --data.crop-area null "
        "--data.crop-ratio [1.0,1.0] --data.ood.x /y --model.width 3 --optim.lr 3e-2 --optim.step-epochs [1,2] "
        "--optim.schedule multistep --method.options.t-wrong null --method.options.warmup-epochs 2 --epochs 5 "
        "--precision bfloat16 --output 7"
    )
    assert config.data == DataConfig(
        dataset="digits",
        loader="torch",
        workers=2,
        image_size=16,
        channels=1,
        mean=[0.1],
        std=[0.2],
        crop_fraction=1.0,
        crop_area=None,
        crop_ratio=(1.0, 1.0),
        flip=False,
        ood={"x": "/y"},
    )
    assert (config.model.width, config.model.name) == (3, "cifar_resnet8")
    assert (config.optim.lr, config.optim.step_epochs, config.optim.schedule) == (0.03, [1, 2], "multistep")
    options = {"t_wrong": None, "warmup_epochs": 2, "queue_size": 2000, "t_min": 5, "t_max": 20}
    assert config.method == MethodConfig(options=options)
    assert (config.epochs, config.precision, config.output, config.batch_size) == (5, "bfloat16", "7", 64)


def test_every_option_is_accepted_with_hyphens_and_with_underscores() -> None:
    defaults = Config().to_dict()
    sections = {name: defaults.pop(name) for name in ("data", "model", "optim", "method", "mix")}
    options = defaults | {
        f"{section}.{name}": sections[section][name] for section in sections for name in sections[section]
    }
    assert len(options) > 50
    for name, value in options.items():
        text = yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n")[0]
        for spelled in {name, name.replace("_", "-")}:
            assert parse_training([f"--{spelled}", text])[0] == Config(), name


def test_short_names_of_options() -> None:
    for words in ("--data-dir images", "--data-dir=images", "--data_dir images", "--data.root images"):
        assert parse(f"--config folder-tal {words}").data.root == "images"
    assert parse("--log none").logger == "none"
    assert parse_training(["--bench"])[:2] == (Config(), True)


def test_options_of_methods_of_0_1_0_are_accepted() -> None:
    options = {"variant": "released", "queue_size": 7, "backend": "triton", "warmup_epochs": 3, "t_wrong": None}
    for words in (
        "--method.variant released --method.queue_size 7 --method.backend=triton --method.warmup_epochs 3 "
        "--method.t_wrong null",
        "--method.variant released --method.queue-size=7 --method.backend triton --method.warmup-epochs 3 "
        "--method.t-wrong null",
    ):
        assert parse(words).method == MethodConfig(options=options)
        assert parse(f"--config imagenet-resnet50-tal {words}").method.options["queue_size"] == 7
    assert parse("--method.t_min 5 --method.options.t-min 5.0").method.options["t_min"] == 5.0
    assert "method.t_min is 5 but method.options.t_min is 6; both name the same option" in refusal(
        "--method.t_min 5 --method.options.t_min 6"
    )


def test_options_win_over_files_and_later_files_over_earlier(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("epochs: 7\noptim:\n  lr: 1e-2\n")
    config = parse(f"--batch_size 9 --config digits-ce --config={mine}")
    assert (config.epochs, config.optim.lr, config.batch_size, config.method.name) == (7, 0.01, 9, "ce")
    assert parse(f"--epochs 3 --config {mine}").epochs == 3
    assert parse("--epochs 3 --epochs 4").epochs == 4


def test_names_of_ood_sets_are_kept_as_they_are(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("data: {ood: {near: /near}}\n")
    config = parse(f"--config {mine} --eval-batch-size=5 --data.ood.my-set_2.x /x")
    assert config.data.ood == {"near": "/near", "my-set_2.x": "/x"}
    assert parse_training(["--config", str(mine), "--data.ood", "{far: /far}"])[0].data.ood == {"far": "/far"}


def test_another_method_is_chosen_by_its_name_alone(tmp_path: Path) -> None:
    assert parse("--config digits-tal --method.name ce").method == MethodConfig("ce")
    assert parse("--config digits-tal --method.name fmfp-tal").method.options["queue_size"] == 2000
    Config(method=MethodConfig("fmfp", options={"rho": 0.2})).save(tmp_path / "fmfp.yaml")
    assert parse(f"--config {tmp_path / 'fmfp.yaml'} --method.name tal").method == MethodConfig("tal")
    assert parse(f"--config {tmp_path / 'fmfp.yaml'} --method.name fmfp-tal").method.options["rho"] == 0.2
    assert "method.options has 'rho' but ce has no options" in refusal("--method.name ce --method.options.rho 0.1")


def test_merging_changes_neither_side() -> None:
    values, overrides = {"method": {"options": {"rho": 1}}}, {"method": {"name": "tal"}, "optim": {"lr": 1}}
    assert merged(values, overrides) == {"method": {"name": "tal", "options": {}}, "optim": {"lr": 1}}
    assert values == {"method": {"options": {"rho": 1}}}
    assert overrides == {"method": {"name": "tal"}, "optim": {"lr": 1}}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--config mine.yaml", f"no preset or file 'mine.yaml'; the presets are {', '.join(PRESETS)}"),
        ("--config digits-tall", "no preset or file 'digits-tall'; did you mean digits-tal"),
        ("--config", "argument --config: expected one argument"),
        ("--epochs many", "epochs is 'many' but must be a whole number"),
        ("--epochs", "argument --epochs: expected one argument"),
        ("--data.mean [0.1", "data.mean is '[0.1' but must be list[float]"),
        ("--data.loader fast", "data.loader is 'fast'; use 'auto' or 'dali' or 'torch'"),
        ("--data.lodaer dali", "unrecognized arguments: --data.lodaer dali; did you mean --data.loader"),
        ("--data.flip 1", "data.flip is 1 but must be true or false"),
        ("--epochs 0", "epochs is 0 but must be at least 1"),
        ("--optim 3", "optim is 3 but must be a mapping"),
        ("--method.name cee --method.options.gamma 3", "method.name is 'cee'; use 'ce' or "),
        ("--config digits-tal --method.options.gama 3", "method.options.gama is not an option; there are "),
    ],
)
def test_mistakes_are_refused_in_a_sentence(words: str, sentence: str) -> None:
    assert sentence in refusal(words)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epochs: [", "mine.yaml is not YAML"),
        ("just words", "mine.yaml must be a mapping such as 'epochs: 10', not str"),
        ("optim:\n  learning_rate: 1", "optim.learning_rate is not an option; there are optim.name, optim.lr"),
        ("optim: 3", "optim is 3 but must be a mapping"),
        ("method: 3", "method is 3 but must be a mapping"),
        ("method: {options: null}", "method.options is None but must be dict"),
        ("data:\n  channels: 2", "data.channels is 2; use 1 or 3"),
        ("base: digits", "base is 'digits' in "),
        ("base: [digits-ce]", "mine.yaml but must be a preset: cifar100-resnet110-ce, "),
    ],
)
def test_bad_files_are_refused_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert sentence in refusal(f"--config {tmp_path / 'mine.yaml'}")


def test_a_file_has_the_rest_from_the_preset_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: digits-tal\nmethod: {t_max: 30, options: {t_min: 6}}\nseed: 4\n")
    config, preset = load_config(str(tmp_path / "mine.yaml")), load_config("digits-tal")
    assert (config.seed, config.data, config.optim) == (4, preset.data, preset.optim)
    assert config.method.options == {**preset.method.options, "t_min": 6, "t_max": 30}
    (tmp_path / "mine.yaml").write_text("base: digits-tal\nmethod: {name: ce}\n")
    assert load_config(str(tmp_path / "mine.yaml")) == load_config("digits-ce")


NESTED = 3000 * "{a: " + 3000 * "}"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (NESTED.encode(), "mine.yaml is not YAML: too deeply nested"),
        (b"epochs: 3\nseed: 1\nepochs: 4\n", "mine.yaml is not YAML: epochs is given twice at line 3, column 1"),
        (b"optim: {lr: 0.1, lr: 0.2}", "mine.yaml is not YAML: lr is given twice"),
        (b"optim: &o {lr: *o}", "mine.yaml is not YAML: found unconstructable recursive node"),
        (b"epochs: 2020-13-45", "mine.yaml is not YAML: month must be in 1..12"),
        ("epochs: 3\n".encode("utf-16-le"), "mine.yaml is not YAML: unacceptable character #x0000"),
        (b"output: \xff", "#x00ff: invalid start byte at position 8; save it as UTF-8"),
        (b"optim: {lr: [" + 500 * b"7777, " + b"]}", "optim.lr is [7777, 7777, 7777, "),
    ],
)
def test_malformed_files_are_refused_in_a_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    said = refusal(f"--config {tmp_path / 'mine.yaml'}")
    assert sentence in said
    assert len(said) < 500


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_may_have_a_byte_order_mark_and_keys_merged_from_elsewhere(tmp_path: Path, encoding: str) -> None:
    text = "method: {options: &o {t_min: 1}}\noptim: {lr: 0.5}\ndata: {root: données}\n"
    (tmp_path / "mine.yaml").write_bytes(text.encode(encoding))
    config = load_config(str(tmp_path / "mine.yaml"))
    assert (config.optim.lr, config.data.root) == (0.5, "données")
    (tmp_path / "mine.yaml").write_text("optim: &o {lr: 0.5, momentum: 0.1}\nmodel: {<<: {width: 3}, width: 4}\n")
    assert load_config(str(tmp_path / "mine.yaml")).model.width == 4


def test_options_of_the_command_line_are_refused_alike() -> None:
    assert "optim.lr is 'a" in refusal(f"--optim.lr {400 * 'a'}")
    for words in (["--optim", "{lr: 1, lr: 2}"], ["--optim", NESTED]):
        with pytest.raises(ValueError, match="optim is '{.* but must be a mapping"):
            parse_training(words)


@FUZZ
@given(mutations(Path("tal_fast/config/presets/digits-tal.yaml").read_bytes()))
def test_damaged_files_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    reads_or_refuses(lambda path: load_config(str(path)).check(), tmp_path / "x.yaml")


@pytest.mark.parametrize("columns", ["40", "80", "300"])
def test_help_has_a_sentence_for_each_option_in_at_most_100_columns(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as caught:
        parse_training(["--help"], "tal-fast train")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: tal-fast train ")
    assert max(map(len, text.splitlines())) <= 100
    groups = ("run:", "data:", "model:", "optim:", "method:", "options of tal and fmfp-tal:")
    places = [text.index(f"\n{group}\n") for group in groups]
    assert places == sorted(places)
    shown = {word for line in text.splitlines() for word in line.split() if word.startswith("--")}
    for option in ("--batch-size", "--data.image-size", "--data-dir", "--method.options.swa-from"):
        assert any(word.rstrip(",") == option for word in shown)
    assert not any("_" in word for word in shown)


def test_help_names_the_owner_of_each_option_of_the_same_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclasses.dataclass
    class FocalOptions(MethodOptions):
        """Options.

        Attributes:
            gamma: focusing parameter of the focal loss.
        """

        gamma: float = 2.0

    monkeypatch.setattr(parse_module, "OPTIONS", {"focal": FocalOptions, **OPTIONS})
    with pytest.raises(SystemExit):
        parse_training(["--help"])
    text = capsys.readouterr().out
    focal, openmix = (text.split(f"\noptions of {name}:\n")[1].split("\n\n")[0] for name in ("focal", "openmix"))
    assert "focusing parameter of the focal loss (default: 2)" in " ".join(focal.split())
    assert "weight of the mixed images' loss (default: 1)" in " ".join(openmix.split())
    assert "--method.options.gamma" in focal
    assert "--method.options.gamma" in openmix
    config = parse("--method.options.gamma 3 --method.name openmix --method.options.outliers x")
    assert config.method.options["gamma"] == 3


def test_every_option_is_documented() -> None:
    for kind in (Config, DataConfig, ModelConfig, OptimConfig, MethodConfig, MixConfig, *OPTIONS.values()):
        for field in dataclasses.fields(kind):
            if field.name not in ("data", "model", "optim", "method", "mix"):
                assert len(attribute_help(kind)[field.name]) > 8, f"{kind.__name__}.{field.name}"
    assert attribute_help(OPTIONS["tal"]).keys() >= TAL_OPTIONS


@pytest.mark.parametrize("text", ["[3, 07, yes]", "yes, 3,07", "[yes,'07',3,3]"])
def test_names_of_classes_are_text_in_any_order(text: str) -> None:
    assert parse_training(["--data.unseen_classes", text])[0].data.unseen_classes == ["07", "3", "yes"]
