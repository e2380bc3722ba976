"""The evaluator from end to end: a run's folder or an npz in, report.json, pictures and tables out."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tal_fast import evaluation as evaluate
from tal_fast.evaluation import command, report
from tal_fast.evaluation import pipeline as outputs
from tal_fast.evaluation import predictions as inference
from tal_fast.evaluation.prediction_store import Outputs
from tal_fast.metrics.calibration import calibration_metrics
from tal_fast.metrics.failure import METRICS, failure_metrics
from tal_fast.metrics.settings import Mix, new_fd, ood
from tal_fast.models.features import last_layer
from tal_fast.runs.load import load_run
from tal_fast.scores.features import FEATURE_SCORES, FeatureScorer, Training
from tal_fast.scores.logits import SCORES
from tal_fast.utils.io import replacing
from tests.helpers.evaluation import make_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has been evaluated."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "synthetic-tal")
    evaluate.evaluate_run(folder, mix=Mix("all"))
    return folder


def write_npz(path: Path, **changes: Any) -> Path:
    """Outputs of a classifier of 5 classes, right three times in four, with an OOD set; None leaves an array out."""
    rng = np.random.default_rng(0)
    labels = rng.integers(5, size=200)
    logits = rng.normal(size=(200, 5)).astype(np.float32)
    logits[np.arange(200), labels] += 3 * rng.random(200).astype(np.float32)
    arrays: dict[str, Any] = {"logits": logits, "labels": labels, "ood_noise_logits": 0.5 * rng.normal(size=(90, 5))}
    arrays |= changes
    np.savez(path, **{name: values for name, values in arrays.items() if values is not None})
    return path


class Pairs(nn.Module):
    """Logits and features that tell which image they come from."""

    calls = 0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        x = images.flatten(1)
        return torch.cat((x, -x), 1), 2 * x


def batches(indices: list[list[int]], dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for part in indices:
        index = torch.tensor(part)
        yield index[:, None].to(dtype), index % 2, index


# --- one pass -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, "float32"), (torch.float64, "float64")])
def test_narrow_outputs_are_widened(dtype: torch.dtype, kept: str) -> None:
    ((indices, outputs),) = inference.run_model(Pairs(), batches([[4, 1]], dtype))
    assert outputs.features is not None
    assert (outputs.logits.dtype, outputs.features.dtype) == (kept, kept)
    np.testing.assert_array_equal(indices, [4, 1])
    np.testing.assert_array_equal(outputs.logits[:, 0], [4, 1])
    np.testing.assert_array_equal(outputs.labels, [0, 1])


def test_diverged_is_refused() -> None:
    broken = [(torch.tensor([[1.0], [float("nan")]]), torch.zeros(2), torch.tensor([7, 3]))]
    with pytest.raises(ValueError, match="the logits of sample 3 of 'val' are not finite"):
        list(inference.run_model(Pairs(), broken, name="val"))


def test_right_takes_the_first_of_equal_logits() -> None:
    outputs = Outputs(np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 2.0]]), None, np.array([0, 1, 1]))
    assert outputs.right.tolist() == [True, False, True]


# --- the cache ------------------------------------------------------------------------------------------------------


def test_cache_names_never_meet(tmp_path: Path) -> None:
    names = ["val", "a/b", "a_b", "../val", "a b", "ä"]
    paths = {inference.cache_path(tmp_path, name) for name in names}
    assert len(paths) == len(names)
    assert all(path.parent == tmp_path for path in paths)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the splits that a model is run over from now on."""
    names: list[str] = []
    run_model = inference.run_model

    def count(model: nn.Module, loader: Any, device: Any, name: str, *rest: Any) -> Any:
        names.append(name)
        return run_model(model, loader, device, name, *rest)

    monkeypatch.setattr(inference, "run_model", count)
    return names


