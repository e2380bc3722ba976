"""Data sets of other packages, and IDX files."""

from __future__ import annotations

import gzip
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tal_fast.config.schema import DataConfig
from tal_fast.data import builtin
from tal_fast.data.build import build_data
from tests.helpers.images import collect, idx, write_fashion


def test_digits_are_files_split_by_class() -> None:
    data = build_data(DataConfig(dataset="digits", loader="torch", workers=0, image_size=16, channels=1))
    assert data.class_names == tuple("0123456789")
    assert data.ood_names == ("photos",)
    train, val, photos = (data.split(s) for s in ("train", "val", "photos"))
    assert (len(train), len(val), len(photos)) == (901, 896, 520)
    counts = np.bincount(train.labels) - np.bincount(val.labels)
    assert set(counts.tolist()) <= {0, 1}
    from sklearn.datasets import load_digits

    digits = load_digits()
    for images in (train, val):
        for index in (0, 100, 500):
            path = Path(images.paths[index])  # type: ignore[union-attr]
            want = digits.images[int(path.stem)] * (255 / 16)
            assert np.abs(np.asarray(Image.open(path)) - want).max() <= 0.5
            assert digits.target[int(path.stem)] == images.labels[index]
    images, labels, _ = collect(data.loader("photos", batch_size=520))
    assert images.shape == (520, 1, 16, 16)
    assert set(labels.tolist()) == {-1}
    assert images.std((1, 2, 3)).median() > 0.05  # patches of photos, not blanks


def count_digits(cache: str, results: Any) -> None:
    os.environ["TAL_FAST_CACHE"] = cache
    folder = builtin.digits_folder()
    results.put(sum(len(names) for _, _, names in os.walk(folder)))


def test_two_processes_can_make_the_digits_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=count_digits, args=(str(tmp_path), results)) for _ in range(2)]
    for process in processes:
        process.start()
    counts = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert counts == [1797 + 520] * 2
    assert os.listdir(tmp_path) == ["digits-1"]  # nothing half-made is left


@pytest.mark.skipif(not Path(builtin.FASHION_MNIST_ROOT).is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist() -> None:
    splits = builtin.fashion_mnist(None)
    assert [splits[s][0].shape for s in ("train", "val")] == [(60000, 28, 28), (10000, 28, 28)]
    assert np.bincount(splits["val"][1]).tolist() == [1000] * 10
    assert splits["train"][0].mean() / 255 == pytest.approx(0.2860, abs=1e-3)  # as widely published


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.gz", b"not gzip", "cannot be unpacked"),
        (
            "a.gz",
            gzip.compress(idx(np.zeros((2, 3, 3), np.uint8)), mtime=0)[:-9],
            "cannot be unpacked",
        ),  # an id for both workers
        ("a", b"", "is not an IDX file of uint8 values in 3 dimensions"),
        ("a", bytes((0, 0, 8, 3)), "is not an IDX file"),
        ("a", idx(np.zeros(5, np.uint8)), "is not an IDX file"),
        ("a", idx(np.zeros((2, 3, 3), np.uint8))[:-1], "holds 17 values but its header says 2 x 3 x 3"),
        ("a", idx(np.zeros((2, 3, 3), np.uint8)) + b"x", "holds 19 values"),
    ],
)
def test_damaged_idx_files_are_rejected(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        builtin.read_idx(tmp_path / name, 3)


def test_missing_idx_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="apt install dataset-fashion-mnist"):
        builtin.fashion_mnist(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="has neither train-images-idx3-ubyte.gz nor"):
        builtin.fashion_mnist(str(tmp_path))
    write_fashion(tmp_path / "f")
    (tmp_path / "f" / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8)))
    with pytest.raises(ValueError, match="20 t10k images but 3 labels"):
        builtin.fashion_mnist(str(tmp_path / "f"))
