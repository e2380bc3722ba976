"""Reports side by side: ``python -m tal_fast.compare runs/digits-ce runs/digits-tal``.

Runs that differ in nothing but their seed make one row, with the mean and the standard deviation over them; the best of
each column is marked. Below, each row's difference to the baseline with a 95% interval:

- over the test images, on the same resamples for all runs (``tal_fast.metrics.bootstrap``), where the ``samples.npz`` beside
  the reports are about the same images: what other test images may change for these very models;
- over seeds, where both have two runs or more: what training them again may change. Student's t of the differences of
  runs of the same seed where both rows have the same seeds, Welch's t otherwise;
- over both (``--over both``): what another laboratory may find.

Each run is judged by its method's own score (TAL by cosine, CE by the maximum softmax probability) unless ``--score``
says otherwise.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tal_fast.config.parse import parse_yaml
from tal_fast.evaluation.report import (
    SETTING_TITLES,
    TITLES,
    UNITS,
    Report,
    format_table,
    format_value,
    mix_and_seed,
    read_report,
    resample_settings,
)
from tal_fast.evaluation.sample_scores import Samples, read_samples
from tal_fast.metrics.bootstrap import LEVEL, interval
from tal_fast.metrics.failure import HIGHER_IS_BETTER, METRICS, Floats
from tal_fast.metrics.settings import Mix
from tal_fast.utils.io import replacing
from tal_fast.utils.process import program_name

DEFAULT_METRICS = ("aurc", "auroc", "fpr95")
FORMATS = ("table", "markdown", "latex", "csv")
OVER = ("images", "seeds", "both")
# What runs of one group may differ in: none of it changes what is trained, but for the seed.
_NOT_THE_METHOD = ("seed", "output", "resume", "device", "threads", "progress", "eval_batch_size")

Column = tuple[str, str]  # setting, metric


class Summary(NamedTuple):
    """Of one metric over the runs of a group: NaN where undefined in one of them; std NaN for a single run."""

    mean: float
    std: float
    runs: int


class Difference(NamedTuple):
    """A group's mean minus the baseline's, with its interval; ``over`` is one of ``OVER``, or empty: no interval."""

    value: float
    low: float
    high: float
    over: str


@dataclass
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        name: of the row.
        runs: their names.
        reports: of the runs.
        samples: of the runs, None where there are none.
        score: they are judged by.
        seeds: of the runs, None where it is not known.
        baseline: name of the group that the differences are taken to; empty: none.
        differences: by column, for every group but the baseline.
    """

    name: str
    runs: list[str]
    reports: list[Report]
    samples: list[Samples | None]
    score: str
    seeds: list[int | None]
    baseline: str = ""
    differences: dict[Column, Difference] = field(default_factory=dict)

    def values(self, column: Column) -> list[float]:
        """One for each run."""
        setting, metric = column
        return [report["settings"][setting][self.score][metric] for report in self.reports]

    def summary(self, column: Column) -> Summary:
        """Of one metric."""
        return _summary(self.values(column))

    @property
    def accuracy(self) -> Summary:
        """Of the runs on ID samples."""
        return _summary([math.nan if r["id_accuracy"] is None else r["id_accuracy"] for r in self.reports])


def _summary(values: Sequence[float]) -> Summary:
    return Summary(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan, len(values))


def check_comparable(reports: Sequence[Report], names: Sequence[str]) -> None:
    """Refuse to set numbers side by side that mean different things.

    Raises:
        ValueError: the reports differ in convention, mix, its seed, OOD or shifted sets, or number of samples.
    """
    first = reports[0]
    for report, name in zip(reports[1:], names[1:], strict=True):
        for what in ("convention", "mix", "set of OOD data", "set of shifted data"):
            one, other = (_says(r, what) for r in (first, report))
            if one != other:
                raise ValueError(
                    f"{names[0]} and {name} cannot be compared: {what} is {one} in one and {other} in the other; "
                    "evaluate them alike"
                )
        sizes = [(r["counts"]["id"], {**r["counts"]["ood"], **r["counts"].get("shift", {})}) for r in (first, report)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{names[0]} and {name} cannot be compared: they were evaluated on {_sizes(*sizes[0])} and on "
                f"{_sizes(*sizes[1])}"
            )


