"""Tables as text, Markdown and LaTeX, and the format of titles and values in them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from tal_fast.config.names import METRICS

WIDTH = 100
"""Columns of the terminal that text tables have to fit."""
METRIC_TITLES = {
    "aurc": "AURC", "eaurc": "E-AURC", "eaurc_exact": "E-AURC exact", "augrc": "AUGRC", "auroc": "AUROC",
    "fpr95": "FPR95", "tnr95": "TNR95", "aupr_success": "AUPR-success", "aupr_error": "AUPR-error",
}  # fmt: skip
SETTING_TITLES = {"old_fd": "Old FD", "ood": "OOD", "new_fd": "New FD", "shift": "Old FD under shift"}
UNITS = ("natural", "paper")
PAPER_SCALE = {metric: 1000.0 if "aurc" in metric or metric == "augrc" else 100.0 for metric in METRICS}
"""Factor that papers multiply a metric by."""
STYLES = ("table", "markdown", "latex")
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "<": "$<$", ">": "$>$",
}  # fmt: skip


def setting_title(key: str, report: Mapping[str, Any]) -> str:
    """Title of a setting of a report: ``new_fd/svhn`` -> ``New FD against svhn``."""
    kind, _, name = key.partition("/")
    title = SETTING_TITLES.get(kind, printable(kind))
    if kind == "old_fd":
        return title
    shifted = kind == "shift"
    sets = report.get("shift_names", []) if shifted else report["ood_names"]
    if not name and len(sets) > 1:
        return f"{title}: mean over {len(sets)} {'shifted' if shifted else 'OOD'} sets"
    name = printable(name or "".join(sets))
    return f"{title} ({name})" if shifted else f"{title} against {name}"


def printable(text: str) -> str:
    r"""Text with everything escaped that does not print.

    Bytes that are not UTF-8 become ``\xff``, control and bidirectional characters ``\x1b`` and ``\u202e``.
    """
    return "".join(c if c.isprintable() else _escape_sequence(c) for c in text)


def _escape_sequence(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # surrogates stand for the bytes 0x80..0xff of a file name that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def nan_if_none(value: float | None) -> float:
    """A number as read from JSON, where NaN is null."""
    return math.nan if value is None else float(value)


def format_value(metric: str, value: float, units: str = "natural") -> str:
    """Format a metric: a fraction with four decimals (five for AURC and its kin), or as papers do; '-' for NaN."""
    if math.isnan(value):
        return "-"
    if units == "paper":
        return f"{value * PAPER_SCALE[metric]:.2f}"
    return f"{value:.5f}" if PAPER_SCALE[metric] == 1000 else f"{value:.4f}"


def format_percent(value: float, digits: int = 2) -> str:
    """Format a fraction in percent; '-' for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}%}"


def mark_best(values: Sequence[float], higher_is_better: bool) -> list[bool]:
    """Whether each value equals the best of those that are not NaN."""
    known = [value for value in values if not math.isnan(value)]
    best = (max if higher_is_better else min)(known) if known else math.nan
    return [value == best for value in values]


def escape(text: str, style: str) -> str:
    """Text on one line with the special characters of a style escaped."""
    if style == "table":
        return printable(text)
    text = " ".join(text.split())
    if style == "latex":
        return "".join(_LATEX.get(character, character) for character in text)
    for special in "\\`*_{}[]<>#|":
        text = text.replace(special, "\\" + special)
    return text


def emphasize(text: str, best: bool, style: str) -> str:
    """Mark a cell that is the best of its column."""
    if style == "table":
        return text + ("*" if best else " ")  # the space keeps digits aligned
    if not best:
        return text
    return f"**{text}**" if style == "markdown" else rf"\textbf{{{text}}}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], style: str = "table", left: int = 1) -> str:
    """Format a table whose cells are escaped already.

    Args:
        header: column titles; in the style ``table`` they may have several lines.
        rows: cells of each row.
        style: one of ``STYLES``. ``latex`` needs the package ``booktabs``.
        left: number of left-aligned columns; the others are aligned to the right.
    """
    if style == "markdown":
        lines = [header, [*["---"] * left, *["---:"] * (len(header) - left)], *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if style == "latex":
        body = [rf"{' & '.join(row)} \\" for row in rows]
        return "\n".join(
            [
                rf"\begin{{tabular}}{{{'l' * left}{'r' * (len(header) - left)}}}", r"\toprule",
                rf"{' & '.join(escape(title, style) for title in header)} \\",
                r"\midrule", *body, r"\bottomrule", r"\end{tabular}",
            ]
        )  # fmt: skip
    height = max(title.count("\n") for title in header)
    titles = [("\n" * (height - title.count("\n")) + title).split("\n") for title in header]
    lines = [*zip(*titles, strict=True), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def wrap(text: str) -> str:
    """Wrap a paragraph to ``WIDTH`` columns, later lines indented."""
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
