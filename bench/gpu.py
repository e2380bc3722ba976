"""Steps, kernels and training on a GPU, as JSON: ``python -m bench.gpu --out FILE``.

The same work, peers and gates as the suite that pytest runs (``bench_step``, ``bench_loss``, ``bench_typicalness``,
``bench_training``), without pytest. Groups, in order: the whole step, the loss kernels, the search, training, and the
peers, which torch.compile makes slow to start. Device time is a CUDA graph's replay over inputs that together exceed
three times the L2 cache (``harness.GraphTimer``).

Every part has a budget of seconds. One that fails, takes too long or finds no time left is recorded as such with what
it has measured, and costs no other: after an error that ends the CUDA context the process starts anew with the next
part. The file is written after each; ``bench.gpu_summary`` says what it means. The exit status is 1 if a part failed,
and a wrong kernel fails its part; a peer of others may fail. ``--smoke`` runs tiny shapes on the CPU with the same
code, the Triton kernels in the interpreter, timed by the clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import bench_loss, bench_step, bench_training, bench_typicalness
from bench.gpu_summary import GROUPS, name_of
from bench.harness import (
    BLOCK,
    CannotRun,
    GraphTimer,
    arithmetic_rate,
    clock,
    copy_bandwidth,
    environment,
    events,
    host_time,
    instruction_rate,
    kernels_launched,
    percentiles,
    ratio_to_floor,
    sets_beyond_cache,
    write_json,
)
from tal_fast.loss import dispatch
from tal_fast.loss._extension import triton_problem
from tal_fast.loss.backends import LossInputs
from tal_fast.loss.backends.base import KernelBackend
from tal_fast.loss.options import LossOptions

BIG_STEP, SMALL_STEP = (256, 1000, 2048, 880_880), (128, 100, 64, 30_000)  # B, C, D, N
STEPS = [
    *((peer, BIG_STEP, "float32") for peer in ("paper", "released")),
    ("paper", BIG_STEP, "bfloat16"),
    *((peer, SMALL_STEP, "float32") for peer in ("paper", "released")),
    *((peer, BIG_STEP, "float32") for peer in bench_step.DIRECT),
]
LOSS_SHAPES = [
    (16_384, 1000), (4096, 21_841), (4096, 8192), (16_384, 1003), (65_536, 100), (4096, 131_072), (256, 1000),
]  # fmt: skip
OURS = ("kernel", "kernel_released", "paper", "released")
LOSS_PEERS = ("cross_entropy_compiled", "reference_compiled", "liger", "quack")
SEARCHES = [(256, 2048, 880_880), (256, 2048, 20_000), (1024, 512, 880_880)]  # B, D, N
INSTRUCTIONS_A_PAIR = 5.5
"""Thread instructions that brute force needs for one row and entry: two subtractions, a product, a multiplication with
addition, a minimum, and half of an instruction for loads and the loop."""


class OutOfTime(BaseException):
    """A part has used its budget. Not an Exception, so that no handler of a peer's errors takes it."""


class Bench:
    """Where and how to time.

    Args:
        smoke: tiny shapes on the CPU.
    """

    def __init__(self, smoke: bool) -> None:
        self.smoke = smoke
        self.device = torch.device("cpu" if smoke else "cuda")
        small = {"megabytes": 8} if smoke else {"megabytes": 1024}
        self.copy_rate = copy_bandwidth(self.device, **small)
        self.arithmetic = arithmetic_rate(self.device, 128 if smoke else 4096)
        self.instructions = None if smoke else instruction_rate(self.device)

    def sets(self, bytes_read: int) -> int:
        return 2 if self.smoke else sets_beyond_cache(self.device, bytes_read)

    def time(self, calls: Sequence[Callable[[], object]], graph: bool = True) -> dict[str, float]:
        """p20, p50 and p80 of one call.

        Args:
            graph: replay a CUDA graph; otherwise launch from Python between two events.
        """
        if self.smoke:
            return percentiles(clock(calls[0], 2))
        return percentiles(GraphTimer(self.device)(calls) if graph else events(calls))

    def synchronized(self, run: Callable[[], object]) -> Callable[[], None]:
        """The call and its end on the device: what a step costs with the launches from Python."""

        def call() -> None:
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        return call

    def kernels_us(self, calls: Sequence[Callable[[], object]]) -> list[tuple[str, float]]:
        """Name and microseconds of each Triton launch of a call, in order, each replayed by itself."""
        launches = [kernels_launched(call) for call in calls]
        return [
            (same[0].kernel.fn.__name__, 1e3 * self.time([partial(e.run, *e.tensors) for e in same])["p20_ms"])
            for same in zip(*launches, strict=True)
        ]


