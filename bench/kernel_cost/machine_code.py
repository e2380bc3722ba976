"""Reader of machine code: instructions, their kinds, loops, and loads in flight.

Reads what ``nvdisasm -c`` prints for an NVIDIA cubin and the assembly text that Triton keeps for AMD. Subroutines (slow
paths of a division, square root or remainder) are not followed and not counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush

# Kinds of instructions; the first four are execution units, which the model of ``compile_check`` bounds. An opcode not
# listed belongs to "alu" (integers, comparisons, selections, conversions between float32 and half precision).
NVIDIA_KINDS = {
    "fma": "FADD FMUL FFMA FHADD FHFMA FADD2 FMUL2 FFMA2 IMAD IMAD32I HADD2 HMUL2 HFMA2",
    "special": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "float64": "DADD DMUL DFMA DSETP DMNMX",
    "shared": "LDS STS LDSM STSM ATOMS SHFL REDUX",
    "load": "LDG LD LDGSTS",
    "store": "STG ST",
    "atomic": "ATOM ATOMG RED REDG",
    "local": "LDL STL",
    "constant": "LDC ULDC LDCU S2R S2UR CS2R",
    "barrier": "BAR",
    "control": "BRA BRX JMP EXIT RET CALL BSSY BSYNC BREAK WARPSYNC NOP DEPBAR LDGDEPBAR MEMBAR ERRBAR CGAERRBAR CCTL",
}
NVIDIA_KIND = {opcode: kind for kind, opcodes in NVIDIA_KINDS.items() for opcode in opcodes.split()}
AMD_KINDS = [  # the first pattern that matches
    (r"v_.*_f64", "float64"),
    (r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_", "special"),
    (r"v_(pk_)?(add|sub|subrev|mul|fma|fmac|mac)_f", "fma"),
    (r"v_", "alu"),
    (r"(global|flat|buffer)_load", "load"),
    (r"(global|flat|buffer)_store", "store"),
    (r"(global|flat|buffer)_atomic", "atomic"),
    (r"scratch_", "local"),
    (r"ds_", "shared"),
    (r"s_(buffer_)?load|s_memtime", "constant"),
    (r"s_barrier", "barrier"),
    (r"s_(c?branch|endpgm|nop|waitcnt|sleep|setprio|trap|code_end)", "control"),
    (r"s_", "uniform"),
    (r"buffer_|", "control"),
]
# Of a load or store, by a part of its opcode; 4 without such a part.
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
BYTES |= {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dwordx2": 8, "dwordx4": 16}


@dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel."""

    opcode: str
    operands: str
    kind: str
    target: str = ""  # label that a branch goes to
    conditional: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of global memory that a thread reads or writes with a load or store."""
        return next((BYTES[part] for part in re.split(r"[._]", self.opcode) if part in BYTES), 4)

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction can follow."""
        return self.conditional or not re.match(r"(BRA|BRX|JMP|EXIT|RET|s_branch|s_endpgm)\b", self.opcode)


class Code:
    """A kernel's instructions with its control flow."""

    def __init__(self, lines: Iterable[Instruction | str]) -> None:
        """Take the instructions in order; a string is the label of the next one."""
        self.instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in lines:
            if isinstance(line, str):
                labels[line] = len(self.instructions)
            else:
                self.instructions.append(line)
        count = len(self.instructions)
        ends = {i + 1 for i, line in enumerate(self.instructions) if line.target or not line.falls_through}
        starts = sorted({0, *labels.values(), *ends} - {count})
        self.blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]
        self.successors: list[set[int]] = []
        for block in self.blocks:
            last = self.instructions[block[-1]]
            targets = {block.stop} if last.falls_through else set()
            targets |= {labels[last.target]} if last.target else set()
            self.successors.append({starts.index(t) for t in targets if t < count})

    def reachable(self, start: int, without: int = -1) -> set[int]:
        """Blocks that can run after the start of block ``start``, itself included, on ways that avoid ``without``."""
        seen, stack = {start, without}, [start]
        while stack:
            new = self.successors[stack.pop()] - seen
            seen |= new
            stack += new
        return seen - {without}

    @cached_property
    def loops(self) -> dict[int, frozenset[int]]:
        """Blocks of each natural loop, by its first block; those that share it are one loop."""
        live = self.reachable(0)
        found: dict[int, frozenset[int]] = {}
        for tail in sorted(live):
            for head in self.successors[tail]:
                if head != 0 and tail in self.reachable(0, without=head):
                    continue  # not a loop: ``tail`` can be reached without its ``head``
                body = {block for block in live - {head} if tail in self.reachable(block, without=head)}
                found[head] = found.get(head, frozenset()) | body | {head}
        return dict(sorted(found.items()))

    def shortest_way(self, blocks: Set[int], start: int, ends: Set[int]) -> set[int]:
        """Blocks on the way of fewest instructions from ``start`` to one of ``ends``; a loop on it is run once."""
        ways: list[tuple[int, int, tuple[int, ...]]] = [(0, start, (start,))]
        seen: set[int] = set()
        while ways:
            length, block, way = heappop(ways)
            if block in ends:
                return set(way)
            if block not in seen:
                seen.add(block)
                for after in self.successors[block] & blocks:
                    heappush(ways, (length + len(self.blocks[after]), after, (*way, after)))
        return set(blocks)

    def lines(self, blocks: Iterable[int]) -> list[Instruction]:
        """Instructions of blocks, in order."""
        return [self.instructions[i] for block in sorted(blocks) for i in self.blocks[block]]


