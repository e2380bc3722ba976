"""``python -m tal_fast.train`` as a command: refusals, a whole run, runs on two processes."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tal_fast.runs import checkpoint
from tal_fast.runs.load import load_run
from tal_fast.training.command import main
from tal_fast.utils.process import run_and_exit
from tests.helpers.training import raise_signal_at

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _cache_and_threads(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--output", ""], "output is empty; name a folder for the results"),
        (["--output", "x", "--threads", "1000000"], "threads is 1000000; use at most "),
    ],
)
def test_values_that_no_run_can_use_are_refused(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refusal(["--config", "digits-ce", *words], capsys)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--config digits", "no preset or file 'digits'; did you mean digits-ce"),
        ("--epochs 0", "epochs is 0 but must be at least 1"),
        ("--config folder-tal", "data.root is not set; name the folder that holds train/ and val/ with --data.root"),
        ("--config folder-tal --data.root /nowhere", "/nowhere is not a folder; name one that holds train/ and val/"),
        ("--config digits-ce --batch-size 5000", "a step takes 5000 images"),
        ("--config digits-ce --model.name resnet19", "no model 'resnet19'; did you mean resnet18"),
        ("--config digits-tal --method.t_min 200", "t_min"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(
    tmp_path: Path, argv: str, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence in refusal(argv.split(), capsys)
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_damaged_checkpoints_are_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", "digits-ce", "--epochs", "1", "--data.loader", "torch", "--data.workers", "0"]
    output = str(tmp_path / "out")
    main([*options, "--data.train-limit", "64", "--output", output, "--progress", "none"])
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "out" / "checkpoints" / name).write_bytes(b"damaged")
    err = refusal([*options, "--output", output, "--resume", "auto"], capsys)
    assert "last.pt cannot be read" in err
    assert "previous.pt cannot be read" in err


def test_a_run_that_fails_at_its_start_can_be_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", "digits-ce", "--epochs", "1", "--data.train-limit", "64", "--data.loader", "torch"]
    words += ["--data.workers", "0", "--device", "cpu", "--output", str(tmp_path / "run")]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("tal_fast.training.loggers.Loggers.__init__", full)
        with pytest.raises(SystemExit) as caught:
            run_and_exit(lambda: main(words))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: No space left on device; make room\n"
    assert (tmp_path / "run" / "config.yaml").exists()
    main(words)
    assert load_run(tmp_path / "run").epoch == 1


def test_options_are_read_without_torch() -> None:
    for words in ("-m tal_fast.train --help", "-m tal_fast train --help", "-m tal_fast.train --epochs 0"):
        code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_module(sys.argv.pop(1), run_name='__main__')"
        _, module, *options = words.split()
        done = subprocess.run([sys.executable, "-c", code, module, *options], capture_output=True, text=True)
        if "--help" in options:
            program = "tal-fast train" if module == "tal_fast" else "python -m tal_fast.train"
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith(f"usage: {program} ")
        else:
            assert (done.returncode, done.stderr) == (2, "error: epochs is 0 but must be at least 1\n")


def test_the_console_command_lists_the_commands() -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "tal_fast", *words], capture_output=True, text=True)

    text = run("--help").stdout
    assert text == run().stdout
    entries = {path.stem for path in (ROOT / "tal_fast").glob("*.py")} - {"__init__", "__main__", "functional"}
    assert {line.split()[0].replace("-", "_") for line in text.splitlines()[2:]} == entries
    assert all(len(line.split()) > 3 for line in text.splitlines()[2:])
    unknown = run("trian")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: no command 'trian'; there are train, predict, evaluate, ")


@pytest.mark.slow
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


def test_a_signal_saves_the_run_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", "digits-tal", "--epochs", "1", "--data.train-limit", "200", "--device", "cpu"]
    words += ["--data.loader", "torch", "--data.workers", "0", "--logger", "none", "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        raise_signal_at(patch, step=2, number=signal.SIGUSR1)
        with pytest.raises(SystemExit) as caught:
            main([*words, "--resume", "auto"])
    assert caught.value.code == 75
    out, err = capsys.readouterr()
    assert out.startswith("tal on digits: ")
    assert err == "stopped by SIGUSR1 and saved after 0 epochs and 2 steps; go on with --resume auto\n"
    main([*words, "--resume", "auto", "--progress", "none"])
    assert capsys.readouterr() == ("", "")
    assert load_run(tmp_path / "run").epoch == 1


def test_an_error_of_the_network_is_no_mistake_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--config", "digits-ce", "--epochs", "1", "--data.train-limit", "200", "--device", "cpu"]
    words += ["--data.loader", "torch", "--data.workers", "0", "--logger", "none", "--output", str(tmp_path / "run")]
    cross_entropy, count = torch.nn.functional.cross_entropy, [0]

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        count[0] += 1
        if count[0] == 3:
            raise ValueError("a fault of the network")
        return cross_entropy(*args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.cross_entropy", failing)
    with pytest.raises(ValueError, match="a fault of the network"):  # Python prints it and exits with 1
        main(words)
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 2


def torchrun(*options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tal_fast.train"),
        *("--config", "digits-tal", "--epochs", "5", "--device", "cpu"),
        *("--data.loader", "torch", "--data.workers", "0"),
        *options,
    ]


def state(output: Path) -> dict[str, torch.Tensor]:
    content = checkpoint.load(output / "checkpoints" / "last.pt")
    tensors = {f"model.{k}": v for k, v in content["model"].items()}
    for rank, own in enumerate(content["ranks"]):
        tensors |= {f"{rank}.{k}": v for k, v in own["method"].items()}
    return tensors


@pytest.mark.slow
def test_two_processes_stop_and_resume_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    done = subprocess.run(torchrun("--output", str(straight)), check=True, capture_output=True, text=True)
    assert done.stdout.count("epoch 5/5") == done.stdout.count("epoch 1/5") == 1  # rank 0 alone prints
    assert "2 x cpu" in done.stdout

    process = subprocess.Popen(
        torchrun("--output", str(parts)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not checkpoint.exists(parts / "checkpoints") and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on to its processes
    _, err = process.communicate()
    assert "stopped by SIGTERM and saved after" in err
    stopped = checkpoint.load(parts / "checkpoints" / "last.pt")
    assert stopped["epoch"] < 5
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
        correct = sum(int((run.model(x)[0].argmax(1) == y).sum()) for x, y, _ in run.data.loader("val", batch_size=128))
    assert correct / 896 == pytest.approx(run.history[-1]["val_accuracy"])

    # Half the processes continue too, and say that the result is another.
    words = torchrun("--output", str(tmp_path / "fewer"), "--resume", "auto")
    main(words[words.index("--config") :])
    assert "warning: ranks 2 -> 1 since" in capsys.readouterr().err
    assert load_run(tmp_path / "fewer", "last").epoch == 5


@pytest.mark.slow
def test_a_batch_must_divide_among_the_ranks(tmp_path: Path) -> None:
    done = subprocess.run(
        torchrun("--output", str(tmp_path / "x"), "--batch-size", "33"), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "batch_size 33 is for all ranks together but does not divide among 2; use 32" in done.stderr
    assert not (tmp_path / "x").exists()
