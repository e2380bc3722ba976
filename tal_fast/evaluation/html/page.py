"""The page: gathers what is saved, and fills the template with it."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tal_fast.evaluation.html import charts
from tal_fast.evaluation.html.charts import Chart
from tal_fast.evaluation.html.gallery import Gallery, Images, confidence_galleries, printable, typicalness_galleries
from tal_fast.evaluation.predictions import CACHE
from tal_fast.evaluation.report import SETTING_TITLES, TITLES, Report, format_value, mix_and_seed, read_report
from tal_fast.evaluation.sample_scores import FILE as SAMPLES
from tal_fast.evaluation.sample_scores import Samples, read_samples
from tal_fast.evaluation.train_typicalness import training_typicalness
from tal_fast.metrics.calibration import BINS
from tal_fast.metrics.curves import Operating, OperatingPoints, kinds, reliability
from tal_fast.metrics.failure import HIGHER_IS_BETTER, METRICS
from tal_fast.metrics.settings import Mix, judged_settings
from tal_fast.runs import checkpoint as checkpoints
from tal_fast.utils.io import replacing

if TYPE_CHECKING:
    from tal_fast.runs.load import Run

FILE = "report.html"
RISKS = (0.01, 0.02, 0.05)
COVERAGES = (0.80, 0.90, 0.95)
# Curves that show at first, and histograms outside the folded part: more cannot be told apart.
SHOWN_SCORES = 6
# Points of all curves together, about a megabyte of coordinates.
_ALL_POINTS = 80_000
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Cell:
    """A number in a table.

    Attributes:
        text: as it is shown.
        best: whether no other in its column is better; of a difference, whether it is none by chance. In bold.
        detail: in small print below it.
    """

    text: str
    best: bool = False
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """A setting's metrics.

    Attributes:
        key: of the setting.
        title: heading.
        samples: how many of which kind.
        bounds: floor and random AURC, in words.
        columns: titles of the metrics, each with whether larger is better (None: neither).
        rows: score -> its cells.
        differences: score -> its cells minus the baseline's; empty without a bootstrap.
        notes: why a metric is undefined.
    """

    key: str
    title: str
    samples: str
    bounds: str
    columns: list[tuple[str, bool | None]]
    rows: dict[str, list[Cell]]
    differences: dict[str, list[Cell]]
    notes: list[str]


def write_html(
    folder: str | Path,
    *,
    run: Run | None = None,
    images: Images | None = None,
    typicalness: bool = True,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Path:
    """Write ``report.html`` beside the ``report.json`` and ``samples.npz`` of an evaluation.

    Args:
        folder: where they are.
        run: the run evaluated; found by what the report says unless given.
        images: what was evaluated; the run's unless given. Without images, or when they have gone, the galleries are
            left out and the page says why.
        typicalness: whether to show the most and least typical training images of a TAL run, which takes a pass over
            all training images, kept in the run's cache.
        batch_size, device: of that pass.

    Returns:
        The page's path.

    Raises:
        ValueError: no evaluation there, or one that cannot be read.
    """
    folder = Path(folder)
    report = read_report(folder)
    samples = read_samples(folder)
    if samples is None:
        raise ValueError(f"there is no {folder / SAMPLES}; evaluate again to have it")
    _check_same(report, samples, folder)
    galleries, notes = _galleries(report, samples, folder, run, images, typicalness, batch_size, device)
    text = render(report, samples, galleries, notes)
    with replacing(folder / FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return folder / FILE


def _check_same(report: Report, samples: Samples, folder: Path) -> None:
    said, right = report["counts"], samples.right
    there = {name: len(split) for name, split in samples.predictions.items()}
    same = said["id_right"] == int(right.sum()) and there == {"val": len(right), **said["ood"]}
    same = same and said["id"] == len(right) and list(samples.ood_scores) == report["ood_names"]
    same = same and {name: len(own) for name, (own, _) in samples.shifts.items()} == said.get("shift", {})
    if not same or list(report["settings"]["old_fd"]) != list(samples.id_scores):
        raise ValueError(f"report.json and {SAMPLES} in {folder} are of different evaluations; evaluate again")


def _galleries(
    report: Report,
    samples: Samples,
    folder: Path,
    run: Run | None,
    images: Images | None,
    typicalness: bool,
    batch_size: int,
    device: torch.device | str,
) -> tuple[list[Gallery], list[str]]:
    """The galleries, and a sentence for each that is left out."""
    from tal_fast.runs.load import load_run

    if images is None and run is None and "run" not in report:
        return [], ["No images: what was evaluated is no run, whose images can be found again."]
    try:
        if run is None and "run" in report:
            own = (folder / checkpoints.FOLDER).is_dir()
            run = load_run(folder if own else report["run"], report["checkpoint"], device)
        if images is None:
            assert run is not None
            there = [name for name in samples.predictions if name in ("val", *run.data.ood_names)]
            images = Images({name: run.data.split(name) for name in there}, run.data.class_names, run.data.channels)
        held_out = report.get("temperature", {}).get("held_out", 0)
        for name, split in images.splits.items():
            had = len(samples.predictions[name]) + (held_out if name == "val" else 0)
            if len(split) != had:
                raise ValueError(f"{name} has {len(split)} images now and had {had}")
        found = confidence_galleries(images, samples, _primary(report))
    except (ValueError, OSError) as problem:
        return [], [f"No images: {problem}."]
    notes = [
        f"No images of {printable(name)}: only the evaluation itself knows where they are."
        for name in samples.ood_scores
        if name not in images.splits
    ]
    if run is None:
        return found, notes
    if run.method != "tal":
        return found, [*notes, "No typicalness: only runs trained by TAL keep the queue that it is measured by."]
    if not typicalness:
        return found, [*notes, "No typicalness: the pass over the training images was left out."]
    try:
        cache_folder = run.checkpoint.parents[1] / CACHE / run.checkpoint.stem
        typical = training_typicalness(run, cache_folder, batch_size=batch_size, device=device)
        training = Images({"train-eval": run.data.split("train-eval")}, run.data.class_names, run.data.channels)
        return found + typicalness_galleries(training, run.data.split("train-eval").labels, typical), notes
    except (ValueError, OSError) as problem:
        return found, [*notes, f"No typicalness: {problem}."]


def _primary(report: Report) -> str:
    """The score that the page judges by: the run's own, else the first."""
    scores = list(report["settings"]["old_fd"])
    return str(report["score"]) if report.get("score") in scores else scores[0]