def _says(report: Report, what: str) -> str:
    if what == "mix":
        return mix_and_seed(report)
    if what == "convention":
        return str(report["convention"])
    return ", ".join(report["ood_names"] if what == "set of OOD data" else report.get("shift_names", [])) or "none"


def _sizes(n_id: int, of_sets: dict[str, int]) -> str:
    return ", ".join([f"{n_id} ID", *(f"{n} {name}" for name, n in of_sets.items())]) + " samples"


def judged_by(report: Report, name: str, score: str | None = None) -> str:
    """The score a report is judged by: the given one, the run's own, or the only one there is.

    Raises:
        ValueError: the report does not have it, or leaves open which it is.
    """
    there = list(report["settings"]["old_fd"])
    chosen = score or report.get("score") or (there[0] if len(there) == 1 else None)
    if chosen is None:
        raise ValueError(f"{name} names no score of its own; choose one with --score: {', '.join(there)}")
    if chosen not in there:
        raise ValueError(f"{name} has no score {chosen!r}; it has {', '.join(there)}")
    return chosen


def method_of(run: str | Path) -> str | None:
    """What a run's ``config.yaml`` says but for its seed and where and how it ran; None where there is none.

    Raises:
        ValueError: the file cannot be read.
    """
    config = _config_of(run)
    if config is None:
        return None
    return json.dumps({key: value for key, value in config.items() if key not in _NOT_THE_METHOD}, sort_keys=True)


def seed_of(run: str | Path) -> int | None:
    """The seed in a run's ``config.yaml``; None where there is none.

    Raises:
        ValueError: the file cannot be read.
    """
    return (_config_of(run) or {}).get("seed")


def _config_of(run: str | Path) -> dict[str, Any] | None:
    path = Path(run) / "config.yaml"
    if not path.is_file():
        return None
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path} cannot be read ({problem})") from None


def group_runs(
    reports: Sequence[Report],
    names: Sequence[str],
    methods: Sequence[str | None] | None = None,
    samples: Sequence[Samples | None] | None = None,
    score: str | None = None,
    seeds: Sequence[int | None] | None = None,
) -> list[Group]:
    """Runs of the same method in one group, in the order of their first; a run without a method is on its own.

    Args:
        reports: from ``tal_fast.evaluation.report.read_report``.
        names: of the runs.
        methods: from ``method_of``.
        samples: from ``tal_fast.evaluation.sample_scores.read_samples``.
        score: judge all by this one; None: each by its own.
        seeds: of the runs, from ``seed_of``.

    Raises:
        ValueError: see ``check_comparable`` and ``judged_by``.
    """
    check_comparable(reports, names)
    seeds = seeds or [None] * len(reports)
    methods = methods or [None] * len(reports)
    samples = samples or [None] * len(reports)
    found: dict[tuple[str, str], list[int]] = {}
    for i, (report, name, method) in enumerate(zip(reports, names, methods, strict=True)):
        found.setdefault((method or f"\0{i}", judged_by(report, name, score)), []).append(i)
    groups = [
        Group(
            _common_name([names[i] for i in members]),
            [names[i] for i in members],
            [reports[i] for i in members],
            [samples[i] for i in members],
            chosen,
            [seeds[i] for i in members],
        )
        for (_, chosen), members in found.items()
    ]
    for group in groups:
        if sum(other.name == group.name for other in groups) > 1:
            group.name = ", ".join(group.runs)
    return groups


