"""Cost of a compiled kernel: instructions per unit of work, loads in flight, and the time that a model predicts."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.kernel_cost import machine_code
from bench.kernel_cost.machine_code import Code, Instruction
from tal_fast.kernels.launch import Launch, Target

Figures = dict[str, Any]  # of one kernel; ``analyse`` and ``predict`` list them


@dataclass(frozen=True)
class GPU:
    """Properties of a GPU in the model of a kernel's speed."""

    name: str
    clock: float  # GHz
    copy: float  # TB/s of a device copy, reads and writes counted
    cache_mb: int  # L2
    float64: int  # thread instructions in float64 a clock and multiprocessor


@dataclass(frozen=True)
class Architecture:
    """Properties of an architecture that decide launches and occupancy, and its GPUs whose speed is predicted."""

    launch: Target
    shared_kb: int  # shared memory of a multiprocessor
    gpus: tuple[GPU, ...] = ()


H100, H200 = GPU("H100", 1.755, 3.0, 50, 64), GPU("H200", 1.95, 4.25, 50, 64)
TARGETS = {
    "sm_80": Architecture(Target(108, 32, "sm_80"), 164, (GPU("A100", 1.41, 1.75, 40, 32),)),
    "sm_90": Architecture(Target(132, 32, "sm_90"), 228, (H100, H200)),
    "sm_100": Architecture(Target(148, 32, "sm_100"), 228, (GPU("B200", 1.85, 6.8, 126, 64),)),
    "gfx942": Architecture(Target(304, 64, "gfx942"), 64),  # MI300
}


@dataclass(frozen=True)
class Work:
    """Unit of work that a kernel's instructions are counted per.

    ``units``, ``tile`` and ``passes`` are functions of the kernel's arguments and constants by name.
    """

    unit: str
    units: Callable[[Mapping[str, Any]], int]  # in an iteration of the loop over rows, or in a program without one
    tile: Callable[[Mapping[str, Any]], int] = lambda _: 0  # units in an iteration of an inner loop
    passes: Callable[[Mapping[str, Any]], int] = lambda _: 0  # inner loops, each over all units; 0: none
    # Bytes a unit that passes without exponentials read besides.
    extra: Callable[[Mapping[str, Any]], int] = lambda _: 0
    array: str = ""  # argument that is read from memory: one element a unit and pass
    hot_loop: bool = False  # count only the inner loop with the most minima
    loops_only: bool = False  # leave out what is not in a loop


LOGITS = Work(
    "logit",
    lambda v: v["ROWS"] * v["CLASSES"],
    lambda v: v["ROWS"] * v["WIDTH"],
    lambda v: 0 if v["HELD"] else 2 + v["NEED_GRAD"] if "NEED_GRAD" in v else 1,
    lambda v: v["class_weight_ptr"].itemsize if v.get("SMOOTH") and v["WEIGHTED"] else 0,
    "logits_ptr",
)
SHARDED = Work("logit", lambda v: v["classes"], lambda v: v["BLOCK"], lambda _: 1, array="logits_ptr")
WORK = {
    "loss_kernel": LOGITS,
    "batch_sums_kernel": LOGITS,
    "scan_kernel": SHARDED,
    "exp_sums_kernel": SHARDED,
    "gradient_kernel": SHARDED,
    "scale_kernel": Work("value", lambda v: v["BLOCK"]),
    "statistics_kernel": Work(
        "feature", lambda v: v["width"], lambda v: v["FEATURES"], lambda _: 1, array="features_ptr"
    ),
    "search_kernel": Work(
        "pair", lambda v: v["QUERIES"] * v["ENTRIES"], lambda v: v["QUERIES"] * v["ENTRIES"], hot_loop=True
    ),
    "push_kernel": Work(
        "row", lambda v: v["ROWS"], lambda v: v["ROWS"], lambda v: 1 + v["MORE_THAN_SLOTS"], loops_only=True
    ),
}

# The model's constants: thread instructions a clock and multiprocessor, and clocks.
ISSUE = 128
UNITS = {"alu": 64, "fma": 128, "special": 16, "shared": 32}
LATENCY = 800  # of a load from memory, under load
CACHE_LATENCY = 300  # of a load from the L2 cache, where the search finds the queue
BARRIER = 40


