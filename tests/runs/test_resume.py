"""Finding the checkpoint a run resumes from."""

from __future__ import annotations

import dataclasses
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tal_fast.config.methods import OPTIONS
from tal_fast.config.schema import Config, MethodConfig, OptimConfig
from tal_fast.data import dali
from tal_fast.runs import checkpoint, resume
from tal_fast.runs.checkpoint import Damaged
from tal_fast.runs.resume import FIXED, SAME_BITS, WARNED, changes, differences, find_checkpoint
from tal_fast.training.trainer import Trainer, TrainingFailed
from tal_fast.utils.locks import FolderLock
from tests.helpers.checkpoints import content
from tests.helpers.locks import holder
from tests.helpers.training import assert_same_end, config, one_thread  # noqa: F401

SHAPE = content()["shape"]


def save(saved: Config, name: str = "last.pt", epoch: int = 1) -> Path:
    path = Path(saved.output) / "checkpoints" / name
    checkpoint.save(path, content(config=saved.to_dict(), epoch=epoch))
    return path


def test_auto_takes_the_newest_checkpoint_that_can_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    auto = config(tmp_path / "run", resume="auto")
    assert find_checkpoint(auto) is None
    last, previous = save(auto, epoch=2), save(auto, "previous.pt")
    content, path = find_checkpoint(auto) or ({}, None)
    assert (content["epoch"], path) == (2, last)
    last.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        content, path = find_checkpoint(auto) or ({}, None)
    assert (content["epoch"], path) == (1, previous)
    assert f"last.pt cannot be read (BadZipFile); it is damaged or not one; going on from {previous}" in caplog.text


@pytest.mark.parametrize("lost", [Path.unlink, lambda best: best.write_bytes(b"")], ids=["missing", "empty"])
def test_a_lost_best_checkpoint_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: Callable[[Path], Any]
) -> None:
    auto = config(tmp_path, resume="auto")
    best = save(auto, "best.pt")
    last = content(config=auto.to_dict()) | {"best": {"epoch": 1, "val_accuracy": 0.5}}
    checkpoint.save(best.with_name("last.pt"), last)
    find_checkpoint(auto)
    assert caplog.text == ""
    lost(best)
    find_checkpoint(auto)
    assert f"{best}, the weights of epoch 1, is missing or empty" in caplog.text
    assert "use --checkpoint last" in caplog.text


def test_a_path_resumes_into_the_same_or_an_empty_folder(tmp_path: Path) -> None:
    path = str(save(config(tmp_path / "a")))
    for folder in ("a", "b"):
        content, found = find_checkpoint(config(tmp_path / folder, resume=path)) or ({}, None)
        assert (content["epoch"], str(found)) == (1, path)
    save(config(tmp_path / "b"))
    with pytest.raises(ValueError, match=r"b holds a run already, which resuming from .* would overwrite"):
        find_checkpoint(config(tmp_path / "b", resume=path))
    with pytest.raises(ValueError, match="there is no checkpoint /nowhere"):
        find_checkpoint(config(tmp_path / "c", resume="/nowhere"))


@pytest.mark.parametrize("name", ["metrics.csv", "checkpoints/last.pt"])
def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path, name: str) -> None:
    assert find_checkpoint(config(tmp_path / "run")) is None
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).touch()
    with pytest.raises(ValueError, match="holds a run already; continue it with --resume auto, or name another"):
        find_checkpoint(config(tmp_path / "run"))


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; name a folder"):
        find_checkpoint(config(tmp_path / "file"))
    with pytest.raises(NotADirectoryError, match="file/run"):
        find_checkpoint(config(tmp_path / "file" / "run"))
    (tmp_path / "checkpoints").touch()
    with pytest.raises(ValueError, match="checkpoints is a file, where the checkpoints go; remove it, or"):
        find_checkpoint(config(tmp_path))


