"""Damaged files of outputs, samples, reports and caches: read as they were, or refused in one sentence."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tal_fast.evaluation import train_typicalness
from tal_fast.evaluation.npz import read_npz
from tal_fast.evaluation.report import read_report, write_report
from tal_fast.evaluation.sample_scores import read_samples
from tal_fast.runs.prediction_store import Outputs, OutputStore
from tal_fast.utils import arrays
from tests.helpers.compare import write_run
from tests.helpers.fuzz import FUZZ, mutations, reads_or_refuses

RNG = np.random.default_rng(0)
LOGITS, LABELS = RNG.normal(size=(20, 5)), RNG.integers(5, size=20)


def npz(save: Callable[..., None] = np.savez, **changes: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, logits=LOGITS, labels=LABELS, **changes)
    return buffer.getvalue()


def replaced(content: bytes, old: bytes, new: bytes) -> bytes:
    """The content with a piece replaced where it is last found, such as in a zip's directory."""
    head, found, tail = content.rpartition(old)
    assert found
    return head + new + tail


def with_member(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def header(text: bytes) -> bytes:
    """An .npy file with this header and no data."""
    return b"\x93NUMPY\x01\x00" + (len(text)).to_bytes(2, "little") + text


HUGE = b"{'descr': '<f8', 'fortran_order': False, 'shape': (2000000000000, 5), }\n"


@FUZZ
@example(with_member("logits.npy", b"no array"))
@example(with_member("logits.npy", header(HUGE)))
@example(with_member("logits.npy", header(b"{'descr': '<f8', 'shape': (")))
@example(with_member("logits.npy", header(b"[" * 9000)))
@example(with_member("../../logits.npy", b""))
@example(replaced(npz(), b"PK\x01\x02", b"PK\x01\x03"))
@given(mutations(npz()))
def test_outputs(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "outputs.npz").write_bytes(content)
    if reads_or_refuses(read_npz, tmp_path / "outputs.npz"):
        np.testing.assert_array_equal(read_npz(tmp_path / "outputs.npz").id.logits, LOGITS)


@FUZZ
@given(mutations(npz(np.savez_compressed)))
def test_compressed_outputs(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "outputs.npz").write_bytes(content)
    if reads_or_refuses(read_npz, tmp_path / "outputs.npz"):
        np.testing.assert_array_equal(read_npz(tmp_path / "outputs.npz").id.logits, LOGITS)


def test_outputs_larger_than_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", logits=np.zeros((1000, 1000)), labels=np.zeros(1000, int))
    assert (tmp_path / "bomb.npz").stat().st_size < 20_000
    monkeypatch.setattr(arrays, "total_memory", lambda: 1e6)
    with pytest.raises(ValueError, match=r"its arrays have 8,008,256 bytes, more than this machine's memory"):
        read_npz(tmp_path / "bomb.npz")


def shard() -> bytes:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {"indices": np.arange(20), "labels": LABELS, "logits": LOGITS, "features": LOGITS}
    digest = OutputStore("", "0" * 64, 20)._digest
    np.savez(buffer, key="0" * 64, **arrays, **{f"sha256/{name}": digest(name, arrays[name]) for name in arrays})
    return buffer.getvalue()


@FUZZ
@given(mutations(shard()))
def test_shards(tmp_path: Path, content: bytes) -> None:
    store = OutputStore(tmp_path / "val", "0" * 64, 20)
    store.prepare()
    path = store.folder / "000000000-20.npz"

    def load(path: Path) -> Outputs:
        path.write_bytes(content)
        return store.load()

    if reads_or_refuses(load, path):
        np.testing.assert_array_equal(store.load().logits, LOGITS)
    path.write_bytes(content)
    if not store.missing().size:
        np.testing.assert_array_equal(store.load().logits, LOGITS)


@FUZZ
@given(mutations(npz(key="0" * 64, distance=np.arange(20.0), prediction=LABELS)))
def test_cached_typicalness(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "typicalness.npz").write_bytes(content)
    found = train_typicalness._load(tmp_path / "typicalness.npz", "0" * 64, 20)
    if found is not None:
        np.testing.assert_array_equal(found[0], np.arange(20.0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "ce"
    write_run(folder, "ce", 0, 1.0, n=30)
    return folder


@FUZZ
@given(st.data())
def test_samples(run: Path, tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "samples.npz").write_bytes(data.draw(mutations((run / "samples.npz").read_bytes())))
    if reads_or_refuses(read_samples, tmp_path):
        np.testing.assert_array_equal(read_samples(tmp_path).id_scores["msp"], read_samples(run).id_scores["msp"])


@FUZZ
@given(st.data())
def test_reports(run: Path, tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "report.json").write_bytes(data.draw(mutations((run / "report.json").read_bytes())))
    if reads_or_refuses(read_report, tmp_path):  # damage of white space alone changes nothing
        assert read_report(tmp_path) == read_report(run)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 1, "settings": 3, "sha256": "0"}', "\ufeff{}"])
def test_reports_that_are_no_reports(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    assert not reads_or_refuses(read_report, tmp_path)


def test_a_report_that_was_changed_by_hand_is_refused(run: Path, tmp_path: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    report["id_accuracy"] += 0.1
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"report\.json is damaged or was changed by hand; evaluate the run again"):
        read_report(tmp_path)
    write_report(report, tmp_path / "report.json")
    assert read_report(tmp_path)["id_accuracy"] == report["id_accuracy"]
