"""Check of image files, and training with its list."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tal_fast.config.schema import DataConfig
from tal_fast.data.build import build_data
from tal_fast.data.check import check_folder, main, write_list


def picture(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(256, size=(40, 50, 3), dtype=np.uint8))


def make_folder(root: Path) -> dict[str, str]:
    """Make a folder of two classes with one file of each kind; returns path -> kind."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                picture(i).save(root / split / name / f"good{i}.jpg")
    cat = root / "train" / "cat"
    (cat / "empty.png").touch()
    (cat / "text.JPEG").write_text("<html>404</html>")
    for ending in ("jpg", "png"):
        picture(1).save(cat / f"cut.{ending}")
        whole = (cat / f"cut.{ending}").read_bytes()
        (cat / f"cut.{ending}").write_bytes(whole[: len(whole) // 2])
    picture(2).save(cat / "crc.png")
    broken = bytearray((cat / "crc.png").read_bytes())
    for i in range(len(broken) // 2, len(broken) // 2 + 50):
        broken[i] ^= 255  # within the compressed pixels
    (cat / "crc.png").write_bytes(broken)
    Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50)).save(cat / "deep.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(cat / "float.tif")
    picture(3).save(cat / "moving.jpg", format="GIF")
    picture(4).convert("CMYK").save(cat / "print.jpg")
    exif = Image.Exif()
    exif[274] = 8
    picture(5).save(cat / "turned.jpg", exif=exif)
    picture(6).save(cat / "really-png.jpg", format="PNG")
    picture(7).save(cat / "no-ending", format="PNG")
    (cat / "Thumbs.db").write_bytes(b"neither is an image nor says so")
    (cat / ".hidden.jpg").touch()
    kinds = {
        "empty.png": "empty",
        "text.JPEG": "not an image",
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "crc.png": "damaged",
        "deep.png": "unsupported pixels",
        "float.tif": "unsupported pixels",
        "moving.jpg": "unsupported pixels",
        "print.jpg": "CMYK",
        "turned.jpg": "EXIF-rotated",
        "really-png.jpg": "ending",
        "no-ending": "ignored",
    }
    return {f"train/cat/{name}": kind for name, kind in kinds.items()}


USABLE = ["train/cat/print.jpg", "train/cat/turned.jpg", "train/cat/really-png.jpg"] + [
    f"{split}/{name}/good{i}.jpg" for split in ("train", "val") for name in ("cat", "dog") for i in range(3)
]


@pytest.mark.parametrize("workers", [1, 3])
def test_each_kind_is_found_and_only_usable_images_are_listed(tmp_path: Path, workers: int) -> None:
    kinds = make_folder(tmp_path)
    report = check_folder(tmp_path, workers)
    assert {f.path: f.kind for f in report.findings} == kinds
    assert len(report.findings) == len(kinds)
    assert report.usable == sorted(USABLE)
    assert report.others == {".db": 1}
    assert Counter(f.kind for f in report.problems) == {
        "empty": 1, "not an image": 1, "truncated": 2, "damaged": 1, "unsupported pixels": 3
    }  # fmt: skip
    assert "orientation 8" in [f.detail for f in report.findings]


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_training_with_the_list(tmp_path: Path, loader: str) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    root, out = tmp_path / "images", tmp_path / "list.txt"
    make_folder(root)
    with pytest.raises(ValueError, match=r"check_data FOLDER --out list.txt and --data.file_list list.txt"):
        build_data(DataConfig(root=str(root), loader=loader, image_size=16))  # type: ignore[arg-type]
    done = subprocess.run(
        [sys.executable, "-m", "tal_fast.check_data", str(root), "--out", str(out), "--workers", "2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"empty: {root}/train/cat/empty.png (file of 0 bytes)" in done.stdout
    assert "15 usable images; 1 file is left out: 1 .db" in done.stdout
    assert "not usable: 2 truncated" in done.stdout
    assert "worth knowing: 1 CMYK" in done.stdout
    assert "Traceback" not in done.stderr
    lines = out.read_text().splitlines()
    assert lines[0].startswith("#")
    assert lines[1:] == sorted(USABLE)
    data = build_data(DataConfig(root=str(root), file_list=str(out), loader=loader, image_size=16, workers=1))  # type: ignore[arg-type]
    assert (len(data.split("train")), len(data.split("val"))) == (9, 6)
    seen = [i for _, _, indices in data.loader("train-eval", batch_size=4) for i in indices.tolist()]
    assert seen == list(range(9))


def test_a_flat_folder_without_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("#1.png", "deep/é.jpg"):
        picture(1).save(tmp_path / name)
    assert main([str(tmp_path), "--workers", "1", "--out", str(tmp_path / "list.txt")]) == 0
    assert "2 usable images\n" in capsys.readouterr().out
    assert (tmp_path / "list.txt").read_text().splitlines()[1:] == ["./#1.png", "deep/é.jpg"]


def test_a_line_break_in_a_name_keeps_a_file_off_the_list(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "two\nlines.png")
    picture(1).save(tmp_path / "one.png")
    report = check_folder(tmp_path, 1)
    assert report.usable == ["one.png"]
    assert [f.kind for f in report.problems] == ["unsupported name"]


def test_file_names_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = b"odd\xff.png".decode(errors="surrogateescape")
    for split in ("train", "val"):
        (tmp_path / "images" / split / "cat").mkdir(parents=True)
        picture(1).convert("CMYK").save(tmp_path / "images" / split / "cat" / name, format="TIFF")
    out = tmp_path / "list.txt"
    assert main([str(tmp_path / "images"), "--workers", "1", "--out", str(out)]) == 0
    assert "odd\\xff.png" in capsys.readouterr().out
    assert b"train/cat/odd\xff.png\n" in out.read_bytes()
    data = build_data(DataConfig(root=str(tmp_path / "images"), file_list=str(out), workers=0, image_size=8))
    assert len(next(iter(data.loader("train", batch_size=1)))[0]) == 1


def test_bad_input_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, sentence in (([str(tmp_path / "nowhere")], "is not a folder"), ([str(tmp_path)], "holds no images")):
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert sentence in err
        assert err.startswith("error: ")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "list.txt cannot be read .*write it with python -m tal_fast.check_data"),
        ("# nothing\n\n", "names no files"),
        ("train/cat/good0.jpg\ntrain/cat/gone.jpg\n", r"names 1 files that are not in .* \(train/cat/gone.jpg\)"),
        ("train/cat/good0.jpg\nval/cat/good0.jpg\n", "names no image of .*train/dog; add one or remove the folder"),
        ("train/cat/good0.jpg\ntrain/dog/good0.jpg\n", "names no image of .*val; add some"),
    ],
)
def test_bad_lists_are_rejected(tmp_path: Path, text: str | None, sentence: str) -> None:
    make_folder(tmp_path / "images")
    out = tmp_path / "list.txt"
    if text is not None:
        out.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        build_data(DataConfig(root=str(tmp_path / "images"), file_list=str(out), loader="torch"))


def test_classes_do_not_depend_on_the_list(tmp_path: Path) -> None:
    make_folder(tmp_path / "images")
    write_list(tmp_path / "list.txt", [p for p in USABLE if p != "val/cat/good1.jpg" and "val/dog" not in p])
    data = build_data(DataConfig(root=str(tmp_path / "images"), file_list=str(tmp_path / "list.txt"), loader="torch"))
    assert data.class_names == ("cat", "dog")
    assert data.split("val").labels.tolist() == [0, 0]
    with pytest.raises(ValueError, match="data.file_list is for data.dataset folder, webdataset, hugg.*, not digits"):
        build_data(DataConfig(dataset="digits", file_list="x"))
