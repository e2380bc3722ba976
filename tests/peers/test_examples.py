"""Scripts of examples/training: they learn the digits, and their checkpoints continue the queue of past samples."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

EXAMPLES = Path(__file__).parents[2] / "examples" / "training"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    """Runs a script in a folder of its own; returns its metrics."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

    def main(script: str, *arguments: Any) -> dict[str, float]:
        return runpy.run_path(str(EXAMPLES / f"{script}.py"))["main"]([str(argument) for argument in arguments])

    return main


def check_queues(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], prefix: str) -> None:
    """The later checkpoint's queue begins with the earlier one's entries."""
    old, new = before[f"{prefix}queue.mean"], after[f"{prefix}queue.mean"]
    count = int(before[f"{prefix}queue.cursor"][1])
    assert 0 < count < int(after[f"{prefix}queue.cursor"][1])
    assert torch.equal(new[:count], old[:count])


def test_the_plain_loop_learns_and_goes_on(run: Callable[..., dict[str, float]]) -> None:
    run("plain_loop", "--epochs", 2)
    before = torch.load("digits.pt", weights_only=True)
    metrics = run("plain_loop", "--epochs", 8)
    after = torch.load("digits.pt", weights_only=True)
    check_queues(before["loss"], after["loss"], "")
    assert metrics["accuracy"] > 0.88
    assert metrics["aurc"] < 0.02


def test_the_lightning_module_learns_and_goes_on(run: Callable[..., dict[str, float]]) -> None:
    run("lightning_module", "--epochs", 2)
    (first,) = Path("lightning-run").rglob("*.ckpt")
    metrics = run("lightning_module", "--epochs", 8, "--resume", first, "--output", "resumed")
    (second,) = Path("resumed").rglob("*.ckpt")
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (first, second)]
    check_queues(*states, "loss_fn.")
    assert metrics["accuracy"] > 0.88
    assert metrics["aurc"] < 0.02


def test_the_hugging_face_trainer_learns_and_goes_on_to_the_bit(run: Callable[..., dict[str, float]]) -> None:
    metrics = run("hf_trainer", "--epochs", 12)
    assert metrics["eval_accuracy"] > 0.8
    assert metrics["eval_aurc"] < 0.04
    steps = [22 * epoch for epoch in (10, 12)]
    before, after = (safetensors.torch.load_file(f"hf-run/checkpoint-{step}/model.safetensors") for step in steps)
    check_queues(before, after, "tal.")
    run("hf_trainer", "--epochs", 12, "--resume", f"hf-run/checkpoint-{steps[0]}", "--output", "resumed")
    resumed = safetensors.torch.load_file(f"resumed/checkpoint-{steps[1]}/model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in after.items())
