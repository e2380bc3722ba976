"""Compile check: kernels compile for GPUs that are not present, and a spill fails the check."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tal_fast.kernels import compile_check

COMMAND = [sys.executable, "-m", "tal_fast.kernels.compile_check"]


def run(*command: str, interpreter: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreter else "0"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_one_kernel_compiles_for_every_target() -> None:
    done = run(*COMMAND, "--quick", "--match", "push accepted")
    assert done.returncode == 0, done.stdout + done.stderr
    for target in compile_check.TARGETS:
        assert target in done.stdout
    assert "8 kernels: no spill" in done.stdout


def test_a_spill_fails_the_check() -> None:
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from tal_fast.kernels import compile_check
plans = list(compile_check.planned_launches("cuda:90", quick=True))
# 24 registers do not hold the 16 minima of a thread and their addresses.
compile_check.planned_launches = lambda *_: [(label, replace(plan, max_registers=24)) for label, plan in plans]
compile_check.ProcessPoolExecutor = ThreadPoolExecutor  # a process would not see the change
sys.argv = ["compile_check", "--quick", "--target", "cuda:90", "--match", "nearest, queue float32"]
compile_check.main()
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "SPILLS" in done.stdout


def test_the_interpreter_is_refused() -> None:
    done = run(*COMMAND, interpreter=True)
    assert done.returncode == 2
    assert "unset it" in done.stderr


def test_unknown_amd_metadata_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"no \.vgpr_count"):
        compile_check.hip_resources("nothing here", 0)
    resources = compile_check.hip_resources(".vgpr_count:     40\n.vgpr_spill_count: 3\n", 16)
    assert resources == compile_check.Resources(40, 3, 16)
