"""Tables of the page: metrics, differences, operating points, classes and calibration bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tal_fast.evaluation.report import Report
from tal_fast.evaluation.sample_scores import Predictions
from tal_fast.evaluation.tables import (
    METRIC_TITLES,
    describe_samples,
    format_percent,
    format_value,
    mark_best,
    nan_if_none,
    setting_notes,
    setting_title,
)
from tal_fast.metrics.curves import OperatingPoint, OperatingPoints
from tal_fast.metrics.failure import HIGHER_IS_BETTER, METRICS

RISKS, COVERAGES = (0.01, 0.02, 0.05), (0.80, 0.90, 0.95)
"""Risks and coverages that operating points are chosen for."""
COLUMNS = tuple(sorted(METRICS, key=lambda metric: metric not in ("aurc", "auroc", "fpr95", "augrc")))
"""Metrics in the order of the columns, the main ones first."""
MEANINGS = {
    "AURC": "area under the risk-coverage curve: the error rate of the kept samples, averaged over all coverages",
    "AUGRC": "AURC with the errors counted among all samples: the rate of errors that are kept, undetected",
    "AUROC": "probability that a success is more confident than an error; 0.5 is chance",
    "FPR95": "share of the errors kept when 95% of the successes are; TNR95 is the share rejected",
    "E-AURC": "AURC minus its floor, all errors ranked last, by the paper’s approximation or exact",
    "AUPR": "average precision with successes or errors as the positive class; chance is their share",
}
"""Column -> what it is, for the legend."""
MAX_CLASSES, MAX_CONFUSIONS = 30, 15
"""Rows of the tables of classes and of confusions."""


class Cell(NamedTuple):
    """A number or a name in a table."""

    text: str
    bold: bool = False  # the best of its column, or a difference whose interval excludes zero
    detail: str = ""  # small print below the number


class Table(NamedTuple):
    """A table that its columns' titles sort."""

    label: str
    columns: Sequence[tuple[str, bool | None]]  # title, and whether larger is better (None: neither)
    rows: Sequence[tuple[str, Sequence[Cell]]]
    mark: str = "best"  # CSS class of bold cells


class SettingTable(NamedTuple):
    """Metrics of a setting."""

    samples: str  # numbers of samples, and AURC of the lower bound and of a random score
    metrics: Table
    differences: Table | None  # to the baseline
    notes: list[str]  # why metrics are undefined


def setting_table(report: Report, key: str) -> SettingTable:
    """Tables of the metrics of a setting."""
    by_score = report["settings"][key]
    intervals = report.get("intervals", {}).get(key, {})
    rows: dict[str, list[Cell]] = {score: [] for score in by_score}
    for metric in COLUMNS:
        values = [nan_if_none(by_metric.get(metric)) for by_metric in by_score.values()]
        best = mark_best(values, HIGHER_IS_BETTER[metric])
        for score, value, is_best in zip(by_score, values, best, strict=True):
            detail = _interval(metric, intervals.get(score, {}))
            rows[score].append(Cell(format_value(metric, value), is_best and len(by_score) > 1, detail))
    tied = report["tied_share"].get(key, {})
    for score, cells in rows.items():
        cells.append(Cell(format_percent(nan_if_none(tied.get(score)), 1)))
    title = setting_title(key, report)
    columns = [(METRIC_TITLES[metric], HIGHER_IS_BETTER[metric]) for metric in COLUMNS]
    differences = report.get("differences", {}).get(key)
    return SettingTable(
        describe_samples(report, key),
        Table(title, [("score", None), *columns, ("tied", None)], [*rows.items()]),
        differences and Table(f"{title}, differences", [("score", None), *columns], _difference_rows(differences), ""),
        setting_notes(report, key, METRICS),
    )


def _interval(metric: str, intervals: Mapping[str, Sequence[float | None]]) -> str:
    if metric not in intervals:
        return ""
    low, high = (format_value(metric, nan_if_none(end)) for end in intervals[metric][-2:])
    return f"{low} to {high}"


def _difference_rows(differences: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[Cell]]]:
    rows = []
    for score, by_metric in differences.items():
        cells = []
        for metric in COLUMNS:
            value, low, high = (nan_if_none(v) for v in by_metric.get(metric, (None, None, None)))
            text = ("+" if value > 0 else "") + format_value(metric, value)
            cells.append(Cell(text, low > 0 or high < 0, _interval(metric, by_metric)))
        rows.append((score, cells))
    return rows


def operating_table(title: str, points: Mapping[str, OperatingPoints]) -> Table:
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
    columns = [(f"coverage at risk ≤ {risk:.0%}", True) for risk in RISKS]
    columns += [(f"risk at coverage ≥ {coverage:.0%}", False) for coverage in COVERAGES]
    return Table(f"{title}, operating points", [("score", None), *columns], [*rows.items()])


def class_table(predictions: Predictions, names: Sequence[str]) -> Table:
    """Table of the classes, the least accurate first."""
    label, prediction, size = predictions.label, predictions.prediction, len(names)
    images, predicted, hits = (np.bincount(c, minlength=size) for c in (label, prediction, label[predictions.correct]))
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = hits / images, hits / predicted, np.bincount(label, predictions.probability, size) / images
    order = [c for c in np.argsort(shares[0], kind="stable") if images[c]][:MAX_CLASSES]
    rows = [(names[c], [Cell(f"{images[c]:,}"), *(_percent(share[c]) for share in shares)]) for c in order]
    return Table("Classes", _plain("class", "images", "accuracy", "precision", "probability"), rows)


def confusion_table(predictions: Predictions, names: Sequence[str]) -> Table:
    """Table of the most frequent confusions of two classes."""
    wrong, size = ~predictions.correct, len(names)
    pairs, counts = np.unique(predictions.label[wrong] * size + predictions.prediction[wrong], return_counts=True)
    images, rows = np.bincount(predictions.label, minlength=size), []
    for i in np.argsort(-counts, kind="stable")[:MAX_CONFUSIONS]:
        label, prediction = divmod(int(pairs[i]), size)
        cells = [Cell(names[prediction]), Cell(f"{counts[i]:,}"), _percent(counts[i] / images[label])]
        rows.append((names[label], cells))
    return Table("Most frequent confusions", _plain("label", "predicted as", "images", "share of the label’s"), rows)


def _percent(value: float) -> Cell:
    return Cell(format_percent(value))


def _plain(*titles: str) -> list[tuple[str, bool | None]]:
    return [(title, None) for title in titles]
