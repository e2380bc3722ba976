"""Names of what was measured, figures in words, and Markdown tables of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from bench.report.results import Row

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
