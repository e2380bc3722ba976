"""Files that are left out or refused: other endings, pixels of more than 8 bits, and entries that are no files."""

from __future__ import annotations

import logging
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tal_fast.data import image_folder
from tal_fast.data.build import build_data
from tal_fast.data.check import check_folder, main
from tal_fast.data.headers import UnreadableImage, image_size
from tal_fast.data.image_folder import read_flat
from tests.helpers.images import LOADERS, collect, config, make_folder, picture

READ = {
    "a.jfif": {"format": "JPEG"}, "b.JPE": {"format": "JPEG"}, "c.jp2": {}, "d.j2k": {}, "e.pnm": {"format": "PPM"},
    "f.apng": {"format": "PNG"}, "g.mpo": {"save_all": True, "append_images": [picture(50, 60, 2)]},
    "h.jpg": {"format": "MPO", "save_all": True, "append_images": [picture(50, 60, 2)]},
}  # fmt: skip


@pytest.mark.parametrize("loader", LOADERS)
def test_files_that_both_loaders_read(tmp_path: Path, loader: Any) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        for name, options in READ.items():
            picture(50, 60, 1).save(tmp_path / split / "cat" / name, **options)
    data = build_data(config(tmp_path, loader=loader, mean=[0.0] * 3, std=[1 / 255] * 3))
    assert [Path(path).name for path in data.split("val").paths] == sorted(READ)  # type: ignore[union-attr]
    reader = data.loader("val", batch_size=len(READ))
    images = collect(reader)[0]
    assert reader.unreadable == {}
    assert (images - images[4]).abs().mean() < 4  # all show the same picture, some compressed
    assert check_folder(tmp_path, 1).findings == []


def test_files_that_are_left_out_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder(tmp_path / "images")
    for name in ("1.jxl", "2.JXL", "3.gif", "4.avif", "list.txt", "README"):
        (root / "val" / "cat" / name).touch()
    (root / "val" / "stray.jpg").touch()
    (root / "val" / "cat" / "again").symlink_to(root, target_is_directory=True)
    with caplog.at_level(logging.WARNING):
        data = build_data(config(root))
    assert caplog.messages == [
        f"{root}/train: 1 file is left out: 1 .db; convert images among them to JPEG or PNG",
        f"{root}/val: links to a folder above them are not followed: 1; their images are read once",
        f"{root}/val: 7 files are left out: 2 .jxl, 1 .avif, 1 .gif, 1 .txt, "
        "1 without a class folder, 1 without an ending; convert images among them to JPEG or PNG",
    ]
    assert len(data.split("val")) == 7
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        read_flat(root / "val" / "cat", "photos")
    assert "6 files are left out: 2 .jxl" in caplog.text


def test_classes_without_validation_images_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder(tmp_path / "images")
    shutil.rmtree(root / "val" / "dog")
    build_data(config(root))
    assert f"{root}/val has no image of 1 of 3 classes: dog" in caplog.text


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_list_that_has_no_end_is_refused(tmp_path: Path, make: Any) -> None:
    root = make_folder(tmp_path / "images")
    make(tmp_path / "list.txt")
    with pytest.raises(ValueError, match="list.txt is a pipe or a device, which may have no end; name a file"):
        build_data(config(root, file_list=str(tmp_path / "list.txt")))