def _common_name(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    # By characters: runs/ce-1 and runs/ce-2 are runs/ce.
    common = os.path.commonprefix(list(names)).rstrip("-_. /")  # noqa: RUF071
    for ending in ("seed", "-s", "_s"):
        if common.endswith(ending):
            common = common.removesuffix(ending).rstrip("-_. /")
    return common or names[0]


def add_differences(
    groups: Sequence[Group],
    baseline: Group,
    columns: Sequence[Column],
    resamples: int,
    over: str = "images",
    progress: bool = False,
) -> None:
    """Fill in every other group's differences to the baseline; see the module's docstring.

    Args:
        groups, baseline: from ``group_runs``; the baseline is one of them.
        columns: settings and metrics.
        resamples: of the bootstrap over images; 0: intervals over seeds only.
        over: of ``OVER``, what the intervals are over as far as the runs allow it: seeds alone where the images are
            not the same, images alone for single runs.
        progress: draw bars.
    """
    same_images = resamples > 0 and over != "seeds" and _same_images(groups)
    on_resamples: dict[int, list[dict[str, Floats]]] = {}
    if same_images:
        on_resamples = {id(group): _on_resamples(group, resamples, progress) for group in groups}
    for group in groups:
        if group is baseline:
            continue
        group.baseline = baseline.name
        several = min(len(group.runs), len(baseline.runs)) > 1
        for column in columns:
            setting, metric = column
            value = group.summary(column).mean - baseline.summary(column).mean
            sides = [np.array(g.values(column)) for g in (group, baseline)]
            resampled = []
            if same_images:
                of_metric = METRICS.index(metric)
                resampled = [
                    np.stack([run[setting][:, of_metric] for run in on_resamples[id(g)]]) for g in (group, baseline)
                ]
            low, high, kind = math.nan, math.nan, ""
            if same_images and not (over == "both" and several):
                low, high, _ = interval(resampled[0].mean(0) - resampled[1].mean(0))
                kind = "images"
            elif several:
                pairs = _pairs(group, baseline)
                if pairs is not None:  # differences of runs of the same seed are one sample
                    own, other = pairs
                    sides = [sides[0][own] - sides[1][other]]
                    resampled = [resampled[0][own] - resampled[1][other]] if same_images else []
                low, high = _over_seeds(sides, resampled)
                kind = "both" if same_images else "seeds"
            group.differences[column] = Difference(value, low, high, kind)


def _pairs(group: Group, baseline: Group) -> tuple[list[int], list[int]] | None:
    """Places of the runs of both groups, in the order of their seeds; None unless they have the same."""
    seeds = [[(-1 if seed is None else seed) for seed in g.seeds] for g in (group, baseline)]
    if -1 in seeds[0] or sorted(seeds[0]) != sorted(seeds[1]) or len(set(seeds[0])) < len(seeds[0]):
        return None
    own, other = ([of.index(seed) for seed in sorted(of)] for of in seeds)
    return own, other


def _same_images(groups: Sequence[Group]) -> bool:
    found = []
    for group in groups:
        for report, samples in zip(group.reports, group.samples, strict=True):
            if samples is None or group.score not in samples.id_scores:
                return False
            # Beside a report that was moved may lie another's samples.
            if (report["counts"]["id"], report["counts"]["id_right"]) != (samples.right.size, samples.right.sum()):
                return False
            if list(samples.shifts) != report.get("shift_names", []):
                return False
            found.append(samples.identity)
    return all(identity == found[0] for identity in found)


def _on_resamples(group: Group, resamples: int, progress: bool) -> list[dict[str, Floats]]:
    """For each run, setting -> (resamples, len(METRICS)) on the same resamples of the images."""
    found = []
    for report, samples in zip(group.reports, group.samples, strict=True):
        assert samples is not None
        of_run = resample_settings(
            samples.right,
            {group.score: samples.id_scores[group.score]},
            {name: {group.score: scores[group.score]} for name, scores in samples.ood_scores.items()},
            {name: (right, {group.score: scores[group.score]}) for name, (right, scores) in samples.shifts.items()},
            mix=Mix.parse(report["mix"]),
            seed=report["seed"],
            convention=report["convention"],
            resamples=resamples,
            progress=progress,
        )
        found.append({key: values[group.score] for key, values in of_run})
    return found


def _over_seeds(sides: Sequence[Floats], resampled: Sequence[Floats]) -> tuple[float, float]:
    """Student's t interval of a mean, or of the difference of two, over seeds and, with resamples, over images too.

    With s² the variance over n runs, s²/n is what the seeds do to the mean. The variance of the mean over the
    resamples is what the images do. What a run owes to how *its* errors fall on *these* images (the interaction of seed
    and image) is in both: on resampled images the runs' variance grows by as much once more, which tells how much it
    is, and it is taken off once. Degrees of freedom by Welch and Satterthwaite, the seeds being the few.

    Args:
        sides: one or two of (runs,): the differences of paired runs, or the values of each side.
        resampled: as ``sides``, (runs, resamples); empty: over seeds alone.

    Returns:
        The interval's ends; of no width where nothing varies, NaN where a value is undefined.
    """
    from scipy import stats

    middle = float(sides[0].mean() - (sides[1].mean() if len(sides) > 1 else 0.0))
    of_seeds = [side.var(ddof=1) / side.size for side in sides]
    total = sum(of_seeds)
    if resampled:
        defined = ~np.isnan(np.concatenate(resampled)).any(0)
        kept = [values[:, defined] for values in resampled]
        if defined.sum() < 2:
            return math.nan, math.nan
        of_images = float(np.var(kept[0].mean(0) - (kept[1].mean(0) if len(kept) > 1 else 0.0), ddof=1))
        both = sum(
            max(float(values.var(0, ddof=1).mean() - side.var(ddof=1)), 0.0) / side.size
            for values, side in zip(kept, sides, strict=True)
        )
        total = max(total, of_images, total + of_images - both)
    if not total > 0:
        return (middle, middle) if total == 0 else (math.nan, math.nan)
    few = sum(part**2 / (side.size - 1) for part, side in zip(of_seeds, sides, strict=True))
    freedom = total**2 / few if few > 0 else math.inf
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(total)
    return middle - half, middle + half


def find_group(groups: Sequence[Group], name: str) -> Group:
    """The group of this name, or in which a run of this name is.

    Raises:
        ValueError: there is none.
    """
    for group in groups:
        if name == group.name or name in group.runs or Path(name).name in group.runs:
            return group
    raise ValueError(f"there is no row {name!r} to be the baseline; there are {', '.join(g.name for g in groups)}")


def columns_of(groups: Sequence[Group], metrics: Sequence[str]) -> list[Column]:
    """Each metric of Old FD, OOD and New FD, as far as they are there."""
    there = groups[0].reports[0]["settings"]
    return [(key, metric) for key in SETTING_TITLES if key in there for metric in metrics]


def comparison(
    reports: Sequence[Report],
    names: Sequence[str],
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    score: str | None = None,
    units: str = "natural",
) -> str:
    """A table with a row a report and a column a metric of each setting, the best of each column marked with ``*``.

    Args:
        reports: from ``tal_fast.evaluation.report.read_report``.
        names: of the rows.
        metrics: keys of ``tal_fast.metrics.METRICS``.
        score: judge all by this one; None: each by its own.
        units: ``natural`` or ``paper``.

    Raises:
        ValueError: see ``check_comparable`` and ``judged_by``.
    """
    groups = group_runs(reports, names, score=score)
    return format_groups(groups, columns_of(groups, metrics), "table", units)


def _plain(text: str) -> str:
    return text


def markdown_escaped(text: str) -> str:
    """On one line, with Markdown's special characters as themselves."""
    for special in "\\`*_{}[]<>#|":
        text = text.replace(special, "\\" + special)
    return " ".join(text.split())


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "<": "$<$", ">": "$>$",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


# How a format escapes text, and how it marks the best.
_STYLES: dict[str, tuple[Callable[[str], str], Callable[[str, bool], str]]] = {
    "table": (_plain, lambda text, best: text + ("*" if best else " ")),
    "markdown": (markdown_escaped, lambda text, best: f"**{text}**" if best else text),
    "latex": (_latex, lambda text, best: rf"\textbf{{{text}}}" if best else text),
}


def format_groups(groups: Sequence[Group], columns: Sequence[Column], style: str, units: str = "natural") -> str:
    """The groups as a table, and their differences to the baseline, if they have any, as a second.

    Args:
        groups: from ``group_runs``.
        columns: settings and metrics; of those against single OOD sets, the head names only the kind.
        style: one of ``FORMATS``. ``csv`` is one long table instead, a line a group and column, in natural units and
            with all digits. ``latex`` needs the package ``booktabs``.
        units: ``natural`` or ``paper``.
    """
    if style == "csv":
        return _csv(groups, columns)
    escape, mark = _STYLES[style]
    several = any(len(group.runs) > 1 for group in groups)
    cells = [
        [
            mark(escape(_percent(group.accuracy)), best)
            for group, best in zip(groups, _best([g.accuracy.mean for g in groups], True), strict=True)
        ]
    ]
    for column in columns:
        summaries = [group.summary(column) for group in groups]
        cells.append(
            [
                mark(escape(_with_std(column[1], s, units)), best)
                for s, best in zip(
                    summaries, _best([s.mean for s in summaries], HIGHER_IS_BETTER[column[1]]), strict=True
                )
            ]
        )
    titles = [(SETTING_TITLES[key.partition("/")[0]], TITLES[metric]) for key, metric in columns]
    head = [("", "run"), ("", "score"), *([("", "runs")] if several else []), ("", "accuracy"), *titles]
    rows = [
        [escape(g.name), escape(g.score), *([str(len(g.runs))] if several else []), *row]
        for g, row in zip(groups, zip(*cells, strict=True), strict=True)
    ]
    tables = [_table(head, rows, style)]
    compared = [group for group in groups if group.differences]
    if compared:
        rows = [
            [escape(f"{g.name} - {g.baseline}"), *(escape(_difference(c, g.differences[c], units)) for c in columns)]
            for g in compared
        ]
        tables.append(_table([("", "difference"), *titles], rows, style))
    return "\n\n".join(tables)


def _best(values: Sequence[float], higher: bool) -> list[bool]:
    known = [v for v in values if not math.isnan(v)]
    best = (max if higher else min)(known) if known else math.nan
    return [value == best for value in values]


def _percent(accuracy: Summary) -> str:
    return f"{accuracy.mean:.2%}" + (f" ± {100 * accuracy.std:.2f}" if accuracy.runs > 1 else "")


def _with_std(metric: str, summary: Summary, units: str) -> str:
    text = format_value(metric, summary.mean, units)
    return text if summary.runs == 1 else f"{text} ± {format_value(metric, summary.std, units)}"


def _difference(column: Column, difference: Difference, units: str) -> str:
    value, low, high = (_signed(format_value(column[1], v, units)) for v in difference[:3])
    return f"{value} [{low}, {high}]" if difference.over else value


def _signed(text: str) -> str:
    return text if text[0] in "-+" else f"+{text}"


def _table(head: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], style: str) -> str:
    if style == "table":
        # A space under the mark of the best keeps the digits in line.
        first = [f"{above} \n{title} " if above or title == "accuracy" else f"\n{title}" for above, title in head]
        return format_table(first, rows)
    titles = [f"{above} {title}".strip() for above, title in head]
    if style == "markdown":
        lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    body = [rf"{' & '.join(row)} \\" for row in rows]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}", r"\toprule", rf"{' & '.join(map(_latex, titles))} \\",
            r"\midrule", *body, r"\bottomrule", r"\end{tabular}",
        ]
    )  # fmt: skip


