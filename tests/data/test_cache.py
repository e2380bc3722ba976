"""The cache: folders that are made once, sizes of images, and homes that cannot be written."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tal_fast.config.schema import DataConfig
from tal_fast.data.build import build_data
from tal_fast.data.cache import make_folder_once
from tests.helpers.images import config, make_folder, needs_dali


def test_a_failure_leaves_no_folder(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("made")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_folder_once(tmp_path / "cache" / "set", fail)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture(params=["read-only", "full", "a file", "no home"])
def bad_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cache that cannot be written; root may write anywhere, so permissions are not enough."""
    cache = tmp_path / "home" / "cache"
    monkeypatch.setenv("TAL_FAST_CACHE", str(cache))
    if request.param == "a file":
        cache.parent.write_text("")
    elif request.param == "no home":
        monkeypatch.delenv("TAL_FAST_CACHE")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))
    else:
        error = OSError(errno.EROFS if request.param == "read-only" else errno.ENOSPC, request.param)
        mkdir, mkstemp = Path.mkdir, tempfile.mkstemp

        def refuse(self: Path, *args: Any, **options: Any) -> None:
            if request.param == "read-only" and self.is_relative_to(cache):
                raise error
            mkdir(self, *args, **options)

        def full(*args: Any, **options: Any) -> Any:
            if Path(options.get("dir") or "/").is_relative_to(cache):
                raise error
            return mkstemp(*args, **options)

        monkeypatch.setattr(Path, "mkdir", refuse)
        monkeypatch.setattr(tempfile, "mkstemp", full)
    return request.param


def test_sizes_of_images_need_no_cache(bad_cache: str, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    assert build_data(config(root)).split("train").sizes[0].tolist() == [40, 90]


@needs_dali
def test_dali_needs_no_cache(bad_cache: str, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    data = build_data(config(root, loader="dali"))
    Path(data.split("train").paths[2]).write_bytes(b"damaged")  # type: ignore[union-attr]
    reader = data.loader("train-eval", batch_size=4, skip_unreadable=True)
    assert sum(int((labels == -100).sum()) for _, labels, _ in reader) == 1


def test_digits_need_no_cache(bad_cache: str) -> None:
    first, second = (build_data(DataConfig(dataset="digits", loader="torch")).split("val") for _ in range(2))
    assert len(first) == 896
    assert first.paths == second.paths  # type: ignore[union-attr]


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "another file", "a huge array", "a folder"])
def test_damaged_sizes_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setenv("TAL_FAST_CACHE", str(tmp_path / "cache"))
    root = make_folder(tmp_path / "images")
    want = build_data(config(root)).split("train").sizes.tolist()
    for path in (tmp_path / "cache").rglob("*.npz"):
        content = path.read_bytes()
        if damage == "a folder":
            path.unlink()
            path.mkdir()
            continue
        at = content.index(b"\x28\x00\x00\x00\x5a")  # 40 x 90
        header = content.replace(b"(13, 2)", b"(1" + 12 * b"0" + b", 2)", 1)
        path.write_bytes(
            {
                "empty": b"", "cut": content[:99], "another file": b"PK\3\4" + bytes(99), "a huge array": header,
                "changed": content[:at] + b"\x29" + content[at + 1 :],
            }[damage]
        )  # fmt: skip
    assert build_data(config(root)).split("train").sizes.tolist() == want
