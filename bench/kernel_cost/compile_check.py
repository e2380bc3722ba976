"""Check of every kernel, compiled for GPUs that are not present: its machine code against a budget.

``python -m bench.kernel_cost.compile_check`` plans the launches that the launchers would make, from tensors without
data, compiles each for A100, H100, B200 and MI300, and reads from the code object what it costs: instructions per
logit, pair or row, loads in flight, programs per multiprocessor, and the bound that these give (docs/performance.md
states the model and its error).

``--report FILE`` writes the figures, ``--emit DIR`` the code objects and their assembly, ``--budget FILE`` compares
with a report of the same version of Triton. A spill, more instructions than the limit or 5% over the report, and a
kernel that does not compile fail the check.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.kernel_cost.cost import TARGETS, Figures, analyse
from tal_fast.kernels.launch import Launch, planned_for, replaced

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


# Most instructions per unit for sm_90 with this Triton, and most barriers in what is counted, by label.
LIMITS_TRITON = "3.8"
LIMITS: dict[str, tuple[float, int | None]] = {
    **{f"loss {t} C={c} paper": (40, None) for t in ("bfloat16", "float32") for c in (1000, 4096, 8192)},
    **{f"loss {t} C={c} paper": (45, None) for t in ("bfloat16", "float32") for c in (100, 1003, 21841, 131072)},
    "search queue float32": (6, 0),
    # Several rows to a warp; twice the logits a thread, which would do, spill with Triton 3.8.
    "loss float32 C=100 paper": (60, None),
    # One program; a scan over its rows takes most.
    "push accepted queue float32": (85, None),
}
# Bytes that spill outside the loops of a few kernels, by version of Triton, as measured: other layouts spill more, or
# are slower.
_ALL = "released smoothing class weights"
SPILLS: dict[str, dict[tuple[str, str], int]] = {
    "3.8": {
        ("sm_100", f"loss float64 C=1003 {_ALL}"): 16,
        ("sm_100", f"loss float64 C=21841 {_ALL}"): 8,
        ("sm_100", f"loss float32 C=100 {_ALL}"): 8,
        **{("sm_100", f"loss float32 C=21841 paper{w}"): 24 for w in ("", " warm-up")},
        **{("sm_100", f"loss bfloat16 C=21841 paper{w}"): 8 for w in ("", " warm-up")},
        ("sm_100", "loss float16 C=21841 paper"): 8,
    },
    "3.6": {
        **{(target, f"loss float32 C=21841 {_ALL}"): 8 for target in ("sm_80", "sm_90")},
        ("sm_80", "loss bfloat16 C=32768 paper"): 16,
    },
    "3.5": {
        **{(target, "batch sums float64 C=21841"): 8 for target in ("sm_90", "sm_100")},
        **{("sm_90", f"loss {t} C=1003 {_ALL}"): 8 for t in ("bfloat16", "float16")},
        ("sm_90", "loss bfloat16 C=131072 paper"): 8,
        ("sm_100", f"loss bfloat16 C=1003 {_ALL}"): 24,
        ("sm_100", f"loss float16 C=1003 {_ALL}"): 16,
        ("sm_100", f"loss bfloat16 C=8192 {_ALL}"): 16,
        **{("sm_100", f"loss {t} C=21841 paper"): 8 for t in ("bfloat16", "float16")},
    },
}
RISE = 1.05  # allowed over the committed report


def planned_launches(target_name: str) -> Iterator[tuple[str, Launch]]:
    """Labels and launches of every kernel, at shapes that reach each launch configuration."""
    found: list[Launch] = []
    with planned_for(TARGETS[target_name].launch), replaced(found.append):
        for labels in calls():
            assert len(labels) == len(found)
            yield from zip(labels, found, strict=True)
            found.clear()


def calls() -> Iterator[list[str]]:
    """Call every launcher with tensors without data; gives the labels of the launches that each call has made."""
    from tal_fast.kernels import distance, loss, queue_push, sharded, sums

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    rows = 256
    labels, accepted = meta(rows, dtype=torch.int64), meta(rows, dtype=torch.bool)
    cursor, tickets = meta(2, dtype=torch.int64), meta(distance.TICKETS.value, dtype=torch.int32)
    summary = meta(7, dtype=torch.float64)
    weights = meta(1000)
    for dtype, width, queue_dtype, weight in (
        (torch.float32, 2048, torch.float32, None),
        (torch.bfloat16, 2048, torch.float32, weights),
        (torch.float16, 63, torch.float64, None),
        (torch.float64, 2048, torch.float64, weights),
    ):
        queue, entry = meta(880_880, dtype=queue_dtype), meta(rows, dtype=queue_dtype)
        in_queue = f"queue {dtype_name(queue_dtype)}"
        features = meta(rows, width, dtype=dtype)
        distance.statistics_distance(features, labels, queue, queue, cursor, weight)
        weighted = "" if weight is None else " class weights"
        yield [f"statistics {dtype_name(dtype)} D={width}", f"search {in_queue}{weighted}"]
        if weight is None:
            distance.nearest(queue, queue, cursor, entry, entry)
            queue_push.push(queue, queue, cursor, entry, entry, accepted)
            queue_push.push(queue, queue, cursor, entry, entry, None)
            yield [f"{name} {in_queue}" for name in ("search without labels", "push accepted", "push all")]

    rows = 4096
    labels, distances = meta(rows, dtype=torch.int64), meta(rows)
    for dtype, classes in itertools.product(TYPES, (1, 10, 100, 1000, 1003, 4096, 8192, 16384, 21841, 32768, 131072)):
        # float16 and float64 differ in the type of the gradient and of the arithmetic, which two widths show.
        if not dtype.is_floating_point or (dtype in (torch.float16, torch.float64) and classes not in (1003, 21841)):
            continue
        shape = f"{dtype_name(dtype)} C={classes}"
        logits = meta(rows, classes, dtype=dtype)
        # The launch whose speed counts, then the one with every branch that takes registers.
        branches: list[tuple[Any, ...]] = [("paper", 20.0, 0.0, None, "mean", False, True)]
        branches += [("released", 20.0, 0.1, meta(classes), "mean", False, True)]
        if classes in (1003, 21841):
            branches += [
                ("paper", None, 0.1, None, "none", False, False),
                ("paper", 20.0, 0.0, None, "sum", True, True),
            ]
        for variant, t_wrong, smoothing, weights, reduction, warmup, need_grad in branches:
            loss.loss_forward(
                logits, labels, distances, summary, tickets, weights,
                variant, 10.0, 100.0, t_wrong, 0.0, smoothing, -100, reduction, warmup, need_grad,
            )  # fmt: skip
            flags = ["", " smoothing"][smoothing > 0] + ["", " class weights"][weights is not None]
            flags += ["", " warm-up"][warmup] + [" no gradient", ""][need_grad]
            yield [f"loss {shape} {variant}{flags}"]
        if classes in (100, 1000, 1003, 21841):
            sums.batch_sums(logits, labels, distances, summary, tickets, 0.0, -100)
            yield [f"batch sums {shape}"]
        if classes in (1000, 32768):  # logits of a row that are not adjacent
            apart = meta(classes, rows, dtype=dtype).t()
            loss.loss_forward(
                apart, labels, distances, summary, tickets, None,
                "paper", 10.0, 100.0, 20.0, 0.0, 0.0, -100, "mean", False, True,
            )  # fmt: skip
            sums.batch_sums(apart, labels, distances, summary, tickets, 0.0, -100)
            yield [f"loss {shape} of any strides", f"batch sums {shape} of any strides"]
        if classes == 1003:
            loss.scale(logits, meta(1), dtype)
            yield [f"scale {dtype_name(dtype)} in place"]
            if dtype == torch.float32:
                loss.scale(logits, meta(1), torch.float16)
                yield ["scale float32 to float16"]
        if classes in (1003, 131072):
            column, valid = meta(rows, dtype=torch.float64), meta(rows, dtype=torch.bool)
            sharded.scan(logits)
            sharded.exp_sums(logits, labels, column, column)
            sharded.gradient(logits, labels, valid, meta(rows, 7))
            yield [f"sharded {name} {shape}" for name in ("scan", "sums", "gradient")]


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype without the module."""
    return str(dtype).removeprefix("torch.")


