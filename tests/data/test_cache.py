"""Folders that are made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tal_fast.data.cache import make_folder_once


def test_a_failure_leaves_no_folder(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("made")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_folder_once(tmp_path / "cache" / "set", fail)
    assert list((tmp_path / "cache").iterdir()) == []