def test_one_pass_serves_until_the_weights_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = counted(monkeypatch)
    folder = make_run(tmp_path / "run", "ce")
    first = evaluate.evaluate_run(folder)
    assert passes == ["val", "ood-noise"]
    assert evaluate.evaluate_run(folder, scores=["energy", "msp"], mix=Mix("all"))["mix"] == "all"
    assert passes == ["val", "ood-noise"]
    make_run(folder, "ce", seed=1)
    second = evaluate.evaluate_run(folder)
    assert passes == ["val", "ood-noise"] * 2
    assert second["settings"] != first["settings"]


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
    run = make_run(tmp_path / "run", data=data)
    passes = counted(monkeypatch)
    first = evaluate.evaluate_run(run)
    assert evaluate.evaluate_run(run)["settings"] == first["settings"]
    assert first["counts"] == {"id": 6, "id_right": first["counts"]["id_right"], "ood": {"other": 3}, "shift": {}}
    assert passes == ["val", "ood-other"]
    Image.new("RGB", (16, 16), "red").save(tmp_path / "ood" / "1.png")
    evaluate.evaluate_run(run)
    assert passes == ["val", "ood-other", "ood-other"]
    # Another image of the same size shows in the time of change.
    os.utime(tmp_path / "val" / "cat" / "2.png", (1, 1))
    evaluate.evaluate_run(run)
    assert passes == ["val", "ood-other", "ood-other", "val"]


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    (run / evaluate.CACHE).write_text("in the way")
    passes = counted(monkeypatch)
    for _ in range(2):
        evaluate.evaluate_run(run, tmp_path / "out")
    assert passes == ["val", "ood-noise"] * 2
    assert "outputs cannot be kept" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.json").is_file()


# --- the report of a run --------------------------------------------------------------------------------------------


