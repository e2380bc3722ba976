"""Damaged files of data sets: read, or refused in one sentence."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tal_fast.data import builtin, cifar, imagenet, matlab, ood
from tal_fast.data.build import build_data
from tal_fast.data.headers import image_size
from tal_fast.data.image_folder import read_list
from tests.data.test_imagenet import write_kit
from tests.helpers.fuzz import FUZZ, mutations, reads_or_refuses
from tests.helpers.images import config, idx, make_folder, picture, write_cifar

FEW = settings(FUZZ, max_examples=12)
"""Settings for readers that start a process each time."""

IDX = idx(np.arange(60, dtype=np.uint8).reshape(5, 4, 3))


@FUZZ
@given(st.one_of(mutations(IDX), mutations(gzip.compress(IDX)), mutations(IDX).map(gzip.compress)), st.booleans())
def test_idx(tmp_path: Path, content: bytes, packed: bool) -> None:
    path = tmp_path / ("images.gz" if packed else "images")
    path.write_bytes(content)
    reads_or_refuses(lambda path: builtin.read_idx(path, 3), path)


@pytest.fixture(scope="module")
def cifar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar") / "files"
    write_cifar(folder, "cifar100", records=2)
    return folder


@FUZZ
@given(st.data())
def test_cifar(cifar_folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    for name in ("train.bin", "test.bin", "fine_label_names.txt"):
        (tmp_path / name).write_bytes((cifar_folder / name).read_bytes())
    damaged = tmp_path / data.draw(st.sampled_from(["test.bin", "fine_label_names.txt"]))
    damaged.write_bytes(data.draw(mutations(damaged.read_bytes())))
    reads_or_refuses(lambda path: cifar.read("cifar100", str(path), "val"), tmp_path)
    if reads_or_refuses(lambda path: cifar.class_names("cifar100", str(path)), tmp_path):
        assert all(name.isprintable() for name in cifar.class_names("cifar100", str(tmp_path)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("folder") / "images", train=3, val=3)


@FUZZ
@given(st.data())
def test_file_list(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    names = "\n".join(["# é", *(str(p.relative_to(folder)) for p in folder.rglob("*.png")), str(folder / "val" / "x")])
    encoding = data.draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
    path = tmp_path / "list.txt"
    path.write_bytes(data.draw(mutations(names.encode(encoding))))
    reads_or_refuses(lambda path: read_list(path, folder), path)


KAGGLE = "ImageId,PredictionString\n" + "".join(f"ILSVRC2012_val_{i:08d},n0{i} 1 2 3 4\n" for i in range(9))


@FUZZ
@example(KAGGLE.replace("n03 1 2 3 4", " ").encode())
@example(KAGGLE.encode("utf-16-le"))
@given(mutations(KAGGLE.encode()))
def test_imagenets_table_of_kaggle(tmp_path: Path, content: bytes) -> None:
    (tmp_path / imagenet.SOLUTION).write_bytes(content)
    reads_or_refuses(imagenet.validation_classes, tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_imagenets_table_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    (tmp_path / imagenet.SOLUTION).write_bytes(KAGGLE.replace("\n", "\r\n").encode(encoding))
    assert imagenet.validation_classes(tmp_path)["ILSVRC2012_val_00000003"] == "n03"


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit") / "data"
    write_kit(folder, dict.fromkeys(range(1, 8), "n01440764"))
    return folder


@FEW
@given(st.data())
def test_imagenets_development_kit(kit: Path, tmp_path: Path, data: st.DataObject) -> None:
    for name in (imagenet.META, imagenet.GROUND_TRUTH):
        (tmp_path / name).write_bytes((kit / name).read_bytes())
    damaged = tmp_path / data.draw(st.sampled_from([imagenet.META, imagenet.GROUND_TRUTH]))
    damaged.write_bytes(data.draw(mutations(damaged.read_bytes())))
    reads_or_refuses(imagenet.validation_classes, tmp_path)


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@FUZZ
@given(mutations(_npy(np.zeros((3, 4, 4, 3), np.uint8))))
def test_arrays_of_images(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    reads_or_refuses(lambda path: ood.ood_set(f"npy:{path}", 8, 3), tmp_path / "x.npy")


@FUZZ
@given(st.data())
def test_cifar_c(tmp_path: Path, data: st.DataObject) -> None:
    for name, array in (("noise", np.zeros((10, 4, 4, 3), np.uint8)), ("labels", np.arange(10))):
        (tmp_path / f"{name}.npy").write_bytes(_npy(array))
    damaged = tmp_path / data.draw(st.sampled_from(["noise.npy", "labels.npy"]))
    damaged.write_bytes(data.draw(mutations(damaged.read_bytes())))
    split = ood.MemoryImages(np.zeros((1, 4, 4, 3), np.uint8), np.zeros(1, np.int64))
    reads_or_refuses(
        lambda path: ood.shift_set(f"cifar-c:{path}", [str(i) for i in range(10)], split, 3), tmp_path / "noise.npy"
    )


@pytest.fixture(scope="module")
def svhn() -> bytes:
    from scipy.io import savemat

    file = io.BytesIO()
    savemat(file, {"X": np.zeros((4, 4, 3, 2), np.uint8), "y": np.ones(2)})
    return file.getvalue()


@FEW
@given(st.data())
def test_svhn(svhn: bytes, tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "test.mat").write_bytes(data.draw(mutations(svhn)))
    reads_or_refuses(lambda path: ood.ood_set(f"svhn:{path}", 8, 3), tmp_path / "test.mat")


def _crash(path: Path, name: str, squeeze: bool) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_crash_of_the_reader_of_mat_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SciPy's reader ends with a segmentation fault for some files."""
    monkeypatch.setattr(matlab, "_load", _crash)
    with pytest.raises(ValueError, match=r"x.mat cannot be read as SVHN's .mat \(its reader crashed\); download"):
        ood.ood_set(f"svhn:{tmp_path}/x.mat", 8, 3)


def _encoded(kind: str) -> bytes:
    file = io.BytesIO()
    picture(20, 30, 1).save(file, kind)
    return file.getvalue()


# Pillow warns of damage that it can do without.
@pytest.mark.filterwarnings("ignore:::PIL")
@FUZZ
@given(
    st.sampled_from([_encoded(kind) for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")]).flatmap(
        mutations
    )
)
def test_headers_of_images(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    if reads_or_refuses(lambda path: image_size(str(path)), tmp_path / "x.jpg"):
        height, width = image_size(str(tmp_path / "x.jpg"))
        assert 1 <= height < 2**31
        assert 1 <= width < 2**31


@FUZZ
@given(st.data())
def test_cached_sizes_of_images(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAL_FAST_CACHE", str(tmp_path))
        want = build_data(config(folder)).split("train").sizes
        for path in sorted(tmp_path.rglob("*.npz")):
            path.write_bytes(data.draw(mutations(path.read_bytes())))
        assert np.array_equal(build_data(config(folder)).split("train").sizes, want)
    shutil.rmtree(tmp_path / "image-sizes-3")
