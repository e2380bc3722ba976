"""The page: fills the template with the contents of an evaluation."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

import jinja2

from tal_fast.evaluation.evaluation import Evaluation
from tal_fast.evaluation.html import charts
from tal_fast.evaluation.html.images import gallery_sections
from tal_fast.evaluation.html.summary import conventions, headline_numbers, model_description, page_title
from tal_fast.evaluation.html.tables import COVERAGES, RISKS, bin_rows, operating_tables, setting_tables
from tal_fast.evaluation.tables import nan_if_none, printable, setting_title
from tal_fast.metrics.curves import kinds, reliability
from tal_fast.utils.io import replacing

FILE = "report.html"
SHOWN_SCORES = 6
"""Curves shown at first, and histograms outside the folded part."""
MAX_POINTS = 80_000
"""Points of all curves together, about a megabyte of coordinates."""
_FOLDER = Path(__file__).parent


def write_html(evaluation: Evaluation, folder: str | Path) -> Path:
    """Write ``report.html`` of an evaluation and return its path."""
    path = Path(folder) / FILE
    text = render(evaluation)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def render(evaluation: Evaluation) -> str:
    """Render the page of an evaluation; names from outside are escaped."""
    report, samples, primary = evaluation.report, evaluation.samples, evaluation.primary_score
    scores = list(samples.id_scores)
    ordered = [primary, *(score for score in scores if score != primary)]
    bins = reliability(samples.predictions["val"].probability, samples.correct)
    ece = nan_if_none((report.get("calibration") or {}).get("ece"))
    css, javascript = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return str(
        _template().render(
            title=page_title(report),
            model=model_description(report),
            report=report,
            primary=primary,
            scores=[(i, score, charts.style(i), score in ordered[:SHOWN_SCORES]) for i, score in enumerate(scores)],
            headline=headline_numbers(report, primary),
            conventions=conventions(report),
            tables=setting_tables(report),
            panels=_risk_coverage_charts(evaluation),
            operating=operating_tables(evaluation),
            risks=RISKS,
            coverages=COVERAGES,
            histograms=_histograms(evaluation, ordered),
            shown=SHOWN_SCORES,
            reliability=charts.reliability_diagram(bins, ece),
            bins=bin_rows(bins),
            galleries=gallery_sections(evaluation),
            notes=evaluation.notes,
            css=css,
            javascript=javascript,
            policy=_security_policy(css, javascript),
            box=charts,
        )
    )


def _risk_coverage_charts(evaluation: Evaluation) -> list[charts.Chart]:
    curves = len(evaluation.settings) * len(evaluation.samples.id_scores)
    points = max(40, min(charts.MAX_CURVE_POINTS, MAX_POINTS // curves))
    found = [
        charts.risk_coverage(
            setting_title(key, evaluation.report), evaluation.settings[key].setting, by_score, evaluation.primary_score,
            RISKS, COVERAGES, points,
        )
        for key, by_score in evaluation.operating_points.items()
    ]  # fmt: skip
    return [chart for chart in found if chart is not None]


def _histograms(evaluation: Evaluation, scores: list[str]) -> list[charts.Chart]:
    samples = evaluation.samples
    found = []
    for score in scores:
        groups = kinds(samples.correct, samples.id_scores[score], samples.ood_scores, score)
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