def test_the_check_counts_other_endings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(9, 9, 1).save(tmp_path / "a.png")
    picture(9, 9, 1).save(tmp_path / "b.gif")
    (tmp_path / "c.jxl").write_bytes(b"Pillow does not know this format")
    assert main([str(tmp_path), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 usable images; 1 file is left out: 1 .jxl" in out
    assert "b.gif (GIF, convert it to PNG)" in out


def png16(path: Path, pixels: np.ndarray, colour: int) -> None:
    """Write a PNG of 16 bits, which Pillow cannot."""
    height, width = pixels.shape[:2]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def tiff16(path: Path, pixels: np.ndarray) -> None:
    """Write a TIFF of 16 bits RGB, which Pillow cannot."""
    height, width, channels = pixels.shape
    fields = {
        256: width, 257: height, 258: 134, 259: 1, 262: 2, 273: 140, 277: channels, 278: height, 279: pixels.nbytes,
        284: 1,
    }  # fmt: skip
    entries = [struct.pack("<HHII", tag, 3, 3 if tag == 258 else 1, value) for tag, value in fields.items()]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(fields)) + b"".join(entries) + bytes(4)
    path.write_bytes(head + struct.pack("<3H", 16, 16, 16) + pixels.astype("<u2").tobytes())


def deep(path: Path) -> None:
    """Write a file whose 12-bit pixels would be nearly black."""
    pixels = np.asarray(picture(40, 50, 1)).astype(np.uint16) * 16
    if path.name == "rgb.png":
        png16(path, pixels, 2)
    elif path.name == "alpha.png":
        png16(path, np.concatenate([pixels, pixels[..., :1]], axis=2), 6)
    elif path.name == "rgb.tif":
        tiff16(path, pixels)
    elif path.suffix == ".ppm":
        path.write_bytes(b"P6 50 40 65535\n" + pixels.astype(">u2").tobytes())
    elif path.suffix == ".jp2":
        picture(40, 50, 1).save(path)
        content = bytearray(path.read_bytes())
        content[content.index(b"\xff\x4f\xff\x51") + 42] = 11  # bits of the first channel, less 1
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["rgb.png", "alpha.png", "rgb.tif", "rgb.ppm", "rgb.jp2"])
def test_more_than_8_bits_are_refused(tmp_path: Path, name: str) -> None:
    deep(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.mode in ("RGB", "RGBA")  # so the mode does not tell
    with pytest.raises(UnreadableImage, match=f"{name} cannot be read as an image .*(more than 8 bits|largest value)"):
        image_size(str(tmp_path / name))
    assert [f.kind for f in check_folder(tmp_path, 1).findings] in (["unsupported pixels"], ["damaged"])


def test_pixels_that_dali_reads_differently_are_refused(tmp_path: Path) -> None:
    picture(9, 9, 1).convert("LA").save(tmp_path / "a.tif")
    (tmp_path / "b.pgm").write_bytes(b"P5 2 2 100\n" + bytes((0, 50, 100, 1)))
    (tmp_path / "c.ppm").write_bytes(b"P3 1 1 255\n1 2 3\n")
    (tmp_path / "d.pgm").write_bytes(b"P5 2 2 255\n" + bytes((0, 50, 100, 1)))
    (tmp_path / "e.pbm").write_bytes(b"P4 8 1\n\x55")
    report = check_folder(tmp_path, 1)
    assert [f.path for f in report.problems] == ["a.tif", "b.pgm", "c.ppm"]
    assert report.usable == ["d.pgm", "e.pbm"]


ODD = {
    "broken link": lambda path: path.symlink_to("gone.jpg"),
    "broken link to itself": lambda path: path.symlink_to(path.name),
    "neither a file nor a folder": os.mkfifo,
    "neither a file nor a folder: a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("split", ["train", "val"])
def test_entries_that_are_no_files(tmp_path: Path, kind: str, split: str) -> None:
    root = make_folder(tmp_path / "images")
    odd = root / split / "cat" / "odd.jpg"
    ODD[kind](odd)
    reason = kind.partition(" to itself")[0].partition(":")[0]
    with pytest.raises(UnreadableImage, match=rf"odd.jpg cannot be read as an image \({reason}\); .*check_data FOLDER"):
        build_data(config(root))
    findings = check_folder(root, 2).findings
    assert [(f.path, f.kind, f.detail) for f in findings if "odd" in f.path] == [
        (f"{split}/cat/odd.jpg", "damaged", reason)
    ]
    main([str(root), "--workers", "1", "--out", str(tmp_path / "list.txt")])
    data = build_data(config(root, file_list=str(tmp_path / "list.txt")))  # the remedy
    assert len(data.split("train")) == 13
    odd.rename(odd.with_name("no image.txt"))
    assert len(build_data(config(root)).split("train")) == 13


def test_links_to_folders_above_are_not_followed(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    cat = root / "train" / "cat"
    (cat / "all").symlink_to("..", target_is_directory=True)
    (cat / "self").symlink_to(".", target_is_directory=True)
    (tmp_path / "more").mkdir()
    picture(9, 9, 1).save(tmp_path / "more" / "1.png")
    (cat / "more").symlink_to(tmp_path / "more", target_is_directory=True)
    (tmp_path / "more" / "back").symlink_to(cat, target_is_directory=True)
    paths = build_data(config(root)).split("train").paths  # type: ignore[union-attr]
    assert len(paths) == 14
    assert str(cat / "more" / "1.png") in paths
    links = [f.path for f in check_folder(root, 1).findings if f.kind == "link"]
    assert links == ["train/cat/all", "train/cat/more/back", "train/cat/self"]
    (root / "train" / "again").symlink_to(root, target_is_directory=True)
    with pytest.raises(ValueError, match="train/again holds no images"):
        build_data(config(root))


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "images")
    original = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith(locked):
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for locked in ("train/cat", "train", "val"):
        with pytest.raises(ValueError, match=rf"{locked} cannot be read \(Permission denied\)"):
            build_data(config(root))
        report = check_folder(root, 1)
        assert (locked, "damaged", "Permission denied") in {(f.path, f.kind, f.detail) for f in report.findings}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_lists_that_other_programs_wrote(tmp_path: Path, encoding: str, line: str) -> None:
    root = make_folder(tmp_path / "images")
    names = [os.path.relpath(p, root) for s in ("train", "val") for p in build_data(config(root)).split(s).paths]  # type: ignore[union-attr]
    out = tmp_path / "list.txt"
    out.write_bytes(line.join(["# é", *names, ""]).encode(encoding))
    if encoding == "utf-16-le":  # without a mark at its beginning
        with pytest.raises(ValueError, match="list.txt is no text in UTF-8 .*; save it as UTF-8"):
            build_data(config(root, file_list=str(out)))
    else:
        assert len(build_data(config(root, file_list=str(out))).split("train")) == 13


def test_absolute_paths_through_links(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    whole = build_data(config(root)).split("train")
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    (tmp_path / "parent").symlink_to(tmp_path, target_is_directory=True)
    out = tmp_path / "list.txt"
    for written, given in (
        (root, tmp_path / "link"), (tmp_path / "link", root), (tmp_path / "parent" / "images", tmp_path / "link"),
    ):  # fmt: skip
        paths = [p for s in ("train", "val") for p in build_data(config(written)).split(s).paths]  # type: ignore[union-attr]
        out.write_text("\n".join(paths))
        read = build_data(config(given, file_list=str(out))).split("train")
        assert [Path(p).relative_to(given) for p in read.paths] == [Path(p).relative_to(root) for p in whole.paths]  # type: ignore[union-attr]
    (tmp_path / "other.jpg").touch()
    out.write_text(f"{tmp_path}/other.jpg\n../other.jpg\n")
    with pytest.raises(ValueError, match=r"names 2 files that are not in .*other.jpg, ../other.jpg"):
        build_data(config(root, file_list=str(out)))


def test_a_list_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else below the class folders is looked at."""
    root = make_folder(tmp_path / "images")
    (root / "train" / "cat" / "gone.jpg").symlink_to("nowhere")
    out = tmp_path / "list.txt"
    assert main([str(root), "--workers", "1", "--out", str(out)]) == 1
    monkeypatch.setattr(image_folder, "walk", None)
    data = build_data(config(root, file_list=str(out)))
    assert (len(data.split("train")), len(data.split("val"))) == (13, 7)
    out.write_text(out.read_text().replace("train/emu", "train/yak"))
    (root / "train" / "emu").rename(root / "train" / "yak")
    with pytest.raises(ValueError, match=r"val/emu has no counterpart among the training classes \(cat, dog, yak\)"):
        build_data(config(root, file_list=str(out)))
