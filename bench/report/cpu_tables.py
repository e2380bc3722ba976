"""Tables of the benchmarks on CPUs, by the names of their blocks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from bench.report.limits import floors_table, limits_table, targets_table
from bench.report.results import MOST_LOAD, RESULTS, Results, Row
from bench.report.text import NAMES, ms, p20, percent, table, times


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


QUEUE_PEERS = ("index", "brute_force", "faiss_flat", "ckdtree")
DISTRIBUTIONS = {
    "spread": "spread over the plane",
    "equal": "all equal",
    "outlier": "one far outlier",
    "collinear": "collinear",
    "equal_means": "collinear, all means equal",
    "drifting": "drifting scale",
}


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
        rows.append((f"{n:,}", *(ms(queue_cost(r)) for r in found.values()), growth))
    return table(("N", *(NAMES[p] for p in QUEUE_PEERS), "index, against N = 20,000"), rows)


def distribution_table(results: Results) -> str:
    rows = []
    for name, text in DISTRIBUTIONS.items():
        found = {
            p: results.one("queue", peer=p, N=880_880, distribution=name) for p in ("index", "brute_force", "ckdtree")
        }
        rows.append((text, *(ms(queue_cost(r)) for r in found.values())))
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
}
