"""``python -m tal_fast.train``: options, refusals, presets, and runs on two processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from tal_fast.config.schema import Config, DataConfig, load_config, preset_names
from tal_fast.runs import checkpoint
from tal_fast.runs.load import load_run
from tal_fast.training.command import main, parse

ROOT = Path(__file__).parents[2]
PRESETS = [
    "cifar100-resnet110-ce",
    "cifar100-resnet110-fmfp-tal",
    "cifar100-resnet110-tal",
    "digits-ce",
    "digits-tal",
    "fashion-mnist-ce",
    "fashion-mnist-tal",
    "folder-tal",
    "imagenet-deit-small",
    "imagenet-resnet50-ce",
    "imagenet-resnet50-tal",
    "imagenet-resnet50-tal-fast",
]


@pytest.fixture(autouse=True)
def _own_cache_and_threads(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TAL_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1  # one sentence, no traceback, no usage
    return err


# ---- Options --------------------------------------------------------------------------------------------------


def test_data_dir_is_short_for_data_root() -> None:
    for argv in (["--data-dir", "images"], ["--data-dir=images"], ["--data_dir", "images"]):
        assert parse(["--config", "folder-tal", *argv]).data.root == "images"


def test_presets_hold_what_their_names_say() -> None:
    assert preset_names() == PRESETS
    for name in PRESETS:
        config = load_config(name).check()
        named = [method for method in ("ce", "fmfp-tal") if name.endswith(f"-{method}")]
        assert config.method.name == (named[0] if named else "tal")
        assert parse(["--config", name]).to_dict() == config.to_dict()
    for data in (
        "digits",
        "fashion-mnist",
        "cifar100-resnet110",
        "imagenet-resnet50",
    ):  # compared with each other, they must differ in the method alone
        ce, tal = load_config(f"{data}-ce").to_dict(), load_config(f"{data}-tal").to_dict()
        del ce["method"], tal["method"]
        assert ce == tal


def test_every_field_can_be_set() -> None:
    words = (
        "--config digits-tal --data.loader torch --data.mean [0.1] --data.std=[0.2] --data.crop_area null "
        "--data.crop_ratio [1.0,1.0] --data.ood.x /y --model.width 3 --optim.lr 3e-2 --optim.step_epochs [1,2] "
        "--optim.schedule multistep --method.t_wrong null --method.warmup_epochs 2 --epochs 5 --precision bfloat16 "
        "--output o"
    )
    config = parse(words.split())
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
    assert (config.method.t_wrong, config.method.warmup_epochs, config.method.queue_size) == (None, 2, 2000)
    assert (config.epochs, config.precision, config.output, config.batch_size) == (5, "bfloat16", "o", 64)


def test_options_win_over_files_and_later_files_over_earlier(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("epochs: 7\noptim:\n  lr: 1e-2\n")  # PyYAML itself reads 1e-2 as text
    config = parse(["--batch_size", "9", "--config", "digits-ce", f"--config={mine}"])
    assert (config.epochs, config.optim.lr, config.batch_size, config.method.name) == (7, 0.01, 9, "ce")
    assert parse(["--epochs", "3", "--config", str(mine)]).epochs == 3
    assert parse(["--eval-batch-size=5", "--data.ood.my-set", "/x"]).data.ood == {"my-set": "/x"}


def test_a_config_survives_its_file(tmp_path: Path) -> None:
    config = load_config("imagenet-resnet50-tal")
    config.data.ood = {"textures": "/data/dtd"}
    config.save(tmp_path / "config.yaml")
    assert load_config(str(tmp_path / "config.yaml")) == config
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--config digits", f"no preset or file 'digits'; the presets are {', '.join(PRESETS)}"),
        ("--config", "--config needs a preset or a file; the presets are cifar100-resnet110-ce"),
        ("--epochs many", "epochs"),
        ("--data.loader fast", "data.loader"),
        ("--data.lodaer dali", "--data.lodaer"),
        ("--epochs 0", "epochs is 0 but must be at least 1"),
        ("--config folder-tal", "data.root is not set; name the folder that holds train/ and val/ with --data.root"),
        ("--config folder-tal --data.root /nowhere", "/nowhere is not a folder; name one that holds train/ and val/"),
        ("--config digits-ce --batch-size 5000", "a step takes 5000 images"),
        ("--config digits-ce --model.name resnet19", "no model 'resnet19': did you mean resnet18"),
        ("--config digits-tal --method.t_min 200", "t_min"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(
    tmp_path: Path, argv: str, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence in refusal(argv.split(), capsys)
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epochs: [", "mine.yaml is not YAML"),
        ("just words", "must be a mapping"),
        ("optim:\n  learning_rate: 1", "optim.learning_rate is not an option; there are optim.name, optim.lr"),
        ("optim: 3", "optim is 3 but must be a mapping"),
        ("epochs: 3.5", "epochs is 3.5 but must be int"),
        ("data:\n  channels: 2", "data.channels is 2; use 1 or 3"),
        ("data:\n  flip: 1", "data.flip is 1 but must be bool"),
        ("data:\n  crop_area: [1.0]", "data.crop_area is [1.0] but must be tuple[float, float]"),
    ],
)
def test_bad_files_are_refused_in_a_sentence(
    tmp_path: Path, text: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert sentence in refusal(["--config", str(tmp_path / "mine.yaml")], capsys)


def test_a_bad_image_and_a_damaged_checkpoint_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", "digits-ce", "--epochs", "1", "--data.loader", "torch", "--data.workers", "0"]
    output = str(tmp_path / "out")
    main([*options, "--output", output, "--progress", "none"])
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "out" / "checkpoints" / name).write_bytes(b"damaged")
    err = refusal([*options, "--output", output, "--resume", "auto"], capsys)
    assert "last.pt cannot be read" in err
    assert "previous.pt cannot be read" in err


def test_all_but_the_command_line_imports_without_jsonargparse() -> None:
    code = (
        "import sys; sys.modules['jsonargparse'] = None\n"
        "import tal_fast.training.trainer, tal_fast.runs.load, tal_fast.train, tal_fast.data, tal_fast.models\n"
        "tal_fast.runs.load.Config.from_dict({})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- Runs -----------------------------------------------------------------------------------------------------


def test_the_digits_preset_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--config", "digits-tal", "--output", str(tmp_path / "run")])
    out = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("epoch") for line in out) == 24  # not a terminal: one line an epoch
    assert "\r" not in "".join(out)
    run = load_run(tmp_path / "run")
    rows = run.history
    assert max(row["val_accuracy"] for row in rows) > 0.95
    assert rows[0]["typicalness"] == 1.0  # int(0.05 * 24) = 1 epoch of warm-up
    assert 0 < rows[1]["typicalness"] < 1
    assert rows[-1]["queue_length"] == 2000
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == run.config.to_dict()


def torchrun(*options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tal_fast.train"),
        *(
            "--config",
            "digits-tal",
            "--epochs",
            "5",
            "--data.loader",
            "torch",
            "--data.workers",
            "0",
            "--device",
            "cpu",
        ),
        *options,
    ]


def state(output: Path) -> dict[str, torch.Tensor]:
    content = checkpoint.load(output / "checkpoints" / "last.pt")
    tensors = {f"model.{k}": v for k, v in content["model"].items()}
    for rank, own in enumerate(content["ranks"]):
        tensors |= {f"{rank}.{k}": v for k, v in own["method"].items()}
    return tensors


def test_two_processes_stop_and_resume_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    done = subprocess.run(torchrun("--output", str(straight)), check=True, capture_output=True, text=True)
    assert done.stdout.count("epoch 5/5") == done.stdout.count("epoch 1/5") == 1  # rank 0 alone prints
    assert "2 x cpu" in done.stdout

    process = subprocess.Popen(
        torchrun("--output", str(parts)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not checkpoint.exists(parts / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on to its processes
    _, err = process.communicate(timeout=120)
    assert "stopped by SIGTERM and saved after" in err
    stopped = checkpoint.load(parts / "checkpoints" / "last.pt")
    assert 1 <= stopped["epoch"] < 5
    shutil.copytree(parts, tmp_path / "fewer")
    subprocess.run(torchrun("--output", str(parts), "--resume", "auto"), check=True, capture_output=True)

    want, got = state(straight), state(parts)
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    queues = [want[f"{rank}.loss_fn.queue.mean"] for rank in (0, 1)]
    assert not torch.equal(*queues)  # each rank has its own

    # What both ranks measured together is what the saved model measures alone.
    run = load_run(straight, "last")
    with torch.no_grad():
        right = sum(int((run.model(x)[0].argmax(1) == y).sum()) for x, y, _ in run.data.loader("val", batch_size=128))
    assert right / 896 == pytest.approx(run.history[-1]["val_accuracy"])

    # Half the processes go on too, and say that the result is another.
    words = torchrun("--output", str(tmp_path / "fewer"), "--resume", "auto")
    main(words[words.index("--config") :])
    assert "warning: ranks 2 -> 1 since" in capsys.readouterr().out
    assert load_run(tmp_path / "fewer", "last").epoch == 5


def test_a_batch_must_divide_among_the_ranks(tmp_path: Path) -> None:
    done = subprocess.run(
        torchrun("--output", str(tmp_path / "x"), "--batch_size", "33"), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "batch_size 33 is for all ranks together but does not divide among 2; use 32" in done.stderr
    assert not (tmp_path / "x").exists()
