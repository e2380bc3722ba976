"""What a kernel costs, read from machine code in which everything to be counted was planted."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tal_fast.kernels import cost
from tal_fast.kernels.machine_code import read_sass


def test_unknown_amd_metadata_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"no \.vgpr_count"):
        cost.hip_resources("nothing here")
    assert cost.hip_resources(".vgpr_count:     40\n.vgpr_spill_count: 3\n") == (40, 3)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        ("sm_90", 64, 0, 8, 4),  # registers: 65,536 / (64 * 256)
        ("sm_90", 65, 0, 8, 3),  # given by 8 a thread: 72
        ("sm_90", 32, 0, 1, 32),  # programs
        ("sm_90", 32, 0, 4, 16),  # warps
        ("sm_90", 32, 100_000, 4, 2),  # shared memory: 228 KB
        ("sm_80", 32, 100_000, 4, 1),  # 164 KB
        ("gfx942", 128, 0, 4, 4),  # 512 / 128 waves on each of 4 SIMDs
        ("gfx942", 32, 20_000, 4, 3),  # 64 KB
    ],
)
def test_programs_a_multiprocessor(target: str, registers: int, shared: int, warps: int, programs: int) -> None:
    assert cost.programs_a_multiprocessor(registers, shared, warps, target) == programs


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
    counted = cost.count(loop, rows, 128)
    assert counted.units == 1000
    assert len(loop.lines(counted.runs)) == 3
    straight = sass("MOV R1, R2", *LOADS, *TICKET)
    counted = cost.count(straight, rows, 128)
    assert len(straight.lines(counted.runs)) == 5  # the ticket and the exit after it, but not the last program's loop
    with pytest.raises(RuntimeError, match="1000 logits were expected where the code loads 512 bytes"):
        cost.count(sass("LDG.E R4, desc[UR4][R2.64]", *TICKET), rows, 128)


def test_the_shorter_way_through_a_branch_counts_if_it_moves_every_logit() -> None:
    logits = torch.empty(8, 1024, dtype=torch.bfloat16, device="meta")
    rows = launch("loss_kernel", logits_ptr=logits, classes=1000)
    rare = ["@P2 BRA `(.L_x_1)", *["MOV R1, R2"] * 50, ".L_x_1"]
    skipped = sass(".L_x_0", *LOADS, *rare, "@P0 BRA `(.L_x_0)", *TICKET)
    assert len(skipped.lines(cost.count(skipped, rows, 128).runs)) == 4
    needed = sass(".L_x_0", "@P2 BRA `(.L_x_1)", *LOADS, *["MOV R1, R2"] * 50, ".L_x_1", "@P0 BRA `(.L_x_0)", *TICKET)
    assert len(needed.lines(cost.count(needed, rows, 128).runs)) == 54


def test_passes_over_a_wide_row_are_summed_and_unrolling_is_seen() -> None:
    logits = torch.empty(8, 8192, dtype=torch.bfloat16, device="meta")
    rows = launch("long_row_loss_kernel", logits_ptr=logits, classes=8192, BLOCK=1024, NEED_GRAD=False)
    code = sass(".L_x_0", *LOADS, "@P0 BRA `(.L_x_0)", ".L_x_1", *LOADS, *LOADS, "@P0 BRA `(.L_x_1)", *TICKET)
    counted = cost.count(code, rows, 128)
    # 8 logits a thread and load: 8 iterations of one tile, 4 of two.
    assert sorted(counted.runs.values()) == [1, 4, 8]
    assert counted.units == 8192
    rows.arguments = (*rows.arguments[:-1], True)  # and a gradient, which would be a third
    with pytest.raises(RuntimeError, match="3 loops over tiles were expected and 2 found"):
        cost.count(code, rows, 128)


def test_a_loop_that_some_rows_skip_is_not_a_pass_over_the_row() -> None:
    logits = torch.empty(8, 8192, dtype=torch.bfloat16, device="meta")
    rows = launch("batch_sums_kernel", logits_ptr=logits, classes=8192, BLOCK=1024)
    always = [".L_x_1", *LOADS, "@P0 BRA `(.L_x_1)"]
    skipped = ["@P2 BRA `(.L_x_3)", ".L_x_2", *LOADS, "@P0 BRA `(.L_x_2)", ".L_x_3"]
    code = sass(".L_x_0", "MOV R1, R2", *always, *skipped, "@P1 BRA `(.L_x_0)", *TICKET)
    counted = cost.count(code, rows, 128)
    assert len(counted.loops) == 1
    assert sum(len(code.lines([block])) * times for block, times in counted.runs.items()) == 3 * 8 + 3


def test_pairs_are_counted_in_the_loop_with_the_minima() -> None:
    search = launch("nearest_kernel", QUERIES=16, ENTRIES=128)
    minima = [".L_x_1", *["FMNMX R1, R1, R2, PT"] * 32, "@P0 BRA `(.L_x_1)"]
    code = sass(".L_x_0", *LOADS, "@P0 BRA `(.L_x_0)", *minima, "EXIT")
    counted = cost.count(code, search, 128)
    assert counted.units == 2 * 16 * 128
    assert len(code.lines(counted.runs)) == 33
    with pytest.raises(RuntimeError, match="which should be one"):
        cost.count(sass(".L_x_1", "FMNMX R1, R1, R2, PT", "@P0 BRA `(.L_x_1)", "EXIT"), search, 128)


def test_the_model_names_what_is_slowest() -> None:
    logits = torch.empty(8, 1024, dtype=torch.bfloat16, device="meta")
    rows = launch("loss_kernel", logits_ptr=logits, grad_ptr=logits, classes=1024)
    stores = ["STG.E.128 desc[UR4][R2.64], R4"]

    def predict(*lines: str, programs: int = 16) -> dict[str, Any]:
        code = sass(".L_x_0", *LOADS, *lines, *stores, "@P0 BRA `(.L_x_0)", "EXIT")
        kinds = {"fma": 128 * len(lines) / 1024}
        counted = cost.count(code, rows, 128)
        return cost.predict(cost.H100, 132, rows, code, counted, kinds, programs)

    fast = predict()
    assert fast["bound"] == "memory"
    assert fast["share"] > 0.98
    assert predict(programs=1)["bound"] == "latency"
    slow = predict(*["FFMA R1, R1, R1, R1"] * 800)
    assert slow["bound"] == "issue"
    # 100 instructions a logit at 128 a clock, 4 bytes at 3.0 TB/s, and some latency.
    copy = 4 / (3000 / 1.755 / 132)
    assert slow["share"] == pytest.approx(copy / math.hypot(copy, 100 / 128), rel=0.03)
