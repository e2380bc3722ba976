"""Tables of reports: titles, values, text, Markdown and LaTeX."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from tal_fast.metrics.calibration import BINS, CALIBRATION
from tal_fast.metrics.intervals import FEW
from tal_fast.metrics.settings import GROUPS, Mix
from tal_fast.utils.logs import printable

WIDTH = 100
"""Columns of the terminal that text tables have to fit."""
METRIC_TITLES = {
    "aurc": "AURC", "eaurc": "E-AURC", "eaurc_exact": "E-AURC exact", "augrc": "AUGRC", "auroc": "AUROC",
    "fpr95": "FPR95", "tnr95": "TNR95", "aupr_success": "AUPR-success", "aupr_error": "AUPR-error",
}  # fmt: skip
SETTING_TITLES = {"old_fd": "Old FD", "ood": "OOD", "new_fd": "New FD", "shift": "Old FD under shift"}
STYLES = ("table", "markdown", "latex")
PRINTED_METRICS = ("aurc", "eaurc", "augrc", "auroc", "fpr95", "tnr95", "aupr_success", "aupr_error")
PRINTED_SCORES = 10
"""Most scores that a setting's table prints, beside the model's own."""
UNIT_NAMES = {"natural": "natural units", "paper": "AURC, E-AURC and AUGRC times 1000, the rest in percent"}
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "<": "$<$",
    ">": "$>$",    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "†": r"$^{\dagger}$", "‡": r"$^{\ddagger}$",
}  # fmt: skip


def setting_title(key: str, report: Mapping[str, Any]) -> str:
    """Title of a setting of a report: ``new_fd/svhn`` -> ``New FD against svhn``."""
    kind, _, name = key.partition("/")
    title = SETTING_TITLES.get(kind, printable(kind))
    if kind == "old_fd":
        return title
    shifted = kind == "shift"
    sets = report.get("shift_names", []) if shifted else report["ood_names"]
    if (name in GROUPS and name not in sets) or (not name and len(sets) > 1):
        number = sum(one.startswith(f"{name}/") for one in sets) if name else len(sets)
        what = f"{name} {'shifted' if shifted else 'OOD'} set{'s' if number > 1 else ''}".strip()
        return f"{title}: mean over {number} {what}"
    name = printable(name or "".join(sets))
    return f"{title} ({name})" if shifted else f"{title} against {name}"


def mix_with_seed(report: Mapping[str, Any]) -> str:
    """Mix of a report, with its seed if the mix is random."""
    return f"{report['mix']}, seed {report['seed']}" if Mix.parse(report["mix"]).random else str(report["mix"])


def nan_if_none(value: float | None) -> float:
    """A number as read from JSON, where NaN is null."""
    return math.nan if value is None else float(value)


def paper_scale(metric: str) -> int:
    """Factor that papers multiply a metric by."""
    return 1000 if "aurc" in metric or "augrc" in metric else 100


def format_value(metric: str, value: float, units: str = "natural") -> str:
    """Format a metric: a fraction with four decimals (five for AURC and its kin), or as papers do; '-' for NaN."""
    if math.isnan(value):
        return "-"
    if units == "paper":
        return f"{value * paper_scale(metric):.2f}"
    return f"{value:.5f}" if paper_scale(metric) == 1000 else f"{value:.4f}"


def format_percent(value: float, digits: int = 2) -> str:
    """Format a fraction in percent; '-' for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}%}"


def mark_best(values: Sequence[float], higher_is_better: bool) -> list[bool]:
    """Whether each value equals the best of those that are not NaN; none is the best of fewer than two."""
    known = [value for value in values if not math.isnan(value)]
    best = (max if higher_is_better else min)(known) if len(known) > 1 else math.nan
    return [value == best for value in values]


def escape(text: str, style: str) -> str:
    """Text on one line with the special characters of a style escaped."""
    if style == "table":
        return printable(text)
    text = printable(" ".join(text.split()))
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


