"""Reports side by side: groups over seeds, paired differences, and each format's marks and escapes."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from tal_fast import evaluation as evaluate
from tal_fast.config.schema import Config
from tal_fast.evaluation import compare, report
from tal_fast.evaluation.sample_scores import Samples, read_samples, write_samples
from tal_fast.metrics.bootstrap import bootstrap
from tal_fast.metrics.failure import METRICS, failure_metrics
from tal_fast.metrics.settings import Mix
from tests.helpers.evaluation import make_run

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def one_report(score: str | None, aurc: float, auroc: float, **changes: Any) -> report.Report:
    values = {**dict.fromkeys(METRICS, 0.5), "aurc": aurc, "auroc": auroc}
    return {
        "format": 1, "id_accuracy": 0.9, "convention": "tal_fast", "mix": "all", "seed": 0, "ood_names": [],
        "counts": {"id": 10, "id_right": 9, "ood": {}}, "score": score,
        "settings": {"old_fd": {"msp": values, "cosine": {**values, "aurc": 0.01}}}, **changes,
    }  # fmt: skip


def test_compare_marks_the_best_of_each_column() -> None:
    reports = [one_report("msp", 0.2, 0.8), one_report("msp", 0.1, math.nan), one_report("msp", 0.3, 0.7)]
    lines = compare.comparison(reports, ["a", "b", "c"], metrics=["aurc", "auroc"]).splitlines()
    assert lines[1].split() == ["run", "score", "accuracy", "AURC", "AUROC"]
    assert [line.split() for line in lines[2:]] == [
        ["a", "msp", "90.00%*", "0.20000", "0.8000*"],
        ["b", "msp", "90.00%*", "0.10000*", "-"],
        ["c", "msp", "90.00%*", "0.30000", "0.7000"],
    ]


def test_compare_judges_each_by_its_own_score() -> None:
    reports = [one_report("msp", 0.2, 0.8), one_report("cosine", 0.1, 0.7)]
    assert "0.01000*" in compare.comparison(reports, ["ce", "tal"], metrics=["aurc"])
    assert "0.10000*" in compare.comparison(reports, ["ce", "tal"], metrics=["aurc"], score="msp")
    assert "100.00*" in compare.comparison(reports, ["ce", "tal"], metrics=["aurc"], score="msp", units="paper")
    with pytest.raises(ValueError, match="tal has no score 'energy'; it has msp, cosine"):
        compare.comparison(reports[1:], ["tal"], score="energy")
    with pytest.raises(ValueError, match="names no score of its own; choose one with --score: msp, cosine"):
        compare.comparison([one_report(None, 0.2, 0.8)], ["npz"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"convention": "tal"}, "convention is tal_fast in one and tal in the other"),
        ({"mix": "first-n"}, "mix is all in one and first-n in the other"),
        ({"mix": "prior=0.5", "seed": 1}, "mix is all in one and prior=0.5, seed 1 in the other"),
        ({"ood_names": ["svhn"]}, "set of OOD data is none in one and svhn in the other"),
        ({"shift_names": ["fog"]}, "set of shifted data is none in one and fog in the other"),
        ({"counts": {"id": 11, "id_right": 9, "ood": {}}}, "evaluated on 10 ID samples and on 11 ID samples"),
    ],
)
def test_compare_refuses_numbers_that_mean_different_things(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="a and b cannot be compared") as refusal:
        compare.comparison([one_report("msp", 0.2, 0.8), one_report("msp", 0.2, 0.8, **changes)], ["a", "b"])
    assert message in str(refusal.value)


def judged(
    folder: Path, method: str, seed: int, quality: float, n: int = 400, identity: str = "same"
) -> tuple[np.ndarray, np.ndarray]:
    """A run's folder with config, report and samples, as training and evaluation would leave them."""
    folder.mkdir(parents=True)
    config = Config.from_dict({"method": {"name": method}, "seed": seed, "output": str(folder), "threads": seed + 1})
    config.save(folder / "config.yaml")
    correct = np.random.default_rng(0).random(n) < 0.8
    scores = quality * correct + np.random.default_rng(seed + 1).normal(size=n)
    other = np.random.default_rng(seed + 10).normal(size=90)
    made = report.make_report(correct, {"msp": scores}, {"noise": {"msp": other}}, mix=Mix("all"))
    report.write_report({**made, "score": "msp"}, folder / "report.json")
    samples = Samples(correct, {"msp": scores}, {"noise": {"msp": other}}, {"val": identity, "noise": "x"})
    write_samples(samples, folder / "samples.npz")
    return scores, correct


