"""Resolved runtime options."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tal_fast.config.schema import Config, ModelConfig, OptimConfig
from tal_fast.training.runtime import Runtime

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_on_the_cpu_is_float32_without_compilation() -> None:
    runtime = Runtime.resolve(Config(), CPU)
    assert (runtime.dtype, runtime.compile, runtime.channels_last) == (None, False, False)
    assert runtime.summary() == "float32"


def test_auto_on_a_gpu_depends_on_its_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        runtime = Runtime.resolve(Config(), GPU)
        assert (runtime.dtype, runtime.compile, runtime.channels_last) == (dtype, True, True)


def test_given_options_win_over_auto() -> None:
    options = Config(precision="bfloat16", model=ModelConfig(compile=True, channels_last=True))
    assert Runtime.resolve(options, CPU).summary() == "bfloat16, channels last, compiled"


@pytest.mark.parametrize(
    ("options", "device", "ranks", "sentence"),
    [
        ({"cuda_graphs": True}, CPU, 1, "cuda_graphs is on but the device is cpu"),
        ({"cuda_graphs": True, "precision": "float16"}, GPU, 1, "cuda_graphs cannot skip steps as a float16 scaler"),
        ({"cuda_graphs": True, "precision": "float32"}, GPU, 2, "cuda_graphs is for one GPU but there are 2 ranks"),
        ({"model": ModelConfig(sync_batchnorm=True)}, CPU, 1, "sync_batchnorm works on GPUs only"),
        ({"batch_size": 33}, CPU, 2, "batch_size 33 is for all ranks .* does not divide among 2; use 32"),
        ({"optim": OptimConfig(accumulate=5), "batch_size": 32}, CPU, 1, "optim.accumulate is 5 but a rank's 32"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], device: torch.device, ranks: int, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        Runtime.resolve(Config(**options), device, ranks)