def test_a_process_that_torchrun_restarts_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(config(tmp_path))
    with pytest.raises(ValueError, match="holds a run already"):
        find_checkpoint(config(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    content, _ = find_checkpoint(config(tmp_path)) or ({}, None)
    assert content["epoch"] == 1


def test_a_folder_in_use_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = config(tmp_path / "run", resume="auto")
    save(auto)
    monkeypatch.setattr(resume, "REQUEUE_WAIT_S", 0.1)
    process = holder(tmp_path / "run")
    for options in (auto, config(tmp_path / "run")):
        with pytest.raises(ValueError, match=rf"run is in use by process {process.pid} on .*; wait until it ends, or"):
            find_checkpoint(options, FolderLock(tmp_path / "run"))
    process.communicate("end\n")
    lock = FolderLock(tmp_path / "run")
    assert find_checkpoint(auto, lock) is not None
    assert lock.held
    lock.release()


def test_of_two_runs_that_create_a_folder_one_is_refused(tmp_path: Path) -> None:
    trainer, late = (Trainer(config(tmp_path / "run", epochs=1)) for _ in range(2))
    assert not (tmp_path / "run").exists()
    process = holder(tmp_path / "run")
    with pytest.raises(TrainingFailed, match=f"run is in use by process {process.pid}"):
        trainer.fit()
    process.communicate("end\n")
    trainer.fit()
    with pytest.raises(TrainingFailed, match="holds a run already"):
        late.fit()
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epochs": 6, "seed": 4}, "(epochs was 4 and is 6, seed was 3 and is 4); set it back, start anew in"),
        (
            {"epochs": 6, "seed": 4, "allow": ["epochs"]},
            "(seed was 3 and is 4); .* go on with it by --allow seed$",
        ),
        ({"optim": OptimConfig(lr=0.01)}, "--allow optim.lr,optim.warmup_epochs"),
        ({"epochs": 6}, "epochs was 4 and is 6.* go on with it by --extend$"),
        ({"epochs": 2, "extend": True}, "epochs was 4 and is 2.* go on with it by --allow epochs$"),
        (
            {"optim": OptimConfig("adamw")},
            "(optim.name was 'sgd' and is 'adamw'), which its state does not fit",
        ),
        (
            {"data_options": {"unseen_classes": ["bars-0"]}, "allow": ["data.unseen_classes"]},
            "data.unseen_classes was .. and is .'bars-0'.*, which its state does not fit",
        ),
        ({"method": "ce", "allow": ["method.name"]}, "method.name was 'tal' and is 'ce'.*which its state does not fit"),
    ],
)
def test_another_configuration_is_refused_with_what_would_allow_it(
    tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    save(config(tmp_path))
    pattern = sentence.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"last.pt was made by another configuration .*{pattern}"):
        find_checkpoint(config(tmp_path, resume="auto", **options))


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 6, "seed": 4, "allow": ["epochs", "seed"]},
        {"epochs": 6, "extend": True},
        {"optim": OptimConfig(lr=0.01, clip_norm=1.0), "allow": ["optim.lr", "optim.clip-norm", "optim.warmup-epochs"]},
        {"threads": 7, "eval_batch_size": 3, "checkpoint_every_steps": 5},
    ],
)
def test_allowed_options_may_change(tmp_path: Path, options: dict[str, Any]) -> None:
    save(config(tmp_path))
    assert find_checkpoint(config(tmp_path, resume="auto", **options)) is not None


def test_a_configuration_that_cannot_be_read_is_named_with_its_file(tmp_path: Path) -> None:
    path = save(config(tmp_path))
    checkpoint.save(path, content(config={"epochz": 3}))
    with pytest.raises(Damaged, match=r"the configuration in .*last.pt cannot be read: epochz is not an option"):
        find_checkpoint(config(tmp_path, resume="auto"))


def test_the_documentation_lists_every_option_where_it_belongs() -> None:
    """Rows: the same bits, other bits with a warning, four that need ``--allow``, always refused."""
    methods = [MethodConfig(name, options={"outliers": "x"} if name == "openmix" else {}) for name in OPTIONS]
    options = {name for method in methods for name in Config(method=method).flat()}
    table = Path("docs/training.md").read_text().partition("### What may change")[2].split("\n\n")[1].splitlines()[2:]
    rows = [set(re.findall(r"`([a-z_.]+)`", line.split("|")[1])) & options for line in table]
    same, warned, *allowed, fixed = rows
    assert (same, warned, fixed) == (SAME_BITS, WARNED, FIXED)
    assert set().union(*allowed) == options - SAME_BITS - WARNED - FIXED
    assert sum(map(len, rows)) == len(options)  # none twice


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"eval_batch_size": 7, "progress": "lines", "data_options": {"workers": 3}}, []),
        ({"method": "logitnorm", "method_options": {"tau": 0.04}}, []),  # the default, written out
        ({"method_options": {"confidence_threshold": -1.0}}, []),  # likewise
        (
            {"method_options": {"confidence_threshold": 0.0}},
            ["method.options.confidence_threshold was -1.0 and is 0.0"],
        ),
        (
            {"method": "logitnorm", "method_options": {"tau": 0.5}},
            ["method.options.tau was 0.04 and is 0.5"],
        ),
        ({"data_options": {"crop_area": (0.2, 1.0)}}, ["data.crop_area was [0.5, 1.0] and is [0.2, 1.0]"]),
    ],
)
def test_differences_are_options_that_change_the_result(
    tmp_path: Path, options: dict[str, Any], expected: list[str]
) -> None:
    saved = config(tmp_path / "a", options.get("method", "tal"))
    assert differences(saved.to_dict(), config(tmp_path / "b", **options)) == expected


