"""Tables and plots of the committed results: ``python -m bench.report``.

Reads bench/results/cpu/*.json, kernels/*.json, and gpu.json where there is one; writes the tables of README.md and
docs/performance.md between their markers, and docs/figures/*.svg. The same results always give the same text.
``--check`` writes nothing and exits with 1 where a table is not what the results say.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.compare import load
from bench.gpu_summary import COPY_LIMIT, STEP_LIMIT_US
from tal_fast.kernels.compile_check import LIMITS, describe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
FIGURES = ROOT / "docs" / "figures"

NAMES = {
    "list_queue": "list queue",
    "reference": "reference",
    "reference_compiled": "reference, compiled",
    "released": "tal_fast `released`",
    "released_direct": "`released`, direct",
    "paper": "tal_fast `paper`",
    "paper_direct": "`paper`, direct",
    "cross_entropy": "cross-entropy",
    "cross_entropy_compiled": "cross-entropy, compiled",
    "tal_fast": "tal_fast",
    "index": "tal_fast's index",
    "brute_force": "brute force, C++",
    "cdist": "torch.cdist",
    "faiss_flat": "faiss flat",
    "ckdtree": "SciPy k-d tree",
    "liger": "Liger cross-entropy",
    "quack": "quack cross-entropy",
    "kernel": "`paper`, the kernel alone",
    "kernel_released": "`released`, the kernels alone",
    "sklearn": "scikit-learn, 3 of the 9 metrics",
}

MOST_LOAD = 1.5
"""Processes a core up to which a wall-clock figure is published. Two threads wait for each other: with more processes
than cores a slow peer takes ten times as long and a fast one as long as ever, which would flatter the fast one."""

Row = dict[str, Any]


class Results:
    """The benchmarks of some files, to be asked for by what they measured."""

    def __init__(self, files: list[dict[str, Any]]) -> None:
        self.files = files
        self.withheld = 0
        self.rows: list[Row] = []
        for file in files:
            busy = MOST_LOAD * file["machine_info"]["cores"]
            for row in file["benchmarks"]:
                if row["clock"] == "wall" and row["load"] > busy:
                    self.withheld += 1
                else:
                    self.rows.append(row)

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Every JSON file of a folder.

        Raises:
            ValueError: there is none, or one does not count (``bench.compare.load``).
        """
        paths = sorted(folder.glob("*.json"))
        if not paths:
            raise ValueError(f"{folder} holds no results; make bench measures them")
        return cls([load(path) for path in paths])

    def find(self, group: str, **facts: Any) -> list[Row]:
        return [r for r in self.rows if r["group"] == group and all(r.get(k) == v for k, v in facts.items())]

    def one(self, group: str, **facts: Any) -> Row | None:
        found = self.find(group, **facts)
        return found[0] if found else None


def ms(value: float | None) -> str:
    """Milliseconds, to three digits, as what they are easiest to read."""
    if value is None:
        return "–"
    if value < 1:
        return f"{significant(value * 1e3)} µs"
    return f"{significant(value)} ms" if value < 1e3 else f"{significant(value / 1e3)} s"


def p20(row: Row | None) -> str:
    return ms(row["p20_ms"] if row else None)