def table_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert compare.main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def csv_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, str, str], dict[str, str]]:
    assert compare.main([*arguments, "--format", "csv"]) == 0
    rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
    return {(row["run"], row["setting"], row["metric"]): row for row in rows}


def test_runs_that_differ_in_their_seed_make_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {}
    for method, quality in (("ce", 1.0), ("tal", 1.5)):
        for seed in range(3):
            made[method, seed] = judged(tmp_path / f"digits-{method}-seed{seed}", method, seed, quality)
    runs = [str(tmp_path / f"digits-{m}-seed{s}") for s in range(3) for m in ("ce", "tal")]
    rows = csv_of([*runs, "--bootstrap", "300"], capsys)
    assert {key[0] for key in rows} == {"digits-ce", "digits-tal"}
    per_run = {m: [failure_metrics(*made[m, s])["auroc"] for s in range(3)] for m in ("ce", "tal")}
    for method, values in per_run.items():
        row = rows[f"digits-{method}", "old_fd", "auroc"]
        assert (float(row["mean"]), float(row["std"])) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
        assert row["runs"] == "3"
        assert row["best"] == str(int(method == "tal"))
    # The difference of means on each resample, the same images for all six runs.
    on_resamples = {
        m: np.mean([bootstrap({"s": made[m, s][0]}, made[m, s][1], resamples=300)["s"] for s in range(3)], axis=0)
        for m in ("ce", "tal")
    }
    difference = (on_resamples["tal"] - on_resamples["ce"])[:, METRICS.index("auroc")]
    row = rows["digits-tal", "old_fd", "auroc"]
    assert row["over"] == "images"
    want = (np.mean(per_run["tal"]) - np.mean(per_run["ce"]), *np.quantile(difference, (0.025, 0.975)))
    assert [float(row[k]) for k in ("difference", "low", "high")] == pytest.approx(want)
    assert rows["digits-ce", "old_fd", "auroc"]["difference"] == ""
    reverse = csv_of([*runs, "--bootstrap", "300", "--baseline", "digits-tal"], capsys)["digits-ce", "old_fd", "auroc"]
    assert float(reverse["high"]) == pytest.approx(-want[1])
    printed = table_of(runs, capsys)
    assert "mean ± standard deviation over runs" in printed[0]
    mean, std = np.mean(per_run["ce"]), np.std(per_run["ce"], ddof=1)
    assert f"{mean:.4f} ± {std:.4f} " in "\n".join(printed)


def test_over_seeds_where_the_images_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values: dict[str, list[float]] = {"ce": [], "tal": []}
    for method, quality in (("ce", 1.0), ("tal", 1.5)):
        for seed in range(3):
            made = judged(tmp_path / f"{method}-{seed}", method, seed, quality, identity=f"{method}-{seed}")
            values[method].append(failure_metrics(*made)["aurc"])
    runs = sorted(str(path) for path in tmp_path.iterdir())
    row = csv_of(runs, capsys)["tal", "old_fd", "aurc"]
    paired = scipy.stats.ttest_rel(values["tal"], values["ce"]).confidence_interval(0.95)
    assert row["over"] == "seeds"
    assert (float(row["low"]), float(row["high"])) == pytest.approx((paired.low, paired.high))
    assert "Student's t over pairs of the same seed" in table_of(runs, capsys)[1]
    # Two runs of three seeds do not pair.
    row = csv_of(runs[1:], capsys)["tal", "old_fd", "aurc"]
    test = scipy.stats.ttest_ind(values["tal"], values["ce"][1:], equal_var=False).confidence_interval(0.95)
    assert (float(row["low"]), float(row["high"])) == pytest.approx((test.low, test.high))
    assert "Welch's t over seeds" in table_of(runs[1:], capsys)[1]
    # One run a method, and nothing to pair by: a difference without an interval.
    single = csv_of([runs[0], runs[3]], capsys)["tal-0", "old_fd", "aurc"]
    assert single["over"] == single["low"] == ""
    assert float(single["difference"]) == pytest.approx(values["tal"][0] - values["ce"][0])
    for path in tmp_path.glob("*/samples.npz"):
        path.unlink()
        write_samples(Samples(np.ones(3, bool), {"msp": np.ones(3)}, {}, {"val": "same"}), path)
    assert csv_of(runs, capsys)["tal", "old_fd", "aurc"]["over"] == "seeds"
    for path in tmp_path.glob("*/samples.npz"):
        path.unlink()
    assert csv_of(runs, capsys)["tal", "old_fd", "aurc"]["over"] == "seeds"


