"""Values of groups of runs and their differences to a baseline, with 95% intervals.

- Over the test images, on the same resamples for all runs (``tal_fast.metrics.bootstrap``), where the samples beside
  the reports are the same images: what other test images may change for these very models.
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
from tal_fast.evaluation.report import resample_settings
from tal_fast.metrics.bootstrap import LEVEL, interval
from tal_fast.metrics.failure import HIGHER_IS_BETTER, METRICS
from tal_fast.utils.arrays import Floats

OVER = ("images", "seeds", "both")
"""Sources of variation that intervals cover: test images, seeds of training, or both."""


class Comparison:
    """Means of groups of runs and their differences, with intervals as far as the runs allow them.

    Args:
        resamples: of the bootstrap over images; 0: intervals over seeds only.
        over: one of ``OVER``; seeds alone if the images differ, images alone for single runs.
    """

    def __init__(self, resamples: int, over: str = "images") -> None:
        self.resamples, self.over = resamples, over
        self._resampled: dict[int, list[dict[str, Floats]]] = {}

    def add_differences(self, groups: Sequence[Group], baseline: Group, columns: Sequence[Column]) -> None:
        """Fill in the intervals of the groups and the differences of the others to the baseline."""
        for group, column in itertools.product(groups, columns):
            group.intervals[column] = self.estimate(column, group)
            if group is not baseline:
                group.baseline = baseline.name
                group.differences[column] = self.estimate(column, group, baseline)

    def mark_best(self, groups: Sequence[Group], columns: Sequence[Column]) -> None:
        """Fill in the columns in which a group is ahead of the next best by a difference whose interval excludes 0."""
        for column in columns:
            known = [group for group in groups if not math.isnan(group.summary(column).mean)]
            known.sort(key=lambda group: group.summary(column).mean, reverse=HIGHER_IS_BETTER[column[1]])
            if len(known) > 1 and self.estimate(column, *known[:2]).significant:
                known[0].best.add(column)

    def estimate(self, column: Column, *sides: Group) -> Estimate:
        """Mean of a group, or the difference of two groups' means, with its interval or why there is none."""
        setting, metric = column
        mean = sides[0].summary(column).mean - sum(side.summary(column).mean for side in sides[1:])
        why_not = self._why_not_images(column, sides)
        values, resampled = [np.array(side.values(column)) for side in sides], []
        if not why_not:
            j = METRICS.index(metric)
            resampled = [np.stack([run[setting][:, j] for run in self._resample(side)]) for side in sides]
        if min(len(side.runs) for side in sides) > 1 and (why_not or self.over != "images"):
            pairs = seed_pairs(*sides) if len(sides) > 1 else None
            if pairs is not None:  # differences of runs of the same seed are one sample
                values = [values[0][pairs[0]] - values[1][pairs[1]]]
                resampled = [resampled[0][pairs[0]] - resampled[1][pairs[1]]] if resampled else []
            low, high = seed_interval(values, resampled)
            over, why_not = "both" if resampled else "seeds", "" if self.over == "seeds" else why_not
        elif not why_not:
            low, high, _ = interval(resampled[0].mean(0) - sum(values.mean(0) for values in resampled[1:]))
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
        if self.over == "seeds" or self.resamples == 0:
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
        if column[1] not in METRICS or any(column[0] not in run for side in sides for run in self._resample(side)):
            return f"{column[1]} of {column[0]} is not computed on resamples"
        return ""

    def _resample(self, group: Group) -> list[dict[str, Floats]]:
        """For each run, setting -> (resamples, len(METRICS)) on the same resamples of the images."""
        if id(group) not in self._resampled:
            self._resampled[id(group)] = []
            for report, settings in zip(group.reports, group.scored_settings(), strict=True):
                values = resample_settings(settings, self.resamples, report["seed"], report["convention"])
                self._resampled[id(group)].append({key: by_score[group.score] for key, by_score in values})
        return self._resampled[id(group)]


def add_differences(
    groups: Sequence[Group], baseline: Group, columns: Sequence[Column], resamples: int, over: str = "images"
) -> None:
    """Fill in the groups' intervals, differences to the baseline, which is one of them, and in what they are best."""
    comparison = Comparison(resamples, over)
    comparison.add_differences(groups, baseline, columns)
    comparison.mark_best(groups, columns)


def seed_pairs(group: Group, baseline: Group) -> tuple[list[int], list[int]] | None:
    """Positions of the runs of both groups by seed, or by run if it is unknown; None unless both have the same."""
    first, second = (
        [run if seed is None else seed for run, seed in zip(side.runs, side.seeds, strict=True)]
        for side in (group, baseline)
    )
    if len(first) != len(second) or len(set(first)) < len(first) or set(first) != set(second):
        return None
    return list(range(len(first))), [second.index(key) for key in first]


def seed_interval(sides: Sequence[Floats], resampled: Sequence[Floats]) -> tuple[float, float]:
    """Student's t interval of a mean, or of the difference of two, over seeds and, with resamples, over images too.

    With s² the variance over n runs, s²/n is the variance of the mean due to seeds; the variance of the mean over the
    resamples is that due to images. The interaction of seed and image (how a run's errors fall on these images) is in
    both. On resampled images the variance over runs grows by the interaction once more, which estimates it, and it is
    subtracted once. Degrees of freedom are Welch and Satterthwaite's, over seeds.

    Args:
        sides: one or two of (runs,): the differences of paired runs, or the values of each group.
        resampled: like ``sides`` but (runs, resamples); empty: over seeds alone.

    Returns:
        Ends of the interval; of zero width where nothing varies, NaN where a value is undefined.
    """
    from scipy import stats

    mean = float(sides[0].mean() - (sides[1].mean() if len(sides) > 1 else 0.0))
    seed_variances = [side.var(ddof=1) / side.size for side in sides]
    total = sum(seed_variances)
    if resampled:
        defined = ~np.isnan(np.concatenate(resampled)).any(0)
        kept = [values[:, defined] for values in resampled]
        if defined.sum() < 2:
            return math.nan, math.nan
        image_variance = float(np.var(kept[0].mean(0) - (kept[1].mean(0) if len(kept) > 1 else 0.0), ddof=1))
        interaction = sum(
            max(float(values.var(0, ddof=1).mean() - side.var(ddof=1)), 0.0) / side.size
            for values, side in zip(kept, sides, strict=True)
        )
        total = max(total, image_variance, total + image_variance - interaction)
    if not total > 0:
        return (mean, mean) if total == 0 else (math.nan, math.nan)
    squares = sum(v**2 / (side.size - 1) for v, side in zip(seed_variances, sides, strict=True))
    freedom = total**2 / squares if squares > 0 else math.inf
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(total)
    return mean - half, mean + half
