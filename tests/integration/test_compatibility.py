"""Files of version 0.1.0 load, resume and evaluate as they did then; ``tests/data/v0.1.0`` holds them."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tal_fast import compare, evaluate, experiment, html_report
from tal_fast.config.parse import load_config, parse_training
from tal_fast.evaluation.calibration import calibrate as choose
from tal_fast.evaluation.export import SelectiveClassifier
from tal_fast.evaluation.report import read_report
from tal_fast.evaluation.sample_scores import read_samples
from tal_fast.runs import checkpoint
from tal_fast.runs.load import load_run
from tal_fast.training.trainer import Trainer
from tal_fast.utils.rng import rng_state

FILES = Path(__file__).parents[1] / "data" / "v0.1.0"
EXPECTED: dict[str, Any] = json.loads((FILES / "expected.json").read_text())
RUNS = sorted(EXPECTED["configs"])
INTERRUPTED = sorted(EXPECTED["continued"])
TAL_OPTIONS = {
    "warmup_epochs", "variant", "queue_size", "t_min", "t_max", "t_wrong", "confidence_threshold", "queue_scope",
    "backend",
}  # fmt: skip
"""Fields of 0.1.0's ``method`` that only TAL reads; configurations of other methods have them too."""


@pytest.fixture(autouse=True)
def _one_thread(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TAL_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fingerprints(value: Any, name: str) -> dict[str, str]:
    """Place -> SHA-256 of type, shape and bytes, for every tensor in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        head = f"{value.dtype} {list(value.shape)} ".encode()
        return {name: hashlib.sha256(head + value.contiguous().numpy().tobytes()).hexdigest()}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {k: sha for key, item in items for k, sha in fingerprints(item, f"{name}/{key}").items()}


def expected_tensors(run: str, part: str) -> dict[str, str]:
    tensors = EXPECTED["tensors"][f"{run}/checkpoints/last.pt"]
    return {name: sha for name, sha in tensors.items() if name.startswith(f"{part}/")}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted option -> value, the method's own options directly under ``method``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "ood":
            found |= flat(value, prefix if key == "options" else f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def resumed(run: str, output: Path) -> Trainer:
    """A trainer that goes on with a copy of the run, as the command line makes it."""
    shutil.copytree(FILES / run, output)
    config = output / "config.yaml"
    # The machine of the tests may lack the C++ extension; a resumed run may change its backend.
    config.write_text(config.read_text().replace("backend: native", "backend: auto"))
    return Trainer(parse_training(["--config", str(config), "--output", str(output), "--resume", "auto"])[0])


@pytest.mark.parametrize("run", RUNS)
def test_config_keeps_its_meaning(run: str) -> None:
    old, new = flat(EXPECTED["configs"][run]), flat(load_config(str(FILES / run / "config.yaml")).to_dict())
    ignored = {"fmfp-tal": {"t_wrong"}, "tal": set()}.get(old["method.name"], TAL_OPTIONS)
    for option, value in old.items():
        if option.removeprefix("method.") not in ignored:
            assert new[option] == value, option


def test_command_line_options_of_tal_still_mean_the_same() -> None:
    options = (
        "--config digits-tal --method.variant released --method.queue-size 120 --method.t_min 5 --method.t-max 60 "
        "--method.t-wrong null --method.confidence-threshold 0.2 --method.queue_scope global "
        "--method.backend reference --method.warmup-epochs 1 --method.label-smoothing 0.05"
    )
    new = flat(parse_training(options.split())[0].to_dict())
    old = flat(EXPECTED["configs"]["run"]) | {"method.backend": "reference"}
    assert {k: new[k] for k in old if k.startswith("method.")} == {k: old[k] for k in old if k.startswith("method.")}


@pytest.mark.parametrize("run", RUNS)
def test_checkpoint_loads_tensor_by_tensor(run: str) -> None:
    content = checkpoint.load(FILES / run / "checkpoints" / "last.pt")
    for part in ("model", "average", "optimizer", "ranks"):
        assert fingerprints(content[part], part) == expected_tensors(run, part)


@pytest.mark.parametrize("run", RUNS)
def test_trainer_restores_the_state(run: str, tmp_path: Path) -> None:
    trainer = resumed(run, tmp_path / "run")
    state = trainer.state
    content = checkpoint.load(FILES / run / "checkpoints" / "last.pt")
    generators = fingerprints(rng_state(), "ranks/0/rng")
    assert generators == expected_tensors(run, "ranks/0/rng")
    assert (state.epoch, state.step) == (content["epoch"], content["step"])
    assert (state.history, state.best) == (content["history"], content["best"])
    assert fingerprints(state.network.state_dict(), "model") == expected_tensors(run, "model")
    assert fingerprints(state.optimizer.state_dict(), "optimizer") == expected_tensors(run, "optimizer")
    average = {} if state.average is None else fingerprints(state.average.network.state_dict(), "average")
    assert average == expected_tensors(run, "average")
    assert len(average) == (0 if run in ("run", "mid-epoch/crl") else len(state.network.state_dict()))
    # The queue, or the counts of CRL; by value, for a method may give its state other names.
    of_method = fingerprints(state.method.state_dict(), "")
    assert sorted(of_method.values()) == sorted(expected_tensors(run, "ranks/0/method").values())
    # Its options too: they decide the loss of a batch.
    state.method.start_epoch(state.epoch)
    logits, features = 3 * torch.arange(160.0).sin().view(16, 10), torch.arange(256.0).cos().abs().view(16, 16)
    step = state.method(logits, features, torch.arange(16) % 10, torch.arange(16))
    assert float(step.loss) == pytest.approx(EXPECTED["losses"][run], rel=1e-5)


@pytest.mark.parametrize("run", INTERRUPTED)
def test_interrupted_run_goes_on_to_its_end(run: str, tmp_path: Path) -> None:
    trainer = resumed(run, tmp_path / "run")
    before = list(trainer.history)
    trainer.fit()
    assert trainer.history[: len(before)] == before
    assert trainer.state.epoch == trainer.config.epochs == len(trainer.history)
    last = trainer.history[-1]
    # Another machine rounds otherwise, and steps amplify that; bench/same_bits.py compares bits on one machine.
    for name, value in EXPECTED["continued"][run].items():
        assert last[name] == pytest.approx(value, rel=0.02, abs=0.02), name


def test_finished_run_evaluates_to_the_same_metrics(tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "report"
    shutil.copytree(FILES / "run", run)
    assert load_run(run).epoch == load_run(run, "last").epoch == 3
    options = ["--ood", "noise=gaussian:150", "--shift", "contrast=contrast:4", "--scores", "logits", "features"]
    options += ["--no-typicalness", "--device", "cpu"]
    assert evaluate.main(["--run", str(run), "--output", str(output), *options]) == 0
    report, old = read_report(output), EXPECTED["evaluation"]
    assert report["counts"]["id"] == old["counts"]["id"]
    new_samples, old_samples = read_samples(output), read_samples(FILES / "run")
    assert new_samples is not None
    assert old_samples is not None
    # Scores of another machine differ in their last bits, and each pair that swaps ranks moves AURC by about 1e-5.
    differences = [np.abs(new_samples.id_scores[s] - old_samples.id_scores[s]).max() for s in ("cosine", "msp")]
    differences += [
        np.abs(new_samples.ood_scores[name][s] - scores[s]).max()
        for name, scores in old_samples.ood_scores.items() for s in scores
    ]  # fmt: skip
    assert max(differences) < 1e-5
    tolerance = 1e-6 if max(differences) < 1e-12 else 1e-3
    assert report["id_accuracy"] == pytest.approx(old["id_accuracy"], abs=tolerance)
    assert report["calibration"] == pytest.approx(old["calibration"], abs=tolerance)
    assert report["settings"].keys() == old["settings"].keys()
    for setting, by_score in old["settings"].items():
        for score, metrics in by_score.items():
            assert report["settings"][setting][score] == pytest.approx(metrics, abs=tolerance, nan_ok=True), (
                setting,
                score,
            )


def test_stored_outputs_evaluate_to_the_same_metrics(tmp_path: Path) -> None:
    outputs = str(FILES / "outputs.npz")
    options = ["--output", str(tmp_path), "--scores", "logits", "--bootstrap", "50"]
    assert evaluate.main(["--npz", outputs, *options]) == 0
    report, old = read_report(tmp_path), EXPECTED["evaluation_of_outputs"]
    assert report["settings"].keys() == report["intervals"].keys() == old["settings"].keys() == old["intervals"].keys()
    for setting, by_score in old["settings"].items():
        assert report["settings"][setting].keys() == report["intervals"][setting].keys() >= by_score.keys()
        for score, values in by_score.items():
            for metric, value in values.items():
                found = report["settings"][setting][score][metric]
                assert found == pytest.approx(value, abs=1e-6, nan_ok=True), (setting, score, metric)
    assert report["calibration"] == pytest.approx(old["calibration"], abs=1e-6)


def test_report_and_samples_are_read() -> None:
    report, samples = read_report(FILES / "run"), read_samples(FILES / "run")
    old = EXPECTED["evaluation"]["settings"]
    assert report["settings"].keys() == old.keys()
    for setting, by_score in report["settings"].items():
        for score, metrics in by_score.items():
            assert metrics == pytest.approx(old[setting][score], abs=1e-6, nan_ok=True)
    assert samples is not None
    assert len(samples.id_scores["cosine"]) == report["counts"]["id"]
    assert {name: len(scores["msp"]) for name, scores in samples.ood_scores.items()} == report["counts"]["ood"]
    assert samples.predictions["val"].label.shape == samples.id_scores["msp"].shape


def test_reports_of_runs_are_compared(tmp_path: Path) -> None:
    folders = sorted((FILES / "experiment" / "runs").iterdir())
    table = tmp_path / "table.csv"
    options = ["--baseline", "ce-label_smoothing=0.1", "--bootstrap", "20", "--format", "csv", "--out", str(table)]
    assert compare.main([*map(str, folders), *options]) == 0
    with open(table, newline="") as file:
        rows = {(row["run"], row["setting"], row["metric"]): row for row in csv.DictReader(file)}
    reports = [read_report(folder) for folder in folders if folder.name.startswith("tal-")]
    row = rows["tal-label_smoothing=0.1-t_max=40", "old_fd", "aurc"]
    assert int(row["runs"]) == len(reports) == 2
    assert float(row["mean"]) == pytest.approx(np.mean([r["settings"]["old_fd"]["cosine"]["aurc"] for r in reports]))
    assert float(row["low"]) < float(row["difference"]) < float(row["high"])


def test_page_is_written_from_the_report(tmp_path: Path) -> None:
    shutil.copytree(FILES / "run", tmp_path / "run")
    assert html_report.main([str(tmp_path / "run"), "--no-typicalness", "--device", "cpu"]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "New FD" in page
    assert "photos" in page


def test_jobs_of_an_experiment_are_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, file = tmp_path / "experiment", FILES / "experiment.yaml"
    shutil.copytree(FILES / "experiment", output)
    old = json.loads((output / "results.json").read_text())
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.name != "results.json"}
    assert experiment.main([str(file), "--output", str(output)]) == 0
    # No job ran again: it would have changed its record and left a log.
    assert {path: path.read_bytes() for path in before} == before
    assert not list(output.rglob("log.txt"))
    new = json.loads((output / "results.json").read_text())
    assert new["missing"] == old["missing"] == []
    for key in ("name", "label", "method", "grid", "seed", "seconds", "report"):
        assert [run[key] for run in new["runs"]] == [run[key] for run in old["runs"]]
    assert [d["value"] for d in new["differences"]] == pytest.approx([d["value"] for d in old["differences"]], abs=1e-6)
    assert all(d["low"] <= d["value"] <= d["high"] for d in new["differences"])


def test_results_of_an_experiment_are_read_without_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(FILES / "experiment" / "results.json", tmp_path)
    assert experiment.main([str(FILES / "experiment.yaml"), "--output", str(tmp_path), "--table-only"]) == 0
    assert "tal-label_smoothing=0.1-t_max=40" in capsys.readouterr().out


def test_threshold_and_selective_classifier_are_read() -> None:
    folder = FILES / "run" / "calibrated"
    about = json.loads((folder / "threshold.json").read_text())
    samples, run = read_samples(FILES / "run"), load_run(FILES / "run")
    assert samples is not None
    # The file is of a union bound over starts, whatever this accepts is accepted still.
    correct = samples.predictions["val"].label == samples.predictions["val"].prediction
    _, found = choose(samples.id_scores["cosine"], correct, risk=about["risk"])
    assert found["samples"] == about["samples"]
    assert found["accepted"] >= about["accepted"]
    state = torch.load(folder / "selective.pt", weights_only=True)
    classifier = SelectiveClassifier(run.model, about["score"], threshold=0.0).eval()
    classifier.load_state_dict(state)
    assert float(classifier.threshold) == about["threshold"]
    images, _, indices = next(iter(run.data.loader("val", batch_size=900)))
    prediction, confidence, accept = classifier(images)
    assert prediction.tolist() == samples.predictions["val"].prediction[indices].tolist()
    assert confidence.tolist() == pytest.approx(samples.id_scores["cosine"][indices].tolist(), abs=1e-5)
    assert accept.tolist() == (confidence > about["threshold"]).tolist()
    assert 300 < accept.sum() < 600
