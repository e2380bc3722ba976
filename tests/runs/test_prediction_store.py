"""Outputs stored in shards: atomic, resumable, shared by ranks."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tal_fast.runs import prediction_store
from tal_fast.runs.prediction_store import Outputs, OutputStore, ShardWriter
from tal_fast.utils.io import replacing

RNG = np.random.default_rng(0)
LOGITS, FEATURES = RNG.normal(size=(10, 3)), RNG.normal(size=(10, 4)).astype(np.float32)
LABELS = RNG.integers(3, size=10)
KEY, OTHER = "0" * 64, "1" * 64


def shard(indices: list[int], features: bool = True) -> tuple[Any, Outputs]:
    return np.array(indices), Outputs(LOGITS[indices], FEATURES[indices] if features else None, LABELS[indices])


def filled(folder: Path, *shards: list[int], key: str = KEY, features: bool = True) -> OutputStore:
    store = OutputStore(folder, key, 10, features)
    store.prepare()
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
    assert OutputStore(tmp_path / "gone", KEY, 3).missing().tolist() == [0, 1, 2]
    assert OutputStore(tmp_path / "val", OTHER, 10).missing().size == 10


def test_a_sample_written_twice_is_read_once(tmp_path: Path) -> None:
    store = filled(tmp_path / "val", [0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9])
    indices = np.concatenate([i for i, _ in store.blocks()])
    assert sorted(indices) == list(range(10))
    np.testing.assert_array_equal(store.load().logits, LOGITS)


def test_stores_of_other_keys_are_removed_unless_in_use(tmp_path: Path) -> None:
    used = filled(tmp_path / "val", list(range(10)))
    (tmp_path / "val" / "000000000-10.npz").touch()  # as version 0.2.0 kept them
    (tmp_path / "val" / "store.json").touch()
    store = filled(tmp_path / "val", [0, 1], key=OTHER)
    assert store.missing().size == 8
    np.testing.assert_array_equal(used.load().logits, LOGITS)
    del used
    filled(tmp_path / "val", key=OTHER)
    assert [path.name for path in (tmp_path / "val").iterdir()] == [OTHER[:16]]
    assert store.missing().size == 8


def test_a_shard_of_another_key_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = filled(tmp_path / "other", list(range(10)), key=OTHER)
    store = filled(tmp_path / "val", [0, 1, 2])
    (theirs,) = other.folder.glob("*.npz")
    (ours,) = store.folder.glob("*.npz")
    for name in (theirs.name, ours.name):
        shutil.copy(theirs, store.folder / name)
        with pytest.raises(ValueError, match="holds outputs of other weights, images or settings; evaluate again"):
            store.load()
        shutil.copy(theirs, store.folder / name)
        with caplog.at_level(logging.WARNING):
            assert store.missing().size == (7 if name == theirs.name else 10)
        assert f"{name} holds outputs of other weights" in caplog.text


def test_samples_that_vanish_are_not_made_up(tmp_path: Path) -> None:
    store = filled(tmp_path / "val", [0, 1, 2], list(range(3, 10)))
    next(store.folder.glob("000000003-*.npz")).unlink()
    for read in (store.load, lambda: store.columns("labels"), lambda: list(store.blocks())):
        with pytest.raises(ValueError, match="7 of 10 samples are missing in .*; evaluate again"):
            read()


def test_shards_of_the_same_samples_and_other_ones_stay_apart(tmp_path: Path) -> None:
    store = filled(tmp_path / "val", [0, 1, 2, 3], [0, 5, 6, 7], [4, 8, 9])
    np.testing.assert_array_equal(store.load().logits, LOGITS)


def test_outputs_with_features_serve_without_but_not_the_reverse(tmp_path: Path) -> None:
    filled(tmp_path / "with", list(range(10)))
    store = filled(tmp_path / "with", features=False)
    assert not store.missing().size
    assert store.load().features is None
    fast = filled(tmp_path / "without", list(range(10)), features=False)
    store = filled(tmp_path / "without")
    assert store.missing().size == 10
    store.write(*shard(list(range(10))))
    for both in (fast, store):
        assert not both.missing().size
        np.testing.assert_array_equal(both.load().logits, LOGITS)
    np.testing.assert_array_equal(store.load().features, FEATURES)


def damaged(**changes: Any) -> dict[str, Any]:
    arrays = {"indices": np.arange(3), "labels": LABELS[:3], "logits": LOGITS[:3], **changes}
    digest = OutputStore("", KEY, 10)._digest
    hashed = {name: array for name, array in arrays.items() if array.dtype != object}
    return {"key": KEY, **arrays, **{f"sha256/{name}": digest(name, array) for name, array in hashed.items()}}


@pytest.mark.parametrize(
    "content",
    [
        None,
        damaged(features=FEATURES[:2]),
        damaged(features=FEATURES[:3], indices=np.array([0, 1, 10])),
        damaged(features=FEATURES[:3], indices=np.array([0, 1, -1])),
        damaged(features=FEATURES[:3], indices=np.zeros(3)),
        damaged(features=np.array([{}, {}, {}])),
        {"labels": LABELS},
        {**damaged(features=FEATURES[:3]), "logits": LOGITS[:3] + 1},
        {**damaged(features=FEATURES[:3]), "labels": LABELS[:3] + 1},
    ],
)
def test_a_damaged_shard_is_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: dict[str, Any] | None
) -> None:
    store = filled(tmp_path / "val", [0, 1, 2], list(range(3, 10)))
    first = next(store.folder.glob("000000000-3*.npz"))
    whole = first.read_bytes()

    def damage() -> None:
        if content is None:
            first.write_bytes(whole[:100])
        else:
            np.savez(first, **content)

    damage()
    with pytest.raises(ValueError, match=r"000000000-3.*\.npz .*; evaluate again to compute it anew"):
        store.load()
    assert store.missing().tolist() == [0, 1, 2]
    damage()  # that is seen before anything is loaded
    with caplog.at_level(logging.WARNING):
        assert store.missing().tolist() == [0, 1, 2]
    assert "it is computed again" in caplog.text
    store.write(*shard([0, 1, 2]))
    np.testing.assert_array_equal(store.load().logits, LOGITS)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_shards_that_are_no_files_are_computed_again(tmp_path: Path, make: Callable[[Path], None]) -> None:
    store = filled(tmp_path / "val", [0, 1, 2], list(range(3, 10)))
    first = next(store.folder.glob("000000000-3*.npz"))
    first.unlink()
    make(first)
    assert store.missing().tolist() == [0, 1, 2]
    store.write(*shard([0, 1, 2]))
    np.testing.assert_array_equal(store.load().logits, LOGITS)


def test_a_bit_that_flipped_is_seen_before_anything_is_loaded(tmp_path: Path) -> None:
    store = filled(tmp_path / "val", [0, 1, 2], list(range(3, 10)))
    first = next(store.folder.glob("000000000-3*.npz"))
    content = bytearray(first.read_bytes())
    content[content.index(LOGITS[:3].tobytes())] ^= 1
    first.write_bytes(content)
    assert store.missing().tolist() == [0, 1, 2]


def test_a_second_process_waits_for_the_same_pass(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, second = filled(tmp_path / "val"), filled(tmp_path / "val")
    done: list[int] = []

    def compute() -> None:
        with second.only_pass():
            done.append(second.missing().size)

    with caplog.at_level(logging.WARNING), store.only_pass():
        thread = threading.Thread(target=compute)
        thread.start()
        while not caplog.records:
            time.sleep(0.01)
        with second.only_pass(wait=False):  # ranks do not wait
            assert not done
        store.write(*shard(list(range(10))))
    thread.join()
    assert done == [0]
    assert "another process computes the same outputs" in caplog.text


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    store = filled(tmp_path / "val")
    leftover = store.folder / ".000000000-3-abcdefgh.npz"
    leftover.touch()
    (tmp_path / "val" / f".removed-{OTHER[:16]}-00000000").mkdir()
    with replacing(store.folder / "000000000-5.npz") as writing:
        filled(tmp_path / "val")
        assert writing.exists()
        assert not leftover.exists()
        assert [path.name for path in (tmp_path / "val").iterdir()] == [KEY[:16]]


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
    assert len(list(store.folder.glob("*.npz"))) == 3
