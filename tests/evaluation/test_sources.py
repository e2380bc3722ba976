"""Evaluation of runs and saved outputs: passes, cache, files."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tal_fast.config.names import SCORE_GROUPS
from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.evaluation.sources import default_output, evaluate_npz, evaluate_run
from tal_fast.metrics.failure import failure_metrics
from tal_fast.metrics.settings import Mix
from tal_fast.models.features import last_layer
from tal_fast.runs.load import load_run
from tal_fast.runs.predictions import CACHE, Inference, PassOptions
from tal_fast.scores.features import FeatureScorer
from tal_fast.scores.logits import SCORES
from tal_fast.scores.training_statistics import Training
from tests.helpers.evaluation import make_run, read_json, record_passes, write_npz


def test_one_pass_serves_until_the_weights_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = record_passes(monkeypatch)
    folder = make_run(tmp_path / "run", "ce")
    first = evaluate_run(folder, options=EvaluationOptions(scores=["max-logit"]))
    assert first is not None
    assert list(first.report["settings"]["old_fd"]) == ["max_logit", "msp"]  # the method's own score is added
    assert passes == ["val", "ood-noise"]
    again = evaluate_run(folder, options=EvaluationOptions(scores=["energy", "msp"], mix=Mix("all")))
    assert again is not None
    assert again.report["mix"] == "all"
    assert passes == ["val", "ood-noise"]
    make_run(folder, "ce", seed=1)
    second = evaluate_run(folder)
    assert second is not None
    assert passes == ["val", "ood-noise"] * 2
    assert second.report["settings"] != first.report["settings"]


def test_one_pass_serves_until_an_image_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAL_FAST_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for folder in ("train/cat", "train/dog", "val/cat", "val/dog", "ood"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / folder / f"{i}.png")
    data = {
        "dataset": "folder", "root": str(tmp_path), "ood": {"other": str(tmp_path / "ood")}, "loader": "torch",
        "workers": 0, "image_size": 16,
    }  # fmt: skip
    run = make_run(tmp_path / "run", data=data, classes=["cat", "dog"])
    passes = record_passes(monkeypatch)
    for _ in range(2):
        evaluate_run(run, typicalness=False)
    counts = read_json(run)["counts"]
    assert counts == {"id": 6, "id_right": counts["id_right"], "ood": {"other": 3}, "shift": {}}
    assert passes == ["val", "ood-other"]
    Image.new("RGB", (16, 16), "red").save(tmp_path / "ood" / "1.png")
    evaluate_run(run, typicalness=False)
    assert passes == ["val", "ood-other", "ood-other"]
    # Another image of the same size has another modification time.
    os.utime(tmp_path / "val" / "cat" / "2.png", (1, 1))
    evaluate_run(run, typicalness=False)
    assert passes == ["val", "ood-other", "ood-other", "val"]


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run", "ce")
    (run / CACHE).write_text("in the way")
    passes = record_passes(monkeypatch)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            evaluate_run(run, tmp_path / "out")
    assert passes == ["val", "ood-noise"] * 2
    assert "outputs cannot be kept" in caplog.text
    assert (tmp_path / "out" / "report.json").is_file()


def test_feature_scores_of_a_run_are_those_of_its_features(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "ce")
    evaluation = evaluate_run(folder, options=EvaluationOptions(scores=["all"]))
    assert evaluation is not None
    assert list(evaluation.report["settings"]["new_fd"]) == list(SCORE_GROUPS["all"])
    assert evaluation.report["fitted"]["training_samples"] == 400
    run = load_run(folder)
    inference = Inference(run.model, run.data, folder / CACHE / "best")
    train, val = (inference.store(split).load() for split in ("train-eval", "val"))
    weight, bias = last_layer(run.model)
    assert train.features is not None
    assert val.features is not None
    # The layer that was found is the one that made the logits from these features.
    np.testing.assert_allclose(val.features @ weight.T + bias, val.logits, rtol=1e-4, atol=1e-5)
    scorer = FeatureScorer(Training(train.features, train.labels, weight, bias))
    scores = scorer.scores(["mahalanobis"], val.logits, val.features)["mahalanobis"]
    assert evaluation.report["settings"]["old_fd"]["mahalanobis"] == failure_metrics(scores, val.correct)


def test_fast_evaluations_keep_no_features(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "ce")
    passes = PassOptions(features=False)
    evaluation = evaluate_run(run, passes=passes, options=EvaluationOptions(scores=["all"]))
    assert evaluation is not None
    assert list(evaluation.report["settings"]["old_fd"]) == list(SCORES)
    shards = list(run.glob("eval-cache/best/*/*/*.npz"))
    assert {path.parents[1].name for path in shards} == {"val", "ood-noise"}
    assert all("features" not in np.load(path) for path in shards)


def test_an_ood_set_cannot_have_a_name_that_is_taken(evaluated_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an OOD set cannot be called 'val'"):
        evaluate_run(evaluated_run, tmp_path, ood={"val": "gaussian:5"})
    with pytest.raises(ValueError, match="the data set has an OOD set 'noise' already"):
        evaluate_run(evaluated_run, tmp_path, ood={"noise": "gaussian:5"})


def test_errors_of_sets_begin_with_the_users_name(evaluated_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^the set 'street' cannot be used: the set 'no/such' is neither a folder nor"):
        evaluate_run(evaluated_run, tmp_path, ood={"street": "no/such"})
    with pytest.raises(
        ValueError, match="^the set 'dirty lens' cannot be used: 'blur:9x' must end with a whole number"
    ):
        evaluate_run(evaluated_run, tmp_path, shifts={"dirty lens": "blur:9x"})


@pytest.mark.timeout(20)
def test_a_pipe_is_no_file_of_outputs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "outputs.npz")
    with pytest.raises(ValueError, match=r"outputs.npz is a pipe or a device, which may have no end; name a file"):
        evaluate_npz(tmp_path / "outputs.npz")


def test_saved_outputs_are_reported_beside_their_file(tmp_path: Path) -> None:
    evaluation = evaluate_npz(write_npz(tmp_path / "outputs.npz"))
    folder = tmp_path / "outputs-report"
    assert default_output(tmp_path / "outputs.npz") == folder
    assert {path.name for path in folder.iterdir()} == {"report.json", "samples.npz", "report.html"}
    assert read_json(folder)["settings"] == evaluation.report["settings"]
    assert str(default_output("pretrained", "timm/vit")) == "timm-vit-pretrained-report"


@pytest.mark.slow
def test_torchrun_evaluates_as_one_process_does(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "ce")
    options = EvaluationOptions(scores=["msp", "mahalanobis"], mix=Mix("all"))
    one = evaluate_run(run, tmp_path / "one", cache=tmp_path / "one-cache", options=options)
    assert one is not None
    args = [
        "--run-dir", str(run), "--device", "cpu", "--batch-size", "33", "--scores", "msp,mahalanobis", "--mix", "all",
        "--output", str(tmp_path / "two"), "--cache", str(tmp_path / "two-cache"),
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tal_fast.evaluate"]
    found = subprocess.run([sys.executable, *launcher, *args], capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("ID accuracy") == 1
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    for key, by_score in one.report["settings"].items():
        for score, values in by_score.items():
            # Batches of other sizes round differently.
            assert two["settings"][key][score] == pytest.approx(values, abs=1e-4), (key, score)
    for name, samples in (("val", 200), ("ood-noise", 1000), ("train-eval", 400)):
        shards = (tmp_path / "two-cache" / name).glob("*/[0-9]*.npz")
        indices = np.concatenate([np.load(path)["indices"] for path in shards])
        np.testing.assert_array_equal(np.sort(indices), np.arange(samples))
