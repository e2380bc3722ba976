"""Kernels compile for GPUs that are not here, as they would be launched, and a spill is seen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

from tal_fast.kernels import compile_check  # noqa: E402


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tal_fast.kernels.compile_check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_one_kernel_for_every_target() -> None:
    done = run("--quick", "--match", "push accepted")
    assert done.returncode == 0, done.stdout + done.stderr
    for target in compile_check.TARGETS:
        assert target in done.stdout
    assert "8 kernels: no spill" in done.stdout


def test_a_spill_fails_the_check() -> None:
    code = """
from tal_fast.kernels import compile_check as check, loss
loss.warps_of = lambda block, target: 1  # a row of 8,192 logits in one warp cannot fit
import sys
sys.argv = ["compile_check", "--quick", "--target", "cuda:90", "--match", "loss_kernel bfloat16 C=16384 paper"]
from concurrent.futures import ThreadPoolExecutor
check.ProcessPoolExecutor = ThreadPoolExecutor
check.main()
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "SPILLS" in done.stdout


def test_the_interpreter_is_refused() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tal_fast.kernels.compile_check"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "unset it" in done.stderr


def test_amd_metadata_that_changed_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="no .vgpr_count"):
        compile_check.hip_resources("nothing here", 0)
    resources = compile_check.hip_resources(".vgpr_count:     40\n.vgpr_spill_count: 3\n", 16)
    assert resources == compile_check.Resources(40, 3, 16)
