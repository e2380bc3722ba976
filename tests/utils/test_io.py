"""Atomic writing of files."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from tal_fast.utils.io import check_writable, replacing
from tal_fast.utils.locks import alone_in
from tests.helpers.disks import fail_replacing


def test_a_file_is_replaced_when_the_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    for text in ("old", "new"):
        with replacing(path) as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask  # not private, as temporary files are


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("fails_at", [0, 1])
def test_the_old_file_is_kept_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    path, keep = tmp_path / "file", tmp_path / "kept"
    for text in ("first", "second"):
        with replacing(path, keep=keep) as temporary:
            temporary.write_text(text)
    assert (path.read_text(), keep.read_text()) == ("second", "first")
    fail_replacing(monkeypatch, fails_at, OSError("no space left on device"))
    with pytest.raises(OSError, match="no space"), replacing(path, keep=keep) as temporary:
        temporary.write_text("third")
    assert "second" in [p.read_text() for p in tmp_path.iterdir()]  # moved aside or not
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_the_file_is_on_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("text")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_leftovers_of_killed_writers_are_removed_and_no_others(tmp_path: Path) -> None:
    leftover, other = tmp_path / ".report-abcdefgh.json", tmp_path / ".report-of-mine-abcdefgh.json"
    leftover.touch()
    other.touch()
    with replacing(tmp_path / "report.json") as first, replacing(tmp_path / "report.json") as second:
        assert not leftover.exists()
        assert first.exists()
        assert second.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "report.json"]


def test_a_folder_is_locked_by_one_at_a_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    order: list[str] = []

    def second() -> None:
        with alone_in(tmp_path, "waiting"):
            order.append("second")

    with alone_in(tmp_path, "waiting"):
        thread = threading.Thread(target=second)
        thread.start()
        while not caplog.records:
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert caplog.messages == ["waiting"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match=str(path)):
            check_writable(path)


def test_errors_name_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full") as caught, replacing(tmp_path / "file.bin"):
        raise OSError(errno.ENOSPC, "full")  # as writing does, without a name
    assert caught.value.filename == str(tmp_path / "file.bin")
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "file.bin") as temporary:
        temporary.unlink()
    assert caught.value.filename == str(tmp_path / "file.bin")
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "file.bin"):
        open(tmp_path / "another")  # noqa: SIM115
    assert caught.value.filename == str(tmp_path / "another")


def test_torch_save_on_a_full_disk_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="or the disk fails") as caught, replacing(tmp_path / "file.pt"):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert caught.value.filename == str(tmp_path / "file.pt")
    with pytest.raises(RuntimeError, match="mine"), replacing(tmp_path / "file.pt"):
        raise RuntimeError("mine")
