"""Scores fitted on held-out samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tal_fast import evaluate
from tal_fast.evaluation.fitted_scores import fit_score
from tal_fast.evaluation.npz import read_npz
from tal_fast.evaluation.pipeline import EvaluationInputs, evaluate_outputs
from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.metrics.failure import failure_metrics
from tal_fast.metrics.settings import new_fd
from tal_fast.runs.prediction_store import Outputs
from tal_fast.scores import cosine, log_gap, max_logit_pnorm, msp
from tal_fast.scores.temperature import held_out
from tests.helpers.evaluation import read_json, write_npz


def outputs(samples: int = 600, classes: int = 8, seed: int = 0) -> Outputs:
    """Logits of a random direction per class and of a length that says nothing: the p-norm is better than MSP."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=samples)
    logits = rng.normal(size=(samples, classes)) + 2 * np.eye(classes)[labels]
    return Outputs(logits * rng.lognormal(sigma=1.5, size=(samples, 1)), None, labels)


@pytest.mark.parametrize(("choose_by", "given"), [("old-fd", False), ("new-fd", False), ("new-fd", True)])
def test_pnorm_has_the_least_aurc_of_all(choose_by: str, given: bool) -> None:
    held, far = outputs(), np.random.default_rng(1).normal(size=(300, 8))
    score, entry = fit_score("pnorm", held, choose_by, far if given else None)
    assert entry["chosen"] != "msp"
    p = int(entry["chosen"].removeprefix("p = "))
    np.testing.assert_array_equal(score(held.logits), max_logit_pnorm(p)(held.logits))
    assert entry["aurc"][entry["chosen"]] == min(entry["aurc"].values())
    if choose_by == "old-fd":
        assert entry["aurc"]["p = 4"] == failure_metrics(max_logit_pnorm(4)(held.logits), held.correct)["aurc"]
    elif given:
        setting = new_fd(held.correct, 300, seed=0)
        want = failure_metrics(setting.confidence(msp(held.logits), msp(far)), setting.success)["aurc"]
        assert entry["aurc"]["msp"] == want


def test_msp_is_taken_where_no_p_is_better() -> None:
    held = outputs()
    # Labels drawn from the softmax: the probability of the predicted class is the best score there is.
    p = np.exp(held.logits - held.logits.max(1, keepdims=True))
    labels = (np.random.default_rng(0).random((600, 1)) > (p / p.sum(1, keepdims=True)).cumsum(1)).sum(1)
    score, entry = fit_score("pnorm", Outputs(held.logits, None, labels), "old-fd")
    assert (score, entry["chosen"]) == (msp, "msp")
    right = Outputs(held.logits, None, held.logits.argmax(1))
    assert fit_score("pnorm", right, "old-fd")[1]["chosen"] == "msp"  # all AURC are 0


def test_synthetic_outliers_are_shuffled_logits_of_the_held_out_samples() -> None:
    held = outputs()
    shuffled = np.random.default_rng(7).permuted(held.logits, axis=0)
    np.testing.assert_array_equal(np.sort(shuffled, axis=0), np.sort(held.logits, axis=0))
    got, want = fit_score("pnorm", held, "new-fd", None, 7)[1], fit_score("pnorm", held, "new-fd", shuffled, 7)[1]
    assert got["aurc"] == want["aurc"]


def test_standardised_sum_of_cosine_and_log_gap() -> None:
    held, other = outputs(), outputs(seed=1).logits
    score, _ = fit_score("cosine_log_gap", held, "old-fd")
    z = [(f(other) - f(held.logits).mean()) / f(held.logits).std() for f in (cosine, log_gap)]
    np.testing.assert_allclose(score(other), sum(z), rtol=1e-12)
    with pytest.raises(ValueError, match="infinite or the same for all held-out samples"):
        fit_score("cosine_log_gap", Outputs(np.ones((9, 3)), None, np.zeros(9, int)), "old-fd")
    with pytest.raises(ValueError, match="infinite or the same"):
        fit_score("cosine_log_gap", Outputs(np.arange(9.0)[:, None], None, np.zeros(9, int)), "old-fd")


def test_held_out_samples_and_the_chosen_outliers_are_in_no_metric(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    path = write_npz(tmp_path / "a.npz", ood_far_logits=rng.normal(size=(70, 5)))
    inputs = read_npz(path)
    options = EvaluationOptions(scores=["pnorm", "msp", "cosine_log_gap"], choose_by="new-fd=far", seed=5)
    evaluation = evaluate_outputs(inputs, options)
    fit, rest = held_out(200, 0.2, 5)
    report, samples = evaluation.report, evaluation.samples
    assert (report["ood_names"], report["counts"]["id"], report["fitted_scores"]["held_out"]) == (["noise"], 160, 40)
    np.testing.assert_array_equal(samples.id_scores["msp"], msp(inputs.id.logits[rest]))
    np.testing.assert_array_equal(samples.predictions["val"].index, rest)
    score, entry = fit_score("pnorm", inputs.id.subset(fit), "new-fd", inputs.ood["far"].logits, 5)
    assert report["fitted_scores"]["pnorm"] == entry
    np.testing.assert_array_equal(samples.id_scores["pnorm"], score(inputs.id.logits[rest]))
    # With a temperature, its share is held out, and both are fitted on it.
    both = evaluate_outputs(inputs, EvaluationOptions(scores=["pnorm", "msp"], temperature=0.5)).report
    assert both["fitted_scores"]["held_out"] == both["temperature"]["held_out"] == 100
    # Without a fitted score nothing is held out.
    plain = evaluate_outputs(inputs, EvaluationOptions(scores=["all"])).report
    assert plain["counts"]["id"] == 200
    assert "fitted_scores" not in plain
    flat = EvaluationInputs(Outputs(np.ones((20, 3)), None, np.zeros(20, int)))
    assert "cosine_log_gap" in evaluate_outputs(flat, EvaluationOptions(scores=["msp", "fitted"])).report["left_out"]


def test_the_command_says_what_was_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_npz(tmp_path / "a.npz")
    assert evaluate.main(["--npz", str(path), "--scores", "fitted"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "40 validation samples held out to fit scores on, in no metric; pnorm: " in out
    assert "chosen by new-fd and synthetic outliers" in out
    assert read_json(tmp_path / "a-report")["counts"]["id"] == 160
    for options, message in (
        (
            ["--choose-by", "old-fd", "--scores", "msp"],
            "choosing by old-fd is for pnorm, which is not among the scores",
        ),
        (["--choose-by", "ood"], "pnorm is chosen by old-fd, new-fd or new-fd=OOD-SET, not by 'ood'"),
        (["--choose-by", "new-fd=far"], "pnorm cannot be chosen by 'far': OOD sets are noise"),
    ):
        assert evaluate.main(["--npz", str(path), "--scores", "pnorm", *options]) == 2
        assert message in capsys.readouterr().err