def format_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    style: str = "table",
    left: int = 1,
    spans: Sequence[tuple[str, int]] = (),
) -> str:
    """Format a table whose cells are escaped already, the first ``left`` columns aligned to the left.

    In the style ``table`` titles may have several lines; ``latex`` needs the package ``booktabs`` and has
    ``spans`` of columns, (title, number of columns), above the titles.
    """
    if style == "markdown":
        lines = [header, [*["---"] * left, *["---:"] * (len(header) - left)], *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if style == "latex":
        body = [rf"{' & '.join(row)} \\" for row in rows]
        ends = list(itertools.accumulate(width for _, width in spans))
        above = [rf"\multicolumn{{{width}}}{{c}}{{{escape(title, style)}}}" for title, width in spans]
        rules = [rf"\cmidrule(lr){{{end - k + 1}-{end}}}" for (title, k), end in zip(spans, ends, strict=True) if title]
        return "\n".join(
            [
                rf"\begin{{tabular}}{{{'l' * left}{'r' * (len(header) - left)}}}", r"\toprule",
                *([rf"{' & '.join(above)} \\", " ".join(rules)] if spans else []),
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


def format_report(report: Mapping[str, Any], units: str = "natural") -> str:
    """Format a report in natural or paper units: a summary, and for each setting a table with a row per score."""
    blocks = ["\n".join(wrap(line) for line in _summary(report, units))]
    blocks += [_format_setting(report, key, units) for key in report["settings"]]
    return "\n\n".join(blocks)


def _summary(report: Mapping[str, Any], units: str) -> list[str]:
    counts = report["counts"]
    accuracy = format_percent(nan_if_none(report["id_accuracy"])) if counts["id"] else "undefined"
    lines = [
        f"ID accuracy {accuracy} ({counts['id_right']} of {counts['id']}); convention {report['convention']}; "
        f"ID:OOD mix {mix_with_seed(report)}",
        UNIT_NAMES[units],
    ]
    if "bootstrap" in report:
        how = report["bootstrap"]
        lines.append(f"intervals: {how['level']:.0%}, {how['method']}")
    if "calibration" in report:
        ece, nll, brier = (nan_if_none(report["calibration"][key]) for key in CALIBRATION)
        lines.append(f"softmax on ID: ECE {ece:.4f} ({BINS} bins), NLL {nll:.4f} nats, Brier {brier:.4f}")
    if "temperature" in report:
        scaling = report["temperature"]
        lines.append(
            f"logits divided by T = {scaling['value']:.4f}, fitted on {scaling['held_out']} held-out samples "
            f"(ECE before {nan_if_none(scaling['calibration_before']['ece']):.4f})"
        )
    if fit := report.get("fitted_scores"):
        by = fit["choose_by"] + (" and synthetic outliers" if fit["choose_by"] == "new-fd" else "")
        chosen = f"; pnorm: {fit['pnorm']['chosen']}, chosen by {by}" if "pnorm" in fit else ""
        lines.append(f"{fit['held_out']} validation samples held out to fit scores on, in no metric{chosen}")
    lines += [f"left out: {score}: {printable(reason)}" for score, reason in report.get("left_out", {}).items()]
    return lines


def _format_setting(report: Mapping[str, Any], key: str, units: str) -> str:
    lines = [setting_title(key, report), wrap(describe_samples(report, key, units))]
    intervals = report.get("intervals", {}).get(key, {})
    shown = _printed_scores(report, key)
    values = {
        score: {metric: [value, *intervals.get(score, {}).get(metric, [])] for metric, value in by_metric.items()}
        for score, by_metric in ((score, report["settings"][key][score]) for score in shown)
    }
    level = report["bootstrap"]["level"] if "bootstrap" in report else math.nan
    lines.append(_metric_table(values, PRINTED_METRICS, level, units))
    if others := len(report["settings"][key]) - len(shown):
        lines.append(f"best by AURC; {others} more scores are in report.json and report.html")
    differences = {s: d for s, d in report.get("differences", {}).get(key, {}).items() if s in shown}
    if differences:
        # The floor is the same for all scores, so differences of E-AURC are those of AURC.
        metrics = [metric for metric in PRINTED_METRICS if metric != "eaurc"]
        lines.append(f"Paired differences to {report['bootstrap']['baseline']}:")
        lines.append(_metric_table(differences, metrics, level, units))
    tied = {score: nan_if_none(share) for score, share in report["tied_share"][key].items() if score in shown}
    shares = ", ".join(f"{score} {format_percent(share, 1)}" for score, share in tied.items() if share > 0)
    if shares:
        lines.append(wrap(f"Samples with tied scores: {shares}"))
    return "\n".join([*lines, *map(wrap, setting_notes(report, key, PRINTED_METRICS))])


def _printed_scores(report: Mapping[str, Any], key: str) -> list[str]:
    """Scores to print in a setting: all, or the ``PRINTED_SCORES`` of least AURC and the model's own."""
    aurc = {score: values["aurc"] for score, values in report["settings"][key].items()}
    if len(aurc) <= PRINTED_SCORES:
        return list(aurc)
    best = sorted(aurc, key=lambda score: (math.isnan(aurc[score]), aurc[score]))[:PRINTED_SCORES]
    return [*best, *(score for score in aurc if score == report.get("score") and score not in best)]


def describe_samples(report: Mapping[str, Any], key: str, units: str = "natural") -> str:
    """Numbers of samples of a setting, unless it is a mean over sets, and its bounds of AURC."""
    floor, chance = (
        format_value("aurc", nan_if_none(report[name].get(key)), units) for name in ("aurc_floor", "aurc_random")
    )
    text = f"AURC floor {floor}, random {chance}"
    counts = report["samples"].get(key)
    if counts is None:
        return text
    samples = f"{counts['id']:,} ID" + (f" + {counts['ood']:,} OOD" if counts["ood"] else "")
    return f"{samples}, {counts['errors']:,} error{'s' * (counts['errors'] != 1)}; {text}"


def setting_notes(report: Mapping[str, Any], key: str, metrics: Sequence[str]) -> list[str]:
    """Why metrics of a setting are undefined, one text per reason, and whether its errors are too few for intervals."""
    reasons = report["undefined"].get(key, {})
    few = report.get("bootstrap", {}).get("few", {}).get(key)
    name = min(few, key=few.__getitem__) if few else ""
    notes = [f"With fewer than {FEW} {name} intervals are not verified; here are {few[name]}"] if few else []
    return notes + [
        f"Undefined ({', '.join(METRIC_TITLES[m] for m in metrics if reasons.get(m) == reason)}): {printable(reason)}"
        for reason in sorted(set(reasons.values()))
    ]


def _metric_table(
    values: Mapping[str, Mapping[str, Sequence[float | None]]], metrics: Sequence[str], level: float, units: str
) -> str:
    """Table of score -> metric -> [value] or [value, low, high]: a row per score, and per end of its intervals."""
    labels = [f"  {percentile:.3g}%" for percentile in (50 * (1 - level), 50 * (1 + level))]
    rows = []
    for score, by_metric in values.items():
        lines = zip(*(by_metric[metric] for metric in metrics), strict=True)
        for label, line in zip([score, *labels], lines, strict=False):
            numbers = [format_value(m, nan_if_none(value), units) for m, value in zip(metrics, line, strict=True)]
            rows.append([label, *numbers])
    titles = [METRIC_TITLES[metric].replace("AUPR-", "AUPR\n") for metric in metrics]
    return format_table(["score", *titles], rows)