def significant(value: float, digits: int = 3) -> str:
    """To so many significant digits, without an exponent."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, decimals)}f}"


def times(value: float) -> str:
    return f"{significant(value, 2 if value < 10 else 3)}x"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}" if value >= 0.01 else f"{value:.1%}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    if not rows:
        return "Not measured yet; `make bench` does."
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def hardware(files: Iterable[dict[str, Any]]) -> str:
    """Machines, versions and commits of result files, and which clock was read."""
    info = [file["machine_info"] for file in files]
    machines = sorted({f"{m['cpu']} ({m['vectors']}), {m['cores']} cores" for m in info})
    versions = sorted({f"Python {m['python']}, torch {m['torch']}" for m in info})
    commits = sorted({str(m["commit"]) for m in info})
    return (
        f"{'; '.join(machines)}; {'; '.join(versions)}; commit {', '.join(commits)}. One thread: CPU time; two: wall "
        "clock."
    )


def source(results: Results) -> str:
    """Sentence on hardware, versions, commits and load behind the figures."""
    loads = [row["load"] for row in results.rows]
    withheld = (
        f" {results.withheld} wall-clock figures taken at a load above {MOST_LOAD} a core are withheld (–)."
        if results.withheld
        else ""
    )
    load = f"Load of the machine, the benchmarks' own included: {min(loads):.1f} to {max(loads):.1f}."
    return f"{hardware(results.files)} {load}{withheld}"


STEP_PEERS = ("list_queue", "reference", "reference_compiled", "released", "released_direct", "paper", "paper_direct")


def limits_of(results: Results) -> list[dict[str, float]]:
    """For each number of threads the fastest that any file has seen."""
    found: dict[float, dict[str, float]] = {}
    published = {row["threads"] for row in results.rows}
    for limit in (x for file in results.files for x in file["limits"] if x["threads"] in published):
        best = found.setdefault(limit["threads"], dict(limit))
        best.update({key: max(value, best[key]) for key, value in limit.items()})
    return [found[threads] for threads in sorted(found)]


def limits_table(results: Results) -> str:
    return table(
        ("threads", "copy, read + write", "float32 arithmetic (matrix product)"),
        (
            (str(x["threads"]), f"{x['copy_bytes_per_s'] / 1e9:.1f} GB/s", f"{x['flop_per_s'] / 1e9:.0f} GFLOP/s")
            for x in limits_of(results)
        ),
    )


H100_COPY = 3.0e12  # bytes a second, read and write
H100_ISSUE = 132 * 128 * 1.755e9  # operations a second, one issue slot each


def floors_table(results: Results) -> str:
    """The least time of each part: bytes over a copy's, comparisons over arithmetic's. Nothing here is a timing."""
    one_thread = limits_of(results)[0]
    rows = []
    for what, size, count in (
        ("loss, 128 x 100, float32", 2 * 128 * 100 * 4, 0),
        ("loss, 64 x 1,000, float32", 2 * 64 * 1000 * 4, 0),
        ("loss, 16,384 x 1,000, bfloat16", 2 * 16_384 * 1000 * 2, 0),
        ("loss, 4,096 x 21,841, bfloat16", 2 * 4096 * 21_841 * 2, 0),
        ("loss, 4,096 x 131,072, bfloat16", 2 * 4096 * 131_072 * 2, 0),
        ("statistics, 256 x 2,048, float32", 256 * 2048 * 4, 0),
        ("brute force, 256 queries x 880,880 entries", 8 * 880_880, 6 * 256 * 880_880),
    ):
        cpu = max(size / one_thread["copy_bytes_per_s"], count / one_thread["flop_per_s"])
        gpu = max(size / H100_COPY, count / H100_ISSUE)
        rows.append(
            (what, f"{size / 1e6:,.2f} MB", f"{count / 1e9:,.2f} G" if count else "–", ms(cpu * 1e3), ms(gpu * 1e3))
        )
    return table(("part", "bytes", "operations", "this CPU, 1 thread", "H100"), rows)


def step_table(results: Results) -> str:
    rows = []
    for size in ((128, 100, 64, 30_000), (64, 1000, 2048, 880_880)):
        for threads in (1, 2):
            facts = {**dict(zip("BCDN", size, strict=True)), "threads": threads, "layer": False}
            found = {p: results.one("step", peer=p, **facts) for p in STEP_PEERS}
            released, slow = found["released"], found["list_queue"]
            size_text = ", ".join(f"{n:,}" for n in size)
            if released is None or slow is None:
                rows.append((size_text, str(threads), *["–"] * (len(STEP_PEERS) + 3)))
                continue
            rows.append((
                size_text, str(threads),
                *(p20(r) for r in found.values()),
                ms(released["floor_p20_ms"]),
                *(", direct ".join(times(f(r)) for r in (released, found["released_direct"]) if r) for f in (
                    lambda r, slow=slow: slow["p20_ms"] / r["p20_ms"], lambda r: r["p20_ms"] / r["floor_p20_ms"]
                )),
            ))  # fmt: skip
    head = ("B, C, D, N", "threads", *(NAMES[p] for p in STEP_PEERS), "cross-entropy")
    return table((*head, "`released`: faster than the list queue", "of cross-entropy's time"), rows)


def summary_table(results: Results) -> str:
    """README's table, the whole step beside the released algorithm and cross-entropy, and where it was measured."""
    rows = []
    for size in ((128, 100, 64, 30_000), (64, 1000, 2048, 880_880)):
        for threads in (1, 2):
            facts = {**dict(zip("BCDN", size, strict=True)), "threads": threads, "layer": False}
            found = [results.one("step", peer=peer, **facts) for peer in ("list_queue", "released", "released_direct")]
            if None in found:
                continue
            slow, *fast = (row["p20_ms"] for row in found)  # type: ignore[index]
            rows.append((
                ", ".join(f"{n:,}" for n in size), str(threads), *map(p20, found), ms(found[1]["floor_p20_ms"]),  # type: ignore[index]
                ", direct ".join(times(slow / one) for one in fast),
            ))  # fmt: skip
    head = ("batch, classes, features, queue", "threads", "list queue", "`TALLoss`", "`TALLoss`, direct")
    measured = [file for file in results.files if any(row["group"] == "step" for row in file["benchmarks"])]
    return f"{table((*head, 'cross-entropy', 'faster than the list queue'), rows)}\n\n{hardware(measured)}"