def render(
    report: Report,
    samples: Samples,
    galleries: Sequence[Gallery] = (),
    notes: Sequence[str] = (),
) -> str:
    """The page as text, ASCII but for its own words: names are escaped.

    Args:
        report: from ``tal_fast.evaluation.report.read_report``.
        samples: what it was made from.
        galleries: images to show.
        notes: why others are not there.
    """
    scores, primary = list(samples.id_scores), _primary(report)
    panels, operating = _risk_coverage(report, samples, primary)
    groups = {
        name: kinds(samples.right, values, samples.ood_scores, name) for name, values in samples.id_scores.items()
    }
    ordered = [primary, *(name for name in scores if name != primary)]
    histograms = [charts.confidence_histogram(name, _named(groups[name])) for name in ordered]
    bins = reliability(samples.predictions["val"].probability, samples.right)
    calibration = {k: math.nan if v is None else v for k, v in (report.get("calibration") or {}).items()}
    css, javascript = (_source(name) for name in ("page.css", "page.js"))
    return str(
        _template().render(
            title=_title(report),
            model=_model(report),
            report=report,
            primary=primary,
            scores=[(i, name, charts.style(i), name in ordered[:SHOWN_SCORES]) for i, name in enumerate(scores)],
            facts=_facts(report, primary),
            conventions=_conventions(report),
            tables=_tables(report),
            panels=panels,
            operating=operating,
            risks=RISKS,
            coverages=COVERAGES,
            histograms=[chart for chart in histograms if chart is not None],
            shown=SHOWN_SCORES,
            reliability=charts.reliability_diagram(bins, calibration.get("ece", math.nan)),
            bins=_bin_rows(bins),
            galleries=galleries,
            notes=notes,
            css=css,
            javascript=javascript,
            policy=_policy(css, javascript),
            box=charts,
        )
    )


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = lambda text: printable(str(text))
    return environment.get_template("page.html.j2")


