"""Verdict on each setting of an evaluation, in one sentence."""

from __future__ import annotations

import numpy as np

from tal_fast.evaluation.evaluation import Evaluation
from tal_fast.evaluation.tables import nan_if_none, printable, setting_title
from tal_fast.metrics.failure import METRICS
from tal_fast.metrics.influence import influence
from tal_fast.metrics.intervals import interval

LEVELS = ((0.9, "very well", "good"), (0.8, "well", "good"), (0.7, "fairly", "fair"), (0.5, "weakly", "fair"))
"""Lower end of the interval of AUROC, its words, CSS class; the limits of Hosmer and Lemeshow (2000), section 5.2.4."""
REJECTED = 0.2
"""Share of the samples whose rejection a verdict describes."""


def verdicts(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Title, verdict by the primary score, and level (good, fair, poor or none) of each setting.

    Means over sets have one if the report has their intervals.
    """
    found = ((key, _judge(evaluation, key)) for key in evaluation.report["settings"])
    return [(setting_title(key, evaluation.report), *judged) for key, judged in found if judged is not None]


def _judge(evaluation: Evaluation, key: str) -> tuple[str, str] | None:
    report, score = evaluation.report, evaluation.primary_score
    ends = report.get("intervals", {}).get(key, {}).get(score, {}).get("auroc")
    judged = evaluation.settings.get(key)
    if judged is None and ends is None:
        return None
    auroc = nan_if_none(report["settings"][key][score]["auroc"])
    if np.isnan(auroc):
        return f"Cannot be judged: {printable(report['undefined'][key].get('auroc', 'AUROC is undefined'))}.", "none"
    if ends is None:
        assert judged is not None
        ood, success = judged.setting.ood_index.size, judged.setting.success
        rows = influence(judged.confidences()[score], success, ood)[:, METRICS.index("auroc")]
        ends = interval("auroc", auroc, rows, success.size, int(success.size - success.sum()))
    low, high = (nan_if_none(end) for end in ends[-2:])
    kind = key.partition("/")[0]
    separated = {
        "ood": "foreign from in-distribution images",
        "new_fd": "errors and foreign images from correct predictions",
    }.get(kind, "errors from correct predictions")
    how, level = next(((words, css) for limit, words, css in LEVELS if low > limit), ("no better than chance", "poor"))
    how = "worse than chance, in the wrong order" if high < 0.5 else how
    if low <= 0.5 and high > LEVELS[2][0]:
        how, level = "to an unknown degree, with too few samples to tell it from chance", "none"
    text = f"{score} separates {separated} {how}: AUROC {auroc:.3f} [{low:.3f}, {high:.3f}]"
    if judged is not None and kind != "ood":
        point = evaluation.operating_points[key][score].at_coverage(1 - REJECTED)
        assert point is not None
        before = 1 - float(np.mean(judged.setting.success))
        text += f"; without the least confident {REJECTED:.0%}, {point.risk:.2%} are errors instead of {before:.2%}"
    return f"{text}.", level
