"""Benchmark of a training step (forward, backward, optimizer) with cross-entropy and with TAL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from bench.batches import fill
from bench.harness import agree
from tal_fast.config.schema import MethodConfig, ModelConfig, OptimConfig
from tal_fast.methods import Task, build_method
from tal_fast.models import build_model
from tal_fast.training.optim import build_optimizer
from tal_fast.training.runtime import Runtime
from tal_fast.training.train_step import TrainStep


@dataclass(frozen=True)
class Case:
    method: Literal["tal"]
    model: str
    B: int
    C: int
    side: int
    N: int
    threads: int = 1
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.method}-{self.model}-B{self.B}-C{self.C}-{self.side}px-N{self.N}-{self.dtype}-{self.threads}t"


FULL = [
    *(Case("tal", "cifar_resnet20", 64, 100, 32, 30_000, threads=t) for t in (1, 2)),
    Case("tal", "resnet18", 8, 1000, 224, 880_880, threads=2),
]
SMOKE = [Case("tal", "cifar_resnet20", 16, 100, 32, 30_000)]
GPU = [Case("tal", "resnet50", 256, 1000, 224, 880_880, dtype="bfloat16")]
ROUNDS = 20
EPOCHS = 100  # of the run that the steps belong to; the step is one after warm-up


def make_training(
    case: Case, method: Literal["ce", "tal"], device: torch.device, backend: Literal["auto", "reference"] = "auto"
) -> Callable[[], Tensor]:
    """Training step that returns its loss, on the same weights, images and queue for every method."""
    torch.manual_seed(0)
    network: nn.Module = build_model(ModelConfig(case.model), case.C, image_size=case.side)
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(case.B, 3, case.side, case.side, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(case.C, (case.B,), device=device)
    indices = torch.arange(case.B, device=device)
    method_config = MethodConfig(method, options={"queue_size": case.N, "backend": backend})
    task = Task(EPOCHS, case.C, case.N, learning_rate=0.01)
    loss_fn: Any = build_method(method_config, task).to(device)
    loss_fn.start_epoch(EPOCHS - 1)
    for part in loss_fn.modules():
        if hasattr(part, "queue"):
            fill(part.queue.push, case.N, device)
    optimizer = build_optimizer(OptimConfig(lr=0.01), network)
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if case.dtype == "bfloat16" else None
    train_step = TrainStep(network, loss_fn, Runtime(device, dtype, compile=on_gpu, channels_last=True))
    if on_gpu:
        train_step.compile()

    def step() -> Tensor:
        loss, _ = train_step(images, labels, indices)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


@pytest.mark.cases(FULL, SMOKE, gpu=GPU, group="training")
def bench_training(case: Case, measure: Callable[..., None], device: torch.device) -> None:
    torch.set_num_threads(case.threads)
    tal = make_training(case, case.method, device)
    plain = make_training(case, case.method, device, backend="reference")
    agree(f"the loss of {case}", torch.stack([tal(), tal()]), torch.stack([plain(), plain()]), 1e-3)
    del plain
    facts = {"floor": "the same step with cross-entropy"}
    measure([tal], make_training(case, "ce", device), case=case, facts=facts, rounds=ROUNDS)