def test_intervals_over_seeds_of_values_that_do_not_vary() -> None:
    one, three, undefined = np.array([1.0, 1.0]), np.array([3.0, 3.0]), np.array([1, math.nan])
    assert compare._over_seeds([one, three], []) == (-2, -2)
    assert all(math.isnan(v) for v in compare._over_seeds([undefined, three], []))
    assert compare._over_seeds([one - three], []) == (-2, -2)
    images = np.array([[0.0, 1.0, 2.0]] * 2)  # seeds agree, images do not: the normal interval of the images
    low, high = compare._over_seeds([one], [images])
    assert (low, high) == pytest.approx((1 - 1.96, 1 + 1.96), abs=1e-3)


def test_intervals_over_seeds_and_images_hold_what_they_promise() -> None:
    """The mean over seeds and images of made-up scores lies inside in 95 of 100 experiments, whatever varies most."""
    rng = np.random.default_rng(0)
    n_seeds, n_images, resamples = 4, 50, 200
    for of_seed, of_image, of_both in ((1, 0, 1), (0.05, 8, 1), (0, 0, 8), (0.3, 2, 2)):
        inside = 0
        for _ in range(400):
            values = of_seed * rng.normal(size=(n_seeds, 1)) + of_image * rng.normal(size=(1, n_images))
            values = values + of_both * rng.normal(size=(n_seeds, n_images))
            drawn = rng.integers(n_images, size=(resamples, n_images))
            low, high = compare._over_seeds([values.mean(1)], [values[:, drawn].mean(2)])
            inside += low < 0 < high
        assert 0.91 <= inside / 400 <= 0.99, (of_seed, of_image, of_both, inside / 400)


def test_intervals_over_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method, quality in (("ce", 1.0), ("tal", 1.5)):
        for seed in range(3):
            judged(tmp_path / f"{method}-{seed}", method, seed, quality)
    runs = sorted(str(path) for path in tmp_path.iterdir())
    widths = {}
    for over in compare.OVER:
        row = csv_of([*runs, "--over", over, "--bootstrap", "300"], capsys)["tal", "old_fd", "auroc"]
        assert (row["over"], row["baseline"]) == (over, "ce")
        widths[over] = float(row["high"]) - float(row["low"])
    assert widths["both"] > widths["images"] > 0
    assert "over seeds and test images together" in table_of([*runs, "--over", "both"], capsys)[1]
    single = [runs[0], runs[3], "--over"]  # as far as single runs allow
    assert csv_of([*single, "both"], capsys)["tal-0", "old_fd", "auroc"]["over"] == "images"
    assert csv_of([*single, "seeds"], capsys)["tal-0", "old_fd", "auroc"]["over"] == ""


