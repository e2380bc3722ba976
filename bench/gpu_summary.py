"""Summary of a file of ``bench.gpu``, in 15 lines at most, that end with what to tune next.

``python -m bench.gpu_summary FILE``. It imports no PyTorch, and reads the file of a run that was cut short too.
"""

from __future__ import annotations

import json
import sys
from typing import Any

STEP_LIMIT_US = 60.0
"""Goal for the whole step at (256, 1000, 2048, 880,880) in graph replay, in microseconds."""

COPY_LIMIT = {1000: 0.85, 21_841: 0.75}
"""Goal for the loss kernel, as a share of the copy bandwidth, by number of classes (bfloat16)."""

GROUPS = ("step", "loss", "search", "training", "peers")


def microseconds(milliseconds: float) -> str:
    return f"{1e3 * milliseconds:.1f}"


def shape(r: dict[str, Any], names: str) -> str:
    return " x ".join(f"{r[name]:,}" for name in names)


def lines(result: dict[str, Any]) -> list[str]:
    """The summary's lines."""
    info = result["machine_info"]
    found = [
        f"{info['gpu'] or info['cpu']}, torch {info['torch']}, Triton {info['triton']}, commit {info['commit']}: "
        f"copy {result['copy_GB_per_s']:,.0f} GB/s, float32 product {result['float32_GFLOP_per_s']:,.0f} GFLOP/s"
    ]
    steps = [r for r in result.get("step", []) if "graph" in r]
    losses = [r for r in result.get("loss", []) if r.get("peers")]
    searches = [r for r in result.get("search", []) if "p20_ms" in r]
    for r in steps[:3]:
        found.append(step_line(r))
    if steps[3:]:
        rest = ", ".join(
            f"{r['peer']} {shape(r, 'BCDN')} {r['dtype']} {microseconds(r['graph']['p20_ms'])}" for r in steps[3:]
        )
        found.append(f"other steps, us: {rest}")
    for dtype in ("bfloat16", "float32"):
        some = [r for r in losses if r["dtype"] == dtype]
        if some:
            each = ", ".join(f"{shape(r, 'BC')} {shares(r)}" for r in some)
            found.append(f"loss {dtype}, % of copy, kernel alone paper/released: {each}")
    ratios = [(r, t) for r in losses if (t := autograd_share(r)) is not None]
    if ratios:
        worst, share = max(ratios, key=lambda x: x[1])
        found.append(f"autograd around the kernel adds at most {share:.0%} (at {shape(worst, 'BC')} {worst['dtype']})")
    if searches:
        each = ", ".join(
            f"{shape(r, 'BDN')} {microseconds(r['p20_ms'])}"
            + (f" ({r['p20_ms'] / r['floor_ms']:.1f} of its floor)" if "floor_ms" in r else "")
            for r in searches
        )
        found.append(f"search, us: {each}")
    for r in result.get("training", []):
        if "ratio" in r:
            images = r["images_per_s"]
            found.append(
                f"training: TAL {r['ratio']:.3f} of cross-entropy's time; {images['tal']:,.0f} and "
                f"{images['cross_entropy']:,.0f} images/s"
            )
    peers = [
        (f"{name} {shape(r, 'BC')}", t)
        for r in result.get("peers", [])
        for name, t in r.get("peers", {}).items()
        if "share_of_copy" in t
    ]
    if peers:
        found.append("peers, % of copy: " + ", ".join(f"{name} {t['share_of_copy']:.0%}" for name, t in peers))
    waiting = [r["peer"] for r in steps if r.get("waits_for_the_device")]
    if waiting:
        found.append(f"WAITS FOR THE DEVICE: {', '.join(waiting)}")
    every = [(group, r) for group in GROUPS for r in result.get(group, [])]
    failed = [(group, r) for group, r in every if "failed" in r]
    if failed:
        group, r = failed[0]
        found.append(f"FAILED: {len(failed)} parts; the first, {f'{group} {name_of(r)}'.strip()}: {r['failed'][:160]}")
    skipped = [f"{group} {name_of(r)}".strip() for group, r in every if "skipped" in r]
    if skipped:
        found.append(f"not finished for lack of time: {len(skipped)} parts, from {skipped[0]} on")
    if info["gpu"] is None or not (steps or losses or searches):
        return [*found[:14], "tune next: nothing was measured on a GPU"]
    return [*found[:14], f"tune next: {'; '.join(advice(steps, losses, searches)) or 'all goals are met'}"]