def test_report_of_a_run(run_dir: Path) -> None:
    text = (run_dir / "report.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["run"] == str(run_dir)
    assert (found["method"], found["score"], found["checkpoint"], found["epoch"]) == ("tal", "cosine", "best", 7)
    assert (found["mix"], found["convention"], found["ood_names"]) == ("all", "tal_fast", ["noise"])
    assert found["samples"]["old_fd"]["n"] == found["counts"]["id"] == 1000
    assert set(found["settings"]) == {"old_fd", "ood", "new_fd"}
    run = load_run(run_dir)
    with torch.inference_mode():
        val, noise = (
            [
                torch.cat(x)
                for x in zip(*((*run.model(i), y) for i, y, _ in run.data.loader(s, batch_size=77)), strict=True)
            ]
            for s in ("val", "noise")
        )
    right = val[0].argmax(1) == val[2]
    assert found["id_accuracy"] == pytest.approx(right.double().mean().item())
    for score in ("cosine", "msp"):
        both = SCORES[score](val[0]), SCORES[score](noise[0])
        for key, samples, success in (
            ("old_fd", both[0], right),
            ("ood", np.concatenate(both), torch.arange(2000) < 1000),
            ("new_fd", np.concatenate(both), torch.cat((right, torch.zeros(1000)))),
        ):
            want = failure_metrics(samples, success)
            # Batches of another size round differently.
            assert found["settings"][key][score] == pytest.approx(want, abs=1e-4), (key, score)


def test_calibration_is_of_the_id_samples(run_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert evaluate.main(["--run", str(run_dir), "--output", str(tmp_path)]) == 0
    run = load_run(run_dir)
    val = inference.inference_of(run, run_dir / evaluate.CACHE / "best").store("val").load()
    want = calibration_metrics(val.logits, val.labels)
    assert read(tmp_path)["calibration"] == want
    assert f"ECE {want['ece']:.4f} (15 bins), NLL {want['nll']:.4f} nats" in capsys.readouterr().out


def test_pictures(run_dir: Path) -> None:
    for name in ("risk_coverage.png", "confidence_histogram.png"):
        with Image.open(run_dir / name) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) > 300
        # The first two lines' colours, Okabe and Ito's blue and vermilion.
        for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
            assert (pixels == colour).all(2).sum() > 20, name


def test_the_methods_own_score_is_always_there(tmp_path: Path) -> None:
    found = evaluate.evaluate_run(make_run(tmp_path / "run", "ce"), scores=["max-logit"])
    assert list(found["settings"]["old_fd"]) == ["max_logit", "msp"]


# --- reports of outputs from anywhere -------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_npz(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "outputs.npz")
    assert evaluate.main(["--npz", str(path), "--scores", "logits", "--seed", "3"]) == 0
    found = read(tmp_path / "outputs-report")
    assert list(found["settings"]["new_fd"]) == list(SCORES)
    with np.load(path) as data:
        logits, labels, other = data["logits"], data["labels"], data["ood_noise_logits"]
    right = logits.argmax(1) == labels
    for key, setting in {"ood": ood(right, 90, seed=3), "new_fd": new_fd(right, 90, seed=3)}.items():
        for score, function in SCORES.items():
            confidence = setting.confidence(function(logits), function(other))
            assert found["settings"][key][score] == failure_metrics(confidence, setting.success)
    assert found["samples"]["new_fd"]["id"] == found["samples"]["new_fd"]["ood"] == 90
    assert found["aurc_random"]["ood"] == 0.5
    assert found["aurc_floor"]["old_fd"] < found["settings"]["old_fd"]["msp"]["aurc"] < found["aurc_random"]["old_fd"]


def test_scores_over_features_of_a_run(run_dir: Path, tmp_path: Path) -> None:
    found = evaluate.evaluate_run(run_dir, tmp_path, scores=["all"])
    assert list(found["settings"]["new_fd"]) == [*SCORES, *FEATURE_SCORES]
    run = load_run(run_dir)
    passes = inference.inference_of(run, run_dir / evaluate.CACHE / "best")
    outputs = {split: passes.store(split).load() for split in ("train-eval", "val")}
    train, val = outputs["train-eval"], outputs["val"]
    weight, bias = last_layer(run.model)
    assert train.features is not None
    assert val.features is not None
    # The layer that was found is the one that made the logits of these features.
    np.testing.assert_allclose(val.features @ weight.T + bias, val.logits, rtol=1e-4, atol=1e-5)
    scorer = FeatureScorer(Training(train.features, train.labels, weight, bias))
    want = scorer.scores(["mahalanobis"], val.logits, val.features)["mahalanobis"]
    assert found["settings"]["old_fd"]["mahalanobis"] == failure_metrics(want, val.right)


def test_scores_over_features_of_an_npz(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "plots", MagicMock())  # a dozen reports whose pictures nobody looks at
    rng = np.random.default_rng(2)
    arrays = {
        "features": rng.normal(size=(200, 8)), "ood_noise_features": rng.normal(size=(90, 8)) + 3,
        "train_features": rng.normal(size=(300, 8)), "train_labels": rng.integers(5, size=300),
        "fc_weight": rng.normal(size=(5, 8)), "fc_bias": rng.normal(size=5),
    }  # fmt: skip
    path = write_npz(tmp_path / "outputs.npz", **arrays)
    assert evaluate.main(["--npz", str(path), "--scores", "features", "sirc"]) == 0
    found = read(tmp_path / "outputs-report")["settings"]
    assert list(found["ood"]) == list(FEATURE_SCORES)
    assert found["ood"]["mahalanobis"]["auroc"] > 0.9
    capsys.readouterr()
    for missing, score, message in (
        ("train_features", "knn", "knn: it needs training features, and there are none"),
        ("features", "knn", "knn: it needs the features of every set, and there are no features"),
        ("ood_noise_features", "feature_norm", "of every set, and there are no ood_noise_features"),
        ("train_labels", "mahalanobis", "mahalanobis needs training labels"),
        ("fc_bias", "vim", None),
        ("train_features", "feature_norm", None),
    ):
        write_npz(path, **{**arrays, missing: None})
        assert evaluate.main(["--npz", str(path), "--scores", score, "msp"]) == 0
        assert read(tmp_path / "outputs-report")["left_out"].keys() == ({score} if message else set())
        printed = capsys.readouterr().out
        assert message is None or f"left out: {score}: " in printed
        assert message is None or message in printed
        if message is not None:
            assert evaluate.main(["--npz", str(path), "--scores", score]) == 2
            assert message in capsys.readouterr().err
    write_npz(path, **{**arrays, "fc_weight": None})
    assert evaluate.main(["--npz", str(path), "--scores", "vim"]) == 2
    assert "the last layer's bias must be (C,) and come with its weight" in capsys.readouterr().err


def test_several_ood_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(1).normal(size=(40, 5))
    path = write_npz(tmp_path / "outputs.npz", ood_far_logits=0.1 * noise)
    assert evaluate.main(["--npz", str(path), "--mix", "prior=0.25", "--output", str(tmp_path / "out")]) == 0
    found = read(tmp_path / "out")
    assert list(found["settings"]) == [
        "old_fd", "ood/noise", "new_fd/noise", "ood/far", "new_fd/far", "ood", "new_fd",
    ]  # fmt: skip
    assert (found["samples"]["ood/far"]["id"], found["samples"]["ood/far"]["ood"]) == (120, 40)
    for kind in ("ood", "new_fd"):
        for metric in METRICS:
            each = [found["settings"][f"{kind}/{name}"]["msp"][metric] for name in ("noise", "far")]
            assert found["settings"][kind]["msp"][metric] == pytest.approx(sum(each) / 2)
    printed = capsys.readouterr().out
    assert "mix prior=0.25, seed 0" in printed
    assert "New FD: mean over 2 OOD sets" in printed


def test_shifted_sets_of_an_npz(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(7)
    arrays = {"shift_fog_logits": rng.normal(size=(60, 5)), "shift_fog_labels": rng.integers(5, size=60)}
    features = {"features": rng.normal(size=(200, 4)), "ood_noise_features": rng.normal(size=(90, 4))}
    path = write_npz(tmp_path / "outputs.npz", **arrays, **features, fc_wieght=np.zeros(3))
    assert evaluate.main(["--npz", str(path), "--scores", "msp", "feature_norm"]) == 0
    said = capsys.readouterr()
    assert "has arrays of names that mean nothing here: fc_wieght\n" in said.err
    assert "left out: feature_norm: it needs the features of every set, and there are no shift_fog_features" in said.out
    found = read(tmp_path / "outputs-report")
    right = arrays["shift_fog_logits"].argmax(1) == arrays["shift_fog_labels"]
    assert found["settings"]["shift"]["msp"] == failure_metrics(SCORES["msp"](arrays["shift_fog_logits"]), right)
    errors = int(60 - right.sum())
    assert found["samples"]["shift"] == {"n": 60, "id": 60, "ood": 0, "errors": errors}
    assert found["aurc_random"]["shift"] == errors / 60
    assert found["counts"]["shift"] == {"fog": 60}
    arrays["shift_fog_features"] = rng.normal(size=(60, 4))
    write_npz(path, **arrays, **features)
    assert evaluate.main(["--npz", str(path), "--scores", "feature_norm"]) == 0
    norms = np.abs(arrays["shift_fog_features"]).sum(1)
    assert read(tmp_path / "outputs-report")["settings"]["shift"]["feature_norm"] == failure_metrics(norms, right)


def test_order_of_samples_does_not_matter(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz")
    with np.load(path) as data:
        arrays = dict(data)
    # Many ties: rounded logits.
    arrays["logits"] = np.round(arrays["logits"])
    np.savez(path, **arrays)
    order = np.random.default_rng(5).permutation(200)
    np.savez(tmp_path / "b.npz", **{**arrays, "logits": arrays["logits"][order], "labels": arrays["labels"][order]})
    reports = [evaluate.evaluate_npz(tmp_path / f"{name}.npz", mix=Mix("all")) for name in "ab"]
    assert reports[0]["tied_share"]["old_fd"]["cosine"] > 0.5
    assert reports[0]["settings"] == reports[1]["settings"]


def test_undefined_is_null_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.arange(20) % 5
    path = write_npz(tmp_path / "right.npz", logits=np.eye(5)[labels] + 0.1, labels=labels, ood_noise_logits=None)
    assert evaluate.main(["--npz", str(path)]) == 0
    text = (tmp_path / "right-report" / "report.json").read_text()
    assert "NaN" not in text
    found = json.loads(text)
    assert list(found["settings"]) == ["old_fd"]
    assert found["settings"]["old_fd"]["msp"]["auroc"] is None
    assert found["settings"]["old_fd"]["msp"]["aurc"] == 0
    assert found["undefined"]["old_fd"]["auroc"] == "there are no errors among the 20 samples"
    assert "- undefined (AUROC, FPR95, TNR95, AUPR-error): there are no errors" in capsys.readouterr().out
    assert math.isnan(report.read_report(tmp_path / "right-report")["settings"]["old_fd"]["msp"]["auroc"])


def test_no_samples_at_all(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "none.npz", logits=np.zeros((0, 5)), labels=np.zeros(0, int))
    assert evaluate.main(["--npz", str(path)]) == 0
    found = read(tmp_path / "none-report")
    assert found["id_accuracy"] is None
    assert found["undefined"]["new_fd"]["aurc"] == "there are no samples"


def test_conventions_differ_where_scores_tie(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "outputs.npz")
    with np.load(path) as data:
        np.savez(path, **{**dict(data), "logits": np.round(data["logits"])})
    ours, theirs = (evaluate.evaluate_npz(path, convention=c) for c in ("tal_fast", "tal"))
    assert (ours["convention"], theirs["convention"]) == ("tal_fast", "tal")
    assert ours["settings"]["old_fd"]["msp"]["aurc"] != theirs["settings"]["old_fd"]["msp"]["aurc"]
    assert ours["settings"]["old_fd"]["msp"]["auroc"] == theirs["settings"]["old_fd"]["msp"]["auroc"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": None}, "has no 'logits'; it has labels, ood_noise_logits"),
        ({"labels": None}, "has no 'labels'; it has logits"),
        ({"labels": np.zeros(7, int)}, "logits has 200 samples but labels has 7; they must match"),
        ({"labels": np.full(200, 5)}, "labels must lie in 0..4, the columns of logits; 5 (index 0) does not"),
        ({"labels": np.arange(200) - 1}, "-1 (index 0) does not"),
        ({"labels": np.zeros(200)}, "labels must be (n,) integers, not float64"),
        ({"logits": np.zeros(200)}, "logits must be an (n, C) array"),
        ({"logits": np.full((200, 5), np.nan)}, "the logits of sample 0 of 'logits' are not finite"),
        ({"ood_noise_logits": np.zeros((90, 4))}, "ood_noise_logits has 4 columns but logits has 5"),
        ({"features": np.zeros((7, 3))}, "features has 7 samples but its logits have 200"),
        ({"shift_fog_logits": np.zeros((4, 5))}, "has 'shift_fog_logits' but no 'shift_fog_labels'"),
        (
            {"shift_fog_logits": np.zeros((4, 5)), "shift_fog_labels": np.arange(3)},
            "shift_fog_logits has 4 samples but shift_fog_labels has 3",
        ),
        ({"shift_fog_logits": np.zeros((4, 6)), "shift_fog_labels": np.arange(4)}, "has 6 columns but logits has 5"),
        ({"logits": np.array([{}, {}])}, "cannot be read as .npz without pickle"),
    ],
)
def test_npz_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    path = write_npz(tmp_path / "outputs.npz", **changes)
    assert evaluate.main(["--npz", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "outputs-report").exists()


def test_an_ood_set_called_as_the_id_samples_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run_dir: Path
) -> None:
    path = write_npz(tmp_path / "outputs.npz", ood_val_logits=np.zeros((3, 5)))
    for args in (["--npz", str(path)], ["--run", str(run_dir), "--ood", "val=gaussian:5", "--output", str(tmp_path)]):
        assert evaluate.main(args) == 2
        assert capsys.readouterr().err.startswith("error: an OOD set cannot be called 'val'")


def test_of_torchruns_processes_one_reports_on_an_npz(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_npz(tmp_path / "outputs.npz")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert evaluate.main(["--npz", str(path)]) == 0
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "outputs-report").exists()
    monkeypatch.setenv("RANK", "0")
    assert evaluate.main(["--npz", str(path)]) == 0
    assert "ID accuracy" in capsys.readouterr().out
    assert (tmp_path / "outputs-report" / "report.html").is_file()


def test_files_that_are_no_npz(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.npz").write_text("logits")
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("text.npz", "empty.npz", "array.npy"):
        assert evaluate.main(["--npz", str(tmp_path / name)]) == 2, name
        assert "cannot be read as .npz" in capsys.readouterr().err
    assert evaluate.main(["--npz", str(tmp_path / "gone.npz")]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_runs_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], run_dir: Path) -> None:
    (tmp_path / "empty").mkdir()
    for args, message in (
        (["--run", str(tmp_path / "gone")], "there is no run folder"),
        (["--run", str(tmp_path / "empty")], "there is no checkpoint"),
        (["--run", str(run_dir), "--scores", "cosine,margin"], "unknown score margin; choose from cosine, msp,"),
        (["--run", str(run_dir), "--device", "cuda:99"], "the device 'cuda:99' cannot be used"),
    ):
        assert evaluate.main(args) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--convention", "fd"], "invalid choice: 'fd'"),
        (["--mix", "half"], "unknown mix 'half'; choose from balanced-random"),
        (["--mix", "prior=2"], "must lie in (0, 1), not 2.0"),
        (["--batch-size", "0"], "must be at least 1, not 0"),
        (["--seed", "x"], "must be a whole number, not 'x'"),
        (["--checkpoint", "first"], "invalid choice: 'first'"),
    ],
)
def test_arguments_out_of_range(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--run", "x", *args])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_as_a_command(run_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m"]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120}
    args = ["--run", str(run_dir), "--mix", "all", "--units", "paper", "--output", str(tmp_path)]
    found = subprocess.run([*command, "tal_fast.evaluate", *args], **options)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(f"{run_dir}: tal, best checkpoint, epoch 7\nID accuracy ")
    for part in ("Old FD: 1000 ID", "OOD against noise: 1000 ID + 1000 OOD", "New FD against noise", "AUPR-error"):
        assert part in found.stdout
    side = subprocess.run([*command, "tal_fast.compare", str(run_dir), str(tmp_path)], **options)
    assert side.returncode == 0, side.stderr


def test_commands_in_the_docs_are_understood() -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text().replace("\\\n", " ")
    lines = [line.split("tal_fast.evaluate ", 1)[1] for line in text.splitlines() if "-m tal_fast.evaluate --" in line]
    assert len(lines) == 6
    for line in lines:
        args = command.parser().parse_args(shlex.split(line))
        command.check_source(args)
        evaluate.check_scores(args.scores)