def test_other_settings_are_other_methods(tmp_path: Path) -> None:
    judged(tmp_path / "a", "ce", 0, 1.0)
    judged(tmp_path / "b", "ce", 1, 1.0)
    judged(tmp_path / "c", "tal", 0, 1.0)
    a, b, c = (compare.method_of(tmp_path / name) for name in "abc")
    assert a == b != c
    assert compare.method_of(tmp_path) is None
    (tmp_path / "a" / "config.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="must be a mapping"):
        compare.method_of(tmp_path / "a")


def test_names_of_groups() -> None:
    assert compare._common_name(["runs/ce-1", "runs/ce-2"]) == "runs/ce"
    assert compare._common_name(["ce-s0", "ce-s1"]) == "ce"
    assert compare._common_name(["ce-seed10", "ce-seed11"]) == "ce-seed1"
    assert compare._common_name(["a", "b"]) == "a"
    assert compare._common_name(["ce-seed"]) == "ce-seed"


def test_latex_and_markdown_are_escaped_and_bold() -> None:
    groups = compare.group_runs(
        [one_report("msp", 0.2, 0.8), one_report("msp", 0.1, 0.9)], ["a_b & 50% {x}\\", "<script>|*"]
    )
    columns = compare.columns_of(groups, ["aurc"])
    latex = compare.format_groups(groups, columns, "latex").splitlines()
    assert latex[0] == r"\begin{tabular}{lrrr}"
    assert latex[4] == r"a\_b \& 50\% \{x\}\textbackslash{} & msp & \textbf{90.00\%} & 0.20000 \\"
    assert latex[5] == r"$<$script$>$|* & msp & \textbf{90.00\%} & \textbf{0.10000} \\"
    markdown = compare.format_groups(groups, columns, "markdown").splitlines()
    assert markdown[1] == "| --- | ---: | ---: | ---: |"
    assert markdown[3] == r"| \<script\>\|\* | msp | **90.00%** | **0.10000** |"


def test_differences_in_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, quality in (("first", 1.0), ("second", 2.0)):
        judged(tmp_path / name, {"first": "ce", "second": "tal"}[name], 0, quality)
    runs = [str(tmp_path / name) for name in ("first", "second")]
    row = csv_of([*runs, "--metrics", "auroc"], capsys)["second", "old_fd", "auroc"]
    cell = f"+{float(row['difference']):.4f} [+{float(row['low']):.4f}, +{float(row['high']):.4f}]"
    for style in ("table", "markdown", "latex"):
        out = tmp_path / "tables" / f"out.{style}"
        assert compare.main([*runs, "--metrics", "auroc", "--format", style, "--out", str(out)]) == 0
        assert (cell if style != "markdown" else cell.replace("[", "\\[").replace("]", "\\]")) in out.read_text()
        assert "paired bootstrap over the test images" in out.read_text()
    assert capsys.readouterr().out == ""


def test_baselines_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judged(tmp_path / "ce-0", "ce", 0, 1.0)
    judged(tmp_path / "tal-0", "tal", 0, 1.0)
    runs = [str(tmp_path / "ce-0"), str(tmp_path / "tal-0")]
    assert compare.main([*runs, "--baseline", "fmfp"]) == 2
    assert "there is no row 'fmfp' to be the baseline; there are ce-0, tal-0" in capsys.readouterr().err
    assert compare.main([*runs, "--bootstrap", "-1"]) == 2
    assert "--bootstrap must be at least 0, not -1" in capsys.readouterr().err
    (tmp_path / "ce-0" / "samples.npz").write_bytes(b"PK")
    assert compare.main(runs) == 2
    said = capsys.readouterr().err
    assert "samples.npz cannot be read" in said
    assert said.count("\n") == 1


def test_shifted_sets_are_compared_on_the_same_resamples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=120)
    for name, quality in (("a", 1.0), ("b", 2.0)):
        logits, shifted = (rng.normal(size=(120, 3)) + q * np.eye(3)[labels] for q in (quality, quality / 2))
        np.savez(
            tmp_path / f"{name}.npz", logits=logits, labels=labels, shift_fog_logits=shifted, shift_fog_labels=labels
        )
        evaluate.evaluate_npz(tmp_path / f"{name}.npz", scores=["msp"])
    folders = [str(tmp_path / f"{name}-report") for name in "ab"]
    row = csv_of([*folders, "--bootstrap", "200"], capsys)["b-report", "shift", "auroc"]
    on_resamples = []
    for folder in folders:
        found = read_samples(folder)
        assert found is not None
        right, scores = found.shifts["fog"]
        on_resamples.append(bootstrap(scores, right, resamples=200)["msp"][:, METRICS.index("auroc")])
    assert row["over"] == "images"
    want = np.quantile(on_resamples[1] - on_resamples[0], (0.025, 0.975))
    assert [float(row[k]) for k in ("low", "high")] == pytest.approx(want)


def test_samples_round_trip(tmp_path: Path) -> None:
    samples = Samples(
        np.array([True, False]), {"msp": np.array([1.0, 2])}, {"a/b": {"msp": np.ones(3)}}, {"val": "h"},
        shifts={"c/d": (np.array([True]), {"msp": np.array([0.5])})},
    )  # fmt: skip
    write_samples(samples, tmp_path / "samples.npz")
    found = read_samples(tmp_path / "report.json")
    assert found is not None
    assert found.identity == samples.identity
    np.testing.assert_array_equal(found.ood_scores["a/b"]["msp"], np.ones(3))
    np.testing.assert_array_equal(found.right, samples.right)
    ((name, (right, scores)),) = found.shifts.items()
    assert (name, right.tolist(), scores["msp"].tolist()) == ("c/d", [True], [0.5])
    assert read_samples(tmp_path / "elsewhere" / "report.json") is None


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "synthetic-tal")
    evaluate.evaluate_run(folder, mix=Mix("all"))
    return folder


def test_compare_command(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_run(tmp_path / "synthetic-ce", "ce", seed=1)
    evaluate.evaluate_run(other, mix=Mix("all"))
    assert compare.main([str(run_dir), str(other)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("95% intervals of differences: paired bootstrap over the test images, 2000 resamples")
    assert [line.split()[:2] for line in printed[4:6]] == [["synthetic-tal", "cosine"], ["synthetic-ce", "msp"]]
    assert "*" in printed[4] + printed[5]
    assert printed[-1].startswith("synthetic-ce - synthetic-tal")
    assert printed[-1].count("[") == 9
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    for path, message in (
        (tmp_path / "gone", "there is no"),
        (tmp_path / "broken.json", "cannot be read as JSON"),
        (tmp_path / "list.json", "is not a report of format 1"),
    ):
        assert compare.main([str(run_dir), str(path)]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
