"""Differences of groups to a baseline, and their intervals."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from tal_fast.evaluation.compare import Group
from tal_fast.evaluation.differences import OVER, Comparison, seed_interval
from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.evaluation.sample_scores import Samples, read_samples, write_samples
from tal_fast.evaluation.sources import evaluate_npz
from tal_fast.metrics.failure import METRICS, failure_metrics
from tal_fast.metrics.influence import influence
from tal_fast.metrics.intervals import interval
from tests.helpers.compare import csv_rows, table_lines, write_run

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def test_runs_that_differ_in_their_seed_make_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {}
    for method, quality in (("ce", 1.0), ("tal", 1.5)):
        for seed in range(3):
            made[method, seed] = write_run(tmp_path / f"digits-{method}-seed{seed}", method, seed, quality)
    runs = [str(tmp_path / f"digits-{m}-seed{s}") for s in range(3) for m in ("ce", "tal")]
    rows = csv_rows([*runs, "--bootstrap", "100"], capsys)
    assert {key[0] for key in rows} == {"digits-ce", "digits-tal"}
    per_run = {m: [failure_metrics(*made[m, s])["auroc"] for s in range(3)] for m in ("ce", "tal")}
    for method, values in per_run.items():
        row = rows[f"digits-{method}", "old_fd", "auroc"]
        assert (float(row["mean"]), float(row["std"])) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
        assert row["runs"] == "3"
        assert row["best"] == str(int(method == "tal"))
    # The influences on the difference of means, on the same images for all six runs.
    j, errors = METRICS.index("auroc"), int(sum(1 - made["ce", 0][1]))
    on_means = {m: np.mean([influence(*made[m, s])[:, j] for s in range(3)], axis=0) for m in ("ce", "tal")}
    row = rows["digits-tal", "old_fd", "auroc"]
    assert row["over"] == "images"
    gap = np.mean(per_run["tal"]) - np.mean(per_run["ce"])
    want = gap, *interval("auroc", gap, on_means["tal"] - on_means["ce"], 400, errors, difference=True)
    assert [float(row[k]) for k in ("difference", "low", "high")] == pytest.approx(want)
    assert rows["digits-ce", "old_fd", "auroc"]["difference"] == ""
    reverse = csv_rows([*runs, "--bootstrap", "100", "--baseline", "digits-tal"], capsys)[
        "digits-ce", "old_fd", "auroc"
    ]
    assert float(reverse["high"]) == pytest.approx(-want[1])
    printed = table_lines([*runs, "--bootstrap", "10"], capsys)
    assert "mean ± SD over runs" in printed[0]
    mean, std = np.mean(per_run["ce"]), np.std(per_run["ce"], ddof=1)
    assert any(line.endswith(f" {mean:.4f} ± {std:.4f}") for line in printed)


def test_intervals_are_over_seeds_where_the_images_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values: dict[str, list[float]] = {"ce": [], "tal": []}
    for method, quality in (("ce", 1.0), ("tal", 1.5)):
        for seed in range(3):
            made = write_run(tmp_path / f"{method}-{seed}", method, seed, quality, identity=f"{method}-{seed}")
            values[method].append(failure_metrics(*made)["aurc"])
    runs = sorted(str(path) for path in tmp_path.iterdir())
    row = csv_rows(runs, capsys)["tal", "old_fd", "aurc"]
    paired = scipy.stats.ttest_rel(values["tal"], values["ce"]).confidence_interval(0.95)
    assert row["over"] == "seeds"
    assert (float(row["low"]), float(row["high"])) == pytest.approx((paired.low, paired.high))
    assert "Student's t over pairs of the same seed" in table_lines(runs, capsys)[1]
    # Two runs of three seeds do not pair.
    row = csv_rows(runs[1:], capsys)["tal", "old_fd", "aurc"]
    test = scipy.stats.ttest_ind(values["tal"], values["ce"][1:], equal_var=False).confidence_interval(0.95)
    assert (float(row["low"]), float(row["high"])) == pytest.approx((test.low, test.high))
    assert "Welch's t over seeds" in table_lines(runs[1:], capsys)[1]
    # One run a method, and nothing to pair by: a difference without an interval.
    single = csv_rows([runs[0], runs[3]], capsys)["tal-0", "old_fd", "aurc"]
    assert single["over"] == single["low"] == ""
    assert float(single["difference"]) == pytest.approx(values["tal"][0] - values["ce"][0])
    for path in tmp_path.glob("*/samples.npz"):
        path.unlink()
        write_samples(Samples(np.ones(3, bool), {"msp": np.ones(3)}, {}, {"val": "same"}), path)
    assert csv_rows(runs, capsys)["tal", "old_fd", "aurc"]["over"] == "seeds"
    for path in tmp_path.glob("*/samples.npz"):
        path.unlink()
    assert csv_rows(runs, capsys)["tal", "old_fd", "aurc"]["over"] == "seeds"


def test_seed_intervals_of_values_that_do_not_vary() -> None:
    one, three, undefined = np.array([1.0, 1.0]), np.array([3.0, 3.0]), np.array([1, math.nan])
    assert seed_interval([one, three], []) == (-2, -2)
    assert all(math.isnan(v) for v in seed_interval([undefined, three], []))
    assert seed_interval([one - three], []) == (-2, -2)
    images = np.array([[0.6, -0.8, 0.0]] * 2)  # seeds agree, images do not: the normal interval of the images
    low, high = seed_interval([one], [images])
    assert (low, high) == pytest.approx((1 - 1.96, 1 + 1.96), abs=1e-3)


def test_the_best_is_significantly_ahead_of_every_other_row_not_of_the_next_best_alone() -> None:
    def group(name: str, values: list[float]) -> Group:
        reports = [{"settings": {"old_fd": {"msp": {"aurc": value}}}} for value in values]
        return Group(name, [*map(str, values)], reports, [None] * len(values), "msp", [0, 1, 2])

    column, ranks = ("old_fd", "aurc"), [group("second", [2.1, 2.0, 2.2]), group("first", [1.0, 1.1, 1.2])]
    Comparison(False, "seeds").mark_best(ranks, [column])
    assert [row.best for row in ranks] == [set(), {column}]
    ranks = [group("first", [1.0, 1.1, 1.2]), group("noisy", [1.0, 5.0, 9.0]), group("second", [2.1, 2.0, 2.2])]
    Comparison(False, "seeds").mark_best(ranks, [column])
    assert not any(row.best for row in ranks)


def test_intervals_over_seeds_and_images_have_their_coverage() -> None:
    """The mean over seeds and images of made-up scores lies inside in 95 of 100 experiments, whatever varies most."""
    rng = np.random.default_rng(0)
    n_seeds, n_images = 4, 50
    for of_seed, of_image, of_both in ((1, 0, 1), (0.05, 8, 1), (0, 0, 8), (0.3, 2, 2)):
        inside = 0
        for _ in range(400):
            values = of_seed * rng.normal(size=(n_seeds, 1)) + of_image * rng.normal(size=(1, n_images))
            values = values + of_both * rng.normal(size=(n_seeds, n_images))
            low, high = seed_interval([values.mean(1)], [(values - values.mean(1, keepdims=True)) / n_images])
            inside += low < 0 < high
        assert 0.91 <= inside / 400 <= 0.99, (of_seed, of_image, of_both, inside / 400)


def test_intervals_over_seeds_and_images_are_the_widest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method, quality in (("ce", 1.0), ("tal", 1.5)):
        for seed in range(3):
            write_run(tmp_path / f"{method}-{seed}", method, seed, quality)
    runs = sorted(str(path) for path in tmp_path.iterdir())
    widths = {}
    for over in OVER:
        row = csv_rows([*runs, "--over", over, "--bootstrap", "100"], capsys)["tal", "old_fd", "auroc"]
        assert (row["over"], row["baseline"]) == (over, "ce")
        widths[over] = float(row["high"]) - float(row["low"])
    assert widths["both"] > widths["images"] > 0
    lines = table_lines([*runs, "--over", "both", "--bootstrap", "10"], capsys)
    assert "over seeds and test images together" in lines[1]
    single = [runs[0], runs[3], "--bootstrap", "10", "--over"]  # as far as single runs allow
    assert csv_rows([*single, "both"], capsys)["tal-0", "old_fd", "auroc"]["over"] == "images"
    assert csv_rows([*single, "seeds"], capsys)["tal-0", "old_fd", "auroc"]["over"] == ""


def test_shifted_sets_are_compared_on_the_same_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=120)
    for name, quality in (("a", 1.0), ("b", 2.0)):
        logits, shifted = (rng.normal(size=(120, 3)) + q * np.eye(3)[labels] for q in (quality, quality / 2))
        np.savez(
            tmp_path / f"{name}.npz", logits=logits, labels=labels, shift_fog_logits=shifted, shift_fog_labels=labels
        )
        evaluate_npz(tmp_path / f"{name}.npz", options=EvaluationOptions(scores=["msp"]))
    folders = [str(tmp_path / f"{name}-report") for name in "ab"]
    row = csv_rows([*folders, "--bootstrap", "200"], capsys)["b-report", "shift", "auroc"]
    influences, sizes = [], []
    for folder in folders:
        found = read_samples(folder)
        assert found is not None
        correct, scores = found.shifts["fog"]
        influences.append(influence(scores["msp"], correct)[:, METRICS.index("auroc")])
        sizes.append(min(correct.sum(), 120 - correct.sum()))
    assert row["over"] == "images"
    gap = float(row["difference"])
    want = interval("auroc", gap, influences[1] - influences[0], 120, min(sizes), difference=True)
    assert [float(row[k]) for k in ("low", "high")] == pytest.approx(want)
