"""Cost of a kernel, counted in hand-written machine code."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench.kernel_cost import cost
from bench.kernel_cost.machine_code import read_sass


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
    rows = launch("loss_kernel", logits_ptr=logits, ROWS=1, CLASSES=1000, WIDTH=256, HELD=True)
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
    rows = launch("loss_kernel", logits_ptr=logits, ROWS=1, CLASSES=1000, WIDTH=256, HELD=True)
    rare = ["@P2 BRA `(.L_x_1)", *["MOV R1, R2"] * 50, ".L_x_1"]
    skipped = sass(".L_x_0", *LOADS, *rare, "@P0 BRA `(.L_x_0)", *TICKET)
    assert len(skipped.lines(cost.count(skipped, rows, 128).runs)) == 4
    needed = sass(".L_x_0", "@P2 BRA `(.L_x_1)", *LOADS, *["MOV R1, R2"] * 50, ".L_x_1", "@P0 BRA `(.L_x_0)", *TICKET)
    assert len(needed.lines(cost.count(needed, rows, 128).runs)) == 54


def wide_rows(**values: Any) -> Any:
    """Launch over rows of 8,192 logits in tiles of 1,024, 8 a thread."""
    logits = torch.empty(8, 8192, dtype=torch.bfloat16, device="meta")
    constants = {"ROWS": 1, "CLASSES": 8192, "WIDTH": 1024, "HELD": False, "SMOOTH": False, **values}
    return launch("loss_kernel", logits_ptr=logits, grad_ptr=logits, **constants)


def loop(label: int, *lines: str) -> list[str]:
    return [f".L_x_{label}", *lines, f"@P0 BRA `(.L_x_{label})"]


EXPONENTIALS = ["MUFU.EX2 R4, R4"] * 16
STORE = "STG.E.128 desc[UR4][R2.64], R4"


def test_passes_over_a_wide_row_are_summed_and_unrolling_is_seen() -> None:
    scan = [*loop(1, *LOADS), *loop(2, *LOADS, *LOADS)]  # the remainder, and two tiles at a time
    tie = ["@P2 BRA `(.L_x_4)", *loop(3, *LOADS, "SHFL.BFLY PT, R4, R4, 0x10, 0x1f"), ".L_x_4"]
    sums, gradient = loop(5, *LOADS, *EXPONENTIALS), loop(6, *LOADS, *EXPONENTIALS, STORE)
    code = sass(".L_x_0", "MOV R1, R2", *scan, *tie, *sums, *gradient, "@P1 BRA `(.L_x_0)", *TICKET)
    counted = cost.count(code, wide_rows(NEED_GRAD=True), 128)
    iterations = [(len(code.lines(body)), counted.runs[min(body)]) for body in counted.loops]
    assert iterations == [(5, 4), (19, 8), (20, 8)]
    # Besides: the first and the last instruction, the remainder once, and the branch over the tie.
    assert sum(len(code.lines([b])) * times for b, times in counted.runs.items()) == 4 * 5 + 8 * 19 + 8 * 20 + 2 + 3 + 1
    with pytest.raises(RuntimeError, match="2 loops over tiles were expected and 3 found"):
        cost.count(code, wide_rows(NEED_GRAD=False), 128)


def test_class_weights_are_not_taken_for_more_tiles() -> None:
    weights = torch.empty(8192, device="meta")
    reads = [*LOADS, *["LDG.E.128 R8, desc[UR4][R6.64]"] * 2]  # 8 logits and their 8 weights
    scan, sums = loop(1, *reads), loop(2, *LOADS, *EXPONENTIALS)
    gradient = loop(3, *reads, *EXPONENTIALS, STORE)
    code = sass(".L_x_0", "MOV R1, R2", *scan, *sums, *gradient, "@P1 BRA `(.L_x_0)", *TICKET)
    rows = wide_rows(NEED_GRAD=True, class_weight_ptr=weights, WEIGHTED=True, SMOOTH=True)
    counted = cost.count(code, rows, 128)
    assert [counted.runs[min(body)] for body in counted.loops] == [8, 8, 8]


def test_pairs_are_counted_in_the_loop_with_the_minima() -> None:
    search = launch("search_kernel", QUERIES=16, ENTRIES=128)
    minima = [".L_x_1", *["FMNMX R1, R1, R2, PT"] * 32, "@P0 BRA `(.L_x_1)"]
    code = sass(".L_x_0", *LOADS, "@P0 BRA `(.L_x_0)", *minima, "EXIT")
    counted = cost.count(code, search, 128)
    assert counted.units == 2 * 16 * 128
    assert len(code.lines(counted.runs)) == 33
    with pytest.raises(RuntimeError, match="which should be one"):
        cost.count(sass(".L_x_1", "FMNMX R1, R1, R2, PT", "@P0 BRA `(.L_x_1)", "EXIT"), search, 128)


def test_the_model_names_what_is_slowest() -> None:
    logits = torch.empty(8, 1024, dtype=torch.bfloat16, device="meta")
    rows = launch("loss_kernel", logits_ptr=logits, grad_ptr=logits, ROWS=1, CLASSES=1024, WIDTH=256, HELD=True)
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