def step_line(r: dict[str, Any]) -> str:
    """A whole step, and where its time goes."""
    total = 1e3 * r["graph"]["p20_ms"]
    text = f"step {r['peer']} {shape(r, 'BCDN')} {r['dtype']}: {total:.1f} us"
    text += f", cross-entropy {microseconds(r['cross_entropy_graph']['p20_ms'])}" if "cross_entropy_graph" in r else ""
    text += f", host {r['host_us']:.0f}" if "host_us" in r else ""
    kernels = r.get("kernels_us", [])
    if kernels:
        each = ", ".join(f"{name.removesuffix('_kernel')} {t:.1f}" for name, t in kernels)
        text += f"; {each}, the rest {total - sum(t for _, t in kernels):.1f}"
    return text


def shares(r: dict[str, Any]) -> str:
    """Shares of the copy bandwidth of the kernels alone, ``paper``/``released``."""
    found = [r["peers"].get(name, {}).get("share_of_copy") for name in ("kernel", "kernel_released")]
    return "/".join("–" if share is None else f"{100 * share:.0f}" for share in found)


def autograd_share(r: dict[str, Any]) -> float | None:
    """By how much autograd lengthens the ``paper`` loss, as a fraction."""
    alone, whole = (r["peers"].get(name, {}).get("p20_ms") for name in ("kernel", "paper"))
    return whole / alone - 1 if alone and whole else None


def name_of(r: dict[str, Any]) -> str:
    """Peer, sizes and type of a part."""
    words = [r.get("peer"), shape(r, "".join(k for k in "BCDN" if k in r)), r.get("dtype")]
    return " ".join(word for word in words if word)


def advice(steps: list[dict[str, Any]], losses: list[dict[str, Any]], searches: list[dict[str, Any]]) -> list[str]:
    """Figures that miss their goal, the furthest first in each group."""
    found = []
    slow = [
        r for r in steps if r["B"] == 256 and r["dtype"] == "float32" and 1e3 * r["graph"]["p20_ms"] > STEP_LIMIT_US
    ]
    if slow:
        worst = max(slow, key=lambda r: r["graph"]["p20_ms"])
        parts = worst.get("kernels_us", [])
        total = 1e3 * worst["graph"]["p20_ms"]
        parts = [*parts, ("what is not a Triton kernel", total - sum(t for _, t in parts))]
        name, t = max(parts, key=lambda part: part[1])
        found.append(f"{name}, {t:.0f} of the {total:.0f} us of step {worst['peer']} (goal {STEP_LIMIT_US:.0f})")
    short = [
        (share / COPY_LIMIT.get(r["C"], 0.75), f"{name} {shape(r, 'BC')} {r['dtype']} at {share:.0%} of copy")
        for r in losses
        if r["bytes"] > 1 << 24  # below, launches are the most of it
        for name in ("kernel", "kernel_released")
        if (share := r["peers"].get(name, {}).get("share_of_copy"))
    ]
    found += [text for goal, text in sorted(short)[:3] if goal < 1]
    above = [(r["p20_ms"] / r["floor_ms"], shape(r, "BDN")) for r in searches if "floor_ms" in r]
    found += [
        f"search {size} at {times:.1f} of its floor" for times, size in sorted(above, reverse=True)[:1] if times > 1.2
    ]
    return found


def main() -> None:
    with open(sys.argv[1]) as file:
        print("\n".join(lines(json.load(file))))


if __name__ == "__main__":
    main()
