"""Compile check: kernels compile for GPUs that are not present, and spills and kernels over their budget fail it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tal_fast.kernels import compile_check
from tal_fast.kernels.machine_code import read_sass

COMMAND = [sys.executable, "-m", "tal_fast.kernels.compile_check"]


def run(*command: str, interpreter: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreter else "0"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_one_kernel_compiles_for_every_target_and_is_held_to_its_report(tmp_path: Path) -> None:
    report, objects = tmp_path / "report.json", tmp_path / "objects"
    only = ["--match", "push all queue float32"]
    done = run(*COMMAND, *only, "--report", str(report), "--emit", str(objects))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    for target, architecture in compile_check.TARGETS.items():
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
    found["cuda:80"]["push all queue float32"]["instructions"] /= 1.06
    report.write_text(json.dumps(found))
    over = run(*COMMAND, *only, "--budget", str(report), "--target", "cuda:80")
    assert over.returncode == 1
    assert "in the report" in over.stdout
    found["triton"] = "1.0"
    report.write_text(json.dumps(found))
    other = run(*COMMAND, *only, "--budget", str(report), "--target", "cuda:80")
    assert other.returncode == 2
    assert "is for Triton 1.0" in other.stderr


def test_a_spill_fails_the_check() -> None:
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from types import SimpleNamespace
from tal_fast.kernels import compile_check
plans = list(compile_check.planned_launches("cuda:90"))
# 24 registers do not hold the minima of a thread and their addresses.
limited = lambda plan: SimpleNamespace(
    **{field.name: getattr(plan, field.name) for field in fields(plan)}, options={**plan.options, "maxnreg": 24}
)
compile_check.planned_launches = lambda _: [(label, limited(plan)) for label, plan in plans]
compile_check.ProcessPoolExecutor = ThreadPoolExecutor  # a process would not see the change
sys.argv = ["compile_check", "--target", "cuda:90", "--match", "search queue float32"]
compile_check.main()
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAULT: spills" in done.stdout


def test_the_interpreter_is_refused() -> None:
    done = run(*COMMAND, interpreter=True)
    assert done.returncode == 2
    assert "unset it" in done.stderr


def test_unknown_amd_metadata_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"no \.vgpr_count"):
        compile_check.hip_resources("nothing here")
    assert compile_check.hip_resources(".vgpr_count:     40\n.vgpr_spill_count: 3\n") == (40, 3)


@pytest.mark.parametrize(
    ("figures", "budget", "expected"),
    [
        ({}, None, []),
        ({}, {"instructions": 39.0}, []),
        ({}, {"instructions": 38.0}, ["40.0 instructions a logit, 38.0 in the report"]),
        ({"instructions": 40.1}, None, ["40.1 instructions a logit, limit 40"]),
        ({"spilled": 8}, None, ["spills 8"]),
    ],
)
def test_faults(figures: dict[str, Any], budget: dict[str, Any] | None, expected: list[str]) -> None:
    label = "loss bfloat16 C=1000 paper"
    kernel = {"unit": "logit", "instructions": 40.0, "spilled": 0, "barriers": 2, **figures}
    assert compile_check.faults("cuda:90", label, kernel, budget, limited=True) == expected


def test_a_barrier_in_the_search_is_a_fault() -> None:
    kernel = {"unit": "pair", "instructions": 5.0, "spilled": 0, "barriers": 1}
    label = "search queue float32"
    assert compile_check.faults("cuda:90", label, kernel, None, limited=True) == ["1 barriers in the loop, limit 0"]
    assert compile_check.faults("cuda:100", label, kernel, None, limited=True) == []
    assert compile_check.faults("cuda:90", label, kernel, None, limited=False) == []


def test_every_limit_is_of_a_planned_launch_and_every_kernel_has_its_unit() -> None:
    planned = {target: dict(compile_check.planned_launches(target)) for target in compile_check.TARGETS}
    assert set(compile_check.LIMITS) <= set(planned["cuda:90"])
    kernels = {launch.kernel.__name__ for launches in planned.values() for launch in launches.values()}
    assert kernels == set(compile_check.WORK)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        ("cuda:90", 64, 0, 8, 4),  # registers: 65,536 / (64 * 256)
        ("cuda:90", 65, 0, 8, 3),  # given by 8 a thread: 72
        ("cuda:90", 32, 0, 1, 32),  # programs
        ("cuda:90", 32, 0, 4, 16),  # warps
        ("cuda:90", 32, 100_000, 4, 2),  # shared memory: 228 KB
        ("cuda:80", 32, 100_000, 4, 1),  # 164 KB
        ("hip:gfx942", 128, 0, 4, 4),  # 512 / 128 waves on each of 4 SIMDs
        ("hip:gfx942", 32, 20_000, 4, 3),  # 64 KB
    ],
)
def test_programs_a_multiprocessor(target: str, registers: int, shared: int, warps: int, programs: int) -> None:
    assert compile_check.programs_a_multiprocessor(registers, shared, warps, target) == programs


def launch(kernel: str, **values: Any) -> Any:
    """Launch with these arguments of a kernel of this name, one program a multiprocessor of an H100."""
    function = SimpleNamespace(__name__=kernel, arg_names=list(values))
    return SimpleNamespace(kernel=function, arguments=tuple(values.values()), constants={}, grid=(132,), num_warps=4)


def sass(*lines: str) -> Any:
    """Code of instructions as nvdisasm prints them; a line that starts with a dot is a label."""
    return read_sass("\n".join(f"{line}:" if line[0] == "." else f"  /*0000*/ {line} ;" for line in lines))


LOADS = ["LDG.E.128 R4, desc[UR4][R2.64]", "FADD R1, R4, R5"]
LAST_PROGRAM = [".L_x_9", "DADD R0, R0, R0", "@P1 BRA `(.L_x_9)", "EXIT"]
TICKET = ["ATOMG.E.ADD.STRONG.GPU PT, R3, desc[UR4][R2.64], R5", "@P0 EXIT", *LAST_PROGRAM]


def test_rows_on_chip_are_counted_by_the_iteration_or_by_the_program() -> None:
    logits = torch.empty(8, 1024, dtype=torch.bfloat16, device="meta")
    rows = launch("loss_kernel", logits_ptr=logits, classes=1000)
    loop = sass("MOV R1, R2", ".L_x_0", *LOADS, "@P0 BRA `(.L_x_0)", *TICKET)
    counted = compile_check.count(loop, rows, 128)
    assert counted.units == 1000
    assert len(loop.lines(counted.runs)) == 3
    straight = sass("MOV R1, R2", *LOADS, *TICKET)
    counted = compile_check.count(straight, rows, 128)
    assert len(straight.lines(counted.runs)) == 5  # the ticket and the exit after it, but not the last program's loop
    with pytest.raises(RuntimeError, match="1000 logits were expected where the code loads 512 bytes"):
        compile_check.count(sass("LDG.E R4, desc[UR4][R2.64]", *TICKET), rows, 128)


def test_the_shorter_way_through_a_branch_counts_if_it_moves_every_logit() -> None:
    logits = torch.empty(8, 1024, dtype=torch.bfloat16, device="meta")
    rows = launch("loss_kernel", logits_ptr=logits, classes=1000)
    rare = ["@P2 BRA `(.L_x_1)", *["MOV R1, R2"] * 50, ".L_x_1"]
    skipped = sass(".L_x_0", *LOADS, *rare, "@P0 BRA `(.L_x_0)", *TICKET)
    assert len(skipped.lines(compile_check.count(skipped, rows, 128).runs)) == 4
    needed = sass(".L_x_0", "@P2 BRA `(.L_x_1)", *LOADS, *["MOV R1, R2"] * 50, ".L_x_1", "@P0 BRA `(.L_x_0)", *TICKET)
    assert len(needed.lines(compile_check.count(needed, rows, 128).runs)) == 54


def test_passes_over_a_wide_row_are_summed_and_unrolling_is_seen() -> None:
    logits = torch.empty(8, 8192, dtype=torch.bfloat16, device="meta")
    rows = launch("long_row_loss_kernel", logits_ptr=logits, classes=8192, BLOCK=1024, NEED_GRAD=False)
    code = sass(".L_x_0", *LOADS, "@P0 BRA `(.L_x_0)", ".L_x_1", *LOADS, *LOADS, "@P0 BRA `(.L_x_1)", *TICKET)
    counted = compile_check.count(code, rows, 128)
    # 8 logits a thread and load: 8 iterations of one tile, 4 of two.
    assert sorted(counted.runs.values()) == [1, 4, 8]
    assert counted.units == 8192
    rows.arguments = (*rows.arguments[:-1], True)  # and a gradient, which would be a third
    with pytest.raises(RuntimeError, match="3 loops over tiles were expected and 2 found"):
        compile_check.count(code, rows, 128)


def test_a_loop_that_some_rows_skip_is_not_a_pass_over_the_row() -> None:
    logits = torch.empty(8, 8192, dtype=torch.bfloat16, device="meta")
    rows = launch("batch_sums_kernel", logits_ptr=logits, classes=8192, BLOCK=1024)
    always = [".L_x_1", *LOADS, "@P0 BRA `(.L_x_1)"]
    skipped = ["@P2 BRA `(.L_x_3)", ".L_x_2", *LOADS, "@P0 BRA `(.L_x_2)", ".L_x_3"]
    code = sass(".L_x_0", "MOV R1, R2", *always, *skipped, "@P1 BRA `(.L_x_0)", *TICKET)
    counted = compile_check.count(code, rows, 128)
    assert len(counted.loops) == 1
    assert sum(len(code.lines([block])) * times for block, times in counted.runs.items()) == 3 * 8 + 3


def test_pairs_are_counted_in_the_loop_with_the_minima() -> None:
    search = launch("nearest_kernel", QUERIES=16, ENTRIES=128)
    minima = [".L_x_1", *["FMNMX R1, R1, R2, PT"] * 32, "@P0 BRA `(.L_x_1)"]
    code = sass(".L_x_0", *LOADS, "@P0 BRA `(.L_x_0)", *minima, "EXIT")
    counted = compile_check.count(code, search, 128)
    assert counted.units == 2 * 16 * 128
    assert len(code.lines(counted.runs)) == 33
    with pytest.raises(RuntimeError, match="which should be one"):
        compile_check.count(sass(".L_x_1", "FMNMX R1, R1, R2, PT", "@P0 BRA `(.L_x_1)", "EXIT"), search, 128)


def test_the_model_names_what_is_slowest() -> None:
    logits = torch.empty(8, 1024, dtype=torch.bfloat16, device="meta")
    rows = launch("loss_kernel", logits_ptr=logits, grad_ptr=logits, classes=1024)
    stores = ["STG.E.128 desc[UR4][R2.64], R4"]

    def predict(*lines: str, programs: int = 16) -> dict[str, Any]:
        code = sass(".L_x_0", *LOADS, *lines, *stores, "@P0 BRA `(.L_x_0)", "EXIT")
        kinds = {"fma": 128 * len(lines) / 1024}
        counted = compile_check.count(code, rows, 128)
        return compile_check.predict(compile_check.H100, 132, rows, code, counted, kinds, programs)

    fast = predict()
    assert fast["bound"] == "memory"
    assert fast["share"] > 0.98
    assert predict(programs=1)["bound"] == "latency"
    slow = predict(*["FFMA R1, R1, R1, R1"] * 800)
    assert slow["bound"] == "issue"
    # 100 instructions a logit at 128 a clock, 4 bytes at 3.0 TB/s, and some latency.
    copy = 4 / (3000 / 1.755 / 132)
    assert slow["share"] == pytest.approx(copy / math.hypot(copy, 100 / 128), rel=0.03)