def compile_launch(launch: Launch, target_name: str) -> Any:
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
    is_amd = target_name.startswith("gfx")
    kind, arch = ("hip", target_name) if is_amd else ("cuda", int(target_name.removeprefix("sm_")))
    gpu = GPUTarget(kind, arch, TARGETS[target_name].launch.warp_size)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=gpu, options=launch.options)


def check_target(target_name: str, match: str, emit: Path | None) -> dict[str, Figures | str]:
    """Figures, or the error message, of every matching kernel on one target, by label."""
    found: dict[str, Figures | str] = {}
    for label, launch in planned_launches(target_name):
        if match not in label:
            continue
        try:
            compiled = compile_launch(launch, target_name)
            found[label], assembly = analyse(launch, compiled, target_name)
        except Exception as error:  # report the other kernels too
            found[label] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1].strip()}"
            continue
        if emit:
            folder = emit / target_name
            folder.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"[^\w=.-]+", "-", label)
            code, text = ("hsaco", "s") if target_name.startswith("gfx") else ("cubin", "sass")
            (folder / f"{name}.{code}").write_bytes(compiled.asm[code])
            (folder / f"{name}.{text}").write_text(assembly)
    return found


def faults(target_name: str, label: str, figures: Figures | str, budget: Figures | None, triton: str) -> list[str]:
    """Faults of a kernel: it does not compile, spills, or takes more instructions than its limit.

    Args:
        figures: of this kernel now, or why it does not compile.
        budget: its figures in the committed report, {} if it is not there, None if there is no report.
        triton: the version, such as 3.8; ``LIMITS`` hold for one version.
    """
    if isinstance(figures, str):
        return [f"does not compile: {figures}"]
    limited = triton == LIMITS_TRITON and target_name == "sm_90" and label in LIMITS
    spilled, known = figures["spilled"], SPILLS.get(triton, {}).get((target_name, label), 0)
    found = [f"spills {spilled}"] if spilled > known else []
    if budget == {}:
        found.append("is not in the report; make kernels-report writes it")
    if "uncounted" in figures:
        if limited or "instructions" in (budget or {}):
            found.append(f"cannot be counted: {figures['uncounted']}")
        return found
    now, unit = figures["instructions"], figures["unit"]
    if budget and "instructions" in budget and now > RISE * budget["instructions"]:
        found.append(f"{now} instructions a {unit}, {budget['instructions']} in the report")
    if limited:
        limit, barriers = LIMITS[label]
        if now > limit:
            found.append(f"{now} instructions a {unit}, limit {limit}")
        if barriers is not None and figures["barriers"] > barriers:
            found.append(f"{figures['barriers']} barriers in the loop, limit {barriers}")
    return found


