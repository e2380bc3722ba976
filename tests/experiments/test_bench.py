"""Expected hours of an experiment, and the experiment files for a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tal_fast.config.parse import load_config
from tal_fast.experiments.command import main
from tal_fast.experiments.parse import read_experiment
from tal_fast.experiments.plan import Job
from tal_fast.training import throughput
from tests.helpers.experiments import SMALL, write

EXAMPLES = Path(__file__).parents[2] / "examples" / "experiments"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps, after one to warm up."""
    for name, value in {"MAX_STEPS": 3, "WARM_UP_STEPS": 1, "MAX_SECONDS": 0.1, "VALIDATION_STEPS": 2}.items():
        monkeypatch.setattr(throughput, name, value)


def rows(text: str) -> dict[str, list[str]]:
    """Row of the table -> its cells."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}


def test_the_hours_of_each_row_and_of_all_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    path = write(tmp_path / "e.yaml", grid={"method.options.t_max": {"values": [20, 50], "methods": ["tal"]}})
    found = throughput.Expected(images_per_s=500.0, data_wait=0.25, hours=30.0)
    measured: list[Any] = []
    monkeypatch.setattr(
        "tal_fast.experiments.bench.expected_of", lambda config, ranks: measured.append(config) or found
    )
    assert main([str(path), "--bench", "--jobs", "4"]) == 0
    printed = capsys.readouterr().out
    assert [(config.method.name, config.seed) for config in measured] == [("ce", 0), ("tal", 0), ("tal", 0)]
    ms = f"{1e3 * measured[0].batch_size / 500:.2f}"
    assert rows(printed)["ce"] == [ms, "500", "25%", "30", "h", "00", "min", "2", "60", "h", "00", "min"]
    assert "tal-t_max=50" in rows(printed)
    assert "all 6: 7 d 12 h, 45 h 00 min with 4 at a time;" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_steps_on_the_data_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None) -> None:
    broken = {"method": {"name": "openmix", "options": {"outliers": str(tmp_path / "gone")}}}
    path = write(tmp_path / "e.yaml", methods={"tal": {"method": {"name": "tal"}}, "openmix": broken}, seeds=[5])
    assert main([str(path), "--bench", "--output", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert rows(printed)["tal"][-1] == "s"  # seconds, with two epochs of 200 images
    assert "openmix  not measured: " in printed
    assert str(tmp_path / "gone") in printed
    assert "synthetic" not in printed
    assert not (tmp_path / "out").exists()


def test_synthetic_images_stand_in_for_data_that_are_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setitem(throughput.STAND_INS, "cifar100", (200, 100, 100, 16))
    data = {"dataset": "cifar100", "root": str(tmp_path / "gone"), "crop_area": None, "channels": 1}
    network = {"name": "cifar_resnet8", "width": 8}
    overrides = {**SMALL, "data": data, "model": network, "batch_size": 16}
    openmix = {"method": {"name": "openmix", "options": {"outliers": "npy:gone.npy"}}}
    path = write(tmp_path / "e.yaml", overrides=overrides, methods={"ce": {"method.name": "ce"}, "openmix": openmix})
    assert main([str(path), "--bench"]) == 0
    printed = capsys.readouterr().out
    said = "on synthetic images in memory, which need no decoding (200 for training, 100 for validation, 100 classes)"
    assert f"ce, openmix: {said}, as there is no folder {tmp_path / 'gone'}" in " ".join(printed.split())
    assert all(float(rows(printed)[name][0]) > 0 for name in ("ce", "openmix"))


@pytest.mark.parametrize(
    ("dataset", "file"),
    [("cifar100", "train.bin"), ("cifar10", "batches.meta"), ("folder", "dog/x.png"), ("fashion-mnist", "t10k-ubyte")],
)
def test_nothing_stands_in_for_data_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str, file: str
) -> None:
    root = tmp_path / "data"
    overrides = {"data": {"dataset": dataset, "root": str(root)}, "device": "cpu"}
    path = write(tmp_path / "e.yaml", overrides=overrides, methods={"ce": {"method.name": "ce"}})
    (root / file).parent.mkdir(parents=True)
    (root / file).write_bytes(b"other")
    assert main([str(path), "--bench"]) == 1
    printed = capsys.readouterr().out
    assert re.search("^ce +not measured: ", printed, re.M)
    assert "synthetic" not in printed
    assert "all 0" not in printed


def test_a_mistake_beside_missing_data_is_no_missing_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(throughput.STAND_INS, "cifar100", (200, 100, 100, 16))
    overrides = {"data": {"dataset": "cifar100"}, "device": "cpu", "model": {"name": "gone.py:net"}}
    assert main([str(write(tmp_path / "e.yaml", overrides=overrides)), "--bench"]) == 1
    assert re.search(r"ce   not measured: .*gone\.py", capsys.readouterr().out)


def test_a_row_without_a_stand_in_says_what_is_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    overrides = {"data": {"dataset": "webdataset", "root": str(tmp_path / "gone")}, "device": "cpu"}
    assert main([str(write(tmp_path / "e.yaml", overrides=overrides)), "--bench"]) == 1
    assert re.search(rf"ce   not measured: .*{tmp_path / 'gone'}", capsys.readouterr().out)


def preset_of(job: Job, name: str) -> list[str]:
    """Options of training in which a job differs from a preset, but for where its data are and its seed."""
    ours, theirs = job.config.flat(), load_config(name).flat()
    given = ("data.root", "seed", "threads", "resume", "output", "model.name")
    return [key for key in ours if key not in given and ours[key] != theirs[key]]


@pytest.mark.parametrize("name", ["cifar100", "cifar100-resnet18", "imagenet"])
def test_the_gpu_experiments_have_every_method_and_agree_with_the_presets(name: str) -> None:
    experiment = read_experiment(EXAMPLES / f"{name}.yaml")
    jobs = {job.method: job for job in experiment.jobs}
    assert list(jobs) == [
        "ce", "label-smoothing", "logitnorm", "crl", *(["openmix"] if name != "imagenet" else []), "fmfp", "sure-plus",
        "tal-paper", "tal-released", "fmfp-tal", "sure-plus-tal",
    ]  # fmt: skip
    base, accumulate = ("cifar100-resnet110", []) if name != "imagenet" else ("imagenet-resnet50", ["optim.accumulate"])
    assert preset_of(jobs["ce"], f"{base}-ce") == accumulate
    assert preset_of(jobs["tal-released"], f"{base}-tal") == accumulate
    assert preset_of(jobs["tal-paper"], f"{base}-tal") == [*accumulate, "method.options.variant"]
    sure = load_config("sure-plus-no-pixmix").flat()
    own = {key for key in sure if key.startswith(("mix.", "optim.ema", "optim.sam"))}
    if name != "imagenet":
        assert preset_of(jobs["fmfp-tal"], f"{base}-fmfp-tal") == []
        assert preset_of(jobs["sure-plus"], "sure-plus-no-pixmix") == ["data.dataset"]
        own |= {key for key in sure if key.startswith("optim.")}
    for row in ("sure-plus", "sure-plus-tal"):
        assert {key for key in own if jobs[row].config.flat()[key] != sure[key]} == set()
    assert all(
        job.config.model.name in ("cifar_preact_resnet110", "cifar_resnet18", "resnet50") for job in jobs.values()
    )
    ranges = [job.config.method.options for job in jobs.values() if "t_min" in job.config.method.options]
    assert {(options["t_min"], options["t_max"]) for options in ranges} == {(10.0, 100.0)}