def layer_table(results: Results) -> str:
    """The first size's step with a last layer."""
    rows = []
    for threads in (1, 2):
        facts = {**dict(zip("BCDN", (128, 100, 64, 30_000), strict=True)), "threads": threads, "layer": True}
        found = [
            results.one("step", peer=p, **facts) for p in ("list_queue", "cross_entropy", "released", "released_direct")
        ]
        if None not in found:
            slow, _, *own = found
            gains = (f"{times(slow['p20_ms'] / r['p20_ms'])}" for r in own)  # type: ignore[index]
            rows.append((str(threads), *(p20(r) for r in found), ", direct ".join(gains)))
    head = ("threads", "list queue", "cross-entropy", NAMES["released"], NAMES["released_direct"])
    return table((*head, "faster than the list queue"), rows)


def step_sweep_table(results: Results) -> str:
    rows = []
    for r in results.find("step"):
        if r["peer"].removesuffix("_direct") not in ("released", "paper") or r["layer"]:
            continue
        size, variant = f"{r['B']:,}, {r['C']:,}, {r['D']:,}, {r['N']:,}", r["peer"].replace("_", ", ")
        rows.append((
            size, r["dtype"], str(r["threads"]), variant, ms(r["p20_ms"]), ms(r["p50_ms"]), ms(r["p80_ms"]),
            f"{times(r['ratio'])} ({times(r['ratio_low'])} to {times(r['ratio_high'])})", percent(r["share_of_copy"]),
        ))  # fmt: skip
    head = ("B, C, D, N", "type", "threads", "variant", "p20", "p50", "p80", "over cross-entropy (95%)", "of copy")
    return table(head, rows)


def loss_table(results: Results) -> str:
    peers = ("paper", "released", "reference", "reference_compiled", "cross_entropy_compiled")
    shapes = dict.fromkeys((r["B"], r["C"], r["dtype"], r["threads"]) for r in results.find("loss"))
    rows = []
    for shape in shapes:
        facts = dict(zip(("B", "C", "dtype", "threads"), shape, strict=True))
        found = {p: results.one("loss", peer=p, **facts) for p in peers}
        paper = found["paper"]
        if paper is None:
            continue
        rows.append((
            f"{shape[0]:,} x {shape[1]:,}", shape[2], str(shape[3]), *(p20(r) for r in found.values()),
            ms(paper["floor_p20_ms"]), times(paper["p20_ms"] / paper["floor_p20_ms"]), percent(paper["share_of_copy"]),
        ))  # fmt: skip
    head = ("B x C", "type", "threads", *(NAMES[p] for p in peers), "cross-entropy", "`paper` over it", "of copy")
    return table(head, rows)


