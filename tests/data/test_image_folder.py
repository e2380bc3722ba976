"""Sizes of image files and their cache."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tal_fast.data import image_folder
from tal_fast.data.build import build_data
from tests.helpers.images import config, make_folder, picture


def test_sizes_are_read_once_and_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "images")
    first = build_data(config(root, loader="torch"))
    read: list[str] = []
    original = image_folder.image_size
    monkeypatch.setattr(
        image_folder, "image_size", lambda path, source, upright: read.append(path) or original(path, source, upright)
    )
    second = build_data(config(root, loader="torch"))
    assert read == []
    assert np.array_equal(first.split("train").sizes, second.split("train").sizes)
    victim = Path(first.split("val").paths[0])  # type: ignore[union-attr]
    picture(33, 44, 9).save(victim)
    os.utime(victim, ns=(1, 1))
    third = build_data(config(root, loader="torch"))
    assert third.split("val").sizes[0].tolist() == [33, 44]
    assert str(victim) in read