def hip_resources(assembly: str) -> tuple[int, int]:
    """Vector registers a thread, and how many of them spill, from the metadata of an AMD code object.

    Scalar registers spill into lanes of vector registers, which takes no memory.
    """

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the AMD code object has no .{name}: its format has changed")
        return int(found.group(1))

    return field("vgpr_count"), field("vgpr_spill_count")


def read_cubin(cubin: bytes) -> tuple[str, int, int]:
    """Assembly, registers a thread and bytes of stack of a cubin, from the tools that Triton ships."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, assembly = (
            subprocess.run([str(tools / tool), option, file.name], capture_output=True, text=True)
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout)
    if found is None or assembly.returncode:
        raise RuntimeError(f"the cubin cannot be read: {usage.stdout}{usage.stderr}{assembly.stderr}")
    registers, stack, _, local = map(int, found.groups())
    return assembly.stdout, registers, stack + local


def minima(lines: list[Instruction]) -> int:
    """Number of minima, of which a pair takes one."""
    found = [line.opcode for line in lines if re.match(r"[FD]MNMX|DSETP\.MIN|v_min", line.opcode)]
    return sum(2 if "3" in re.split(r"[._]f", opcode)[0] else 1 for opcode in found)


@dataclass(frozen=True)
class Counted:
    """Counted part of a kernel's code."""

    runs: dict[int, float]  # how often each block runs for ``units``
    units: float
    loops: list[frozenset[int]]  # blocks of each loop over rows or tiles


def values_of(launch: Launch) -> dict[str, Any]:
    """Arguments and constants of a launch by name."""
    return {**dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)), **launch.constants}


def element_sizes(launch: Launch) -> tuple[int, int]:
    """Bytes that a kernel reads and writes per unit and pass; 0, 0 for one whose data stay in the L2 cache."""
    work, values = WORK[launch.kernel.__name__], values_of(launch)
    grad = values.get("grad_ptr")
    written = grad.itemsize if grad is not None and grad.numel() else 0
    return (values[work.array].itemsize, written) if work.array else (0, 0)


class Uncounted(RuntimeError):
    """Error for code whose instructions cannot be counted, such as a loop that is unrolled in full."""


@dataclass(frozen=True)
class Pass:
    """An inner loop of a kernel that reads rows in tiles."""

    body: frozenset[int]
    tiles: int  # in an iteration: the compiler may unroll a loop
    kind: tuple[bool, bool]  # whether it stores, and whether it computes exponentials


def passes_of(code: Code, inner: list[frozenset[int]], launch: Launch, threads: int) -> list[Pass]:
    """The loop that does most of each pass, of all inner loops.

    The compiler makes several loops of one: unrolled, and for the remainder; they are of one kind. A loop that neither
    stores nor computes exponentials, and exchanges values between threads, is no pass but a rare second look at a row.
    """
    work, values = WORK[launch.kernel.__name__], values_of(launch)
    read, written = element_sizes(launch)
    tile, expected = work.tile(values), work.passes(values)
    loops = []
    for body in inner:
        lines = code.lines(body)
        kinds = Counter(line.kind for line in lines)
        loaded, stored = (sum(line.bytes for line in lines if line.kind == kind) for kind in ("load", "store"))
        # Without special functions, an exponential takes some 40 instructions in float64.
        exponentials = kinds["special"] + kinds["float64"] / 8 > loaded / max(read, 1)
        moved, size = (stored, written) if stored else (loaded, read if exponentials else read + work.extra(values))
        tiles = max(1, round(moved * threads / (tile * size))) if size else 1
        if len(inner) <= expected or stored or exponentials or not kinds["shared"] + kinds["barrier"]:
            loops.append(Pass(body, tiles, (stored > 0, exponentials)))
    if len(loops) > expected:
        loops = [max((x for x in loops if x.kind == kind), key=lambda x: x.tiles) for kind in {x.kind for x in loops}]
    if len(loops) != expected:
        raise Uncounted(f"{expected} loops over tiles were expected and {len(loops)} found")
    return sorted(loops, key=lambda x: min(x.body))


