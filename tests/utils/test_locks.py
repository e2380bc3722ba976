"""Lock of a folder between processes."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import re
import time
from pathlib import Path

import pytest

from tal_fast.utils.locks import FolderLock
from tests.helpers.locks import holder


def test_another_process_is_refused_by_name_until_the_holder_is_killed(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    lock = FolderLock(tmp_path / "run")
    who = rf"process {process.pid} on {re.escape(platform.node())}, started 20\d\d-"
    with pytest.raises(ValueError, match=rf"run is in use by {who}.*; wait until it ends, or name another"):
        lock.acquire()
    assert not lock.held
    process.kill()
    process.communicate()
    lock.acquire()
    assert lock.held


def test_a_lock_waits_for_a_holder_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = holder(tmp_path)
    lock = FolderLock(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda _: process.communicate("end\n") if process.returncode is None else None)
    with caplog.at_level(logging.INFO):
        lock.acquire(wait=30)
    assert lock.held
    assert f"waiting up to 30 s for process {process.pid} on" in caplog.text


def test_a_released_lock_leaves_nothing_and_can_be_taken_again(tmp_path: Path) -> None:
    one, other = FolderLock(tmp_path), FolderLock(tmp_path)
    one.acquire()
    one.acquire()
    other.acquire()  # of the same process
    one.release()
    one.release()
    assert (tmp_path / ".lock").exists()
    other.release()
    assert os.listdir(tmp_path) == []
    holder(tmp_path).communicate("end\n")


def test_a_forked_child_does_not_release_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = FolderLock(tmp_path)
    lock.acquire()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    lock.release()
    assert (tmp_path / ".lock").exists()


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", fails)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert "has no file locks (No locks available); start one run at a time" in caplog.text
    lock.release()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file/run"):
        FolderLock(tmp_path / "file" / "run").acquire()


def test_a_lock_whose_file_is_gone_is_taken_again_or_refused(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    lock = FolderLock(run)
    lock.ensure()  # not held: nothing to do
    assert not run.exists()
    lock.acquire()
    run.rename(other)
    FolderLock(run).ensure()  # of the same process
    assert (run / ".lock").exists()
    run.rename(tmp_path / "third")
    process = holder(run)
    with pytest.raises(ValueError, match=f"run is in use by process {process.pid}"):
        lock.ensure()
    lock.release()
    assert (run / ".lock").exists()  # the other process's
    process.communicate("end\n")