def changed(saved: dict[str, Any], now: dict[str, Any], ranks: int = 1) -> list[str]:
    """Texts of the changes between two shapes."""
    same = config(Path("x"))
    content = {"config": same.to_dict(), "world_size": 1, "shape": SHAPE | saved}
    return list(changes(content, SHAPE | now, same, ranks).values())


def test_changed_conditions_are_named() -> None:
    assert changed({}, {}) == changed({}, {"conditions": {"threads": 1}, "digests": {"train": "1"}}) == []
    assert changed({}, {"train_images": 99}, ranks=2) == ["ranks 1 -> 2", "training images 100 -> 99"]
    before = {"conditions": {"threads": 1, "torch": "2.14"}, "digests": {"train": "1", "val": "1"}}
    now = {"conditions": {"threads": 2, "torch": "2.15"}, "digests": {"train": "2", "val": "2"}}
    assert changed(before, before) == []
    assert changed(before, now) == [
        "threads 1 -> 2", "torch '2.14' -> '2.15'", "other training images", "other validation images",
    ]  # fmt: skip


def finished(output: Path, **options: Any) -> Config:
    """Configuration of a run of one epoch, after it was trained."""
    Trainer(config(output, epochs=1, **options)).fit()
    return config(output, epochs=1, resume="auto", **options)


def test_what_changes_the_bits_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = finished(tmp_path)
    Trainer(saved)
    assert "not bit for bit" not in caplog.text
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    options = {"eval_batch_size": 7, "model": dataclasses.replace(saved.model, channels_last=True)}
    saved.method.options["backend"] = "reference"
    saved.data.loader = "dali" if dali.available() else "torch"
    Trainer(dataclasses.replace(saved, **options))
    torch.set_num_threads(threads)
    said = caplog.text
    for text in (
        "eval_batch_size 256 -> 7", f"threads {threads} -> {threads + 1}", "model.channels_last False -> True",
        "method.options.backend 'native' -> 'reference'", "the run goes on, but not bit for bit as it would have",
    ):  # fmt: skip
        assert text in said
    assert ("data.loader 'torch' -> 'dali'" in said) == dali.available()


def test_a_finished_run_is_extended_and_its_options_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = finished(tmp_path)
    saved.epochs, saved.extend = 2, True
    saved.optim = OptimConfig(lr=0.02, clip_norm=0.5, warmup_epochs=1, weight_decay=0.25, momentum=0.5)
    saved.allow = ["optim.lr", "optim.clip_norm", "optim.weight_decay", "optim.momentum"]
    with caplog.at_level(logging.INFO):
        trainer = Trainer(saved)
    assert "optim.lr 0.05 -> 0.02, optim.momentum 0.9 -> 0.5, optim.weight_decay 0.0005 -> 0.25" in caplog.text
    assert "epochs 1 -> 2 since" in caplog.text
    assert "the schedule goes on with a learning rate of 0.02, which was 0.05 before" in caplog.text
    groups = trainer.state.optimizer.param_groups
    assert [(group["weight_decay"], group["momentum"]) for group in groups] == [(0.25, 0.5), (0.0, 0.5)]
    trainer.fit()
    assert [row["epoch"] for row in trainer.history] == [1, 2]
    content = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
    assert (content["epoch"], content["config"]["optim"]["lr"]) == (2, 0.02)
    assert find_checkpoint(dataclasses.replace(saved, allow=[], extend=False)) is not None  # the same command goes on


def test_temporary_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    saved = finished(tmp_path)
    saved.epochs, saved.extend = 2, True
    left = ["checkpoints/.last-abcdefgh.pt", "checkpoints/.epoch-0002-abcd_fgh.pt", ".metrics-abcdefgh.csv"]
    for name in [*left, ".config-abcdefgh.yaml", ".notes-abcdefgh.txt"]:
        (tmp_path / name).touch()
    Trainer(saved).fit()
    assert [path.name for path in tmp_path.rglob(".*")] == [".notes-abcdefgh.txt"]


