"""report.html: its content, its escapes, and how a browser shows it."""

from __future__ import annotations

import base64
import html
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tal_fast import html_report
from tal_fast.evaluation.evaluation import read_evaluation
from tal_fast.evaluation.html.page import FILE, write_html
from tal_fast.evaluation.npz import read_npz
from tal_fast.evaluation.pipeline import evaluate_outputs
from tal_fast.evaluation.report import EvaluationOptions, write_report
from tal_fast.evaluation.sources import evaluate_run
from tal_fast.evaluation.tables import format_value
from tal_fast.metrics.curves import OperatingPoints
from tal_fast.runs.folder import COLUMNS, write_metrics
from tal_fast.runs.predictions import CACHE
from tests.helpers.chromium import PROGRAM, Chromium, chromium
from tests.helpers.evaluation import Page, make_run, read_json, write_npz

CLASSES = ('<script>alert("class")<script>', "a'b\"c&d", "cat")
FILES = (b"<img src=x onerror=alert(1)>.png", b"\"quoted' & tagged.png", b"caf\xe9 \xff.png", "\u202egnp.png".encode())


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an evaluated run whose class, file and set names are an attacker's."""
    root = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    for folder in [*(f"{split}/{name}" for split in ("train", "val") for name in CLASSES), "ood"]:
        (root / folder).mkdir(parents=True)
        for i, name in enumerate(FILES):
            side = 16 if i else 200  # the first is scaled down
            pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
            try:
                with open(os.fsencode(root / folder) + b"/" + name, "wb") as file:
                    Image.fromarray(pixels).save(file, "PNG")
            except OSError:
                pytest.skip("this file system does not take names that are not UTF-8")
    data = {
        "dataset": "folder", "root": str(root), "ood": {"</style><b>ood": str(root / "ood")}, "loader": "torch",
        "workers": 0, "image_size": 16,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAL_FAST_CACHE", str(root / "cache"))
        run = make_run(root / "<i>run<\u2215i>", data=data, classes=sorted(CLASSES))
        evaluate_run(run)
    return run


def page_of(path: Path, options: EvaluationOptions | None = None) -> Page:
    """Page of the outputs in an .npz."""
    return Page(write_html(evaluate_outputs(read_npz(path), options, {"npz": str(path)}), path.parent))


def test_tables_hold_every_number(evaluated_run: Path) -> None:
    text, report = Page(evaluated_run / FILE).text, read_json(evaluated_run)
    for by_score in report["settings"].values():
        for values in by_score.values():
            for metric, value in values.items():
                assert format_value(metric, value) in text, metric
    for name in ("aurc_floor", "aurc_random"):
        for value in report[name].values():
            assert format_value("aurc", value) in text
    for part in ("balanced-random, seed 0", "tal_fast", "Old FD", "New FD against noise"):
        assert part in text


def test_the_best_of_each_column_is_bold(evaluated_run: Path) -> None:
    text, values = (evaluated_run / FILE).read_text(), read_json(evaluated_run)["settings"]["new_fd"].values()
    table = text.split('aria-label="New FD against noise"')[1].split("</table>")[0]
    best = re.findall(r"<strong>([^<]*)</strong>", table)
    assert f"{min(v['aurc'] for v in values):.5f}" in best
    assert f"{max(v['auroc'] for v in values):.4f}" in best
    assert f"{max(v['aurc'] for v in values):.5f}" not in best


def test_operating_points_are_those_of_the_samples(evaluated_run: Path) -> None:
    samples, text = read_evaluation(evaluated_run).samples, Page(evaluated_run / FILE).text
    for coverage in (0.8, 0.9, 0.95):
        point = OperatingPoints(samples.id_scores["cosine"], samples.correct).at_coverage(coverage)
        assert point is not None
        assert f"{point.risk:.2%} at {point.threshold:.5g}" in text


def test_nothing_is_loaded_from_outside(evaluated_run: Path) -> None:
    page = Page(evaluated_run / FILE)
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), tag
            assert name != "style", tag
            if name in ("src", "href"):
                assert (value or "").startswith(("data:", "#")), (tag, value)
    policy = next(m["content"] or "" for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert (evaluated_run / FILE).stat().st_size < 1_000_000


def test_names_are_escaped(hostile_run: Path) -> None:
    text, page = (hostile_run / FILE).read_text(encoding="utf-8"), Page(hostile_run / FILE)
    assert len(page.all("script")) == 1
    assert not page.all("i")
    assert all("onerror" not in attributes for _, attributes in page.elements)
    assert "<script>alert" not in text
    assert "</style><b>" not in text
    for shown in (CLASSES[0], "<img src=x onerror=alert(1)>.png", "\"quoted' & tagged.png"):
        assert shown in page.text
    assert "caf\\xe9 \\xff.png" in page.text
    assert "\\u202egnp.png" in page.text
    assert "\u202e" not in text
    assert html.escape("<i>run<∕i>", quote=True) in text


def test_undefined_metrics_have_a_reason(tmp_path: Path) -> None:
    logits = np.eye(4)[np.arange(40) % 4] * 3
    np.savez(tmp_path / "correct.npz", logits=logits, labels=np.arange(40) % 4)
    text = page_of(tmp_path / "correct.npz").text
    assert "Undefined (AUROC, FPR95, TNR95, AUPR-error): there are no errors among the 40 samples" in text
    assert "nan" not in text


def test_a_page_without_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", logits=np.zeros((0, 3)), labels=np.zeros(0, np.int64))
    assert "There are no samples." in page_of(tmp_path / "none.npz").text


@pytest.mark.parametrize("sets", [0, 1, 2])
def test_every_setting_has_a_chart_and_tables(tmp_path: Path, sets: int) -> None:
    rng = np.random.default_rng(0)
    arrays = {"ood_noise_logits": None, "logits": rng.normal(size=(30, 2)), "labels": rng.integers(2, size=30)}
    for name in ("fog", "<b>snow")[:sets]:
        arrays |= {f"ood_{name}_logits": rng.normal(size=(20, 2)), f"shift_{name}_logits": rng.normal(size=(20, 2))}
        arrays[f"shift_{name}_labels"] = rng.integers(2, size=20)
    page = page_of(write_npz(tmp_path / "x.npz", **arrays))
    assert len(page.charts) == 1 + 3 * sets
    assert ("OOD: mean over 2 OOD sets" in page.text) == (sets == 2)
    if sets:
        errors = int((arrays["shift_fog_logits"].argmax(1) != arrays["shift_fog_labels"]).sum())
        title = "Old FD under shift (fog)"
        assert any(
            label.startswith(f"Risk against coverage, {title}: 20 samples, {errors} wrong.") for label in page.charts
        )
        assert page.text.count(title) == 4  # verdict, metrics, chart, operating points


def test_intervals_and_differences_are_shown(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "x.npz")
    evaluation = evaluate_outputs(read_npz(path), EvaluationOptions(scores=["msp", "max_logit"], intervals=True))
    text, report = write_html(evaluation, tmp_path).read_text(), evaluation.report
    for key in ("old_fd", "ood", "new_fd"):
        low, high = report["intervals"][key]["max_logit"]["auroc"]
        assert f"<small>{low:.4f} to {high:.4f}</small>" in text
        value, low, high = report["differences"][key]["max_logit"]["augrc"]
        number = f"{'+' * (value > 0)}{value:.5f}"
        cell = f"<strong>{number}</strong>" if low > 0 or high < 0 else number
        assert f"{cell}<small>{low:.5f} to {high:.5f}</small>" in text
    assert "95%, Student&#39;s t from the influence of each sample" in text
    assert "differences to msp" in text


def test_unknown_entries_of_a_report_are_tolerated(evaluated_run: Path, tmp_path: Path) -> None:
    report = read_json(evaluated_run)
    report["from_the_future"] = {"x": [1]}
    report["settings"]["shift/fog <1>"] = report["settings"]["old_fd"]
    del report["calibration"]
    write_report(report, tmp_path / "report.json")
    shutil.copy(evaluated_run / "samples.npz", tmp_path)
    assert "fog <1>" in Page(write_html(read_evaluation(tmp_path), tmp_path)).text


def test_the_command_writes_the_same_page(
    evaluated_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("report.json", "samples.npz"):
        shutil.copy(evaluated_run / name, tmp_path)
    # The run is found through the report.
    assert html_report.main([str(tmp_path), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / FILE}\n"
    assert (tmp_path / FILE).read_bytes() == (evaluated_run / FILE).read_bytes()


def test_the_command_measures_typicalness_unless_told_not_to(
    evaluated_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(evaluated_run, tmp_path / "run", ignore=shutil.ignore_patterns(CACHE))
    run = tmp_path / "run"
    assert html_report.main([str(run), "--no-typicalness", "--device", "cpu"]) == 0
    text = Page(run / FILE).text
    assert "the pass over the training images was left out" in text
    assert "Most confident mistakes" in text
    assert not (run / CACHE).exists()
    assert html_report.main([str(run), "--batch_size", "100", "--device", "cpu"]) == 0
    assert "Least typical training images" in Page(run / FILE).text
    assert (run / CACHE / "best" / "typicalness.npz").exists()
    (run / "samples.npz").unlink()
    capsys.readouterr()
    assert html_report.main([str(run), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: there is no ")
    assert said.count("\n") == 1


def test_classes_and_confusions_are_those_of_the_predictions(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    labels, prediction = rng.integers(4, size=60), rng.integers(4, size=60)
    arrays = {"logits": 4.0 * np.eye(4)[prediction], "labels": labels, "ood_noise_logits": None}
    page = page_of(write_npz(tmp_path / "x.npz", **arrays))
    for a in range(4):
        hits = int(((labels == a) & (prediction == a)).sum())
        accuracy, precision = hits / (labels == a).sum(), hits / (prediction == a).sum()
        assert f"class {a} {(labels == a).sum()} {accuracy:.2%} {precision:.2%}" in page.text
        for b in range(4):
            count = int(((labels == a) & (prediction == b)).sum())
            row = f"class {a} class {b} {count} {count / (labels == a).sum():.2%}"
            assert (row in page.text) == (count > 0 and a != b)


def test_the_training_of_the_run_is_drawn(evaluated_run: Path, tmp_path: Path) -> None:
    evaluation = read_evaluation(evaluated_run)
    assert "training" not in [svg.get("data-kind") for svg in Page(write_html(evaluation, tmp_path)).all("svg")]
    rows = [{"epoch": e, "train_loss": 1 / e, "val_accuracy": 0.5 + e / 10, "aurc": float("nan")} for e in (1, 2, 3)]
    write_metrics(tmp_path, [dict.fromkeys(COLUMNS, float("nan")) | row for row in rows])
    found = [svg for svg in Page(write_html(evaluation, tmp_path)).all("svg") if svg.get("data-kind") == "training"]
    assert [svg["aria-label"] for svg in found] == [
        "Loss over 3 epochs; in the last: training 0.3333.", "Accuracy over 3 epochs; in the last: validation 80."
    ]  # fmt: skip


def test_without_matplotlib_the_page_has_its_tables(
    evaluated_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    page = Page(write_html(read_evaluation(evaluated_run), tmp_path))
    assert not page.charts
    assert "Matplotlib is not installed, so this page has no charts; pip install matplotlib" in page.text
    assert "of the label’s" in page.text


def test_a_page_of_many_sets_stays_below_3_mb(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    arrays = {f"ood_set{i}_logits": rng.normal(size=(900, 5)) for i in range(8)}
    arrays |= {"logits": rng.normal(size=(5000, 5)), "labels": rng.integers(5, size=5000)}
    path = write_npz(tmp_path / "x.npz", **arrays, ood_noise_logits=None)
    evaluation = evaluate_outputs(read_npz(path), EvaluationOptions(scores=["logits"]))
    assert 100_000 < write_html(evaluation, tmp_path).stat().st_size < 3_000_000


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if PROGRAM is None:
        pytest.skip("needs Chromium (Debian's package chromium)")
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize(
    ("run", "scheme", "width"),
    [
        ("evaluated_run", "light", 400),
        *(
            pytest.param(run, scheme, width, marks=pytest.mark.slow)
            for run, scheme, width in itertools.product(
                ("evaluated_run", "hostile_run"), ("light", "dark"), (400, 1280)
            )
            if (run, scheme, width) != ("evaluated_run", "light", 400)
        ),
    ],
)
def test_a_browser_shows_the_whole_page(
    run: str, scheme: str, width: int, browser: Chromium, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(run) / FILE
    browser.open(path, width, prefers_color_scheme=scheme)
    assert browser.complaints() == []
    assert browser.requests() == [path.resolve().as_uri()]
    assert browser.evaluate("[document.documentElement.scrollWidth, window.innerWidth]") == [width, width]
    images = browser.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert len(images) >= 12
    assert all(images)
    # Every chart has a size and every curve lies within its panel's width.
    boxes = browser.evaluate(
        "[...document.querySelectorAll('.chart > svg')].map(s => [s.clientWidth, s.clientHeight, "
        "...[...s.querySelectorAll('g.line > path')].map(p => p.getBBox().width)])"
    )
    assert len(boxes) >= 5
    for chart in boxes:
        assert chart[0] >= 300
        assert chart[1] >= 200
        assert all(0 < wide <= 400 for wide in chart[2:])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_curves_have_enough_contrast(scheme: str, evaluated_run: Path, browser: Chromium) -> None:
    """WCAG AA: a contrast of 4.5 for all text, of 3 for the curves."""
    browser.open(evaluated_run / FILE, prefers_color_scheme=scheme)
    pairs = browser.evaluate("""
        [...document.querySelectorAll('body *')].filter(e => e.checkVisibility()).flatMap(e => {
          const style = getComputedStyle(e), line = e.matches('.line > path, .line use');
          const words = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && !e.closest('title');
          if (!line && !words) return [];
          let back = e;
          while (back && getComputedStyle(back).backgroundColor === 'rgba(0, 0, 0, 0)') back = back.parentElement;
          const colour = line ? style.stroke : e.closest('svg') ? style.fill : style.color;
          return [[line, colour, getComputedStyle(back ?? document.body).backgroundColor]];
        })
    """)

    def luminance(colour: str) -> float:
        rgb = np.array([int(v) for v in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    assert len(pairs) > 300
    for line, colour, back in {tuple(pair) for pair in pairs}:
        light, dark = sorted((luminance(colour), luminance(back)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= (3 if line else 4.5), (line, colour, back)


@pytest.mark.slow
def test_parts_of_the_page_have_accessible_names(evaluated_run: Path, browser: Chromium) -> None:
    browser.open(evaluated_run / FILE)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    names: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            names.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("image", "region", "columnheader", "rowheader", "link"):
        assert names.get(role), role
        assert all(names[role]), role
    assert any(name.startswith("Risk against coverage, Old FD: 200 samples") for name in names["image"])
    levels = browser.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(np.diff(levels)) <= 1


@pytest.mark.slow
def test_a_title_sorts_its_column(evaluated_run: Path, browser: Chromium) -> None:
    browser.open(evaluated_run / FILE)
    values = {score: v["auroc"] for score, v in read_json(evaluated_run)["settings"]["old_fd"].items()}
    table = "document.querySelector('table.sortable')"
    titles = browser.evaluate(f"[...{table}.tHead.rows[0].cells].map(c => c.innerText)")
    column = next(i for i, title in enumerate(titles) if title.startswith("AUROC"))
    for reverse, said in ((True, "descending"), (False, "ascending")):
        browser.evaluate(f"{table}.tHead.rows[0].cells[{column}].firstChild.click()")
        shown = browser.evaluate(f"[...{table}.tBodies[0].rows].map(r => r.cells[0].innerText)")
        assert [values[score] for score in shown] == sorted(values.values(), reverse=reverse)
        assert browser.evaluate(f"{table}.tHead.rows[0].cells[{column}].getAttribute('aria-sort')") == said


@pytest.mark.slow
def test_the_page_prints(evaluated_run: Path, browser: Chromium, tmp_path: Path) -> None:
    browser.open(evaluated_run / FILE, 794, media="print", prefers_color_scheme="dark")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    pdf = base64.b64decode(browser.call("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF")


@pytest.mark.slow
def test_the_security_policy_blocks_injected_scripts(evaluated_run: Path, browser: Chromium, tmp_path: Path) -> None:
    """Had a name slipped through, the browser would still run and load nothing of it."""
    text = (evaluated_run / FILE).read_text(encoding="utf-8")
    slip = "<script>document.title = 'taken'</script><img src='https://tracker.invalid/x.png'>"
    changed = tmp_path / "changed.html"
    changed.write_text(text.replace("</main>", slip + "</main>"), encoding="utf-8")
    browser.open(changed)
    assert browser.evaluate("document.title") != "taken"
    assert "Content Security Policy" in " ".join(browser.complaints())