def read_sass(text: str) -> Code:
    """Code of the first function in the output of ``nvdisasm -c``."""
    lines: list[Instruction | str] = []
    for raw in text.splitlines():
        if label := re.match(r"([.$\w]+):", raw):
            lines.append(label[1])
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", raw):
            predicate, opcode, operands = found.groups()
            name = opcode.split(".")[0]
            kind = NVIDIA_KIND.get(name, "uniform" if name.startswith("U") or name == "R2UR" else "alu")
            branch = re.search(r"`\((\.L\w+)\)", operands) if name in ("BRA", "JMP") else None
            # A second predicate, as in "BRA P0, `(.L)", makes a branch conditional too.
            conditional = predicate is not None or (branch is not None and not operands.startswith("`"))
            lines.append(Instruction(opcode, operands, kind, branch[1] if branch else "", conditional))
    return Code(lines)


def read_amdgcn(text: str) -> Code:
    """Code of the kernel in an AMD assembly text."""
    lines: list[Instruction | str] = []
    for raw in text.splitlines():
        raw = raw.split(";")[0]
        if label := re.match(r"(\.LBB\w+):", raw):
            lines.append(label[1])
        elif found := re.match(r"\s+([a-z]+_\w+)\s*(.*?)\s*$", raw):
            opcode, operands = found.groups()
            kind = next(kind for pattern, kind in AMD_KINDS if re.match(pattern, opcode))
            branch = operands if opcode.startswith(("s_branch", "s_cbranch")) else ""
            lines.append(Instruction(opcode, operands, kind, branch, opcode.startswith("s_cbranch")))
    return Code(lines)


def widths(lines: Iterable[Instruction], kind: str) -> dict[str, int]:
    """Number of loads or stores of global memory by the bytes of one thread, widest first."""
    found = Counter(line.bytes for line in lines if line.kind == kind)
    return {str(size): found[size] for size in sorted(found, reverse=True)}


@dataclass(frozen=True)
class Waits:
    """How a thread waits for its loads of global memory."""

    in_flight: int  # most bytes asked for and not yet waited for
    rounds: int  # times that it waits for loads asked for since the last time, in the same iteration
    carried: int  # bytes in flight at the end of an iteration


def waits(lines: list[Instruction], is_loop: bool) -> Waits:
    """Waits for loads in straight code, or in a loop that runs often.

    A load into registers is waited for where one of them appears next; copies into shared memory by the group, at a
    DEPBAR that leaves the newest n; AMD's loads in order, at a vmcnt(n).
    """
    loads: list[tuple[set[str], int, bool]] = []  # registers, bytes, and whether of this iteration
    groups: list[int] = [0]  # bytes of asynchronous copies; the last group is open
    most = rounds = 0
    for _ in range(1 + is_loop):
        rounds, asked = 0, False
        loads = [(registers, size, False) for registers, size, _ in loads]
        for line in lines:
            used = set(re.findall(r"\bR\d+\b", line.operands))
            done = [load for load in loads if load[0] & used]
            if count := re.search(r"vmcnt\((\d+)\)", line.operands):
                done = loads[: max(0, len(loads) - int(count[1]))]
            if asked and any(new for _, _, new in done):
                rounds, asked = rounds + 1, False
            loads = [load for load in loads if load not in done]
            if line.opcode.startswith("LDGSTS"):
                groups[-1] += line.bytes
            elif line.opcode.startswith("LDGDEPBAR"):
                groups.append(0)
            elif line.opcode.startswith("DEPBAR") and (count := re.search(r"SB0, (0x[0-9a-f]+)", line.operands)):
                groups = groups[-1 - int(count[1], 16) :]
            elif line.kind == "load":
                first = re.findall(r"\bR(\d+)\b", line.operands.split("[")[0])
                size = max(1, line.bytes // 4 // max(1, len(first)))
                loads.append(({f"R{int(r) + i}" for r in first for i in range(size)}, line.bytes, True))
                asked = True
            most = max(most, sum(size for _, size, _ in loads) + sum(groups))
    return Waits(most, rounds, sum(size for _, size, _ in loads) + sum(groups))