def count(code: Code, launch: Launch, threads: int) -> Counted:
    """Counted part of a kernel's code, without what only the last program runs, after the ticket.

    Of a branch the shorter way counts, if it too moves all bytes; else both.
    """
    work, values = WORK[launch.kernel.__name__], values_of(launch)
    units, tile = work.units(values), work.tile(values)
    read, written = element_sizes(launch)

    def moved(blocks: Iterable[int], kind: str) -> int:
        return threads * sum(line.bytes for line in code.lines(blocks) if line.kind == kind)

    live = code.reachable(0)
    looping = set().union(*code.loops.values())
    tickets = [b for b in live - looping if any(line.kind == "atomic" for line in code.lines([b]))]
    live -= set().union(*(code.reachable(after) for b in tickets for after in code.successors[b]))
    loops = {head: body for head, body in code.loops.items() if head in live}
    inner = {head: body for head, body in loops.items() if not any(head != h and h in body for h in loops)}
    if work.hot_loop:
        body = max(inner.values(), key=lambda body: minima(code.lines(body)))
        found = minima(code.lines(body)) * threads / tile
        if found < 1 or found != int(found):
            raise Uncounted(f"the hot loop has {found} minima for each of {tile} pairs, which should be one")
        return Counted(dict.fromkeys(body, 1.0), tile * found, [body])
    if not work.passes(values):
        inner = {}
    passes = passes_of(code, list(inner.values()), launch, threads)
    # The loop over rows, or the whole program.
    rows = {head: body for head, body in loops.items() if head not in inner}
    start, blocks = max(rows.items(), key=lambda loop: len(loop[1]), default=(0, frozenset(live)))
    ends = {b for b in blocks if (start in code.successors[b] if rows else not code.successors[b] & blocks)}
    way: set[int] = set()
    for stops in [*({min(x.body)} for x in passes), ends]:
        way |= code.shortest_way(blocks, start, stops)
        start = min(stops)
    if not passes and (moved(way, "load") < read * units or moved(way, "store") < written * units):
        way = set(blocks)
        if moved(way, "load") < read * units:
            raise Uncounted(f"{units} {work.unit}s were expected where the code loads {moved(way, 'load')} bytes")
    runs = {} if work.loops_only else dict.fromkeys(way, 1.0)
    for x in passes:
        runs |= dict.fromkeys(x.body, units / (tile * x.tiles))
    return Counted(runs, units, [x.body for x in passes] or ([frozenset(way)] if rows else []))