def typicalness_table(results: Results) -> str:
    peers = ("tal_fast", "brute_force", "reference", "cdist", "faiss_flat", "ckdtree")
    rows = []
    for n in sorted({r["N"] for r in results.find("typicalness", B=128, D=512)}):
        found = [results.one("typicalness", peer=p, B=128, D=512, N=n, dtype="float32") for p in peers]
        rows.append((f"{n:,}", *(p20(r) for r in found), percent((found[1] or {}).get("share_of_arithmetic"))))
    return table(("N", *(NAMES[p] for p in peers), "brute force, of arithmetic"), rows)


def typicalness_sweep_table(results: Results) -> str:
    rows = [
        (f"{r['B']:,}", f"{r['D']:,}", f"{r['N']:,}", r["dtype"], str(r["threads"]), ms(r["p20_ms"]),
         ms(r["floor_p20_ms"]), percent(r["share_of_copy"]))
        for r in results.find("typicalness", peer="tal_fast")
    ]  # fmt: skip
    return table(("B", "D", "N", "type", "threads", "tal_fast", "torch.std_mean alone", "of copy"), rows)


def queue_cost(row: Row | None) -> float | None:
    """Milliseconds a step: the mean where upkeep is rare and long, the median elsewhere."""
    if row is None:
        return None
    return row["mean_ms" if row["peer"] == "index" else "p50_ms"]


def queue_table(results: Results) -> str:
    rows = []
    smallest = results.one("queue", peer="index", N=20_000, distribution="spread")
    for n in sorted({r["N"] for r in results.find("queue", distribution="spread")}):
        found = {p: results.one("queue", peer=p, N=n, distribution="spread") for p in QUEUE_PEERS}
        index = found["index"]
        growth = times(index["mean_ms"] / smallest["mean_ms"]) if index and smallest else "–"
        rows.append(
            (f"{n:,}", *(ms(r and r["mean_ms" if p == "index" else "p50_ms"]) for p, r in found.items()), growth)
        )
    return table(("N", *(NAMES[p] for p in QUEUE_PEERS), "index, against N = 20,000"), rows)


QUEUE_PEERS = ("index", "brute_force", "faiss_flat", "ckdtree")
DISTRIBUTIONS = {
    "spread": "spread over the plane",
    "equal": "all equal",
    "outlier": "one far outlier",
    "collinear": "collinear",
    "equal_means": "collinear, all means equal",
    "drifting": "drifting scale",
}


def distribution_table(results: Results) -> str:
    rows = []
    for name, text in DISTRIBUTIONS.items():
        found = {
            p: results.one("queue", peer=p, N=880_880, distribution=name) for p in ("index", "brute_force", "ckdtree")
        }
        rows.append((text, *(ms(r and r["mean_ms" if p == "index" else "p50_ms"]) for p, r in found.items())))
    return table(("points, N = 880,880", NAMES["index"], NAMES["brute_force"], "SciPy k-d tree, built anew"), rows)


def training_table(results: Results) -> str:
    rows = [
        (r["model"], f"{r['B']:,}", f"{r['C']:,}", f"{r['N']:,}", str(r["threads"]), ms(r["floor_p20_ms"]),
         ms(r["p20_ms"]), f"{r['ratio']:.3f} ({r['ratio_low']:.3f} to {r['ratio_high']:.3f})")
        for r in results.find("training")
    ]  # fmt: skip
    return table(("network", "B", "C", "N", "threads", "cross-entropy", "TAL", "TAL over cross-entropy (95%)"), rows)


def metrics_table(results: Results) -> str:
    rows = [
        (f"{r['n']:,}", str(NAMES.get(r["peer"], r["peer"])), p20(r), times(r["ratio"]))
        for r in results.find("metrics")
    ]
    return table(("samples", "what", "p20", "over one sort"), rows)


