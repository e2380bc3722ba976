"""Tables of the benchmarks on a GPU, and of the Triton kernels' machine code."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from bench.gpu_summary import COPY_LIMIT, STEP_LIMIT_US
from bench.kernel_cost.compile_check import LIMITS, describe
from bench.report.results import RESULTS
from bench.report.text import NAMES, ms, percent, table, times


def gpu_table(result: dict[str, Any]) -> str:
    """The loss and its peers of bench.gpu's file: time, and share of the bandwidth of a copy."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for r in [*result.get("loss", []), *result.get("peers", [])]:
        for name, t in r.get("peers", {}).items():  # a part that failed before it began has none
            text = (
                f"{ms(t['p20_ms'])}, {percent(t['share_of_copy'])}"
                if "p20_ms" in t
                else t.get("skipped") or t["failed"]
            )
            rows.setdefault((f"{r['B']:,} x {r['C']:,}", r["dtype"]), {})[name] = text
    peers = list(dict.fromkeys(name for found in rows.values() for name in found))
    head = ("B x C", "type", *(NAMES.get(name, name) for name in peers))
    return table(head, ((*shape, *(found.get(name, "–") for name in peers)) for shape, found in rows.items()))


def gpu_steps_table(result: dict[str, Any]) -> str:
    """Whole steps of bench.gpu's file with the time of each kernel, and where they were measured."""
    kernels = ("statistics", "search", "batch_sums", "loss", "push", "scale")
    rows = []
    for r in result.get("step", []):
        if "graph" in r:
            size, taken = ", ".join(f"{r[key]:,}" for key in "BCDN"), dict(r["kernels_us"])
            each = (f"{taken[f'{k}_kernel']:.1f}" if f"{k}_kernel" in taken else "–" for k in kernels)
            floor = ms(r["cross_entropy_graph"]["p20_ms"])
            rows.append((size, r["dtype"], NAMES[r["peer"]], ms(r["graph"]["p20_ms"]), floor, *each))
    heads = (f"{k.replace('_', ' ')}, µs" for k in kernels)
    info = result["machine_info"]
    where = f"{info['gpu']}; torch {info['torch']}, Triton {info['triton']}; commit {info['commit']}"
    copy = f"A copy, reads and writes counted: {result['copy_GB_per_s']:,.0f} GB/s."
    return f"{table(('B, C, D, N', 'type', 'step', 'p20', 'cross-entropy', *heads), rows)}\n\n{where}. {copy}"


def gpu_targets_table(result: dict[str, Any]) -> str:
    """Targets on a GPU and whether they are met."""
    rows = []
    for r in result.get("step", []):
        if "graph" in r and r["B"] == 256 and r["dtype"] == "float32":
            met, took = r["graph"]["p20_ms"] <= STEP_LIMIT_US / 1e3, ms(r["graph"]["p20_ms"])
            size = ", ".join(f"{r[key]:,}" for key in "BCDN")
            rows.append((f"step {NAMES[r['peer']]} at {size}", f"{STEP_LIMIT_US:g} µs", took, met))
    for r in result.get("loss", []):
        kernel = r.get("peers", {}).get("kernel", {})
        limit = COPY_LIMIT.get(r.get("C", 0))
        if limit and "share_of_copy" in kernel and r["dtype"] == "bfloat16" and r["B"] > 256:
            share, rate = kernel["share_of_copy"], kernel["GB_per_s"]
            what = f"loss `paper` at {r['B']:,} x {r['C']:,}, bfloat16"
            rows.append((what, f"{limit:.0%} of a copy", f"{share:.0%} ({rate:,.0f} GB/s)", share >= limit))
    return table(("what", "limit", "measured", "met"), ((*text, "yes" if met else "**no**") for *text, met in rows))


def gpu_search_table(result: dict[str, Any]) -> str:
    """Statistics and search of bench.gpu's file, over their arithmetic."""
    rows = [
        (f"{r['B']:,}, {r['D']:,}, {r['N']:,}", ms(r["p20_ms"]), ms(r["floor_ms"]), times(r["p20_ms"] / r["floor_ms"]))
        for r in result.get("search", [])
        if "floor_ms" in r
    ]
    return table(("B, D, N", "p20", "arithmetic", "over it"), rows)


def gpu_before_table(result: dict[str, Any]) -> str:
    """Kernels and steps before they were rebuilt and now, at the sizes that both files have."""
    before = json.loads((RESULTS / "kernels" / "h200_before.json").read_text())

    def timed(file: dict[str, Any]) -> dict[str, float]:
        losses = ((r, r.get("peers", {}).get("kernel", r)) for r in file.get("loss", []))
        searches = ((r, r) for r in file.get("search", []))
        steps = ((r, r.get("graph", r)) for r in file.get("step", []))
        return {
            **{f"loss `paper`, {r['B']:,} x {r['C']:,}, {r['dtype']}": t["p20_ms"] for r, t in losses if "p20_ms" in t},
            **{
                f"statistics and search, {r['B']:,}, {r['D']:,}, {r['N']:,}": t["p20_ms"]
                for r, t in searches
                if "p20_ms" in t
            },
            **{
                f"step {NAMES[r['peer']]}, {', '.join(f'{r[k]:,}' for k in 'BCDN')}": t["p20_ms"]
                for r, t in steps
                if "p20_ms" in t
            },
        }

    old, new = timed(before), timed(result)
    rows = [(what, ms(t), ms(new[what]), times(t / new[what])) for what, t in old.items() if what in new]
    return table(("what", "before", "now", "faster"), rows)


def kernels_table() -> str:
    """Kernels with a limit: figures of the compile check, and as "before" those of an older commit."""
    report, before = (
        json.loads((RESULTS / "kernels" / name).read_text()) for name in ("triton-3.8.json", "before.json")
    )
    rows = []
    for label, (limit, _) in LIMITS.items():
        now = report["sm_90"][label]
        old = before["sm_90"].get(label)
        models = [describe(report[target][label]["model"]) for target in ("sm_90", "sm_80", "sm_100")]
        loads = ", ".join(f"{count} x {size}" for size, count in now["loads"].items())
        counts = (f"{old['instructions']:.1f}" if old else "–", f"{now['instructions']:.1f}", f"{limit:g}", now["unit"])
        held = (str(now["barriers"]), str(now["registers"]), str(now["programs"]), f"{now['in_flight'] / 1024:.0f} KB")
        rows.append((label, *counts, loads, *held, "; ".join(models)))
    head = ("kernel", "before", "now", "limit", "per", "loads x bytes", "barriers", "registers", "programs")
    return table((*head, "in flight", "model"), rows)


GPU_BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "gpu": gpu_table,
    "gpu-step": gpu_steps_table,
    "gpu-targets": gpu_targets_table,
    "gpu-search": gpu_search_table,
    "gpu-before": gpu_before_table,
}