def backend_alone(name: str, p: bench_loss.Problem) -> bench_loss.Run:
    """The launches without autograd around them: what the kernels' bandwidth is judged by."""
    backend = dispatch.for_device("triton", p.device)
    assert isinstance(backend, KernelBackend)
    options = LossOptions("released" if name == "kernel_released" else "paper")
    summary = bench_loss.reference.batch_summary(p.logits, p.labels, p.distance)
    tickets = bench_loss.tickets_of(backend, p)

    def run(z: Tensor) -> tuple[Tensor, Tensor]:
        inputs = LossInputs(z, p.labels, p.distance, summary, tickets, options, warmup=False)
        if options.variant == "released":
            inputs.summary = backend.complete_summary(inputs)
        return backend.forward(inputs, need_grad=True)[:2]

    return run


def loss(bench: Bench, names: tuple[str, ...], rows: int, classes: int, dtype: torch.dtype, r: dict[str, Any]) -> None:
    """Loss and gradient: every peer on the same logits.

    Raises:
        AssertionError: one of ours is wrong or does not run.
    """
    p = bench_loss.Problem(rows, classes, dtype, bench.device)
    size = 2 * p.logits.numel() * dtype.itemsize
    r |= {"B": rows, "C": classes, "dtype": str(dtype).removeprefix("torch."), "bytes": size, "peers": {}}
    leaves = [p.logits.clone().requires_grad_() for _ in range(bench.sets(p.logits.nbytes))]
    for name in names:
        if name.endswith("_compiled"):
            torch._dynamo.reset()
        try:
            if name.startswith("kernel"):
                run, variant = backend_alone(name, p), "released" if name == "kernel_released" else "paper"
            elif name == "cross_entropy":
                run, variant = bench_loss.cross_entropy(p), "cross_entropy"
            else:
                run, variant = bench_loss.make_peer(name, p)
            bench_loss.gate(name, run, p, variant)
            # Liger's forward reads a number back to the host, which no graph can capture.
            graph = name != "liger"
            t = bench.time([lambda z=leaf, run=run: run(z) for leaf in leaves], graph)  # type: ignore[misc]
            rate = size / (t["p20_ms"] / 1e3)
            r["peers"][name] = {**t, "GB_per_s": rate / 1e9, "share_of_copy": rate / bench.copy_rate}
            r["peers"][name] |= {} if graph else {"timed": "launches from Python, between events"}
        except CannotRun as error:
            r["peers"][name] = {"skipped": str(error)}
        except Exception as error:  # one that does not run must not cost the others
            r["peers"][name] = {"failed": first_line(error)}
            if context_is_lost(bench.device):
                raise
    wrong = {name: t["failed"] for name, t in r["peers"].items() if name in OURS and "failed" in t}
    if wrong:
        raise AssertionError("; ".join(f"{name}: {why}" for name, why in wrong.items()))


def search_alone(p: bench_typicalness.Problem) -> Callable[[Tensor], Tensor]:
    """The launches of statistics and search: (B, D) features -> (B,) distances."""
    backend = dispatch.for_device("triton", p.features.device)
    return lambda f: backend.statistics_distance(f, p.labels, p.queue.ring, -100).distance


