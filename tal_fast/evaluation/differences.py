"""Differences of groups of runs to a baseline, with 95% intervals.

- Over the test images, on the same resamples for all runs (``tal_fast.metrics.bootstrap``), where the samples beside
  the reports are the same images: what other test images may change for these very models.
- Over seeds, where both groups have two runs or more: what training again may change. Student's t of the differences of
  runs of the same seed if both groups have the same seeds, Welch's t otherwise.
- Over both: what another laboratory may find.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tal_fast.evaluation.compare import Column, Difference, Group
from tal_fast.evaluation.report import resample_settings
from tal_fast.metrics.bootstrap import LEVEL, interval
from tal_fast.metrics.failure import METRICS
from tal_fast.metrics.settings import Mix
from tal_fast.utils.arrays import Floats

OVER = ("images", "seeds", "both")
"""Sources of variation that intervals cover: test images, seeds of training, or both."""


def add_differences(
    groups: Sequence[Group], baseline: Group, columns: Sequence[Column], resamples: int, over: str = "images"
) -> None:
    """Fill in the differences of the other groups to the baseline, which is one of the groups.

    With 0 ``resamples`` of the bootstrap over images there are intervals over seeds only. ``over`` is one of ``OVER``,
    as far as the runs allow it: seeds alone if the images differ, images alone for single runs.
    """
    same_images = resamples > 0 and over != "seeds" and _same_images(groups)
    resampled_groups = {id(group): _resample(group, resamples) for group in groups if same_images}
    for group in groups:
        if group is baseline:
            continue
        group.baseline = baseline.name
        several = min(len(group.runs), len(baseline.runs)) > 1
        pairs = seed_pairs(group, baseline)
        for column in columns:
            setting, metric = column
            value = group.summary(column).mean - baseline.summary(column).mean
            sides = [np.array(side.values(column)) for side in (group, baseline)]
            resampled: list[Floats] = []
            if same_images:
                j = METRICS.index(metric)
                resampled = [
                    np.stack([run[setting][:, j] for run in resampled_groups[id(side)]]) for side in (group, baseline)
                ]
            low, high, kind = math.nan, math.nan, ""
            if same_images and not (over == "both" and several):
                low, high, _ = interval(resampled[0].mean(0) - resampled[1].mean(0))
                kind = "images"
            elif several:
                if pairs is not None:  # differences of runs of the same seed are one sample
                    first, second = pairs
                    sides = [sides[0][first] - sides[1][second]]
                    resampled = [resampled[0][first] - resampled[1][second]] if same_images else []
                low, high = seed_interval(sides, resampled)
                kind = "both" if same_images else "seeds"
            group.differences[column] = Difference(value, low, high, kind)


def seed_pairs(group: Group, baseline: Group) -> tuple[list[int], list[int]] | None:
    """Positions of the runs of both groups, in the order of their seeds; None unless both have the same seeds."""
    seeds = [[(-1 if seed is None else seed) for seed in side.seeds] for side in (group, baseline)]
    if -1 in seeds[0] or sorted(seeds[0]) != sorted(seeds[1]) or len(set(seeds[0])) < len(seeds[0]):
        return None
    first, second = ([side.index(seed) for seed in sorted(side)] for side in seeds)
    return first, second


def _same_images(groups: Sequence[Group]) -> bool:
    identities = []
    for group in groups:
        for samples in group.samples:
            if samples is None or group.score not in samples.id_scores:
                return False
            identities.append(samples.identity)
    return all(identity == identities[0] for identity in identities)


def _resample(group: Group, resamples: int) -> list[dict[str, Floats]]:
    """For each run, setting -> (resamples, len(METRICS)) on the same resamples of the images."""
    runs = []
    for report, samples in zip(group.reports, group.samples, strict=True):
        assert samples is not None
        settings = samples.with_score(group.score).settings(Mix.parse(report["mix"]), report["seed"])
        values = resample_settings(settings, resamples, report["seed"], report["convention"])
        runs.append({key: by_score[group.score] for key, by_score in values})
    return runs


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
