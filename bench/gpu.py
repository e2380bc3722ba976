"""Kernels, loss steps and training steps on a GPU, as JSON: ``python -m bench.gpu --out FILE``.

The same work, peers and gates as the suite that pytest runs (``bench_loss``, ``bench_typicalness``, ``bench_step``,
``bench_training``), without pytest, the most telling parts first. Device time is a CUDA graph's replay over inputs that
together exceed three times the L2 cache (``harness.GraphTimer``). A part that fails or finds no time left is recorded
as such and costs no other; the file is written after each. ``--smoke`` runs tiny shapes on the CPU with the same code,
the Triton kernels in the interpreter, timed by the clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import bench_loss, bench_step, bench_training, bench_typicalness
from bench.harness import (
    BLOCK,
    CannotRun,
    GraphTimer,
    arithmetic_rate,
    clock,
    copy_bandwidth,
    environment,
    percentiles,
    ratio_to_floor,
    sets_beyond_cache,
    write_json,
)
from tal_fast.loss._extension import triton_problem

LOSS_SHAPES = [(16_384, 1000), (4096, 21_841), (4096, 131_072), (256, 1000)]  # B, C
LOSS_PEERS = ("kernel", "paper", "released", "cross_entropy", "cross_entropy_compiled", "reference_compiled")
FUSED_PEERS = ("liger", "quack")
DISTANCE_SHAPES = [(256, 2048, 880_880), (256, 2048, 20_000), (1024, 512, 880_880)]  # B, D, N
STEP_SHAPES = [(256, 1000, 2048, 880_880), (128, 100, 64, 30_000)]  # B, C, D, N


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

    def sets(self, bytes_read: int) -> int:
        return 2 if self.smoke else sets_beyond_cache(self.device, bytes_read)

    def time(self, calls: list[Callable[[], object]]) -> dict[str, float]:
        """p20, p50 and p80 of one call."""
        if self.smoke:
            return percentiles(clock(calls[0], 2))
        return percentiles(GraphTimer(self.device)(calls))

    def synchronized(self, run: Callable[[], object]) -> Callable[[], None]:
        """The call and its end on the device: what a step costs with the launches from Python."""

        def call() -> None:
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        return call


def loss_kernel_alone(p: bench_loss.Problem) -> bench_loss.Run:
    """The Triton kernel without autograd around it: what its bandwidth is judged by."""
    from tal_fast import kernels
    from tal_fast.loss import reference

    batch = reference.batch_summary(p.logits, p.labels, p.distance)
    ticket = torch.zeros(1, dtype=torch.int32, device=p.device)
    options: dict[str, Any] = {
        "variant": "paper",
        "t_min": 10.0,
        "t_max": 100.0,
        "t_wrong": 20.0,
        "confidence_threshold": 0.0,
        "label_smoothing": 0.0,
        "ignore_index": -100,
        "warmup": False,
        "need_grad": True,
    }

    def run(z: Tensor) -> tuple[Tensor, Tensor]:
        loss, grad = kernels.loss_forward(z.detach(), p.labels, p.distance, batch, ticket, **options)[:2]
        return loss, grad

    return run


def loss_kernel(bench: Bench, rows: int, classes: int, dtype: torch.dtype) -> dict[str, Any]:
    """Loss and gradient: every peer on the same logits."""
    p = bench_loss.Problem(rows, classes, dtype, bench.device)
    size = 2 * p.logits.numel() * dtype.itemsize
    leaves = [p.logits.clone().requires_grad_() for _ in range(bench.sets(p.logits.nbytes))]
    peers: dict[str, Any] = {}
    for name in LOSS_PEERS[:1] if bench.smoke else (*LOSS_PEERS, *FUSED_PEERS):
        torch._dynamo.reset()
        try:
            if name == "kernel":
                run, variant = loss_kernel_alone(p), "paper"
            elif name == "cross_entropy":
                run, variant = bench_loss.cross_entropy(p), "cross_entropy"
            else:
                run, variant = bench_loss.make_peer(name, p)
            bench_loss.gate(name, run, p, variant)
            t = bench.time([lambda z=leaf, run=run: run(z) for leaf in leaves])  # type: ignore[misc]
            rate = size / (t["p20_ms"] / 1e3)
            peers[name] = {**t, "GB_per_s": rate / 1e9, "share_of_copy": rate / bench.copy_rate}
        except CannotRun as error:
            peers[name] = {"skipped": str(error)}
        except Exception as error:  # a peer that does not run must not cost the others
            peers[name] = {"failed": first_line(error)}
    return {"B": rows, "C": classes, "dtype": str(dtype).removeprefix("torch."), "bytes": size, "peers": peers}


def distance_kernel(bench: Bench, rows: int, width: int, entries: int) -> dict[str, Any]:
    """Statistics and nearest distance by brute force."""
    from tal_fast import kernels

    p = bench_typicalness.Problem(rows, width, entries, torch.float32, bench.device)

    def run(f: Tensor) -> Tensor:
        q = p.queue.ring
        return kernels.statistics_distance(f, p.labels, q.mean, q.std, q.cursor, q.ticket, ignore_index=-100)[2]

    bench_typicalness.gate("the distance kernel", run(p.features), p)
    sets = [p.features.clone() for _ in range(bench.sets(p.features.nbytes))]
    t = bench.time([lambda f=f: run(f) for f in sets])  # type: ignore[misc]
    seconds, pairs = t["p20_ms"] / 1e3, rows * entries
    return {
        "B": rows, "D": width, "N": entries, **t,
        "pairs_per_s": pairs / seconds,
        "share_of_arithmetic": pairs * bench_typicalness.OPERATIONS_A_PAIR / seconds / bench.arithmetic,
    }  # fmt: skip


def loss_step(bench: Bench, peer: str, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """The whole step in graph replay, beside cross-entropy; and with its launches from Python."""
    case = bench_step.Case(peer, *shape)
    step = bench_step.make_step(case, bench.device, backend="triton")
    floor = bench_step.make_step(dataclasses.replace(case, peer="cross_entropy"), bench.device)
    inputs, labels, _ = bench_step.make_inputs(case, bench_step.gate(case, step, bench.device), bench.device)
    calls = [partial(step, *each, labels) for each in inputs]
    floors = [partial(floor, *each, labels) for each in inputs]
    result: dict[str, Any] = {**case.__dict__, "graph": bench.time(calls), "cross_entropy_graph": bench.time(floors)}
    repeats = 2 if bench.smoke else 100
    result["eager"] = percentiles(clock(bench.synchronized(calls[0]), repeats))
    result["cross_entropy_eager"] = percentiles(clock(bench.synchronized(floors[0]), repeats))
    if bench.device.type == "cuda":
        result["extra_memory_bytes"] = extra_memory(calls[0])
        result["waits_for_the_device"] = waits(calls[0])
    return result


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


def training_step(bench: Bench) -> dict[str, Any]:
    """Images a second with cross-entropy and TAL, in turns: ResNet-50, batch 256, bfloat16, channels_last, compiled."""
    if bench.smoke:
        case = bench_training.Case("tal", "cifar_resnet8", 4, 10, 32, 100)
    else:
        (case,) = bench_training.GPU
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
    return {
        **case.__dict__, "tal": ours, "cross_entropy": theirs, **ratio_to_floor(seconds, floors),
        "images_per_s": {"tal": case.B / ours["p50_ms"] * 1e3, "cross_entropy": case.B / theirs["p50_ms"] * 1e3},
    }  # fmt: skip


def graphed_training(bench: Bench) -> dict[str, Any]:
    """Whether the trainer's CUDA-graph mode gives the losses it gives without."""
    from tal_fast.config.parse import load_config
    from tal_fast.training.trainer import Trainer

    losses = []
    for on in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            config = dataclasses.replace(load_config("digits-tal"), epochs=3, output=folder, progress="none")
            config.model.compile = False  # whose first steps would be most of the time
            trainer = Trainer(dataclasses.replace(config, precision="float32", cuda_graphs=on, logger="none"))
            trainer.fit()
            losses.append([row["train_loss"] for row in trainer.history])
    apart = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
    return {"losses": losses, "same_bits": losses[0] == losses[1], "relative_difference": apart}


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def parts(bench: Bench) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and work of every part, in order."""
    found: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    if bench.smoke:
        for classes in (10, 1003):
            found.append(("loss_kernel", lambda c=classes: loss_kernel(bench, 2, c, torch.bfloat16)))  # type: ignore[misc]
        found.append(("distance_kernel", lambda: distance_kernel(bench, 4, 16, 100)))
        for peer in ("released", "released_direct"):
            found.append(("loss_step", lambda p=peer: loss_step(bench, p, (4, 10, 16, 100))))  # type: ignore[misc]
        found.append(("training_step", lambda: training_step(bench)))
        return found
    for rows, classes in LOSS_SHAPES:
        found.append(("loss_kernel", lambda r=rows, c=classes: loss_kernel(bench, r, c, torch.bfloat16)))  # type: ignore[misc]
    for peer in ("paper", "released", *bench_step.DIRECT):
        for shape in STEP_SHAPES:
            found.append(("loss_step", lambda p=peer, s=shape: loss_step(bench, p, s)))  # type: ignore[misc]
    for distance_shape in DISTANCE_SHAPES:
        found.append(("distance_kernel", lambda s=distance_shape: distance_kernel(bench, *s)))  # type: ignore[misc]
    found.append(("training_step", lambda: training_step(bench)))
    found.append(("graphed_training", lambda: graphed_training(bench)))
    for rows, classes in LOSS_SHAPES:
        found.append(("loss_kernel", lambda r=rows, c=classes: loss_kernel(bench, r, c, torch.float32)))  # type: ignore[misc]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--seconds", type=float, default=240, help="start no part after this long (default 240)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    started = time.monotonic()
    if not args.smoke and not torch.cuda.is_available():
        parser.error("no CUDA GPU is here; use --smoke to see that it runs")
    problem = triton_problem(torch.device("cpu" if args.smoke else "cuda"))
    if problem:
        parser.error(f"the Triton kernels do not run here: {problem}")
    torch.manual_seed(0)
    bench = Bench(args.smoke)
    result: dict[str, Any] = {
        "what": "smoke run on the CPU: the times mean nothing" if args.smoke else "tal_fast on a GPU",
        "machine_info": environment(),
        "copy_GB_per_s": bench.copy_rate / 1e9,
        "float32_GFLOP_per_s": bench.arithmetic / 1e9,
    }
    failures = 0
    for name, part in parts(bench):
        before = time.monotonic()
        if before - started > args.seconds:
            outcome: dict[str, Any] = {"skipped": f"no time left of {args.seconds:.0f} seconds"}
        else:
            try:
                outcome = part()
            except Exception as error:
                outcome, failures = {"failed": first_line(error)}, failures + 1
            outcome["seconds"] = round(time.monotonic() - before, 1)
        print(name, outcome, flush=True)
        result.setdefault(name, []).append(outcome)
        write_json(args.out, result)
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