def search(bench: Bench, rows: int, width: int, entries: int, r: dict[str, Any]) -> None:
    """Statistics and nearest distance by brute force."""
    r |= {"B": rows, "D": width, "N": entries}
    p = bench_typicalness.Problem(rows, width, entries, torch.float32, bench.device)
    run = search_alone(p)
    bench_typicalness.gate("the search", run(p.features), p)
    calls = [partial(run, p.features.clone()) for _ in range(bench.sets(p.features.nbytes))]
    r |= bench.time(calls)
    pairs = rows * entries
    r["pairs_per_s"] = pairs / (r["p20_ms"] / 1e3)
    if bench.instructions:
        r["floor_ms"] = 1e3 * (pairs * INSTRUCTIONS_A_PAIR / bench.instructions + p.features.nbytes / bench.copy_rate)
    r["kernels_us"] = bench.kernels_us(calls[:16])


def step(bench: Bench, peer: str, shape: tuple[int, int, int, int], dtype: str, r: dict[str, Any]) -> None:
    """The whole step in graph replay, beside cross-entropy; its kernels; and with its launches from Python."""
    case = bench_step.Case(peer, *shape, dtype=dtype)
    r |= case.__dict__
    run = bench_step.make_step(case, bench.device, backend="triton")
    floor = bench_step.make_step(dataclasses.replace(case, peer="cross_entropy"), bench.device)
    inputs, labels, _ = bench_step.make_inputs(case, bench_step.gate(case, run, bench.device), bench.device)
    calls = [partial(run, *each, labels) for each in inputs]
    floors = [partial(floor, *each, labels) for each in inputs]
    r["graph"] = bench.time(calls)
    r["cross_entropy_graph"] = bench.time(floors)
    if peer in bench_step.COMPILED:
        return
    r["kernels_us"] = bench.kernels_us(calls)
    repeats = 2 if bench.smoke else 100
    r["eager"] = percentiles(clock(bench.synchronized(calls[0]), repeats))
    r["cross_entropy_eager"] = percentiles(clock(bench.synchronized(floors[0]), repeats))
    if bench.device.type == "cuda":
        r["host_us"] = 1e6 * host_time(calls[0], torch.cuda.synchronize)
        r["extra_memory_bytes"] = extra_memory(calls[0])
        r["waits_for_the_device"] = waits(calls[0])


