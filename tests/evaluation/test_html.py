"""report.html: what it says, what it escapes, and that a browser shows it whole, in both themes and sizes."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tal_fast import evaluation as evaluate
from tal_fast.config.schema import Config
from tal_fast.data.datasets import MemoryImages
from tal_fast.evaluation.html import FILE, write_html
from tal_fast.evaluation.html import command as __main__
from tal_fast.evaluation.html.charts import nice_ticks
from tal_fast.evaluation.html.gallery import SIDE, TILES, copy_of, printable, surest
from tal_fast.evaluation.sample_scores import Predictions, Samples, read_samples, write_samples
from tal_fast.evaluation.train_typicalness import queue_of, rescale, training_typicalness
from tal_fast.loss.queue import FeatureQueue
from tal_fast.loss.reference import feature_statistics, nearest_distance
from tal_fast.metrics.calibration import expected_calibration_error
from tal_fast.metrics.curves import OperatingPoints, histograms, oracle_risk, reliability, thinned
from tal_fast.metrics.ranking import risk_coverage_curve
from tal_fast.models import build_model
from tal_fast.runs import checkpoint
from tal_fast.runs.load import load_run
from tests.helpers.chromium import PROGRAM, Chromium, chromium

EVIL = ('<script>alert("class")</script>', "a'b\"c&d", "cat")


def queue_state(entries: int, capacity: int = 50, seed: int = 0) -> dict[str, Any]:
    """What a TAL run's checkpoint holds for one rank."""
    torch.manual_seed(seed)
    queue = FeatureQueue(capacity)
    queue.push(torch.rand(entries), torch.rand(entries))
    return {"method": {f"loss_fn.queue.{name}": value for name, value in queue.state_dict().items()}}


def make_run(
    folder: Path, data: dict[str, Any], classes: list[str], *, method: str = "tal", ranks: list[Any] | None = None
) -> Path:
    """A run with fresh weights, as the trainer would leave it."""
    config = Config.from_dict(
        {"data": data, "model": {"name": "cifar_resnet8", "width": 4}, "method": {"name": method}}
    )
    channels, size = config.data.channels, config.data.image_size or 16
    torch.manual_seed(0)
    model = build_model(config.model, len(classes), channels, size)
    checkpoint.save(
        folder / "checkpoints" / "best.pt",
        {
            "config": config.to_dict(), "epoch": 7, "step": 0, "world_size": 1, "model": model.state_dict(),
            "shape": {"class_names": classes, "channels": channels, "image_size": size},
            "average": None, "optimizer": {}, "scaler": None,
            "ranks": [queue_state(40)] if ranks is None else ranks, "best": 0.0, "history": [],
        },
    )  # fmt: skip
    return folder