def metric_peers_table(results: Results) -> str:
    """One metric at a time beside other libraries, of ``bench.metrics``, not of pytest's benchmarks."""
    found: dict[tuple[int, str], dict[str, float]] = {}
    for row in json.loads((RESULTS / "metrics_cpu.json").read_text()).get("peers", ()):
        found.setdefault((row["n"], row["metric"]), {})[row["library"]] = row["ms"]
    if not found:
        return "Not yet run."
    names = ("torch_uncertainty", "torchmetrics", "scikit_learn", "mapie")
    rows = []
    for (n, metric), calls in found.items():
        own = calls["tal_fast"]
        theirs = (f"{ms(calls[name])} ({times(calls[name] / own)})" if name in calls else "–" for name in names)
        rows.append((f"{n:,}", f"`{metric}`", ms(own), *theirs))
    return table(("samples", "metric", "tal_fast", "torch-uncertainty", "torchmetrics", "scikit-learn", "MAPIE"), rows)


def linear_table(results: Results) -> str:
    """The fused last layer's loss and gradients, beside two steps."""
    peers = ("paper", "released", "paper_two_steps", "released_two_steps", "cross_entropy_torch")
    rows = []
    for r in results.find("linear", peer="paper"):
        facts = {key: r[key] for key in ("B", "C", "D", "dtype", "threads")}
        found = [results.one("linear", peer=peer, **facts) for peer in peers]
        own = [row for row in found[:2] if row]
        rows.append((
            f"{r['B']:,}, {r['C']:,}, {r['D']:,}", ms(r["floor_p20_ms"]), *(p20(row) for row in found),
            ", ".join(times(row["ratio"]) for row in own), ", ".join(percent(row["temporaries"]) for row in own),
        ))  # fmt: skip
    names = "`paper`", "`released`", "`paper`, two steps", "`released`, two steps", "F.linear_cross_entropy, chunked"
    return table(("B, C, D", "three products", *names, "of the products' time", "temporaries, of the logits"), rows)


def targets_table(results: Results) -> str:
    """Targets on CPUs and whether they are met."""
    rows: list[tuple[str, ...]] = []

    def judge(what: str, limit: str, got: str, met: bool | None) -> None:
        rows.append((what, limit, got, "not measured" if met is None else "yes" if met else "**no**"))

    for size, factor in (((128, 100, 64, 30_000), 100), ((64, 1000, 2048, 880_880), 300)):
        for threads in (1, 2):
            facts = {**dict(zip("BCDN", size, strict=True)), "threads": threads, "layer": False}
            slow = results.one("step", peer="list_queue", **facts)
            for peer, way in (("released_direct", "direct"), ("released", "by autograd")):
                fast = results.one("step", peer=peer, **facts)
                where = f"step at {', '.join(f'{n:,}' for n in size)}, threads {threads}, {way}"
                if slow is None or fast is None:
                    judge(where, f"{factor}x the list queue", "–", None)
                    continue
                gain = slow["p20_ms"] / fast["p20_ms"]
                judge(where, f"{factor}x the list queue", times(gain), gain >= factor)
                if factor == 100:
                    limit, took = 3 * fast["floor_p20_ms"] + 0.3, fast["p20_ms"]
                    judge(where, f"3 cross-entropy + 0.3 ms = {ms(limit)}", ms(took), took <= limit)
    small, large = (results.one("queue", peer="index", N=n, distribution="spread") for n in (20_000, 10_000_000))
    if small and large:
        growth = large["mean_ms"] / small["mean_ms"]
        judge("queue at N = 10,000,000", "4x its cost at 20,000", times(growth), growth <= 4)
    for r in results.find("linear"):
        limit = {"paper": 1.1, "released": 1.45}.get(r["peer"])
        if limit:
            where = f"`{r['peer']}` and last layer at {r['B']:,}, {r['C']:,}, {r['D']:,}"
            judge(where, f"{limit}x its three products", f"{r['ratio']:.2f}x", r["ratio"] <= limit)
    return table(("what", "limit", "measured", "met"), rows)


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


