"""Reader of machine code, on hand-written listings."""

from __future__ import annotations

import pytest

from bench.kernel_cost.machine_code import Code, Waits, read_amdgcn, read_sass, waits, widths


def sass(*lines: str) -> Code:
    """Code of instructions as nvdisasm prints them; a line that starts with a dot is a label."""
    text = [
        f"{line}:" if line.startswith(".L") else f"        /*{i:04x}*/      {line} ;" for i, line in enumerate(lines)
    ]
    return read_sass("\n".join([".text.a_kernel:", *text]))


# A loop with one branch over a slow path, a subroutine after the end, and the endless loop with which a kernel closes.
LOOP = (
    "LDC R1, c[0x0][0x28]",
    "@P0 BRA `(.L_x_2)",
    ".L_x_0",
    "@!P0 LDG.E.128 R4, desc[UR4][R2.64]",
    "LDG.E.U16 R8, desc[UR4][R2.64+0x10]",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "FFMA R9, R4, R4, R9",
    "MUFU.EX2 R9, R9",
    "BSSY B0, `(.L_x_1)",
    "@P1 BRA `(.L_x_1)",
    "CALL.REL.NOINC `($slow)",
    ".L_x_1",
    "BSYNC B0",
    "FADD R9, R9, R8",
    "STG.E.64 desc[UR4][R2.64], R4",
    "UIADD3 UR6, UR6, 0x1, URZ",
    "@!P2 BRA P3, `(.L_x_0)",
    ".L_x_2",
    "STL [R1], R9",
    "EXIT",
    "FADD R0, R0, R0",
    "RET.REL.NODEC R30 `(a_kernel)",
    ".L_x_3",
    "BRA `(.L_x_3)",
)


def test_the_loop_is_found_with_its_branch_and_without_what_cannot_run() -> None:
    code = sass(*LOOP)
    (body,) = code.loops.values()
    lines = code.lines(body)
    assert [line.opcode for line in lines] == [
        line.split()[1 if line.startswith("@") else 0] for line in LOOP[3:17] if not line.startswith(".")
    ]
    assert {line.kind for line in code.lines(code.reachable(0) - body)} == {"constant", "control", "local"}
    assert "RET.REL.NODEC" not in {line.opcode for line in code.lines(code.reachable(0))}


def test_kinds_and_widths() -> None:
    code = sass(*LOOP)
    lines = code.lines(next(iter(code.loops.values())))
    kinds = [line.kind for line in lines]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "load": 2, "barrier": 1, "fma": 2, "special": 1, "control": 5, "store": 1, "uniform": 1,
    }  # fmt: skip
    assert widths(lines, "load") == {"16": 1, "2": 1}
    assert widths(lines, "store") == {"8": 1}


def test_a_nested_loop_lies_in_the_outer_one() -> None:
    inside = (".L_x_1", "FADD R0, R0, R1", "@P0 BRA `(.L_x_1)")
    code = sass("MOV R0, R1", ".L_x_0", "MOV R1, R2", *inside, "@P1 BRA `(.L_x_0)", "EXIT")
    outer, inner = code.loops.values()
    assert inner < outer
    assert [line.opcode for line in code.lines(inner)] == ["FADD", "BRA"]


def test_a_jump_into_the_middle_makes_no_loop() -> None:
    code = sass("@P0 BRA `(.L_x_1)", ".L_x_0", "MOV R0, R1", ".L_x_1", "MOV R1, R0", "@P1 BRA `(.L_x_0)", "EXIT")
    assert not code.loops


AT = "desc[UR4][R8.64]"


@pytest.mark.parametrize(
    ("lines", "in_flight", "rounds", "carried"),
    [
        # Two loads asked for together are one round; one at an address that they gave is another.
        (
            [f"LDG.E R1, {AT}", f"LDG.E.64 R2, {AT}", "FADD R5, R1, R3", "LDG.E R4, [R2.64]", "FADD R5, R4, R4"],
            12,
            2,
            0,
        ),
        # The last register of a wide load is waited for too.
        ([f"LDG.E.128 R4, {AT}", "FADD R1, R7, R7"], 16, 1, 0),
        # Asked for in one iteration and used in the next.
        (["FADD R1, R4, R4", f"LDG.E.128 R4, {AT}"], 16, 0, 16),
        # Asynchronous copies: all but the newest group are waited for.
        ([f"LDGSTS.E.BYPASS.128 [R5], {AT}", "LDGDEPBAR", "DEPBAR.LE SB0, 0x1", "LDS R3, [R5]"], 32, 0, 16),
    ],
)
def test_waits_for_loads(lines: list[str], in_flight: int, rounds: int, carried: int) -> None:
    assert waits(sass(*lines).instructions, is_loop=True) == Waits(in_flight, rounds, carried)


def test_amd_assembly() -> None:
    code = read_amdgcn(
        """
a_kernel:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:                                ; %loop
\tglobal_load_dwordx4 v[2:5], v0, s[2:3]
\tglobal_load_ushort v6, v0, s[2:3]
\ts_waitcnt vmcnt(1)
\tv_exp_f32_e32 v2, v2                  ; a comment
\tv_pk_fma_f32 v[2:3], v[2:3], v[4:5], v[2:3]
\tv_add_f64 v[2:3], v[2:3], v[4:5]
\tds_write_b128 v0, v[2:5]
\ts_barrier
\ts_cbranch_scc1 .LBB0_1
\tglobal_store_short v0, v2, s[2:3]
\ts_endpgm
\tv_mov_b32_e32 v0, v0
"""
    )
    (body,) = code.loops.values()
    lines = code.lines(body)
    assert [line.kind for line in lines] == [
        "load", "load", "control", "special", "fma", "float64", "shared", "barrier", "control",
    ]  # fmt: skip
    assert widths(lines, "load") == {"16": 1, "2": 1}
    assert widths(code.lines(code.reachable(0) - body), "store") == {"2": 1}
    assert waits(lines, is_loop=True).in_flight == 20  # the 2 bytes of the iteration before, then 16 and 2 more
    assert waits(lines, is_loop=True).carried == 2
    assert "v_mov_b32_e32" not in {line.opcode for line in code.lines(code.reachable(0))}