def _source(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _policy(css: str, javascript: str) -> str:
    """Content-Security-Policy: nothing from outside, and of styles and scripts only the page's own, by their hash."""

    def digest(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; img-src data:; style-src {digest(css)}; script-src {digest(javascript)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _title(report: Report) -> str:
    if "run" in report:
        return printable(Path(report["run"]).resolve().name)
    return printable(Path(str(report.get("npz") or report.get("weights") or "evaluation")).name)


def _model(report: Report) -> str:
    """What was evaluated, as the beginning of a sentence."""
    if "method" not in report:
        return f"The model {printable(str(report['model']))}." if "model" in report else "The outputs of a model."
    return f"A model trained by {report['method'].upper()}, {report['checkpoint']} checkpoint, epoch {report['epoch']}."


def _named(groups: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {printable(kind): values for kind, values in groups.items()}


def _setting_title(key: str, report: Report) -> str:
    kind, _, name = key.partition("/")
    title = SETTING_TITLES.get(kind, printable(kind))
    sets, what, link = (report["ood_names"], "OOD sets", "against")
    if kind == "shift":
        sets, what, link = (report.get("shift_names", []), "shifted sets", "to")
    if not name and kind != "old_fd":
        if len(sets) > 1:
            return f"{title}: mean over {len(sets)} {what}"
        name = "".join(sets)
    return title + (f" {link} {printable(name)}" if name else "")


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _percent(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}%}"


def _facts(report: Report, primary: str) -> list[tuple[str, str, str]]:
    """(what, number, detail) of what is read first."""
    counts = report["counts"]
    found = [("ID accuracy", _percent(_number(report["id_accuracy"])), f"{counts['id_right']:,} of {counts['id']:,}")]
    for key in ("old_fd", "ood", "new_fd"):
        if key in report["settings"]:
            values = report["settings"][key][primary]
            aurc, auroc = (format_value(metric, _number(values[metric])) for metric in ("aurc", "auroc"))
            bounds = [_number(report[name].get(key)) for name in ("aurc_floor", "aurc_random")]
            between = " to ".join(format_value("aurc", bound) for bound in bounds)
            found.append((f"{SETTING_TITLES[key]} AURC", aurc, f"floor to random: {between}; AUROC {auroc}"))
    calibration = report.get("calibration")
    if calibration:
        ece, nll, brier = (_number(calibration.get(key)) for key in ("ece", "nll", "brier"))
        found.append(("ECE of the softmax", f"{ece:.4f}", f"NLL {nll:.4f} nats, Brier {brier:.4f}"))
    return found


def _conventions(report: Report) -> list[tuple[str, str]]:
    """(what, how) of everything that decides the numbers."""
    counts = report["counts"]
    sets = ", ".join(f"{printable(name)} ({n:,})" for name, n in counts["ood"].items()) or "none"
    found = [
        ("convention of the metrics", report["convention"]),
        ("ID : OOD mix", mix_and_seed(report)),
        ("samples", f"{counts['id']:,} ID; OOD sets: {sets}"),
        ("units", "natural (fractions); papers print AURC, E-AURC and AUGRC times 1000, the rest in percent"),
        ("ties", "the column “tied” is the share of samples whose score equals another’s"),
    ]
    if "images" in report:
        how = report["images"]
        part = f"the central {how['crop_fraction']:.4g} of the shorter side" if "crop_fraction" in how else "all of it"
        numbers = ("(" + ", ".join(f"{v:.4g}" for v in how[what]) + ")" for what in ("mean", "std"))
        size = f"{how['image_size']} × {how['image_size']} pixels"
        found.append(
            ("images", f"{part}, resized to {size} ({how['interpolation']}); normalised by {' and '.join(numbers)}")
        )
    if "temperature" in report:
        scaling = report["temperature"]
        found.append(
            (
                "temperature",
                f"{scaling['value']:.4g}, fitted on {scaling['held_out']:,} ID samples, which are judged nowhere else",
            )
        )
    if report.get("left_out"):
        left_out = "; ".join(f"{score}: {printable(why)}" for score, why in report["left_out"].items())
        found.append(("scores left out", left_out))
    if "bootstrap" in report:
        how = report["bootstrap"]
        found.append(
            (
                "intervals",
                f"{how['level']:.0%}, bootstrap of {how['resamples']:,} resamples: {printable(how['method'])}",
            )
        )
    versions = report.get("versions", {})
    return [*found, ("versions", ", ".join(f"{printable(name)} {v}" for name, v in versions.items()))]


def _tables(report: Report) -> list[Table]:
    return [_table(report, key, by_score) for key, by_score in report["settings"].items()]


def _table(report: Report, key: str, by_score: Mapping[str, Mapping[str, float]]) -> Table:
    best = {
        metric: _best([_number(values.get(metric)) for values in by_score.values()], HIGHER_IS_BETTER[metric])
        for metric in METRICS
    }
    tied = report["tied_share"].get(key, {})
    rows = {}
    for score, values in by_score.items():
        numbers = {metric: _number(values.get(metric)) for metric in METRICS}
        intervals = report.get("intervals", {}).get(key, {}).get(score, {})
        cells = [
            Cell(format_value(metric, value), len(by_score) > 1 and value == best[metric], _ends(metric, intervals))
            for metric, value in numbers.items()
        ]
        rows[score] = [*cells, Cell(_percent(_number(tied.get(score)), 1))]
    n = report["samples"].get(key)
    samples = ""
    if n is not None:
        parts = f"{n['id']:,} ID" + (f" + {n['ood']:,} OOD" if n["ood"] else "")
        samples = f"{parts} samples, {n['errors']:,} errors"
    floor, chance = (_number(report[name].get(key)) for name in ("aurc_floor", "aurc_random"))
    reasons = report["undefined"].get(key, {})
    notes = [
        f"Undefined ({', '.join(TITLES[m] for m in METRICS if reasons.get(m) == why)}): {printable(why)}"
        for why in sorted(set(reasons.values()))
    ]
    return Table(
        key,
        _setting_title(key, report),
        samples,
        f"AURC floor {format_value('aurc', floor)}, random score {format_value('aurc', chance)}",
        [*((TITLES[m], HIGHER_IS_BETTER[m]) for m in METRICS), ("tied", None)],
        rows,
        _differences(report, key),
        notes,
    )


def _ends(metric: str, intervals: Mapping[str, Sequence[float | None]]) -> str:
    """``low to high`` of a metric's interval; nothing where there is none."""
    if metric not in intervals:
        return ""
    low, high = (format_value(metric, _number(end)) for end in intervals[metric][-2:])
    return f"{low} to {high}"


def _differences(report: Report, key: str) -> dict[str, list[Cell]]:
    """Each score minus the baseline, marked where the interval leaves zero out."""
    rows = {}
    for score, by_metric in report.get("differences", {}).get(key, {}).items():
        cells = []
        for metric in METRICS:
            value, low, high = (_number(v) for v in by_metric.get(metric, (None, None, None)))
            text = format_value(metric, value)
            sign = "+" if value > 0 else ""
            cells.append(Cell(sign + text, low > 0 or high < 0, _ends(metric, by_metric)))
        rows[score] = cells
    return rows


def _best(values: Sequence[float], higher: bool) -> float:
    known = [value for value in values if not math.isnan(value)]
    return (max if higher else min)(known) if known else math.nan


def _risk_coverage(
    report: Report, samples: Samples, primary: str
) -> tuple[list[Chart], list[tuple[str, dict[str, list[Cell]]]]]:
    """A panel a setting, and (title, score -> cells) of its operating points."""
    settings = judged_settings(
        samples.right, samples.id_scores, samples.ood_scores, samples.shifts, Mix.parse(report["mix"]), report["seed"]
    )
    points = max(40, min(charts.POINTS, _ALL_POINTS // (len(settings) * len(samples.id_scores))))
    panels, tables = [], []
    for key, one in settings.items():
        found = {score: OperatingPoints(own, one.setting.success) for score, own in one.confidences().items()}
        title = _setting_title(key, report)
        panel = charts.risk_coverage(title, one.setting, found, primary, RISKS, COVERAGES, points)
        if panel is None:
            continue
        panels.append(panel)
        tables.append((title, _operating_cells(found)))
    return panels, tables


def _operating_cells(found: Mapping[str, OperatingPoints]) -> dict[str, list[Cell]]:
    columns: list[list[Operating | None]] = [[p.at_risk(risk) for p in found.values()] for risk in RISKS]
    columns += [[p.at_coverage(coverage) for p in found.values()] for coverage in COVERAGES]
    rows: dict[str, list[Cell]] = {score: [] for score in found}
    for k, column in enumerate(columns):
        by_coverage = k < len(RISKS)
        values = [math.nan if p is None else p.coverage if by_coverage else p.risk for p in column]
        best = _best(values, by_coverage)
        for score, point, value in zip(found, column, values, strict=True):
            detail = "no threshold" if point is None else f"at {point.threshold:.5g}"
            rows[score].append(Cell(_percent(value), len(found) > 1 and value == best, detail))
    return rows


def _bin_rows(bins: Any) -> list[tuple[str, str, str, str]]:
    return [
        (f"{k / BINS:.3f}–{(k + 1) / BINS:.3f}", f"{count:,}", _percent(float(confidence)), _percent(float(accuracy)))
        for k, (count, confidence, accuracy) in enumerate(zip(*bins, strict=True))
        if count
    ]
