"""Tables of the page: metrics, differences, operating points and calibration bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tal_fast.evaluation.report import Report
from tal_fast.evaluation.tables import (
    METRIC_TITLES,
    describe_samples,
    format_percent,
    format_value,
    mark_best,
    nan_if_none,
    setting_title,
    undefined_notes,
)
from tal_fast.metrics.calibration import BINS
from tal_fast.metrics.curves import OperatingPoint, OperatingPoints, ReliabilityBins
from tal_fast.metrics.failure import HIGHER_IS_BETTER, METRICS

RISKS = (0.01, 0.02, 0.05)
"""Risks that operating points are chosen for."""
COVERAGES = (0.80, 0.90, 0.95)
"""Coverages that operating points are chosen for."""


@dataclass(frozen=True)
class Cell:
    """A number in a table."""

    text: str
    bold: bool = False  # the best of its column, or a difference whose interval excludes zero
    detail: str = ""  # small print below the number


@dataclass(frozen=True)
class SettingTable:
    """Metrics of a setting."""

    title: str
    samples: str  # numbers of samples, and AURC of the lower bound and of a random score
    columns: list[tuple[str, bool | None]]  # title of each metric, and whether larger is better (None: neither)
    rows: dict[str, list[Cell]]  # by score
    differences: dict[str, list[Cell]]  # by score, to the baseline; empty without a bootstrap
    notes: list[str]  # why metrics are undefined


def setting_table(report: Report, key: str) -> SettingTable:
    """Table of the metrics of a setting."""
    by_score = report["settings"][key]
    intervals = report.get("intervals", {}).get(key, {})
    rows: dict[str, list[Cell]] = {score: [] for score in by_score}
    for metric in METRICS:
        values = [nan_if_none(by_metric.get(metric)) for by_metric in by_score.values()]
        best = mark_best(values, HIGHER_IS_BETTER[metric])
        for score, value, is_best in zip(by_score, values, best, strict=True):
            detail = _interval(metric, intervals.get(score, {}))
            rows[score].append(Cell(format_value(metric, value), is_best and len(by_score) > 1, detail))
    tied = report["tied_share"].get(key, {})
    for score, cells in rows.items():
        cells.append(Cell(format_percent(nan_if_none(tied.get(score)), 1)))
    return SettingTable(
        setting_title(key, report),
        describe_samples(report, key),
        [*((METRIC_TITLES[metric], HIGHER_IS_BETTER[metric]) for metric in METRICS), ("tied", None)],
        rows,
        _difference_rows(report.get("differences", {}).get(key, {})),
        undefined_notes(report, key, METRICS),
    )


def _interval(metric: str, intervals: Mapping[str, Sequence[float | None]]) -> str:
    if metric not in intervals:
        return ""
    low, high = (format_value(metric, nan_if_none(end)) for end in intervals[metric][-2:])
    return f"{low} to {high}"


def _difference_rows(differences: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Cell]]:
    rows: dict[str, list[Cell]] = {}
    for score, by_metric in differences.items():
        rows[score] = []
        for metric in METRICS:
            value, low, high = (nan_if_none(v) for v in by_metric.get(metric, (None, None, None)))
            text = ("+" if value > 0 else "") + format_value(metric, value)
            rows[score].append(Cell(text, low > 0 or high < 0, _interval(metric, by_metric)))
    return rows


def operating_rows(points: Mapping[str, OperatingPoints]) -> dict[str, list[Cell]]:
    """Table of the operating points of a setting, by score."""
    rows: dict[str, list[Cell]] = {score: [] for score in points}

    def add(column: Sequence[OperatingPoint | None], values: Sequence[float | None], higher_is_better: bool) -> None:
        numbers = [nan_if_none(value) for value in values]
        best = mark_best(numbers, higher_is_better)
        for score, point, value, is_best in zip(points, column, numbers, best, strict=True):
            detail = "no threshold" if point is None else f"at {point.threshold:.5g}"
            rows[score].append(Cell(format_percent(value), is_best and len(points) > 1, detail))

    for risk in RISKS:
        column = [p.at_risk(risk) for p in points.values()]
        add(column, [None if point is None else point.coverage for point in column], True)
    for coverage in COVERAGES:
        column = [p.at_coverage(coverage) for p in points.values()]
        add(column, [None if point is None else point.risk for point in column], False)
    return rows


def bin_rows(bins: ReliabilityBins) -> list[tuple[str, str, str, str]]:
    """Rows of the calibration table: bin, samples, mean probability and accuracy of each bin with samples."""
    return [
        (f"{k / BINS:.3f}–{(k + 1) / BINS:.3f}", f"{count:,}", format_percent(confidence), format_percent(accuracy))
        for k, (count, confidence, accuracy) in enumerate(zip(*bins, strict=True))
        if count
    ]
