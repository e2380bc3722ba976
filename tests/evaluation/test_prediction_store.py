"""Outputs on disk: whole or not there, gone on with after a kill, shared by ranks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tal_fast import evaluation as evaluate
from tal_fast.evaluation import prediction_store as output_store
from tal_fast.evaluation import predictions as inference
from tal_fast.evaluation.prediction_store import Outputs, OutputStore, ShardWriter
from tal_fast.runs.load import load_run
from tal_fast.scores.logits import SCORES
from tests.helpers.evaluation import make_run

RNG = np.random.default_rng(0)
LOGITS, FEATURES = RNG.normal(size=(10, 3)), RNG.normal(size=(10, 4)).astype(np.float32)
LABELS = RNG.integers(3, size=10)


def part(indices: list[int], features: bool = True) -> tuple[Any, Outputs]:
    return np.array(indices), Outputs(LOGITS[indices], FEATURES[indices] if features else None, LABELS[indices])


def filled(folder: Path, *parts: list[int], key: str = "key", features: bool = True) -> OutputStore:
    store = OutputStore(folder, key, 10)
    store.prepare(features)
    for indices in parts:
        store.write(*part(indices, features))
    return store


def test_shards_in_any_order_are_the_split(tmp_path: Path) -> None:
    store = filled(tmp_path / "val", [9, 0, 5], [1, 2, 3, 4], [8, 7, 6])
    assert not store.missing().size
    found = store.load()
    np.testing.assert_array_equal(found.logits, LOGITS)
    np.testing.assert_array_equal(found.features, FEATURES)
    np.testing.assert_array_equal(found.labels, LABELS)
    np.testing.assert_array_equal(store.column("labels"), LABELS)
    assert found.logits.dtype == np.float64
    assert found.features is not None
    assert found.features.dtype == np.float32
    assert store.features().shape == (10, 4)
    rows = np.zeros((10, 4))
    for indices, block in store.features().blocks():
        rows[indices] += block
    np.testing.assert_array_equal(rows, FEATURES)


def test_what_is_missing_is_known(tmp_path: Path) -> None:
    store = filled(tmp_path / "val", [9, 0, 5], [1, 2])
    assert store.missing().tolist() == [3, 4, 6, 7, 8]
    assert OutputStore(tmp_path / "gone", "key", 3).missing().tolist() == [0, 1, 2]
    assert OutputStore(tmp_path / "val", "another key", 10).missing().size == 10


def test_a_sample_written_twice_comes_once(tmp_path: Path) -> None:
    store = filled(tmp_path / "val", [0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9])
    indices = np.concatenate([i for i, _ in store.features().blocks()])
    assert sorted(indices) == list(range(10))
    np.testing.assert_array_equal(store.load().logits, LOGITS)


def test_another_key_empties_the_store(tmp_path: Path) -> None:
    filled(tmp_path / "val", list(range(10)))
    before, store = OutputStore(tmp_path / "val", "key", 10), OutputStore(tmp_path / "val", "another key", 10)
    store.prepare(True)
    with pytest.raises(ValueError, match="holds outputs of other weights or images by now"):
        before.load()
    assert store.missing().size == 10
    assert not list(tmp_path.glob("val/*.npz"))


def test_outputs_with_features_serve_without_but_not_the_reverse(tmp_path: Path) -> None:
    store = filled(tmp_path / "with", list(range(10)))
    store.prepare(False)
    assert not store.missing().size
    store = filled(tmp_path / "without", list(range(10)), features=False)
    assert store.load().features is None
    store.prepare(True)
    assert store.missing().size == 10


def test_a_damaged_shard_is_computed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = filled(tmp_path / "val", [0, 1, 2], list(range(3, 10)))
    first = tmp_path / "val" / "000000000-3.npz"
    whole = first.read_bytes()
    first.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"000000000-3\.npz cannot be read .* remove it and evaluate again"):
        store.load()
    assert store.missing().tolist() == [0, 1, 2]
    assert "cannot be read" in capsys.readouterr().err
    store.write(*part([0, 1, 2]))
    np.testing.assert_array_equal(store.load().logits, LOGITS)


def test_the_writer_gathers_up_to_a_size_and_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path / "val")
    writer = ShardWriter(store)
    monkeypatch.setattr(output_store, "SHARD_BYTES", 2 * (3 * 8 + 4 * 4))
    for i in range(5):
        writer.add(*part([i]))
    assert store.missing().tolist() == [4, 5, 6, 7, 8, 9]
    monkeypatch.setattr(output_store, "SHARD_SECONDS", 0.0)
    writer.add(*part([5]))
    assert store.missing().tolist() == [6, 7, 8, 9]
    writer.flush()
    writer.flush()
    assert len(list(tmp_path.glob("val/*.npz"))) == 3


KILLED = """
import os, signal, sys
import numpy as np
from tal_fast import evaluation as evaluate
from tal_fast.evaluation import prediction_store as output_store
from tal_fast.metrics.settings import Mix

output_store.SHARD_BYTES = 1  # a shard a batch
savez, left = np.savez, [7]