def _csv(groups: Sequence[Group], columns: Sequence[Column]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = "run score runs setting metric mean std best difference low high over baseline"
    writer.writerow(head.split())
    for setting, metric in columns:
        summaries = [group.summary((setting, metric)) for group in groups]
        marks = _best([s.mean for s in summaries], HIGHER_IS_BETTER[metric])
        for group, summary, best in zip(groups, summaries, marks, strict=True):
            difference = group.differences.get((setting, metric), Difference(math.nan, math.nan, math.nan, ""))
            numbers = [summary.mean, summary.std, int(best), *difference[:3]]
            writer.writerow(
                [group.name, group.score, summary.runs, setting, metric]
                + ["" if math.isnan(v) else v for v in numbers]
                + [difference.over, group.baseline]
            )
    return text.getvalue().rstrip("\n")


def describe(groups: Sequence[Group], units: str, resamples: int) -> str:
    """What the numbers are, in a sentence or two."""
    first = groups[0].reports[0]
    scale = "natural units" if units == "natural" else "AURC times 1000, the rest in percent"
    text = f"convention {first['convention']}; ID:OOD mix {mix_and_seed(first)}; {scale}; * best"
    if any(len(group.runs) > 1 for group in groups):
        text += "; mean ± standard deviation over runs"
    over = {d.over for group in groups for d in group.differences.values()}
    for kind in OVER:
        if kind in over:
            text += f"\n{LEVEL:.0%} intervals of differences: {_how(kind, groups, resamples)}"
    return text


def _how(over: str, groups: Sequence[Group], resamples: int) -> str:
    """How intervals over something come about."""
    bootstrap = f"paired bootstrap over the test images, {resamples} resamples"
    if over == "images":
        return bootstrap
    compared = [
        (g, find_group(groups, g.baseline)) for g in groups if any(d.over == over for d in g.differences.values())
    ]
    paired = {_pairs(group, baseline) is not None for group, baseline in compared}
    of_seeds = " or ".join(
        name for name, is_so in (("Student's t over pairs of the same seed", True), ("Welch's t over seeds", False))
        if is_so in paired
    )  # fmt: skip
    return of_seeds if over == "seeds" else f"over seeds and test images together: {of_seeds}, and {bootstrap}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name("compare"), description="Set failure-detection reports side by side."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a report.json")
    parser.add_argument(
        "--metrics", nargs="+", choices=METRICS, default=list(DEFAULT_METRICS), metavar="METRIC",
        help=f"columns of each setting: {', '.join(METRICS)} ({' '.join(DEFAULT_METRICS)})",
    )  # fmt: skip
    parser.add_argument("--score", help="judge every run by this score (each by its method's own)")
    parser.add_argument("--baseline", metavar="NAME", help="row that differences are taken to (the first)")
    parser.add_argument(
        "--bootstrap", type=int, default=2000, metavar="N",
        help="resamples for intervals of differences over the test images; 0: none (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--over", choices=OVER, default="images", help="what intervals are over, as far as the runs allow (%(default)s)"
    )
    parser.add_argument("--units", choices=UNITS, default="natural", help="of the table (%(default)s)")
    parser.add_argument("--format", choices=FORMATS, default="table", help="(%(default)s)")
    parser.add_argument("--out", metavar="FILE", help="write there instead of printing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for bad input, said in one sentence."""
    args = _parser().parse_args(argv)
    names = [Path(run).name if Path(run).is_dir() else str(run) for run in args.runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in args.runs]
    try:
        if args.bootstrap < 0:
            raise ValueError(f"--bootstrap must be at least 0, not {args.bootstrap}")
        reports = [read_report(run) for run in args.runs]
        samples = [read_samples(run) for run in args.runs]
        methods, seeds = [method_of(run) for run in args.runs], [seed_of(run) for run in args.runs]
        groups = group_runs(reports, names, methods, samples, args.score, seeds)
        columns = columns_of(groups, args.metrics)
        baseline = groups[0] if args.baseline is None else find_group(groups, args.baseline)
        if len(groups) > 1:
            add_differences(groups, baseline, columns, args.bootstrap, args.over, progress=True)
        text = format_groups(groups, columns, args.format, args.units)
        if args.format != "csv":
            about = describe(groups, args.units, args.bootstrap)
            text = _as_comment(about, args.format) + text
        if args.out is not None:
            with replacing(args.out) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
            return 0
    except (ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print(text)
    return 0


def _as_comment(about: str, style: str) -> str:
    if style == "latex":
        return "".join(f"% {line}\n" for line in about.replace("* best", "bold: best").splitlines())
    if style == "markdown":
        return markdown_escaped(about.replace("* best", "bold: best")) + "\n\n"
    return about + "\n"
