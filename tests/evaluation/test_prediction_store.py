"""Outputs stored in shards: atomic, resumable, shared by ranks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tal_fast.evaluation import prediction_store
from tal_fast.evaluation.prediction_store import Outputs, OutputStore, ShardWriter

RNG = np.random.default_rng(0)
LOGITS, FEATURES = RNG.normal(size=(10, 3)), RNG.normal(size=(10, 4)).astype(np.float32)
LABELS = RNG.integers(3, size=10)


def shard(indices: list[int], features: bool = True) -> tuple[Any, Outputs]:
    return np.array(indices), Outputs(LOGITS[indices], FEATURES[indices] if features else None, LABELS[indices])


def filled(folder: Path, *shards: list[int], key: str = "key", features: bool = True) -> OutputStore:
    store = OutputStore(folder, key, 10)
    store.prepare(features)
    for indices in shards:
        store.write(*shard(indices, features))
    return store


def test_the_first_of_equal_logits_is_the_prediction() -> None:
    outputs = Outputs(np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 2.0]]), None, np.array([0, 1, 1]))
    assert outputs.correct.tolist() == [True, False, True]


def test_shards_in_any_order_make_up_the_split(tmp_path: Path) -> None:
    store = filled(tmp_path / "val", [9, 0, 5], [1, 2, 3, 4], [8, 7, 6])
    assert not store.missing().size
    outputs = store.load()
    np.testing.assert_array_equal(outputs.logits, LOGITS)
    np.testing.assert_array_equal(outputs.features, FEATURES)
    np.testing.assert_array_equal(outputs.labels, LABELS)
    np.testing.assert_array_equal(store.columns("labels")["labels"], LABELS)
    assert outputs.logits.dtype == np.float64
    assert outputs.features is not None
    assert outputs.features.dtype == np.float32
    assert store.shape == (10, 4)
    rows = np.zeros((10, 4))
    for indices, block in store.blocks():
        rows[indices] += block
    np.testing.assert_array_equal(rows, FEATURES)


def test_missing_samples_are_known(tmp_path: Path) -> None:
    store = filled(tmp_path / "val", [9, 0, 5], [1, 2])
    assert store.missing().tolist() == [3, 4, 6, 7, 8]
    assert OutputStore(tmp_path / "gone", "key", 3).missing().tolist() == [0, 1, 2]
    assert OutputStore(tmp_path / "val", "another key", 10).missing().size == 10


def test_a_sample_written_twice_is_read_once(tmp_path: Path) -> None:
    store = filled(tmp_path / "val", [0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9])
    indices = np.concatenate([i for i, _ in store.blocks()])
    assert sorted(indices) == list(range(10))
    np.testing.assert_array_equal(store.load().logits, LOGITS)


def test_another_key_empties_the_store(tmp_path: Path) -> None:
    filled(tmp_path / "val", list(range(10)))
    before, store = OutputStore(tmp_path / "val", "key", 10), OutputStore(tmp_path / "val", "another key", 10)
    store.prepare(True)
    with pytest.raises(ValueError, match="now holds outputs of other weights or images"):
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


def test_a_damaged_shard_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = filled(tmp_path / "val", [0, 1, 2], list(range(3, 10)))
    first = tmp_path / "val" / "000000000-3.npz"
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"000000000-3\.npz cannot be read .* remove it and evaluate again"):
        store.load()
    with caplog.at_level(logging.WARNING):
        assert store.missing().tolist() == [0, 1, 2]
    assert "it is computed again" in caplog.text
    store.write(*shard([0, 1, 2]))
    np.testing.assert_array_equal(store.load().logits, LOGITS)


def test_the_writer_collects_up_to_a_size_and_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path / "val")
    writer = ShardWriter(store)
    monkeypatch.setattr(prediction_store, "SHARD_BYTES", 2 * (3 * 8 + 4 * 4))
    for i in range(5):
        writer.add(*shard([i]))
    assert store.missing().tolist() == [4, 5, 6, 7, 8, 9]
    monkeypatch.setattr(prediction_store, "SHARD_SECONDS", 0.0)
    writer.add(*shard([5]))
    assert store.missing().tolist() == [6, 7, 8, 9]
    writer.flush()
    writer.flush()
    assert len(list(tmp_path.glob("val/*.npz"))) == 3