def move(root: Path) -> None:
    image = min((root / "train" / "1").iterdir())
    image.rename(root / "train" / "2" / image.name)


def repaint(root: Path) -> None:
    for number, path in enumerate(sorted(root.glob("train/*/*.bmp"))):  # of the same size
        Image.effect_noise((8, 8), 1 + number).save(path)


def add(root: Path) -> None:
    Image.effect_noise((8, 8), 60).save(root / "train" / "3" / "new.bmp")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 4 classes with 10 training and 6 validation images each."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 10), ("val", 6)):
        for name in "1234":
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.effect_noise((8, 8), 30 + i).save(root / split / name / f"{i}.bmp")
    return root


def on_folder(output: Path, root: Path, **options: Any) -> Config:
    data = {"dataset": "folder", "root": str(root), "train_limit": None, **options.pop("data_options", {})}
    return config(output, "ce", batch_size=8, method_options={"queue_size": 150}, data_options=data, **options)


@pytest.mark.parametrize("change", [move, repaint, add])
def test_other_training_images_are_refused(
    tmp_path: Path, images: Path, change: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    root = Path(shutil.copytree(images, tmp_path / "images"))
    Trainer(on_folder(tmp_path / "run", root, epochs=1)).fit()
    change(root)
    with pytest.raises(ValueError, match=r"training images are not the 40 that .*last.pt was made with.*--allow tr"):
        Trainer(on_folder(tmp_path / "run", root, epochs=1, resume="auto"))
    Trainer(on_folder(tmp_path / "run", root, epochs=1, resume="auto", allow=["training-images"]))
    assert "training images" in caplog.text
    assert "not bit for bit" in caplog.text


def test_a_copy_is_the_same_and_other_validation_images_are_warned_of(
    tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Trainer(on_folder(tmp_path / "run", images, epochs=1)).fit()
    root = Path(shutil.copytree(images, tmp_path / "elsewhere", copy_function=shutil.copyfile))
    Trainer(on_folder(tmp_path / "run", root, epochs=1, resume="auto"))
    assert "images" not in caplog.text.replace("last change of an image file", "")
    for path in sorted((root / "val").rglob("*.bmp"))[::2]:
        path.unlink()
    Trainer(on_folder(tmp_path / "run", root, epochs=1, resume="auto"))
    assert "other validation images" in caplog.text


def test_a_list_of_files_may_leave_out_images(tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture) -> None:
    Trainer(on_folder(tmp_path / "run", images, epochs=1)).fit()
    files = sorted(images.rglob("*.bmp"))[1:]
    (tmp_path / "list.txt").write_text("\n".join(str(path.relative_to(images)) for path in files))
    listed = {"file_list": str(tmp_path / "list.txt")}
    Trainer(on_folder(tmp_path / "run", images, epochs=1, resume="auto", data_options=listed))
    assert "training images 40 -> 39" in caplog.text


def test_a_state_that_does_not_fit_is_refused_in_a_sentence(tmp_path: Path) -> None:
    saved = finished(tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    whole = checkpoint.load(path)
    for key, value in {
        "model": dict(list(whole["model"].items())[3:]),
        "optimizer": {"state": {}, "param_groups": []},
        "ranks": [{"method": {}}],
    }.items():
        checkpoint.save(path, whole | {key: value})
        with pytest.raises(Damaged, match=r"the state in .*last.pt does not fit this run \(.*\); it is damaged or of"):
            Trainer(saved)


def test_a_method_that_draws_when_it_is_built_resumes_to_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\nfrom tal_fast.methods.ce import CrossEntropy\n\n\nclass Noisy(CrossEntropy):\n"
        "    def __init__(self, config, task):\n        super().__init__(config, task)\n        torch.randn(4)\n\n"
        "    def forward(self, logits, *rest):\n"
        "        return super().forward(logits + 0.1 * torch.randn_like(logits), *rest)\n"
    )
    name = f"{tmp_path / 'own.py'}:Noisy"
    Trainer(config(tmp_path / "straight", name, epochs=2)).fit()
    Trainer(config(tmp_path / "parts", name, epochs=2)).fit(until=1)
    Trainer(config(tmp_path / "parts", name, epochs=2, resume="auto")).fit()
    assert_same_end(tmp_path / "straight", tmp_path / "parts")
