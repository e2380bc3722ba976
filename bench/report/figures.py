"""Figures of the benchmarks on CPUs."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report.results import ROOT, Results, Row
from bench.report.text import NAMES

FIGURES = ROOT / "docs" / "figures"


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
