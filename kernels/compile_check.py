"""Compile every kernel for GPUs that are not present, and fail on spilled registers.

``python -m tal_fast.kernels.compile_check [--quick]`` plans the launches that the launchers would make, from tensors
without data, and compiles each for A100, H100, B200 and MI300. Spills are read from the binary: on NVIDIA from the
stack size, on AMD from the metadata of the code object.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tal_fast.kernels.launch import Target

# A100, H100, B200 and MI300.
TARGETS = {
    "cuda:80": Target(108, 32),
    "cuda:90": Target(132, 32),
    "cuda:100": Target(148, 32),
    "hip:gfx942": Target(304, 64),
}
# Triton's names of pointer types.
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Resources:
    """Resources of a compiled kernel."""

    registers: int  # per thread
    spilled: int  # bytes of stack on NVIDIA, registers on AMD
    shared: int  # bytes of shared memory


def planned_launches(target_name: str, quick: bool) -> Iterator[tuple[str, Any]]:
    """Labels and launches of every kernel, at shapes that reach each launch configuration."""
    from tal_fast.kernels.distance import plan_search, plan_statistics
    from tal_fast.kernels.loss import plan_batch_sums, plan_loss, plan_scale
    from tal_fast.kernels.queue_push import plan_push
    from tal_fast.kernels.sharded import plan_exp_sums, plan_gradient, plan_scan

    target = TARGETS[target_name]

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    rows = 256
    labels, accepted = meta(rows, dtype=torch.int64), meta(rows, dtype=torch.bool)
    cursor, tickets = meta(2, dtype=torch.int64), meta(3, dtype=torch.int32)
    summary = meta(7, dtype=torch.float64)
    for queue_dtype in (torch.float32, torch.float64):
        queue = meta(880_880, dtype=queue_dtype)
        entry = meta(rows, dtype=queue_dtype)
        for dtype, width in ((torch.float32, 2048), (torch.bfloat16, 2048), (torch.float16, 63)):
            if quick and (queue_dtype, dtype) not in ((torch.float32, torch.bfloat16), (torch.float64, torch.float32)):
                continue
            features = meta(rows, width, dtype=dtype)
            plan, _ = plan_statistics(features, queue_dtype)
            yield f"statistics {dtype_name(dtype)} D={width}, queue {dtype_name(queue_dtype)}", plan
        for some_labels, weights in ((labels, None), (labels, entry), (None, None)):
            kind = "nearest" if some_labels is None else "search" if weights is None else "search, class weights"
            search = entry, entry, entry, tickets, some_labels, weights, -100, target
            yield f"{kind}, queue {dtype_name(queue_dtype)}", plan_search(queue, queue, cursor, *search)[0]
        for kept in (accepted, None):
            yield (
                f"push{'' if kept is None else ' accepted'}, queue {dtype_name(queue_dtype)}",
                plan_push(queue, queue, cursor, entry, entry, kept),
            )

    # Widths on either side of each change of configuration: one warp, odd, the widest single block, the first long row.
    widths = (10, 1003, 16384, 21841) if quick else (1, 100, 1000, 1003, 2048, 4096, 8192, 16384, 21841, 32768, 131072)
    dtypes = (torch.bfloat16, torch.float32) if quick else (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for classes, dtype in itertools.product(widths, dtypes):
        logits, distance = meta(rows, classes, dtype=dtype), meta(rows)
        # The largest kernel first, with every branch that takes registers.
        branches = [("released", True, True, False, True), ("paper", True, False, False, True)]
        if not quick:
            branches += [("paper", False, True, False, False), ("paper", True, False, True, True)]
        if dtype != torch.float16:  # the gradient of float16 logits is float32
            factor = meta(1, dtype=torch.float32)
            yield f"scale {dtype_name(dtype)} C={classes}", plan_scale(logits, factor, logits, target)
        for variant, has_t_wrong, smooth, warmup, need_grad in branches:
            plan, _ = plan_loss(
                logits, labels, distance, summary, tickets, meta(classes) if smooth else None,
                variant, 10.0, 100.0, 20.0 if has_t_wrong else None, 0.0, 0.1 if smooth else 0.0, -100, "mean", warmup,
                need_grad, target=target,
            )  # fmt: skip
            flags = [variant] + ["smoothing"] * smooth + ["warm-up"] * warmup + ["no gradient"] * (not need_grad)
            yield f"{plan.kernel.__name__} {dtype_name(dtype)} C={classes} {' '.join(flags)}", plan
        if classes in (1003, 131072):
            column = meta(rows, dtype=torch.float64)
            terms = meta(rows, 7, dtype=torch.float64)
            for plan in (
                plan_scan(logits, target)[0],
                plan_exp_sums(logits, labels, column, column, target)[0],
                plan_gradient(logits, labels, accepted, terms, target)[0],
            ):
                yield f"sharded {plan.kernel.__name__} {dtype_name(dtype)} C={classes}", plan
        yield (
            f"batch_sums {dtype_name(dtype)} C={classes}",
            plan_batch_sums(logits, labels, distance, summary, tickets, 0.0, -100, target),
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype without the module."""
    return str(dtype).removeprefix("torch.")