def programs_a_multiprocessor(registers: int, shared: int, warps: int, target_name: str) -> int:
    """Programs that run at once on a multiprocessor, by registers, shared memory and warps."""
    shared_kb = TARGETS[target_name].shared_kb
    if target_name.startswith("gfx"):
        # 512 vector registers a lane on each of 4 SIMDs, in steps of 8; 8 waves a SIMD.
        waves = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))
        return min(waves // warps, shared_kb * 1024 // shared if shared else 32)
    # 65,536 registers, given to warps by 256; 64 warps; 32 programs; CUDA keeps 1 KB of shared memory for each.
    by_registers = 65536 // (256 * -(-registers * 32 // 256))
    by_shared = shared_kb * 1024 // (1024 + -(-shared // 128) * 128)
    return min(by_registers // warps, 64 // warps, 32, by_shared)


def analyse(launch: Launch, compiled: Any, target_name: str) -> tuple[Figures, str]:
    """Figures of a compiled kernel, and its assembly.

    Figures:
        unit, instructions: what is counted per (logit, pair, row, value), and thread instructions per unit. A kernel
            that is ``Uncounted`` has "uncounted", the reason, instead, and no figures but registers and spills.
        kinds: the same by kind (``machine_code``).
        loads, stores: instructions by the bytes a thread moves; barriers: their number. All in the counted part.
        warps, registers, spilled (bytes on NVIDIA, registers on AMD), shared (bytes), programs (a multiprocessor).
        in_flight: bytes of loads in flight on a multiprocessor.
        model: by GPU, ``predict``.
    """
    if target_name.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        registers, spilled = hip_resources(assembly)
        code = machine_code.read_amdgcn(assembly)
    else:
        assembly, registers, spilled = read_cubin(compiled.asm["cubin"])
        code = machine_code.read_sass(assembly)
        if not any(line.kind == "local" for line in code.instructions):
            spilled = 0  # a stack that is reserved and not used
    warps, shared = launch.num_warps, compiled.metadata.shared
    threads = warps * TARGETS[target_name].launch.warp_size
    figures: Figures
    try:
        counted = count(code, launch, threads)
    except Uncounted as error:
        figures = {"unit": WORK[launch.kernel.__name__].unit, "uncounted": str(error), "warps": warps}
        return figures | {"registers": registers, "spilled": spilled, "shared": shared}, assembly
    kinds: defaultdict[str, float] = defaultdict(float)
    for block, times in counted.runs.items():
        for kind, number in Counter(line.kind for line in code.lines([block])).items():
            kinds[kind] += number * times * threads / counted.units
    lines = code.lines(counted.runs)
    programs = programs_a_multiprocessor(registers, shared, warps, target_name)
    waits = [machine_code.waits(code.lines(body), True) for body in counted.loops] or [machine_code.waits(lines, False)]
    figures = {
        "unit": WORK[launch.kernel.__name__].unit,
        "instructions": round(sum(kinds.values()), 2),
        "kinds": {kind: round(number, 2) for kind, number in sorted(kinds.items(), key=lambda kind: -kind[1])},
        "loads": machine_code.widths(lines, "load"),
        "stores": machine_code.widths(lines, "store"),
        "barriers": sum(line.kind == "barrier" for line in lines),
        "warps": warps,
        "registers": registers,
        "spilled": spilled,
        "shared": shared,
        "programs": programs,
        "in_flight": min(wait.in_flight for wait in waits) * threads * programs,
    }
    architecture = TARGETS[target_name]
    multiprocessors = architecture.launch.multiprocessors
    programs = min(programs, max(1, math.prod(launch.grid) // multiprocessors))
    model = {g.name: predict(g, multiprocessors, launch, code, counted, kinds, programs) for g in architecture.gpus}
    return figures | {"model": model}, assembly


def predict(
    gpu: GPU,
    multiprocessors: int,
    launch: Launch,
    code: Code,
    counted: Counted,
    kinds: Mapping[str, float],
    programs: int,
) -> Figures:
    """Predicted speed of a kernel, and its bound; docs/performance.md states the model and its error.

    Figures:
        bound: the largest part of the time. share: of the bandwidth of a copy. us: for pairs, which move no memory,
            microseconds for 256 queries of 880,880 entries.
    """
    work, values = WORK[launch.kernel.__name__], values_of(launch)
    # Parts of the time, in clocks of a multiprocessor per unit.
    rates = {**UNITS, "float64": gpu.float64}
    parts = {"issue": max(sum(kinds.values()) / ISSUE, *(kinds.get(unit, 0) / rate for unit, rate in rates.items()))}
    # A program waits for each round of loads and at each barrier; a warp issues an instruction every two clocks.
    latency = CACHE_LATENCY if work.hot_loop else LATENCY
    straight = frozenset(counted.runs).difference(*counted.loops)
    waiting = 0.0
    for body in [*counted.loops, *([straight] if straight else [])]:
        lines = code.lines(body)
        wait = machine_code.waits(lines, body in counted.loops)
        busy = len(lines) * max(2, launch.num_warps / 4) + BARRIER * sum(line.kind == "barrier" for line in lines)
        waiting += counted.runs[min(body)] * max(busy + wait.rounds * latency, latency * bool(wait.carried))
    parts["latency"] = waiting / programs / counted.units
    read, written = element_sizes(launch)
    bytes_a_clock = gpu.copy * 1000 / gpu.clock / multiprocessors
    passes = work.passes(values) or 1
    if programs * multiprocessors * work.units(values) * read < gpu.cache_mb * 0.5e6:
        passes = 1  # the others find the rows in the L2 cache
    parts["memory"] = (passes * read + written) / bytes_a_clock
    clocks = math.hypot(*parts.values())  # they overlap in part
    figures: Figures = {"bound": max(parts, key=lambda name: parts[name])}
    if read:
        figures["share"] = round((read + written) / bytes_a_clock / clocks, 3)
    elif work.hot_loop:
        figures["us"] = round(clocks * 256 * 880_880 / multiprocessors / gpu.clock / 1000, 1)
    return figures