def killed(path, **arrays):
    left[0] -= 1
    if not left[0]:
        path.write_bytes(b"PK half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    savez(path, **arrays)

np.savez = killed
evaluate.evaluate_run(sys.argv[1], batch_size=64, scores=["cosine", "mahalanobis"], mix=Mix("all"))
"""


def test_a_killed_evaluation_goes_on_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"batch_size": 64, "scores": ["cosine", "mahalanobis"]}
    run, whole = make_run(tmp_path / "run"), make_run(tmp_path / "whole")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(run)], capture_output=True, text=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (run / "report.json").exists()
    run_model, computed = inference.run_model, []

    def counting(model: Any, loader: Any, device: Any, name: str, *rest: Any) -> Any:
        for indices, outputs in run_model(model, loader, device, name, *rest):
            computed.extend((name, int(i)) for i in indices)
            yield indices, outputs

    monkeypatch.setattr(inference, "run_model", counting)
    found = evaluate.evaluate_run(run, **options)
    # Six batches of 64 of the validation split were there; the rest of all splits was not.
    wanted = [("val", i) for i in range(6 * 64, 1000)] + [("ood-noise", i) for i in range(1000)]
    assert sorted(computed) == sorted(wanted + [("train-eval", i) for i in range(2000)])
    want = evaluate.evaluate_run(whole, **options)
    assert found is not None
    assert want is not None
    assert found["settings"] == want["settings"]
    assert found["calibration"] == want["calibration"]


def test_ranks_share_a_pass_and_finish_one_anothers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    args = [
        "--run-dir",
        str(run),
        "--device",
        "cpu",
        "--batch-size",
        "33",
        "--scores",
        "msp,mahalanobis",
        "--mix",
        "all",
    ]
    assert evaluate.main([*args, "--output", str(tmp_path / "one"), "--cache", str(tmp_path / "one-cache")]) == 0
    # What one process left behind is no matter for two: here every second shard's worth of samples.
    cache = tmp_path / "two-cache"
    passes = inference.inference_of(load_run(run), cache, batch_size=33)
    left_behind = inference.inference_of(load_run(run), tmp_path / "one-cache", batch_size=33).store("val")
    store = passes._prepared("val", left_behind.key, 1000)
    kept = np.arange(0, 1000, 3)
    outputs = left_behind.load()
    assert outputs.features is not None
    store.write(kept, Outputs(outputs.logits[kept], outputs.features[kept], outputs.labels[kept]))
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tal_fast.evaluate",
         *args, "--output", str(tmp_path / "two"), "--cache", str(cache)],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("ID accuracy") == 1
    for name in ("val", "ood-noise", "train-eval"):
        one, two = (OutputStore(tmp_path / f"{n}-cache" / name, "", k) for n, k in (("one", 0), ("two", 0)))
        indices = [
            np.sort(np.concatenate([np.load(path)["indices"] for path in store.folder.glob("[0-9]*.npz")]))
            for store in (one, two)
        ]
        np.testing.assert_array_equal(indices[0], np.arange(2000 if name == "train-eval" else 1000))
        np.testing.assert_array_equal(indices[0], indices[1])
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    for key, by_score in one["settings"].items():
        for score, values in by_score.items():
            # Batches that are cut otherwise round otherwise.
            assert two["settings"][key][score] == pytest.approx(values, abs=1e-4), (key, score)


def test_precision_of_the_network_is_part_of_the_key(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    exact = inference.inference_of(load_run(run), tmp_path / "cache").store("val").load()
    narrow = inference.inference_of(load_run(run), tmp_path / "cache", amp="bfloat16").store("val").load()
    assert exact.logits.dtype == narrow.logits.dtype == np.float32
    difference = np.abs(exact.logits - narrow.logits).max()
    assert 0 < difference < 0.1 * np.abs(exact.logits).max()
    # All of the narrow logits are bfloat16's numbers: the network ran under autocast.
    np.testing.assert_array_equal(torch.from_numpy(narrow.logits).bfloat16().float().numpy(), narrow.logits)


def test_fast_keeps_no_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert evaluate.main(["--run", str(run), "--fast", "--scores", "all"]) == 0
    found = json.loads((run / "report.json").read_text())
    assert list(found["settings"]["old_fd"]) == list(SCORES)
    shards = list(run.glob("eval-cache/best/*/*.npz"))
    assert {path.parent.name for path in shards} == {"val", "ood-noise"}
    assert all("features" not in np.load(path) for path in shards)
    capsys.readouterr()
    assert evaluate.main(["--npz", "x.npz", "--fast"]) == 2
    assert "--fast does not go with --npz" in capsys.readouterr().err


def test_an_unreadable_image_loses_nothing_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_model = inference.run_model

    def broken(model: Any, loader: Any, device: Any, name: str, *rest: Any) -> Any:
        for number, batch in enumerate(run_model(model, loader, device, name, *rest)):
            if number == 3:
                raise ValueError("an image does not decode")
            yield batch

    passes = inference.inference_of(load_run(make_run(tmp_path / "run")), tmp_path / "cache", batch_size=100)
    with monkeypatch.context() as patch:
        patch.setattr(inference, "run_model", broken)
        with pytest.raises(ValueError, match="does not decode"):
            passes.store("val")
    (path,) = (tmp_path / "cache" / "val").glob("*.npz")
    assert len(np.load(path)["indices"]) == 300