def compile_launch(launch: Any, target_name: str) -> Resources:
    """Compile a kernel with the types, integer specialisation and options that its launch would have."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    names = launch.kernel.arg_names  # the arguments', then the constants'
    for i, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]  # allocations are aligned
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    signature.update(dict.fromkeys(names[len(launch.arguments) :], "constexpr"))
    kind, arch = target_name.split(":")
    gpu = GPUTarget(kind, int(arch) if arch.isdigit() else arch, TARGETS[target_name].warp_size)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=gpu, options=launch.options)
    if kind == "hip":
        return hip_resources(compiled.asm["amdgcn"], compiled.metadata.shared)
    return cuda_resources(compiled.asm["cubin"])


def hip_resources(assembly: str, shared: int) -> Resources:
    """Resources from the metadata of an AMD code object.

    Scalar registers spill into lanes of vector registers, which takes no memory; only vector spills count.
    """

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the AMD code object has no .{name}: its format has changed")
        return int(found.group(1))

    return Resources(field("vgpr_count"), field("vgpr_spill_count"), shared)


def cuda_resources(cubin: bytes) -> Resources:
    """Resources from cuobjdump, which Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump gave no resources: {done.stdout}{done.stderr}")
    registers, stack, shared, local = map(int, found.groups())
    return Resources(registers, stack + local, shared)


def check_target(target_name: str, quick: bool, match: str) -> list[tuple[str, int, Resources | str]]:
    """Label, number of warps, and resources or error message of every matching kernel on one target."""
    rows: list[tuple[str, int, Resources | str]] = []
    for label, launch in planned_launches(target_name, quick):
        if match not in label:
            continue
        try:
            outcome: Resources | str = compile_launch(launch, target_name)
        except Exception as error:  # report the other kernels too
            outcome = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        rows.append((label, launch.num_warps, outcome))
    return rows


def main() -> None:
    """Print a table per target; exit 1 if a kernel spills or does not compile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="check fewer shapes")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="check only this target; repeatable")
    parser.add_argument("--match", default="", help="check only kernels whose label contains this text")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is 1, which replaces the compiler; unset it")
    targets = args.target or list(TARGETS)
    bad = checked = 0
    with ProcessPoolExecutor(min(len(targets), os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(check_target, target, args.quick, args.match) for target in targets]
        for target, job in zip(targets, jobs, strict=True):
            rows = job.result()
            print(f"\n{target}\n  {'kernel':66} warps  registers  spilled  shared")
            for label, warps, outcome in rows:
                checked += 1
                if isinstance(outcome, str):
                    bad += 1
                    print(f"  {label:66} {warps:5}  DOES NOT COMPILE: {outcome}")
                else:
                    bad += outcome.spilled > 0
                    mark = "  SPILLS" if outcome.spilled else ""
                    print(f"  {label:66} {warps:5} {outcome.registers:10} {outcome.spilled:8} {outcome.shared:7}{mark}")
            sys.stdout.flush()
    print(
        f"\n{checked} kernels compiled for {', '.join(targets)}: {bad} bad" if bad else f"\n{checked} kernels: no spill"
    )
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