SYNTHETIC = {"dataset": "synthetic", "crop_area": None, "image_size": 16, "channels": 1}
BARS = [f"bars-{c}" for c in range(10)]


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TAL run on images in memory, evaluated with all scores over logits."""
    run = make_run(tmp_path_factory.mktemp("runs") / "synthetic-tal", SYNTHETIC, BARS)
    evaluate.evaluate_run(run, scores=["logits"], shifts={"noisy": "gaussian-noise"})
    return run


def evil_names() -> list[bytes]:
    return [
        b"<img src=x onerror=alert(1)>.png",
        b"\"quoted' & tagged.png",
        b"caf\xe9 \xff.png",
        "\u202egnp.png".encode(),
    ]


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose class, file and OOD names are what an attacker would choose."""
    root = tmp_path_factory.mktemp("evil")
    rng = np.random.default_rng(0)
    # A slash cannot be in a name, so the closing tag is not in a folder's.
    classes = sorted(name.replace("/", "") for name in EVIL)
    for folder in [*(f"{split}/{name}" for split in ("train", "val") for name in classes), "ood"]:
        (root / folder).mkdir(parents=True)
        for i, name in enumerate(evil_names()):
            side = 16 if i else 200  # the first is scaled down
            pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
            try:
                with open(os.fsencode(root / folder) + b"/" + name, "wb") as file:
                    Image.fromarray(pixels).save(file, "PNG")
            except OSError:
                pytest.skip("this file system does not take names that are no UTF-8")
    data = {
        "dataset": "folder", "root": str(root), "ood": {"</style><b>ood": str(root / "ood")}, "loader": "torch",
        "workers": 0, "image_size": 16,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAL_FAST_CACHE", str(root / "cache"))
        run = make_run(root / "<i>run</i>".replace("/", "\u2215"), data, classes)
        evaluate.evaluate_run(run)
    return run


def samples_of(folder: Path) -> Samples:
    found = read_samples(folder)
    assert found is not None
    return found


class Page(HTMLParser):
    """A page's elements with their attributes, and its text without scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.quiet = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.quiet += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.quiet -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self.quiet:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 7, 10_000])
def test_operating_points_against_every_threshold(levels: int) -> None:
    rng = np.random.default_rng(levels)
    scores = rng.integers(levels, size=301) / levels
    success = rng.random(301) < 0.3 + 0.6 * scores
    found = OperatingPoints(scores, success)
    kept = [(t, scores >= t) for t in np.unique(scores)]
    every = [(k.mean(), 1 - success[k].mean(), t) for t, k in kept]
    for limit in (0.0, 0.01, 0.1, 0.2, 0.3, 1.0):
        fit = [point for point in every if point[1] <= limit + 1e-12]
        point = found.at_risk(limit)
        assert (point is None) == (not fit)
        if point is not None:
            assert point == pytest.approx(max(fit))
    for least in (0.0, 0.5, 0.8, 0.95, 1.0):
        want = max((p for p in every if p[0] >= least - 1e-12), key=lambda p: p[2])
        assert found.at_coverage(least) == pytest.approx(want)


def test_operating_points_without_samples_or_threshold() -> None:
    empty = OperatingPoints([], [])
    assert empty.at_risk(0.5) is None
    assert empty.at_coverage(0.5) is None
    assert OperatingPoints([0.9, 0.1], [0, 0]).at_risk(0.99) is None
    nineteen = OperatingPoints(np.arange(20.0), np.ones(20)).at_coverage(0.95)
    assert nineteen is not None
    assert (nineteen.coverage, nineteen.threshold) == (0.95, 1.0)


def test_oracle_is_the_curve_of_a_score_that_knows() -> None:
    success = np.arange(17) % 3 > 0
    np.testing.assert_allclose(oracle_risk(17, 6), risk_coverage_curve(success * 20.0 + np.arange(17), success).risk)


@pytest.mark.parametrize(("n", "points"), [(1, 5), (5, 5), (6, 5), (1000, 40), (123_457, 240)])
def test_thinned_keeps_the_ends(n: int, points: int) -> None:
    index = thinned(n, points)
    assert index[0] == 0
    assert index[-1] == n - 1
    assert (np.diff(index) > 0).all()
    assert len(index) <= points + 16


def test_reliability_bins_add_up_to_the_ece() -> None:
    rng = np.random.default_rng(0)
    p = np.append(rng.random(500), [0.0, 1.0, 1 / 15])
    right = rng.random(503) < p
    bins = reliability(p, right)
    there = bins.samples > 0
    gap = np.abs(bins.accuracy - bins.confidence)[there] * bins.samples[there]
    assert gap.sum() / 503 == pytest.approx(expected_calibration_error(p, right))
    assert bins.samples.sum() == 503
    assert math.isnan(reliability([0.5], [1]).accuracy[0])


def test_histograms_share_edges_and_leave_infinity_out() -> None:
    edges, shares = histograms([np.array([0.0, 1.0, np.inf, np.inf]), np.zeros(0), np.full(3, 0.5)], bins=4)
    assert edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert [share.tolist() for share in shares] == [[0.25, 0, 0, 0.25], [0] * 4, [0, 0, 1, 0]]
    assert histograms([np.array([np.inf])])[0].size == 0


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0, 1.05, [0, 0.25, 0.5, 0.75, 1.0]),
        (-0.3, 0.5, [-0.2, 0, 0.2, 0.4]),
        (2, 2, [2]),
    ],
)
def test_ticks_are_round(low: float, high: float, want: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(want)


def test_predictions_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    splits = {
        name: Predictions(*rng.integers(3, size=(2, n)), rng.random(n), rng.permutation(n))
        for name, n in (("val", 7), ("a/b", 2), ("é", 3))
    }
    ood_scores = {name: {"msp": rng.random(len(splits[name]))} for name in ("a/b", "é")}
    right = splits["val"].right
    write_samples(Samples(right == 1, {"msp": rng.random(7)}, ood_scores, {}, splits), tmp_path / "samples.npz")
    found = read_samples(tmp_path)
    assert found is not None
    np.testing.assert_array_equal(found.right, right)
    assert list(found.predictions) == list(splits)
    for name, split in splits.items():
        for what in ("label", "prediction", "probability", "index", "right"):
            np.testing.assert_array_equal(getattr(split, what), getattr(found.predictions[name], what))


# --- typicalness ----------------------------------------------------------------------------------------------------


def test_queues_of_all_ranks_are_merged() -> None:
    config = {"method": {"name": "tal", "queue_scope": "local"}}
    ranks = [queue_state(30, seed=1), queue_state(120, capacity=50, seed=2), queue_state(0)]
    mean, std = queue_of({"config": config, "ranks": ranks}).contents()
    assert len(mean) == 30 + 50
    torch.manual_seed(1)
    assert torch.equal(mean[:30], torch.rand(30))
    assert torch.equal(std[:30], torch.rand(30))
    config["method"]["queue_scope"] = "global"
    assert len(queue_of({"config": config, "ranks": ranks[:1] * 2})) == 30


@pytest.mark.parametrize(
    ("ranks", "message"),
    [([queue_state(0)], "queue is empty"), ([{"method": {}}], "holds no queue"), ([], "queue is empty")],
)
def test_no_queue_no_typicalness(ranks: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        queue_of({"config": {"method": {}}, "ranks": ranks})


def test_rescaled_over_the_whole_set() -> None:
    np.testing.assert_allclose(rescale(np.array([3.0, 1.0, np.inf, 2.0, np.nan])), [0, 1, 1, 0.5, 1], atol=1e-7)
    assert rescale(np.array([2.0, 2.0])).tolist() == [1, 1]
    assert rescale(np.array([np.nan])).tolist() == [1]


def test_typicalness_of_training_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "run", SYNTHETIC, BARS, ranks=[queue_state(25, seed=3), queue_state(15, seed=4)])
    run = load_run(folder)
    found = training_typicalness(run, tmp_path / "cache", batch_size=300)
    images = torch.cat([batch for batch, _, _ in run.data.loader("train-eval", batch_size=500)])
    with torch.inference_mode():
        logits, features = run.model(images)
    queue = queue_of(checkpoint.load(run.checkpoint))
    want = nearest_distance(*feature_statistics(features), *queue.contents()).double().numpy()
    np.testing.assert_allclose(found.distance, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found.typicalness, rescale(found.distance))
    assert (found.prediction == logits.argmax(1).numpy()).mean() > 0.999
    assert found.queue_length == 40
    # Kept: no second pass, until the queue is another.
    monkeypatch.setattr(run.model, "forward", None)
    np.testing.assert_array_equal(training_typicalness(run, tmp_path / "cache").distance, found.distance)
    make_run(folder, SYNTHETIC, BARS, ranks=[queue_state(40, seed=5)])
    changed = training_typicalness(load_run(folder), tmp_path / "cache")
    assert not np.array_equal(changed.distance, found.distance)


# --- images ---------------------------------------------------------------------------------------------------------


def picture(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_copies_are_small_and_small_ones_exact(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 9, 3), dtype=np.uint8)
    uri, width, height = copy_of(pixels, 3)
    assert uri.startswith("data:image/png;")
    assert (width, height) == (9, 8)
    np.testing.assert_array_equal(np.asarray(picture(uri)), pixels)
    np.testing.assert_array_equal(np.asarray(picture(copy_of(pixels[..., :1], 1)[0])), pixels[..., 0])
    Image.new("CMYK", (3000, 1000), "red").save(tmp_path / "large.jpg")
    uri, width, height = copy_of(tmp_path / "large.jpg", 3)
    assert uri.startswith("data:image/jpeg;")
    assert (width, height) == picture(uri).size == (SIDE, round(SIDE / 3))
    assert len(uri) < 8000
    Image.new("LA", (20, 10), (7, 0)).save(tmp_path / "alpha.png")
    assert picture(copy_of(tmp_path / "alpha.png", 1)[0]).getpixel((0, 0)) == 7


def test_surest_are_ordered_finite_and_few() -> None:
    values = np.array([1.0, np.inf, 3.0, np.nan, 3.0, 2.0])
    assert surest(values, np.array([1, 1, 1, 1, 1, 0], dtype=bool)).tolist() == [2, 4, 0]
    assert len(surest(np.arange(100.0), np.ones(100, dtype=bool))) == TILES


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain ä.png", "plain ä.png"),
        (os.fsdecode(b"caf\xe9"), "caf\\xe9" if os.fsencode("\udce9") == b"\xe9" else "caf\udce9"),
        ("a\x1b[2J\u202eb\x00", "a\\x1b[2J\\u202eb\\x00"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_names_print(name: str, shown: str) -> None:
    assert printable(name) == shown


# --- the page -------------------------------------------------------------------------------------------------------


def test_tables_hold_every_number(synthetic: Path) -> None:
    page = Page(synthetic / FILE)
    found = json.loads((synthetic / "report.json").read_text())
    for by_score in found["settings"].values():
        for values in by_score.values():
            for metric, value in values.items():
                text = f"{value:.5f}" if "aurc" in metric or metric == "augrc" else f"{value:.4f}"
                assert text in page.text, metric
    for what in ("aurc_floor", "aurc_random"):
        for value in found[what].values():
            assert f"{value:.5f}" in page.text
    assert "balanced-random, seed 0" in page.text
    assert "tal_fast" in page.text
    assert "Old FD" in page.text
    assert "New FD against noise" in page.text


def test_the_best_of_each_column_is_marked(synthetic: Path) -> None:
    text = (synthetic / FILE).read_text()
    found = json.loads((synthetic / "report.json").read_text())["settings"]["new_fd"]
    table = text.split('id="table-3"')[1].split("</table>")[0]
    best = re.findall(r"<strong>([^<]*)</strong>", table)
    assert f"{min(v['aurc'] for v in found.values()):.5f}" in best
    assert f"{max(v['auroc'] for v in found.values()):.4f}" in best
    assert f"{max(v['aurc'] for v in found.values()):.5f}" not in best


def test_operating_points_are_those_of_the_samples(synthetic: Path) -> None:
    ids = samples_of(synthetic)
    page = Page(synthetic / FILE).text
    for least in (0.8, 0.9, 0.95):
        point = OperatingPoints(ids.id_scores["cosine"], ids.right).at_coverage(least)
        assert point is not None
        assert f"{point.risk:.2%} at {point.threshold:.5g}" in page


def test_galleries_show_the_right_images(synthetic: Path) -> None:
    samples = samples_of(synthetic)
    ids = samples.predictions["val"]
    alts = [i["alt"] or "" for i in Page(synthetic / FILE).all("img")]
    wrong = np.flatnonzero(ids.right == 0)
    first = wrong[np.argsort(-samples.id_scores["cosine"][wrong], kind="stable")][:TILES]
    assert [alt for alt in alts if "taken for" in alt and "val #" in alt] == [
        f"bars-{ids.label[i]} taken for bars-{ids.prediction[i]}: val #{i}" for i in first
    ]
    hits = np.flatnonzero(ids.right)
    last = hits[np.argsort(samples.id_scores["cosine"][hits], kind="stable")][:TILES]
    assert [int(alt.split("#")[1]) for alt in alts if "rightly" in alt] == last.tolist()
    surest_ood = np.argsort(-samples.ood_scores["noise"]["cosine"], kind="stable")[:12]
    assert [int(alt.split("#")[1]) for alt in alts if "noise #" in alt] == surest_ood.tolist()
    run = load_run(synthetic)
    typical = training_typicalness(run, synthetic / evaluate.CACHE / "best")
    order = np.argsort(-typical.distance, kind="stable")
    shown = [int(alt.split("#")[1]) for alt in alts if "train-eval #" in alt]
    assert shown[:TILES] == order[:TILES].tolist()
    assert set(shown[TILES:]) == set(np.argsort(typical.distance, kind="stable")[:TILES].tolist())
    # The pixels are the data set's own.
    noise = run.data.split("noise")
    assert isinstance(noise, MemoryImages)
    uri = next(i["src"] or "" for i in Page(synthetic / FILE).all("img") if "noise #" in (i["alt"] or ""))
    np.testing.assert_array_equal(np.asarray(picture(uri)), noise.pixels[surest_ood[0], :, :, 0])


def test_nothing_comes_from_outside(synthetic: Path) -> None:
    page = Page(synthetic / FILE)
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), tag
            assert name != "style", tag
            if name in ("src", "href"):
                assert (value or "").startswith(("data:", "#")), (tag, value)
    policy = next(m["content"] or "" for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert (synthetic / FILE).stat().st_size < 1_000_000


def test_names_are_escaped(evil: Path) -> None:
    text = (evil / FILE).read_text(encoding="utf-8")
    page = Page(evil / FILE)
    assert len(page.all("script")) == 1
    assert not page.all("i")
    assert all("onerror" not in attributes for _, attributes in page.elements)
    assert "<script>alert" not in text
    assert "</style><b>" not in text
    for shown in ('<script>alert("class")<script>', "<img src=x onerror=alert(1)>.png", "\"quoted' & tagged.png"):
        assert shown in page.text
    assert "caf\\xe9 \\xff.png" in page.text
    assert "\\u202egnp.png" in page.text
    assert "\u202e" not in text
    assert html.escape("<i>run<∕i>", quote=True) in text


def test_undefined_metrics_say_why(tmp_path: Path) -> None:
    logits = np.eye(4)[np.arange(40) % 4] * 3
    np.savez(tmp_path / "right.npz", logits=logits, labels=np.arange(40) % 4)
    evaluate.evaluate_npz(tmp_path / "right.npz", scores=["logits"])
    page = Page(tmp_path / "right-report" / FILE)
    assert "there are no errors among the 40 samples" in page.text
    assert "Undefined (AUROC, FPR95, TNR95, AUPR-error)" in page.text
    assert "nan" not in page.text.replace("nanmean", "")


@pytest.mark.parametrize("extra", [{}, {"ood_a_logits": np.eye(2)[[0, 1, 1]], "ood_b/c_logits": np.eye(2)[[0]]}])
def test_npz_has_no_images_and_says_so(tmp_path: Path, extra: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", logits=rng.normal(size=(30, 2)), labels=rng.integers(2, size=30), **extra)
    evaluate.evaluate_npz(tmp_path / "x.npz")
    page = Page(tmp_path / "x-report" / FILE)
    assert not page.all("img")
    assert "No images: what was evaluated is no run" in page.text
    assert ("OOD: mean over 2 OOD sets" in page.text) == bool(extra)
    assert len([svg for svg in page.all("svg") if svg.get("data-kind") == "risk"]) == (5 if extra else 1)


@pytest.mark.parametrize("names", [["fog"], ["fog", "<b>snow"]])
def test_shifted_sets_have_curves_and_operating_points(tmp_path: Path, names: list[str]) -> None:
    rng = np.random.default_rng(0)
    arrays = {"logits": rng.normal(size=(30, 2)), "labels": rng.integers(2, size=30)}
    for name in names:
        arrays |= {f"shift_{name}_logits": rng.normal(size=(20, 2)), f"shift_{name}_labels": rng.integers(2, size=20)}
    np.savez(tmp_path / "x.npz", **arrays)
    evaluate.evaluate_npz(tmp_path / "x.npz")
    page = Page(tmp_path / "x-report" / FILE)
    risk = [svg["aria-label"] for svg in page.all("svg") if svg.get("data-kind") == "risk"]
    assert len(risk) == 1 + len(names)
    right = {
        name: int((arrays[f"shift_{name}_logits"].argmax(1) == arrays[f"shift_{name}_labels"]).sum()) for name in names
    }
    for name, label in zip(names, risk[1:], strict=True):
        assert label is not None
        assert label.startswith(
            f"Risk against coverage, Old FD under shift to {name}: 20 samples, {20 - right[name]} err"
        )
    # A table of metrics, a picture and a table of operating points each.
    assert page.text.count(f"Old FD under shift to {names[0]}") == 3


def test_intervals_and_differences(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=300)
    logits = rng.normal(size=(300, 3)) + 2 * np.eye(3)[labels]
    np.savez(tmp_path / "x.npz", logits=logits, labels=labels, ood_a_logits=rng.normal(size=(80, 3)))
    found = evaluate.evaluate_npz(tmp_path / "x.npz", scores=["msp", "max_logit"], resamples=50)
    text = (tmp_path / "x-report" / FILE).read_text()
    words = Page(tmp_path / "x-report" / FILE).text
    for key in ("old_fd", "ood", "new_fd"):
        low, high = found["intervals"][key]["max_logit"]["auroc"]
        value = found["settings"][key]["max_logit"]["auroc"]
        assert f"{value:.4f} {low:.4f} to {high:.4f}" in words.replace("  ", " ")
        value, low, high = found["differences"][key]["max_logit"]["augrc"]
        difference = f"{'+' * (value > 0)}{value:.5f}"
        cell = f"<strong>{difference}</strong>" if low > 0 or high < 0 else difference
        assert f"{cell}<small>{low:.5f} to {high:.5f}</small>" in text
    assert "95%, bootstrap of 50 resamples" in words
    assert "differences to msp" in words


def test_no_samples_at_all(tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", logits=np.zeros((0, 3)), labels=np.zeros(0, np.int64))
    evaluate.evaluate_npz(tmp_path / "none.npz")
    assert "There are no samples." in Page(tmp_path / "none-report" / FILE).text


def test_keys_from_elsewhere_are_tolerated(synthetic: Path, tmp_path: Path) -> None:
    found = json.loads((synthetic / "report.json").read_text())
    found["from_the_future"] = {"x": [1]}
    found["settings"]["shift/fog <1>"] = found["settings"]["old_fd"]
    del found["calibration"]
    (tmp_path / "report.json").write_text(json.dumps(found))
    shutil.copy(synthetic / "samples.npz", tmp_path)
    page = Page(write_html(tmp_path))
    assert "fog <1>" in page.text


# --- the command ----------------------------------------------------------------------------------------------------


def test_written_again_from_what_is_saved(synthetic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (synthetic / FILE).read_bytes()
    (synthetic / FILE).unlink()
    assert __main__.main([str(synthetic), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{synthetic / FILE}\n"
    assert (synthetic / FILE).read_bytes() == before


def test_without_the_pass_over_training_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", SYNTHETIC, BARS)
    assert evaluate.main(["--run", str(run), "--no-typicalness", "--output", str(tmp_path / "out")]) == 0
    text = Page(tmp_path / "out" / FILE).text
    assert "the pass over the training images was left out" in text
    assert "Most confident mistakes" in text
    assert not (run / evaluate.CACHE / "best" / "typicalness.npz").exists()
    # From the evaluation's own folder, the run is found by what the report says.
    assert __main__.main([str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert "Least typical training images" in Page(tmp_path / "out" / FILE).text


def test_a_run_without_a_queue_or_images(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SYNTHETIC, BARS, method="ce", ranks=[{"method": {}}])
    evaluate.evaluate_run(run)
    assert "only runs trained by TAL keep the queue" in Page(run / FILE).text
    shutil.copytree(run, tmp_path / "moved")
    shutil.rmtree(run)
    for name in ("checkpoints", evaluate.CACHE):
        shutil.rmtree(tmp_path / "moved" / name)
    page = Page(write_html(tmp_path / "moved"))
    assert "No images: there is no run folder" in page.text
    assert len([svg for svg in page.all("svg") if svg.get("data-kind") == "risk"]) == 3


def test_an_image_that_has_been_damaged_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAL_FAST_CACHE", str(tmp_path / "cache"))
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.effect_noise((300, 300), 60).convert("RGB").save(tmp_path / split / name / "0.jpg")
    data = {"dataset": "folder", "root": str(tmp_path), "loader": "torch", "workers": 0, "image_size": 16}
    run = make_run(tmp_path / "run", data, ["cat", "dog"])
    evaluate.evaluate_run(run)
    assert "data:image/jpeg" in (run / FILE).read_text()
    damaged = tmp_path / "train" / "cat" / "0.jpg"
    damaged.write_bytes(damaged.read_bytes()[:3000])
    evaluate.evaluate_run(run)
    # Left out of typicalness as it was of training.
    alts = [image["alt"] or "" for image in Page(run / FILE).all("img")]
    assert [alt for alt in alts if "training" in alt] == ["training image of dog, typicalness 1.00: dog/0.jpg"] * 2
    assert len(alts) == 2 + 2
    damaged = tmp_path / "val" / "cat" / "0.jpg"
    damaged.write_bytes(damaged.read_bytes()[:3000])
    page = Page(write_html(run))
    assert "cannot be read" in page.text
    assert len(page.all("img")) == 1 + 2


@pytest.mark.parametrize("damage", ["report", "samples", "other"])
def test_bad_input_in_one_sentence(
    damage: str, synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("report.json", "samples.npz"):
        shutil.copy(synthetic / name, tmp_path)
    if damage == "report":
        (tmp_path / "report.json").unlink()
    elif damage == "samples":
        (tmp_path / "samples.npz").unlink()
    else:
        found = json.loads((tmp_path / "report.json").read_text())
        found["counts"]["id_right"] += 1
        (tmp_path / "report.json").write_text(json.dumps(found))
    assert __main__.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert {"report": "there is no", "samples": "there is no", "other": "of different evaluations"}[damage] in said


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if PROGRAM is None:
        pytest.skip("needs Chromium (Debian's package chromium)")
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("run", ["synthetic", "evil"])
def test_a_browser_shows_it_whole(
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
        "[...document.querySelectorAll('.chart svg')].map(s => [s.clientWidth, s.clientHeight, "
        "...[...s.querySelectorAll('g.line:not(.off) polyline')].map(p => p.getBBox().width)])"
    )
    assert len(boxes) >= 5
    for chart in boxes:
        assert chart[0] >= 300
        assert chart[1] >= 200
        assert all(0 < wide <= 420 for wide in chart[2:])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(scheme: str, synthetic: Path, browser: Chromium) -> None:
    """WCAG AA: a contrast of 4.5 for all text, of 3 for the curves."""
    browser.open(synthetic / FILE, prefers_color_scheme=scheme)
    pairs = browser.evaluate("""
        [...document.querySelectorAll('body *')].filter(e => e.checkVisibility()).flatMap(e => {
          const style = getComputedStyle(e), line = e.matches('polyline, circle');
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


def test_the_parts_have_names(synthetic: Path, browser: Chromium) -> None:
    browser.open(synthetic / FILE)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    names: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            names.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("image", "checkbox", "region", "columnheader", "rowheader", "link"):
        assert names.get(role), role
        assert all(names[role]), role
    assert any(name.startswith("Risk against coverage, Old FD: 1000 samples") for name in names["image"])
    levels = browser.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(np.diff(levels)) <= 1


def test_hover_reads_the_curve(synthetic: Path, browser: Chromium) -> None:
    browser.open(synthetic / FILE)
    place = browser.evaluate("""
        (() => {
          const svg = document.querySelector('svg[data-kind="risk"]');
          svg.scrollIntoView({block: 'center'});
          const at = new DOMPoint(+svg.dataset.left + 0.8 * (svg.dataset.right - svg.dataset.left), 100);
          const there = at.matrixTransform(svg.getScreenCTM());
          return [there.x, there.y];
        })()
    """)
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    told = browser.evaluate("document.getElementById('tip').innerText").split("\n")
    ids = samples_of(synthetic)
    assert told[0] == "coverage 80.0%"
    said = dict(zip(told[1::2], told[2::2], strict=True))
    for score in ("cosine", "energy"):
        risk = risk_coverage_curve(ids.id_scores[score], ids.right).risk[799]
        assert float(said[score].rstrip("%")) == pytest.approx(100 * risk, abs=0.3)


def test_boxes_hide_scores(synthetic: Path, browser: Chromium) -> None:
    browser.open(synthetic / FILE)
    visible = "[...document.querySelectorAll('.s1 polyline')].map(p => p.getClientRects().length > 0)"
    assert set(browser.evaluate(visible)) == {True}
    browser.evaluate("document.querySelector('input[data-score=\"1\"]').click()")
    assert set(browser.evaluate(visible)) == {False}


def test_on_paper(synthetic: Path, browser: Chromium, tmp_path: Path) -> None:
    browser.open(synthetic / FILE, 794, media="print", prefers_color_scheme="dark")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    pdf = base64.b64decode(browser.call("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF")
    assert browser.evaluate("[...document.querySelectorAll('details')].every(d => d.open)")


def test_a_policy_that_holds(synthetic: Path, browser: Chromium, tmp_path: Path) -> None:
    """Had a name slipped through, the browser would still run and load nothing of it."""
    text = (synthetic / FILE).read_text(encoding="utf-8")
    slip = "<script>document.title = 'taken'</script><img src='https://tracker.invalid/x.png'>"
    changed = tmp_path / "changed.html"
    changed.write_text(text.replace("</main>", slip + "</main>"), encoding="utf-8")
    browser.open(changed)
    assert browser.evaluate("document.title") != "taken"
    assert "Content Security Policy" in " ".join(browser.complaints())
