"""Values of groups of runs and their differences to a baseline, with 95% intervals.

- Over the test images, paired (``tal_fast.metrics.intervals``), where the samples beside the reports are the same
  images: what other test images may change for these very models.
- Over seeds, where all groups have two runs or more: what training again may change. Student's t, for a difference of
  the differences of runs of the same seed if both groups have the same seeds, else Welch's t.
- Over both: what another laboratory may find.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from tal_fast.evaluation.compare import Column, Estimate, Group
from tal_fast.metrics.failure import HIGHER_IS_BETTER, METRICS
from tal_fast.metrics.intervals import LEVEL, Evidence, evidence, fewest, interval
from tal_fast.utils.arrays import Floats

_SEEDS = "Student's t over pairs of the same seed, Welch's t over seeds that do not pair"
OVER = {
    "images": "over the test images, paired", "seeds": _SEEDS, "both": f"over seeds and test images together: {_SEEDS}",
}  # fmt: skip
"""Sources of variation that intervals cover: test images, seeds of training, or both."""


class Comparison:
    """Means of groups of runs and their differences, with intervals as far as the runs allow them.

    Args:
        images: whether there are intervals over images.
        over: one of ``OVER``; seeds alone if the images differ, images alone for single runs.
    """

    def __init__(self, images: bool, over: str = "images") -> None:
        self.images, self.over = images, over
        self._found: dict[int, list[dict[str, Evidence]]] = {}

    def add_differences(self, groups: Sequence[Group], baseline: Group, columns: Sequence[Column]) -> None:
        """Fill in the intervals of the groups and the differences of the others to the baseline."""
        for group, column in itertools.product(groups, columns):
            group.intervals[column] = self.estimate(column, group)
            if group is not baseline:
                group.baseline = baseline.name
                group.differences[column] = self.estimate(column, group, baseline)

    def mark_best(self, groups: Sequence[Group], columns: Sequence[Column]) -> None:
        """Fill in the columns in which a group is ahead of every other by a difference whose interval excludes 0."""
        for column in columns:
            known = [group for group in groups if not math.isnan(group.summary(column).mean)]
            known.sort(key=lambda group: group.summary(column).mean, reverse=higher_is_better(column[1]))
            if len(known) > 1 and all(self.estimate(column, known[0], other).significant for other in known[1:]):
                known[0].best.add(column)

    def estimate(self, column: Column, *sides: Group) -> Estimate:
        """Mean of a group, or the difference of two groups' means, with its interval or why there is none."""
        setting, metric = column
        mean = sides[0].summary(column).mean - sum(side.summary(column).mean for side in sides[1:])
        why_not = self._why_not_images(column, sides)
        values, influences = [np.array(side.values(column)) for side in sides], []
        if not why_not:
            j = METRICS.index(metric)
            influences = [np.stack([run[setting].influence[:, j] for run in self._evidence(side)]) for side in sides]
        if min(len(side.runs) for side in sides) > 1 and (why_not or self.over != "images"):
            pairs = seed_pairs(*sides) if len(sides) > 1 else None
            if pairs is not None:  # differences of runs of the same seed are one sample
                values = [values[0][pairs[0]] - values[1][pairs[1]]]
                influences = [influences[0][pairs[0]] - influences[1][pairs[1]]] if influences else []
            low, high = seed_interval(values, influences)
            over, why_not = "both" if influences else "seeds", "" if self.over == "seeds" else why_not
        elif not why_not:
            n, errors, _ = fewest(run[setting] for side in sides for run in self._evidence(side))
            rows = influences[0].mean(0) - sum(of_runs.mean(0) for of_runs in influences[1:])
            low, high = interval(metric, mean, rows, n, errors, difference=len(sides) > 1)
            over = "images"
        else:
            single = next(side.name for side in sides if len(side.runs) == 1)
            return Estimate(mean, why_not=f"{why_not}, and {single} is a single run")
        if math.isnan(low):
            reports = [report for side in sides for report in side.reports]
            reasons = (report.get("undefined", {}).get(setting, {}).get(metric) for report in reports)
            return Estimate(mean, why_not=f"{metric} is undefined: {next(filter(None, reasons), 'its value is NaN')}")
        return Estimate(mean, low, high, over, why_not)

    def _why_not_images(self, column: Column, sides: Sequence[Group]) -> str:
        """Why there is no interval over test images; empty if there is one."""
        if self.over == "seeds" or not self.images:
            return "none over test images was asked for"
        runs = [run for side in sides for run in zip(side.runs, side.samples, strict=True)]
        identities = {}
        for name, samples in runs:
            if samples is None:
                return f"there is no samples.npz beside the report of {name}"
            identities[name] = samples.identity
            first, other = identities[runs[0][0]], samples.identity
            if differing := [split for split in {**first, **other} if first.get(split) != other.get(split)]:
                return f"the test images or labels of {runs[0][0]} and {name} differ ({', '.join(differing)})"
        if column[1] not in METRICS or any(column[0] not in run for side in sides for run in self._evidence(side)):
            return f"{column[1]} of {column[0]} has no interval over test images"
        return ""

    def _evidence(self, group: Group) -> list[dict[str, Evidence]]:
        """For each run, what the intervals of each setting rest on."""
        if id(group) not in self._found:
            runs = zip(group.reports, group.scored_settings(), strict=True)
            self._found[id(group)] = [
                evidence(settings, group.score, report["convention"]) for report, settings in runs
            ]
        return self._found[id(group)]


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of a metric is better; of those on request it is of the coverage at a risk only."""
    return HIGHER_IS_BETTER.get(metric, metric.startswith("coverage@"))


def seed_pairs(group: Group, baseline: Group) -> tuple[list[int], list[int]] | None:
    """Positions of the runs of both groups by seed, or by run if it is unknown; None unless both have the same."""
    first, second = (
        [run if seed is None else seed for run, seed in zip(side.runs, side.seeds, strict=True)]
        for side in (group, baseline)
    )
    if len(first) != len(second) or len(set(first)) < len(first) or set(first) != set(second):
        return None
    return list(range(len(first))), [second.index(key) for key in first]


def seed_interval(sides: Sequence[Floats], influences: Sequence[Floats]) -> tuple[float, float]:
    """Student's t interval of a mean, or of the difference of two, over seeds and, with influences, over images too.

    With s² the variance over n runs, s²/n is the variance of the mean due to seeds; the sum of squares of the mean's
    influences is that due to images. The interaction of seed and image (how a run's errors fall on these images) is in
    both; the variance of the influences over runs, summed over the images, estimates it, and it is subtracted once.
    Degrees of freedom are Welch and Satterthwaite's, over seeds.

    Args:
        sides: one or two of (runs,): the differences of paired runs, or the values of each group.
        influences: like ``sides`` but (runs, images); empty: over seeds alone.

    Returns:
        Ends of the interval; of zero width where nothing varies, NaN where a value is undefined.
    """
    from scipy import stats

    mean = float(sides[0].mean() - (sides[1].mean() if len(sides) > 1 else 0.0))
    seed_variances = [side.var(ddof=1) / side.size for side in sides]
    total = sum(seed_variances)
    if influences:
        of_mean = influences[0].mean(0) - sum(rows.mean(0) for rows in influences[1:])
        image_variance = float(of_mean @ of_mean)
        interaction = sum(float(rows.var(0, ddof=1).sum()) / len(rows) for rows in influences)
        total = max(total, image_variance, total + image_variance - interaction)
    if not total > 0:
        return (mean, mean) if total == 0 else (math.nan, math.nan)
    squares = sum(v**2 / (side.size - 1) for v, side in zip(seed_variances, sides, strict=True))
    freedom = total**2 / squares if squares > 0 else math.inf
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(total)
    return mean - half, mean + half