def describe(model: Mapping[str, Figures]) -> str:
    """The model's figures in a line: by GPU what bounds it, and the share of a copy's bandwidth or the time."""
    words = []
    for name, figures in model.items():
        speed = f" {figures['share']:.0%} of copy" if "share" in figures else ""
        speed += f" {figures['us']} µs" if "us" in figures else ""
        words.append(f"{name} {figures['bound']}{speed}")
    return "; ".join(words)


def write_report(path: Path, targets: Mapping[str, Mapping[str, Figures | str]]) -> None:
    """Write the figures, one kernel a line."""
    import triton

    lines = [
        f"  {json.dumps(target)}: {{\n"
        + ",\n".join(f"    {json.dumps(label)}: {json.dumps(figures)}" for label, figures in kernels.items())
        + "\n  }"
        for target, kernels in targets.items()
    ]
    versions = f'"triton": {json.dumps(triton.__version__)}, "torch": {json.dumps(torch.__version__)}'
    path.write_text(f"{{\n  {versions},\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    """Print a table per target; exit 1 if a kernel does not compile, spills or is over its budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--emit", type=Path, metavar="DIR", help="write the code objects and their assembly")
    parser.add_argument("--budget", type=Path, metavar="FILE", help="compare with this report")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="check only this target; repeatable")
    parser.add_argument("--match", default="", help="check only kernels whose label contains this text")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is 1, which replaces the compiler; unset it")
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    if args.report and not args.report.parent.is_dir():
        parser.error(f"--report is {args.report} but there is no folder {args.report.parent}; make it first")
    try:
        budget = json.loads(args.budget.read_text()) if args.budget else None
    except (OSError, ValueError) as error:
        parser.error(f"--budget is {args.budget}, which is no report that can be read ({error}); --report writes one")
    if budget and budget["triton"] != triton.__version__:
        parser.error(
            f"{args.budget} is for Triton {budget['triton']} and this is {triton.__version__}; install that one"
        )
    targets = args.target or list(TARGETS)
    report: dict[str, dict[str, Figures | str]] = {}
    bad = checked = 0
    with ProcessPoolExecutor(min(len(targets), os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(check_target, target, args.match, args.emit) for target in targets]
        for target, job in zip(targets, jobs, strict=True):
            report[target] = job.result()
            print(f"\n{target}\n  {'kernel':56} per   instructions  barriers  registers  programs  KB in flight  model")
            for label, figures in report[target].items():
                checked += 1
                wrong = faults(target, label, figures, budget and budget.get(target, {}).get(label, {}), version)
                bad += bool(wrong)
                if not isinstance(figures, str) and "uncounted" in figures:
                    print(f"  {label:56} {figures['unit']:5} not counted: {figures['uncounted']}")
                elif not isinstance(figures, str):
                    f = figures
                    print(
                        f"  {label:56} {f['unit']:5} {f['instructions']:12} {f['barriers']:9} {f['registers']:10} "
                        f"{f['programs']:9} {f['in_flight'] / 1024:13.1f}  {describe(f['model'])}"
                    )
                for fault in wrong:
                    print(f"  {label:56} FAULT: {fault}")
            sys.stdout.flush()
    if not checked:
        parser.error(f"--match is {args.match!r}, which no kernel's label contains; leave it out to see all labels")
    if args.report:
        write_report(args.report, report)
    print(f"\n{checked} kernels, {bad} bad")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
