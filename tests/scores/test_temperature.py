"""Temperature scaling: the minimum of cross-entropy, on samples that take part in nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.special

from tal_fast import evaluation as evaluate
from tal_fast.evaluation.prediction_store import Outputs
from tal_fast.metrics.calibration import calibration_metrics
from tal_fast.scores.temperature import fit_temperature, held_out


def sampled(temperature: float, samples: int = 4000, classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from their softmax at a temperature."""
    rng = np.random.default_rng(1)
    logits = 4 * rng.normal(size=(samples, classes))
    p = scipy.special.softmax(logits / temperature, axis=1)
    return logits, (rng.random((samples, 1)) > p.cumsum(axis=1)).sum(axis=1)


def cross_entropy(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    log_p = scipy.special.log_softmax(logits / temperature, axis=1)
    return float(-log_p[np.arange(len(labels)), labels].mean())


@pytest.mark.parametrize("true", [0.2, 1.0, 7.0])
def test_it_is_the_minimum_of_cross_entropy(true: float) -> None:
    logits, labels = sampled(true)
    found = fit_temperature(logits, labels)
    want = scipy.optimize.minimize_scalar(
        lambda t: cross_entropy(logits, labels, np.exp(t)), bracket=(-3, 3), tol=1e-12
    )
    assert found == pytest.approx(np.exp(want.x), rel=1e-6)
    assert found == pytest.approx(true, rel=0.1)
    assert all(cross_entropy(logits, labels, found) <= cross_entropy(logits, labels, found * k) for k in (0.99, 1.01))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_it_scales_with_the_logits_and_their_type_does_not_matter(scale: float) -> None:
    logits, labels = sampled(2.0)
    want = fit_temperature(logits, labels)
    assert fit_temperature(scale * logits, labels) == pytest.approx(scale * want, rel=1e-8)
    assert fit_temperature(logits.astype(np.float32), labels) == pytest.approx(want, rel=1e-5)


def test_no_minimum_is_said() -> None:
    labels = np.arange(20) % 5
    with pytest.raises(ValueError, match="all 20 held-out samples are classified right"):
        fit_temperature(np.eye(5)[labels], labels)
    with pytest.raises(ValueError, match="no more than chance"):
        fit_temperature(-np.eye(5)[labels], labels)
    with pytest.raises(ValueError, match="no more than chance"):
        fit_temperature(np.zeros((20, 5)), labels)
    with pytest.raises(ValueError, match="a temperature needs samples"):
        fit_temperature(np.zeros((0, 5)), np.zeros(0, int))


def test_held_out_samples_are_a_part() -> None:
    fit, rest = held_out(100, 0.3, seed=4)
    assert (len(fit), len(rest)) == (30, 70)
    assert sorted([*fit, *rest]) == list(range(100))
    assert held_out(100, 0.3, seed=5)[0].tolist() != fit.tolist()
    with pytest.raises(ValueError, match=r"a share of 0\.1 of 3 samples leaves 0 to fit a temperature on"):
        held_out(3, 0.1)


def test_an_evaluation_with_a_temperature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logits, labels = sampled(5.0, 1000)
    rng = np.random.default_rng(2)
    other = rng.normal(size=(300, 6))
    weight, train = rng.normal(size=(6, 8)), rng.normal(size=(200, 8))
    arrays = {
        "features": rng.normal(size=(1000, 8)), "ood_far_features": rng.normal(size=(300, 8)),
        "train_features": train, "fc_weight": weight, "train_logits": train @ weight.T,
    }  # fmt: skip
    np.savez(tmp_path / "a.npz", logits=logits, labels=labels, ood_far_logits=other, **arrays)
    args = ["--npz", str(tmp_path / "a.npz"), "--scores", "msp", "cosine", "vim", "--mix", "all"]
    assert evaluate.main([*args, "--temperature", "held-out=0.25"]) == 0
    found = json.loads((tmp_path / "a-report" / "report.json").read_text())
    fit, rest = held_out(1000, 0.25, 0)
    t = fit_temperature(logits[fit], labels[fit])
    assert found["temperature"]["value"] == t
    assert (found["temperature"]["held_out"], found["counts"]["id"]) == (250, 750)
    assert found["calibration"] == calibration_metrics(logits[rest] / t, labels[rest])
    assert found["temperature"]["calibration_before"] == calibration_metrics(logits[rest], labels[rest])
    assert found["calibration"]["ece"] < found["temperature"]["calibration_before"]["ece"] / 3
    assert "logits divided by T = " in capsys.readouterr().out
    # An evaluation of the same samples, divided beforehand, is the same.
    arrays |= {"features": arrays["features"][rest], "fc_weight": weight / t, "train_logits": train @ weight.T / t}
    np.savez(tmp_path / "b.npz", logits=logits[rest] / t, labels=labels[rest], ood_far_logits=other / t, **arrays)
    assert evaluate.main(["--npz", str(tmp_path / "b.npz"), *args[2:]]) == 0
    want = json.loads((tmp_path / "b-report" / "report.json").read_text())["settings"]
    for key, by_score in want.items():
        for score, values in by_score.items():
            assert found["settings"][key][score] == pytest.approx(values, abs=1e-12), (key, score)
    for text in ("held-out=1", "val", "held-out=x"):
        with pytest.raises(SystemExit):
            evaluate.main([*args, "--temperature", text])
        assert "must be held-out or held-out=SHARE" in capsys.readouterr().err


def test_held_out_samples_leave_their_corrupted_versions_too(tmp_path: Path) -> None:
    logits, labels = sampled(5.0, 400)
    of_id = Outputs(logits, None, labels)
    # The same images twice, corrupted (by nothing): once known as such, once not.
    found = evaluate.evaluate_outputs(
        of_id, {}, tmp_path, scores=["msp"], temperature=0.25, shift_outputs={"blur": of_id, "folder": of_id},
        corrupted=["blur"],
    )  # fmt: skip
    assert found["counts"]["shift"] == {"blur": 300, "folder": 400}
    assert found["settings"]["shift/blur"] == found["settings"]["old_fd"]
    assert found["settings"]["shift/folder"] != found["settings"]["old_fd"]
