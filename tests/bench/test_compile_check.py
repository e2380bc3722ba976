"""Compile check: kernels compile for GPUs that are not present, and spills and kernels over their budget fail it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from bench.kernel_cost import compile_check, cost

COMMAND = [sys.executable, "-m", "bench.kernel_cost.compile_check"]


def run(*command: str, interpreter: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreter else "0"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_one_kernel_compiles_for_every_target_and_is_held_to_its_report(tmp_path: Path) -> None:
    report, objects = tmp_path / "report.json", tmp_path / "objects"
    only = ["--match", "push all queue float32"]
    done = run(*COMMAND, *only, "--report", str(report), "--emit", str(objects))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    for target, architecture in cost.TARGETS.items():
        figures = found[target]["push all queue float32"]
        assert figures["unit"] == "row"
        assert figures["instructions"] == pytest.approx(sum(figures["kinds"].values()), abs=0.2)
        assert figures["registers"] > 0
        assert figures["programs"] > 0
        assert set(figures["model"]) == {gpu.name for gpu in architecture.gpus}
    files = {str(file.relative_to(objects)) for file in objects.rglob("*") if file.is_file()}
    assert "sm_90/push-all-queue-float32.cubin" in files
    assert "gfx942/push-all-queue-float32.hsaco" in files

    # A report of fewer instructions: the same kernel is now over it, on this target only.
    found["sm_80"]["push all queue float32"]["instructions"] /= 1.06
    report.write_text(json.dumps(found))
    over = run(*COMMAND, *only, "--budget", str(report), "--target", "sm_80")
    assert over.returncode == 1
    assert "in the report" in over.stdout
    found["triton"] = "1.0"
    report.write_text(json.dumps(found))
    other = run(*COMMAND, *only, "--budget", str(report), "--target", "sm_80")
    assert other.returncode == 2
    assert "is for Triton 1.0" in other.stderr


def test_a_spill_fails_the_check() -> None:
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from bench.kernel_cost import compile_check
plans = list(compile_check.planned_launches("sm_90"))
# 24 registers do not hold the minima of a thread and their addresses.
compile_check.planned_launches = lambda _: [(label, replace(plan, max_registers=24)) for label, plan in plans]
compile_check.ProcessPoolExecutor = ThreadPoolExecutor  # a process would not see the change
sys.argv = ["compile_check", "--target", "sm_90", "--match", "search queue float32"]
compile_check.main()
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAULT: spills" in done.stdout


def test_the_interpreter_is_refused() -> None:
    done = run(*COMMAND, interpreter=True)
    assert done.returncode == 2
    assert "unset it" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "missing.json"), "no report that can be read"),
        (("--report", "missing/report.json"), "there is no folder missing"),
        (("--target", "sm_90", "--match", "los bfloat16"), "which no kernel's label contains"),
    ],
)
def test_arguments_that_would_check_nothing_are_refused(arguments: tuple[str, ...], message: str) -> None:
    done = run(*COMMAND, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("figures", "budget", "expected"),
    [
        ({}, None, []),
        ({}, {"instructions": 39.0}, []),
        ({}, {"instructions": 38.0}, ["40.0 instructions a logit, 38.0 in the report"]),
        ({}, {}, ["is not in the report; make kernels-report writes it"]),
        ({"instructions": 40.1}, None, ["40.1 instructions a logit, limit 40"]),
        ({"spilled": 8}, None, ["spills 8"]),
    ],
)
def test_faults(figures: dict[str, Any], budget: dict[str, Any] | None, expected: list[str]) -> None:
    label = "loss bfloat16 C=1000 paper"
    kernel = {"unit": "logit", "instructions": 40.0, "spilled": 0, "barriers": 2, **figures}
    assert compile_check.faults("sm_90", label, kernel, budget, triton="3.8") == expected


def test_a_barrier_in_the_search_is_a_fault() -> None:
    kernel = {"unit": "pair", "instructions": 5.0, "spilled": 0, "barriers": 1}
    label = "search queue float32"
    assert compile_check.faults("sm_90", label, kernel, None, triton="3.8") == ["1 barriers in the loop, limit 0"]
    assert compile_check.faults("sm_100", label, kernel, None, triton="3.8") == []
    assert compile_check.faults("sm_90", label, kernel, None, triton="3.6") == []


def test_spills_are_known_by_version_target_and_kernel() -> None:
    kernel = {"unit": "logit", "instructions": 40.0, "spilled": 8, "barriers": 2}
    found = {
        (triton, target): compile_check.faults(target, "loss bfloat16 C=131072 paper", kernel, None, triton=triton)
        for triton in ("3.5", "3.6", "3.8")
        for target in ("sm_80", "sm_90")
    }
    assert found.pop(("3.5", "sm_90")) == []
    assert set(map(tuple, found.values())) == {("spills 8",)}


@pytest.mark.parametrize("version", ["3.5", "3.6", "3.8"])
def test_committed_reports_are_of_the_planned_launches_and_spill_as_said(version: str) -> None:
    report = json.loads(Path(f"bench/results/kernels/triton-{version}.json").read_text())
    assert report["triton"].startswith(version)
    spilled = {}
    for target in cost.TARGETS:
        assert set(report[target]) == set(dict(compile_check.planned_launches(target)))
        spilled |= {(target, label): f["spilled"] for label, f in report[target].items() if f["spilled"]}
    assert spilled == compile_check.SPILLS[version]


def test_every_limit_is_of_a_planned_launch_and_every_kernel_has_its_unit() -> None:
    planned = {target: dict(compile_check.planned_launches(target)) for target in cost.TARGETS}
    assert set(compile_check.LIMITS) <= set(planned["sm_90"])
    kernels = {launch.kernel.__name__ for launches in planned.values() for launch in launches.values()}
    assert kernels == set(cost.WORK)
