"""Printed text of a report: a table per setting that fits a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tal_fast.evaluation.report import Report, mix_with_seed
from tal_fast.evaluation.tables import (
    METRIC_TITLES,
    format_percent,
    format_table,
    format_value,
    nan_if_none,
    printable,
    setting_title,
    wrap,
)
from tal_fast.metrics.calibration import BINS, CALIBRATION

PRINTED_METRICS = ("aurc", "eaurc", "augrc", "auroc", "fpr95", "tnr95", "aupr_success", "aupr_error")
UNIT_NAMES = {"natural": "natural units", "paper": "AURC, E-AURC and AUGRC times 1000, the rest in percent"}


def format_report(report: Report, units: str = "natural") -> str:
    """Format a report: a summary and, for each setting, a table with a row per score.

    Args:
        report: from ``tal_fast.evaluation.report``.
        units: ``natural`` or ``paper``.
    """
    blocks = ["\n".join(wrap(line) for line in _summary(report, units))]
    blocks += [_format_setting(report, key, units) for key in report["settings"]]
    return "\n\n".join(blocks)


def _summary(report: Report, units: str) -> list[str]:
    counts = report["counts"]
    accuracy = format_percent(nan_if_none(report["id_accuracy"])) if counts["id"] else "undefined"
    lines = [
        f"ID accuracy {accuracy} ({counts['id_right']} of {counts['id']}); convention {report['convention']}; "
        f"ID:OOD mix {mix_with_seed(report)}",
        UNIT_NAMES[units],
    ]
    if "bootstrap" in report:
        how = report["bootstrap"]
        lines.append(
            f"intervals: {how['level']:.0%}, percentile bootstrap, {how['resamples']} resamples, seed {how['seed']}"
        )
    if "calibration" in report:
        ece, nll, brier = (nan_if_none(report["calibration"][key]) for key in CALIBRATION)
        lines.append(f"softmax on ID: ECE {ece:.4f} ({BINS} bins), NLL {nll:.4f} nats, Brier {brier:.4f}")
    if "temperature" in report:
        scaling = report["temperature"]
        lines.append(
            f"logits divided by T = {scaling['value']:.4f}, fitted on {scaling['held_out']} held-out samples "
            f"(ECE before {nan_if_none(scaling['calibration_before']['ece']):.4f})"
        )
    lines += [f"left out: {score}: {printable(reason)}" for score, reason in report.get("left_out", {}).items()]
    return lines


def _format_setting(report: Report, key: str, units: str) -> str:
    head = setting_title(key, report)
    counts = report["samples"].get(key)
    if counts is not None:
        head += f": {counts['id']} ID" + (f" + {counts['ood']} OOD" if counts["ood"] else "")
        head += f", {counts['errors']} errors"
    floor, chance = (
        format_value("aurc", nan_if_none(report[name][key]), units) for name in ("aurc_floor", "aurc_random")
    )
    lines = [wrap(f"{head}; AURC floor {floor}, random {chance}")]
    intervals = report.get("intervals", {}).get(key, {})
    values = {
        score: {metric: [value, *intervals.get(score, {}).get(metric, [])] for metric, value in by_metric.items()}
        for score, by_metric in report["settings"][key].items()
    }
    level = report["bootstrap"]["level"] if "bootstrap" in report else math.nan
    lines.append(_metric_table(values, PRINTED_METRICS, level, units))
    differences = report.get("differences", {}).get(key)
    if differences:
        # The floor is the same for all scores, so differences of E-AURC are those of AURC.
        metrics = [metric for metric in PRINTED_METRICS if metric != "eaurc"]
        lines.append(f"paired differences to {report['bootstrap']['baseline']}:")
        lines.append(_metric_table(differences, metrics, level, units))
    tied = {score: nan_if_none(share) for score, share in report["tied_share"][key].items()}
    shares = ", ".join(f"{score} {format_percent(share, 1)}" for score, share in tied.items() if share > 0)
    if shares:
        lines.append(wrap(f"- samples with tied scores: {shares}"))
    reasons = report["undefined"][key]
    for reason in sorted(set(reasons.values())):
        metrics = ", ".join(METRIC_TITLES[m] for m in PRINTED_METRICS if reasons.get(m) == reason)
        lines.append(wrap(f"- undefined ({metrics}): {printable(reason)}"))
    return "\n".join(lines)


def _metric_table(
    values: Mapping[str, Mapping[str, Sequence[float | None]]], metrics: Sequence[str], level: float, units: str
) -> str:
    """A row per score and, below it, a row per end of its intervals.

    Args:
        values: score -> metric -> [value] or [value, low, high].
        metrics: metrics of the columns.
        level: level of the intervals.
        units: ``natural`` or ``paper``.
    """
    labels = [f"  {percentile:.3g}%" for percentile in (50 * (1 - level), 50 * (1 + level))]
    rows = []
    for score, by_metric in values.items():
        lines = zip(*(by_metric[metric] for metric in metrics), strict=True)
        for label, line in zip([score, *labels], lines, strict=False):
            numbers = [format_value(m, nan_if_none(value), units) for m, value in zip(metrics, line, strict=True)]
            rows.append([label, *numbers])
    titles = [METRIC_TITLES[metric].replace("AUPR-", "AUPR\n") for metric in metrics]
    return format_table(["score", *titles], rows)
