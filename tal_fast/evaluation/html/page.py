"""The page: fills the template with the contents of an evaluation."""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import importlib.util
from functools import cache
from pathlib import Path

import jinja2

from tal_fast.evaluation.evaluation import Evaluation
from tal_fast.evaluation.html import charts, tables
from tal_fast.evaluation.html.images import gallery_sections
from tal_fast.evaluation.html.verdicts import verdicts
from tal_fast.evaluation.report import Report
from tal_fast.evaluation.tables import format_percent, mix_with_seed, nan_if_none, printable, setting_title
from tal_fast.metrics.curves import reliability, scores_by_kind
from tal_fast.runs.folder import METRICS_FILE
from tal_fast.utils.io import write_text

FILE = "report.html"
SHOWN_SCORES = 6
"""Scores with curves and histograms: the primary one and the others of least AURC in Old FD."""
_FOLDER = Path(__file__).parent


def write_html(evaluation: Evaluation, folder: str | Path) -> Path:
    """Write ``report.html`` of an evaluation and return its path."""
    path = Path(folder) / FILE
    write_text(path, render(evaluation, folder))
    return path


def render(evaluation: Evaluation, folder: str | Path) -> str:
    """Render the page of an evaluation of ``folder``; names from outside are escaped."""
    report, samples, primary = evaluation.report, evaluation.samples, evaluation.primary_score
    aurc = {score: nan_if_none(values["aurc"]) for score, values in report["settings"]["old_fd"].items()}
    shown = sorted(samples.id_scores, key=lambda score: (score != primary, aurc[score]))[:SHOWN_SCORES]
    filled = [key for key, judged in evaluation.settings.items() if judged.setting.success.size]
    bins = reliability(samples.predictions["val"].probability, samples.correct)
    ece = nan_if_none((report.get("calibration") or {}).get("ece"))
    validation, class_names = samples.predictions["val"], _class_names(evaluation)
    drawn = importlib.util.find_spec("matplotlib") is not None
    css, javascript = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return str(
        _template().render(
            title=_page_title(report),
            model=_model_description(report),
            report=report,
            primary=primary,
            scores=[(score, charts.style(i)) for i, score in enumerate(shown)],
            verdicts=verdicts(evaluation),
            conventions=_conventions(report),
            tables=[tables.setting_table(report, key) for key in report["settings"]],
            legend=tables.MEANINGS,
            drawn=drawn,
            panels=[charts.risk_coverage(evaluation, key, shown) for key in filled] if drawn else [],
            operating=[
                tables.operating_table(setting_title(key, report), evaluation.operating_points[key]) for key in filled
            ],
            histograms=_histograms(evaluation, shown) if drawn else [],
            others=len(samples.id_scores) - len(shown),
            reliability=[charts.reliability_diagram(bins, ece)] if drawn and samples.correct.size else [],
            classes=tables.class_table(validation, class_names),
            all_classes=len(class_names),
            confusions=tables.confusion_table(validation, class_names),
            training=charts.training_curves(_training_rows(report, Path(folder))) if drawn else [],
            galleries=gallery_sections(evaluation),
            notes=evaluation.notes,
            css=css,
            javascript=javascript,
            policy=_security_policy(css, javascript),
            box=charts,
        )
    )


def _class_names(evaluation: Evaluation) -> list[str]:
    """Names of the classes, or their numbers where only the outputs are known."""
    if evaluation.images is not None:
        return [printable(name) for name in evaluation.images.class_names]
    predictions = evaluation.samples.predictions["val"]
    found = [values.max() for values in (predictions.label, predictions.prediction) if values.size]
    return [f"class {c}" for c in range(max(found, default=-1) + 1)]


def _training_rows(report: Report, folder: Path) -> list[dict[str, float]]:
    """Rows of the metrics.csv of the evaluated run; none if it is not there."""
    for run in (folder, Path(report["run"])) if "run" in report else ():
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            lines = (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(lines)]
            return sorted(rows, key=lambda row: row["epoch"])
    return []


def _page_title(report: Report) -> str:
    """Name of the run or file that was evaluated."""
    if "run" in report:
        return printable(Path(report["run"]).resolve().name)
    return printable(Path(str(report.get("npz") or report.get("weights") or "evaluation")).name)


def _model_description(report: Report) -> str:
    """Sentences that say what was evaluated, how accurate it is and how well calibrated."""
    text = f"The model {printable(str(report['model']))}." if "model" in report else "The outputs of a model."
    if "method" in report:
        text = f"Method {printable(report['method'])}, {report['checkpoint']} checkpoint, epoch {report['epoch']}."
    right, images = report["counts"]["id_right"], report["counts"]["id"]
    text += f" Accuracy {format_percent(nan_if_none(report['id_accuracy']))} ({right:,} of {images:,})"
    if calibration := report.get("calibration"):
        ece, nll, brier = (nan_if_none(calibration.get(key)) for key in ("ece", "nll", "brier"))
        text += f"; softmax with ECE {ece:.4f}, NLL {nll:.4f} nats, Brier {brier:.4f}"
    return f"{text}."


def _conventions(report: Report) -> list[tuple[str, str]]:
    """(name, description) of everything that decides the numbers."""
    sets = ", ".join(f"{printable(name)} ({n:,})" for name, n in report["counts"]["ood"].items()) or "none"
    entries = [
        ("convention of the metrics", report["convention"]),
        ("ID : OOD mix", mix_with_seed(report)),
        ("samples", f"{report['counts']['id']:,} ID; OOD sets: {sets}"),
        ("units", "natural (fractions); papers print AURC, E-AURC and AUGRC times 1000, the rest in percent"),
    ]
    if "images" in report:
        how = report["images"]
        part = f"the central {how['crop_fraction']:.4g} of the shorter side" if "crop_fraction" in how else "all of it"
        mean, std = ("(" + ", ".join(f"{v:.4g}" for v in how[name]) + ")" for name in ("mean", "std"))
        size = f"{how['image_size']} × {how['image_size']} pixels"
        text = f"{part}, resized to {size} ({how['interpolation']}); normalised by mean {mean} and std {std}"
        entries.append(("images", text))
    if "temperature" in report:
        scaling = report["temperature"]
        text = f"{scaling['value']:.4g}, fitted on {scaling['held_out']:,} ID samples, which take part in nothing else"
        entries.append(("temperature", text))
    if report.get("left_out"):
        text = "; ".join(f"{score}: {printable(reason)}" for score, reason in report["left_out"].items())
        entries.append(("scores left out", text))
    if "bootstrap" in report:
        how = report["bootstrap"]
        text = f"{how['level']:.0%}, {printable(how['method'])}"
        entries.append(("intervals", text))
    versions = ", ".join(f"{printable(name)} {version}" for name, version in report.get("versions", {}).items())
    return [*entries, ("versions", versions)]


def _histograms(evaluation: Evaluation, scores: list[str]) -> list[charts.Chart]:
    samples = evaluation.samples
    found = []
    for score in scores:
        groups = scores_by_kind(samples.correct, samples.id_scores[score], samples.ood_scores, score)
        found.append(charts.confidence_histogram(score, {printable(kind): values for kind, values in groups.items()}))
    return [chart for chart in found if chart is not None]


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


def _security_policy(css: str, javascript: str) -> str:
    """Content-Security-Policy that allows nothing from outside, and only the page's own style and script by hash."""
    style, script = (
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (css, javascript)
    )
    return (
        f"default-src 'none'; img-src data:; style-src {style}; script-src {script}; base-uri 'none'; "
        "form-action 'none'"
    )