def kernels_table(folder: Path) -> str:
    """Kernels with a limit: figures of the compile check, and as "before" those of an older commit."""
    if not (folder / "triton-3.8.json").exists():
        return "No report yet: `make kernels-report` writes it."
    report, before = (json.loads((folder / name).read_text()) for name in ("triton-3.8.json", "before.json"))
    rows = []
    for label, (limit, _) in LIMITS.items():
        now = report["sm_90"][label]
        old = before["sm_90"].get(label)
        models = [describe(report[target][label]["model"]) for target in ("sm_90", "sm_80", "sm_100")]
        loads = ", ".join(f"{count} x {size}" for size, count in now["loads"].items())
        counts = (f"{old['instructions']:.1f}" if old else "–", f"{now['instructions']:.1f}", f"{limit:g}", now["unit"])
        held = (str(now["barriers"]), str(now["registers"]), str(now["programs"]), f"{now['in_flight'] / 1024:.0f} KB")
        rows.append((label, *counts, loads, *held, "; ".join(models)))
    head = (
        "kernel",
        "before",
        "now",
        "limit",
        "per",
        "loads x bytes",
        "barriers",
        "registers",
        "programs",
        "in flight",
    )
    return table((*head, "model"), rows)


BLOCKS: dict[str, Callable[[Results], str]] = {
    "source": source,
    "limits": limits_table,
    "floors": floors_table,
    "step": step_table,
    "summary": summary_table,
    "layer": layer_table,
    "step-sweep": step_sweep_table,
    "loss": loss_table,
    "typicalness": typicalness_table,
    "typicalness-sweep": typicalness_sweep_table,
    "queue": queue_table,
    "linear": linear_table,
    "distributions": distribution_table,
    "training": training_table,
    "metrics": metrics_table,
    "metric-peers": metric_peers_table,
    "targets": targets_table,
    "kernels": lambda _: kernels_table(RESULTS / "kernels"),
}

GPU_BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "gpu": gpu_table,
    "gpu-step": gpu_steps_table,
    "gpu-targets": gpu_targets_table,
    "gpu-search": gpu_search_table,
    "gpu-before": gpu_before_table,
}


def fill_in(text: str, cpu: Results, gpu: dict[str, Any] | None) -> str:
    """The page with each ``<!-- bench:NAME -->`` ... ``<!-- /bench -->`` block written anew.

    Raises:
        ValueError: a block that there is no table for.
    """

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name in GPU_BLOCKS:
            body = GPU_BLOCKS[name](gpu) if gpu else "Not yet run on a GPU."
        elif name in BLOCKS:
            body = BLOCKS[name](cpu)
        else:
            raise ValueError(f"there is no table {name!r}; there are {', '.join([*BLOCKS, *GPU_BLOCKS])}")
        return f"<!-- bench:{name} -->\n\n{body}\n\n<!-- /bench -->"  # Markdown needs the empty lines

    return re.sub(r"<!-- bench:([\w-]+) -->\n.*?<!-- /bench -->", block, text, flags=re.DOTALL)