def extra_memory(call: Callable[[], object]) -> int:
    """Most device memory a call holds beyond what was held before it."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def waits(call: Callable[[], object]) -> str | None:
    """The host synchronisation a call makes; None if it makes none."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return first_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def training(bench: Bench, r: dict[str, Any]) -> None:
    """Images a second with cross-entropy and TAL, in turns: ResNet-50, batch 256, bfloat16, channels_last, compiled."""
    if bench.smoke:
        case = bench_training.Case("tal", "cifar_resnet8", 4, 10, 32, 100)
    else:
        (case,) = bench_training.GPU
    r |= case.__dict__
    tal = bench.synchronized(bench_training.make_training(case, "tal", bench.device))
    floor = bench.synchronized(bench_training.make_training(case, "ce", bench.device))
    for _ in range(1 if bench.smoke else 5):  # compilation, cuDNN's choice of algorithms
        tal()
        floor()
    floors, seconds = [clock(floor, 2 if bench.smoke else BLOCK)], []
    for _ in range(1 if bench.smoke else 6):
        seconds += clock(tal, BLOCK)
        floors.append(clock(floor, 2 if bench.smoke else BLOCK))
    ours, theirs = percentiles(seconds), percentiles([t for block in floors for t in block])
    r |= {"tal": ours, "cross_entropy": theirs, **ratio_to_floor(seconds, floors)}
    r["images_per_s"] = {"tal": case.B / ours["p50_ms"] * 1e3, "cross_entropy": case.B / theirs["p50_ms"] * 1e3}


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def context_is_lost(device: torch.device) -> bool:
    """Whether an error has ended the CUDA context, so that nothing more runs in this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Part(NamedTuple):
    """A measurement, which fills in a dictionary, and its budget in seconds."""

    group: str
    budget: float
    measure: Callable[[dict[str, Any]], None]


def parts(bench: Bench, only: tuple[str, ...]) -> list[Part]:
    """Every part of the groups, in order."""
    half, single = torch.bfloat16, torch.float32
    if bench.smoke:
        found = [
            *(Part("step", 60, partial(step, bench, p, (4, 10, 16, 100), "float32")) for p in ("paper", "released")),
            *(Part("loss", 60, partial(loss, bench, OURS, 2, classes, half)) for classes in (10, 1003)),
            Part("search", 60, partial(search, bench, 4, 16, 100)),
            Part("training", 60, partial(training, bench)),
        ]
    else:
        loss_names = (*OURS, "cross_entropy")
        found = [
            *(Part("step", 25, partial(step, bench, *each)) for each in STEPS),
            *(Part("loss", 25, partial(loss, bench, loss_names, *s, d)) for d in (half, single) for s in LOSS_SHAPES),
            *(Part("search", 15, partial(search, bench, *each)) for each in SEARCHES),
            Part("training", 120, partial(training, bench)),
            *(Part("peers", 45, partial(loss, bench, (n,), *s, half)) for n in LOSS_PEERS for s in LOSS_SHAPES[:2]),
            *(Part("peers", 45, partial(step, bench, peer, BIG_STEP, "float32")) for peer in bench_step.COMPILED),
        ]
    return [part for part in found if part.group in only]


def run_part(part: Part, left: float) -> dict[str, Any]:
    """Result of a part within its budget or the time left, with the reason if it ended early."""

    def stop(*_: object) -> None:
        raise OutOfTime

    r: dict[str, Any] = {}
    before, budget = time.monotonic(), min(part.budget, left)
    if budget <= 0:
        return {"skipped": "no time left"}
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, budget)
    try:
        part.measure(r)
    except OutOfTime:
        if left < part.budget:
            r["skipped"] = "no time left to finish it"
        else:
            r["failed"] = f"it took longer than its {part.budget:.0f} s"
    except Exception as error:
        r["failed"] = first_line(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    r["seconds"] = round(time.monotonic() - before, 1)
    return r


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"groups, by commas: {', '.join(GROUPS)} (all)")
    parser.add_argument("--seconds", type=float, default=240, help="end after this long (240)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--begin-with", type=int, default=0, help=argparse.SUPPRESS)  # after a lost CUDA context
    args = parser.parse_args(argv)
    end = time.monotonic() + args.seconds
    only = tuple(args.only.split(","))
    if not set(only) <= set(GROUPS):
        parser.error(f"--only is {args.only!r}; name some of {', '.join(GROUPS)}, separated by commas")
    if not args.smoke and not torch.cuda.is_available():
        parser.error("no CUDA GPU is here; use --smoke to see that it runs")
    problem = triton_problem(torch.device("cpu" if args.smoke else "cuda"))
    if problem:
        parser.error(f"the Triton kernels do not run here: {problem}")
    print("\n".join(dispatch.describe()), flush=True)
    torch.manual_seed(0)
    bench = Bench(args.smoke)
    result: dict[str, Any] = {
        "what": "smoke run on the CPU: the times mean nothing" if args.smoke else "tal_fast on a GPU",
        "machine_info": environment(),
        "copy_GB_per_s": bench.copy_rate / 1e9,
        "float32_GFLOP_per_s": bench.arithmetic / 1e9,
        "instructions_per_s": bench.instructions,
    }
    if args.begin_with:
        result = json.loads(args.out.read_text())
    wanted = parts(bench, only)
    for i, part in enumerate(wanted[args.begin_with :], args.begin_with + 1):
        outcome = run_part(part, end - time.monotonic())
        ended = outcome.get("failed") or outcome.get("skipped") or "measured"
        print(f"{part.group} {name_of(outcome)} ({outcome.get('seconds', 0)} s): {ended}", flush=True)
        result.setdefault(part.group, []).append(outcome)
        write_json(args.out, result)
        gc.collect()
        if context_is_lost(bench.device):
            seconds, options = str(end - time.monotonic()), ["--smoke"] * args.smoke
            rest = ["--only", args.only, "--seconds", seconds, "--out", str(args.out), "--begin-with", str(i)]
            os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", *options, *rest])
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    failed = [r for group in GROUPS if group != "peers" for r in result.get(group, []) if "failed" in r]
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
