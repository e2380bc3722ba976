"""Bootstrap intervals against the metrics of resampled arrays, known distributions, and what must always hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tal_fast import evaluation as evaluate
from tal_fast.evaluation import report
from tal_fast.evaluation.sample_scores import read_samples
from tal_fast.metrics import bootstrap as intervals
from tal_fast.metrics.bootstrap import BLOCK, bootstrap, interval, paired_differences
from tal_fast.metrics.failure import CONVENTIONS, METRICS, failure_metrics
from tal_fast.scores.logits import SCORES

pytestmark = pytest.mark.filterwarnings("error")


def case(n: int = 200, decimals: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = np.round(rng.beta(4, 2, n), decimals)
    return scores, (rng.random(n) < 0.2 + 0.7 * scores).astype(int)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans(), st.integers(0, 3)), min_size=1, max_size=40))
def test_weighted_metrics_are_the_metrics_of_the_copies(samples: list[tuple[int, bool, int]]) -> None:
    scores, correct, counts = (np.array(column) for column in zip(*samples, strict=True))
    # As many drawn as there are, as in every resample.
    counts[0] += len(counts) - min(counts.sum(), len(counts))
    while counts.sum() > len(counts):
        counts[counts.argmax()] -= 1
    ranked = intervals._Ranked(scores.astype(float), correct.astype(int))
    got = ranked.metrics(counts[None].astype(np.int32))[0]
    want = failure_metrics(np.repeat(scores, counts), np.repeat(correct, counts))
    np.testing.assert_allclose(got, [want[m] for m in METRICS], rtol=0, atol=1e-12)


@pytest.mark.parametrize("decimals", [0, 1, 2, 9])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_resamples_against_explicit_arrays(decimals: int, convention: str) -> None:
    scores, correct = case(151, decimals)
    found = bootstrap({"s": scores}, correct, 40, resamples=BLOCK + 3, seed=5, convention=convention)["s"]
    assert found.shape == (BLOCK + 3, len(METRICS))
    for block in range(2):
        draws = intervals._Draws(111, 40, (5, block), 0)
        for row in range(BLOCK * block, min(BLOCK * (block + 1), BLOCK + 3)):
            counts = draws.counts(1)[0]
            assert (counts[:111].sum(), counts[111:].sum()) == (111, 40)
            want = failure_metrics(np.repeat(scores, counts), np.repeat(correct, counts), convention)
            np.testing.assert_allclose(found[row], [want[m] for m in METRICS], rtol=0, atol=1e-12)


def test_seeds_threads_batches_and_company_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, correct = case()
    first = bootstrap({"a": scores}, correct, 50, resamples=200, seed=1)["a"]
    monkeypatch.setattr(intervals, "_threads", lambda: 1)
    both = bootstrap({"b": -scores, "a": scores}, correct, 50, resamples=300, seed=1)
    np.testing.assert_array_equal(both["a"][:192], first[:192])
    # The batch decides in which order NumPy adds up, no more.
    monkeypatch.setattr(intervals, "_BATCH", 1)
    np.testing.assert_allclose(bootstrap({"a": scores}, correct, 50, resamples=200, seed=1)["a"], first, atol=1e-14)
    other = bootstrap({"a": scores}, correct, 50, resamples=200, seed=2)["a"]
    assert not np.array_equal(other, first)
    # The ID draws of another stream are the same, the OOD draws are not.
    streams = [intervals._Draws(150, 50, (1, 0), stream).counts(9) for stream in (0, 1)]
    np.testing.assert_array_equal(streams[0][:, :150], streams[1][:, :150])
    assert not np.array_equal(streams[0][:, 150:], streams[1][:, 150:])


def test_constant_metrics_have_no_width() -> None:
    scores, correct = case()
    values = bootstrap({"s": scores}, np.ones_like(correct), resamples=20)["s"]
    assert (values[:, METRICS.index("aurc")] == 0).all()
    assert np.isnan(values[:, METRICS.index("auroc")]).all()
    assert interval(values[:, METRICS.index("aurc")])[:2] == (0, 0)
    assert np.isnan(interval(values[:, METRICS.index("auroc")]).low)
    # OOD and ID apart, OOD's only outcome is failure: the error rate of OOD against ID never changes.
    chance = bootstrap({"s": np.zeros(200)}, np.arange(200) < 120, 80, resamples=20)["s"]
    np.testing.assert_allclose(chance[:, METRICS.index("aurc")], 0.4, atol=1e-12)
    assert np.isnan(bootstrap({"s": []}, [], resamples=3)["s"]).all()


def test_the_error_rate_has_its_binomial_interval() -> None:
    # The AURC of a constant score is the error rate.
    correct = np.arange(400) >= 80
    values = bootstrap({"s": np.zeros(400)}, correct, resamples=4000)["s"][:, METRICS.index("aurc")]
    width = np.sqrt(0.2 * 0.8 / 400)
    assert values.mean() == pytest.approx(0.2, abs=4 * width / np.sqrt(4000))
    assert values.std() == pytest.approx(width, rel=0.05)
    low, high, undefined = interval(values)
    assert (low, high) == pytest.approx((0.2 - 1.96 * width, 0.2 + 1.96 * width), abs=0.004)
    assert undefined == 0


def test_intervals_cover_the_truth() -> None:
    # AUROC of N(1, 1) against N(0, 1) is 0.7602; the percentile interval is a little narrow at n = 150.
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        correct = rng.random(150) < 0.5
        scores = rng.normal(size=150) + correct
        values = bootstrap({"s": scores}, correct, resamples=300, seed=int(rng.integers(1000)))["s"]
        low, high, _ = interval(values[:, METRICS.index("auroc")], 0.9)
        inside += low <= 0.76025 <= high
    assert 80 <= inside <= 98


def test_paired_differences_are_of_the_same_resamples() -> None:
    scores, correct = case(500)
    near = scores + 1e-3 * np.random.default_rng(1).normal(size=500)
    values = bootstrap({"a": scores, "b": near, "twin": 2 * scores}, correct, resamples=400)
    found = dict(paired_differences(values, "a"))
    assert set(found) == {"b", "twin"}
    assert all(i[:2] == (0, 0) for i in found["twin"].values())
    j = METRICS.index("auroc")
    own, paired = interval(values["b"][:, j]), found["b"]["auroc"]
    assert paired.high - paired.low < 0.2 * (own.high - own.low)
    low, high = np.quantile(values["b"][:, j] - values["a"][:, j], [0.025, 0.975])
    assert paired == (pytest.approx(low), pytest.approx(high), 0)


def test_undefined_resamples_are_left_out_and_counted() -> None:
    values = bootstrap({"s": np.arange(20.0)}, np.arange(20) > 0, resamples=2000)["s"]
    found = interval(values[:, METRICS.index("auroc")])
    # The one error is not drawn with probability (19/20)^20.
    assert found.undefined == pytest.approx(0.95**20, abs=0.05)
    assert 0 <= found.low <= found.high <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": {"s": [0.1]}}, "the score s has 1 samples but success has 3"),
        ({"scores": {"s": [0.1, float("nan"), 0.3]}}, "the score s has 1 NaN"),
        ({"resamples": 0}, "resamples must be at least 1, not 0"),
        ({"n_ood": 4}, "n_ood must lie in 0..3"),
        ({"convention": "x"}, "unknown convention 'x'"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"scores": {"s": [0.1, 0.2, 0.3]}, "success": [1, 0, 1], **change}
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        bootstrap(**arguments)
    assert message in str(refusal.value)


@pytest.mark.parametrize("level", [0, 1, 95])
def test_levels(level: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        interval([1.0, 2.0], level)


def outputs_file(path: Path) -> Path:
    rng = np.random.default_rng(0)
    labels = rng.integers(5, size=200)
    logits = rng.normal(size=(200, 5))
    logits[np.arange(200), labels] += 3 * rng.random(200)
    np.savez(
        path, logits=logits, labels=labels, ood_a_logits=rng.normal(size=(90, 5)), ood_b_logits=rng.normal(size=(60, 5))
    )
    return path


def test_report_carries_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = outputs_file(tmp_path / "o.npz")
    arguments = ["--npz", str(path), "--scores", "msp,energy", "--seed", "3", "--bootstrap", "150", "--mix", "all"]
    assert evaluate.main(arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "o-report" / "report.json").read_text())
    assert found["bootstrap"]["resamples"] == 150
    assert found["bootstrap"]["baseline"] == "msp"
    keys = {"old_fd", "ood/a", "new_fd/a", "ood/b", "new_fd/b", "ood", "new_fd"}
    assert set(found["intervals"]) == set(found["differences"]) == keys
    for key in keys:
        assert set(found["differences"][key]) == {"energy"}
        for score, by_metric in found["intervals"][key].items():
            for metric, (low, high) in by_metric.items():
                # Percentile intervals hold the value itself except by a bias of resampling.
                slack = 0.5 * (high - low) + 1e-12
                assert low - slack <= found["settings"][key][score][metric] <= high + slack
        value, low, high = found["differences"][key]["energy"]["aurc"]
        assert value == found["settings"][key]["energy"]["aurc"] - found["settings"][key]["msp"]["aurc"]
        assert low < high
    # The mean over the sets is that of each resample.
    samples = read_samples(tmp_path / "o-report")
    assert samples is not None
    values = []
    for stream, name in enumerate("ab"):
        both = np.concatenate((samples.id_scores["msp"], samples.ood_scores[name]["msp"]))
        m = len(both) - 200
        success = np.concatenate((samples.right, np.zeros(m)))
        values.append(bootstrap({"s": both}, success, m, resamples=150, seed=3, stream=stream)["s"])
    want = interval(np.mean(values, axis=0)[:, METRICS.index("augrc")])
    assert found["intervals"]["new_fd"]["msp"]["augrc"] == pytest.approx(list(want[:2]))
    for part in ("intervals: 95%, percentile bootstrap, 150 resamples, seed 3", "  2.5%", "  97.5%", "energy - msp"):
        assert part in printed


def test_shifted_sets_have_intervals_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(4)
    arrays = {"logits": rng.normal(size=(80, 3)), "labels": rng.integers(3, size=80)}
    for name, n in (("fog", 80), ("snow", 50)):
        arrays |= {f"shift_{name}_logits": rng.normal(size=(n, 3)), f"shift_{name}_labels": rng.integers(3, size=n)}
    np.savez(tmp_path / "o.npz", **arrays)
    options = ["--scores", "energy", "msp", "--bootstrap", "150", "--seed", "3"]
    assert evaluate.main(["--npz", str(tmp_path / "o.npz"), *options]) == 0
    found = json.loads((tmp_path / "o-report" / "report.json").read_text())
    assert set(found["intervals"]) == set(found["differences"]) == {"old_fd", "shift/fog", "shift/snow", "shift"}
    values = {}
    for name in ("fog", "snow"):
        logits, labels = arrays[f"shift_{name}_logits"], arrays[f"shift_{name}_labels"]
        scores = {score: SCORES[score](logits) for score in ("energy", "msp")}
        values[name] = bootstrap(scores, logits.argmax(1) == labels, resamples=150, seed=3)
        want = interval(values[name]["msp"][:, METRICS.index("augrc")])
        assert found["intervals"][f"shift/{name}"]["msp"]["augrc"] == pytest.approx(list(want[:2]))
    both = np.mean([values[name]["msp"] - values[name]["energy"] for name in values], axis=0)
    want = interval(both[:, METRICS.index("augrc")])
    assert found["differences"]["shift"]["msp"]["augrc"][1:] == pytest.approx(list(want[:2]))
    printed = capsys.readouterr().out
    assert printed.count("  2.5%") == 3 * 4  # two scores and a difference in four tables


def test_one_class_is_always_right_and_undefined_is_null(tmp_path: Path) -> None:
    np.savez(tmp_path / "o.npz", logits=np.arange(30.0)[:, None], labels=np.zeros(30, int))
    assert evaluate.main(["--npz", str(tmp_path / "o.npz"), "--scores", "logits", "--bootstrap", "20"]) == 0
    text = (tmp_path / "o-report" / "report.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["id_accuracy"] == 1
    assert found["undefined"]["old_fd"]["auroc"] == "there are no errors among the 30 samples"
    for score, share in found["tied_share"]["old_fd"].items():
        # The softmax of one class is 1 whatever its logit.
        assert share == (score in ("msp", "neg_entropy", "doctor")), score
        assert found["intervals"]["old_fd"][score]["aurc"] == [0, 0]
        assert found["intervals"]["old_fd"][score]["auroc"] == [None, None]
    assert found["bootstrap"]["undefined_share"]["old_fd"]["auroc"] == 1


def test_no_intervals_unless_asked_for() -> None:
    found = report.make_report([1, 0], {"s": np.array([1.0, 2.0])}, {})
    assert "bootstrap" not in found
    assert "intervals" not in found