def plot(cpu: Results, folder: Path) -> None:
    """Draw every figure; each stays the same file for the same results and matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style: Any = {
        "svg.hashsalt": "tal-fast",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.grid": True,
        "grid.alpha": 0.3,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(style):
        for name, draw in (("loss", draw_loss), ("typicalness", draw_typicalness), ("queue", draw_queue)):
            if not cpu.find(name):
                continue
            figure = draw(cpu, plt)
            drawn, path = io.StringIO(), folder / f"{name}.svg"
            figure.savefig(drawn, format="svg", metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)
            if not path.exists() or _rounded(path.read_text()) != _rounded(drawn.getvalue()):
                path.write_text(drawn.getvalue())


def _rounded(svg: str) -> str:
    """A picture with two decimals and without hashes: the last of six differs between instruction sets of CPUs."""
    return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}", re.sub(r"\b[mp][0-9a-f]{10}\b", "", svg))


def lines(axes: Any, rows: list[Row], x: str, peers: Sequence[str], y: str = "p20_ms") -> None:
    """One line a peer, on logarithmic axes, with p20 to p80 shaded."""
    for peer in peers:
        points = sorted((r for r in rows if r["peer"] == peer), key=lambda r: r[x])
        if not points:
            continue
        at = [r[x] for r in points]
        own = peer in ("tal_fast", "index", "paper", "released")
        label = NAMES[peer].replace("`", "")
        (line,) = axes.plot(at, [r[y] for r in points], "o-", label=label, lw=2 if own else 1, ms=3)
        if y == "p20_ms":
            low, high = [r["p20_ms"] for r in points], [r["p80_ms"] for r in points]
            axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15, lw=0)
    axes.set(xscale="log", yscale="log", ylabel="ms")


def draw_loss(cpu: Results, plt: Any) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axes, x, fixed, label in (
        (left, "C", {"B": 128}, "classes, B = 128"),
        (right, "B", {"C": 1000}, "batch, C = 1,000"),
    ):
        rows = cpu.find("loss", dtype="float32", threads=1, **fixed)
        lines(axes, rows, x, ("reference", "paper", "released"))
        floor = sorted((r for r in rows if r["peer"] == "paper"), key=lambda r: r[x])
        at = [r[x] for r in floor]
        axes.plot(at, [r["floor_p20_ms"] for r in floor], "k--", lw=1, label="cross-entropy")
        axes.plot(at, [r["p20_ms"] * r["share_of_copy"] for r in floor], "k:", lw=1, label="one read, one write")
        axes.set_xlabel(label)
    right.set_ylabel("")
    left.legend(fontsize=8)
    figure.suptitle("Loss and gradient, float32, one thread")
    return figure


def draw_typicalness(cpu: Results, plt: Any) -> Any:
    figure, axes = plt.subplots(figsize=(5.5, 3.6))
    rows = cpu.find("typicalness", B=128, D=512, dtype="float32", threads=1)
    lines(axes, rows, "N", ("reference", "cdist", "faiss_flat", "brute_force", "ckdtree", "tal_fast"))
    axes.set(xlabel="queue entries", title="Statistics and nearest distance, B = 128, D = 512, one thread")
    axes.legend(fontsize=8)
    return figure


def draw_queue(cpu: Results, plt: Any) -> Any:
    figure, axes = plt.subplots(figsize=(5.5, 3.6))
    rows = cpu.find("queue", distribution="spread")
    lines(axes, rows, "N", ("ckdtree", "faiss_flat", "brute_force", "index"), y="mean_ms")
    axes.set(xlabel="queue entries", title="Search and push of a batch of 128, upkeep included")
    axes.legend(fontsize=8)
    return figure


def update_pages(pages: Sequence[Path], fill: Callable[[str], str], *, check: bool, command: str) -> list[str]:
    """Make pages anew; the names of those that changed.

    Args:
        pages: files.
        fill: a page's text -> what it should be.
        check: write nothing.
        command: what writes them.

    Raises:
        SystemExit: with ``check``, where a page is out of step.
    """
    stale = []
    for page in pages:
        before = page.read_text()
        after = fill(before)
        if after != before:
            stale.append(page.name)
            if not check:
                page.write_text(after)
    if check and stale:
        raise SystemExit(f"out of step with bench/results: {', '.join(stale)}; run {command}")
    return stale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is out of step")
    args = parser.parse_args()
    gpu_file = RESULTS / "gpu.json"
    try:
        cpu = Results.read(RESULTS / "cpu")
    except ValueError as error:
        parser.error(str(error))
    gpu = json.loads(gpu_file.read_text()) if gpu_file.exists() else None
    stale = update_pages(
        PAGES, lambda text: fill_in(text, cpu, gpu), check=args.check, command="python -m bench.report"
    )
    if args.check:
        return
    plot(cpu, FIGURES)
    print(f"wrote {', '.join(stale) or 'no page anew'} and {FIGURES.relative_to(ROOT)}/*.svg")


if __name__ == "__main__":
    main()
