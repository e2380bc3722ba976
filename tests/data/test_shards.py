"""WebDataset shards: packing, reading, damaged archives, addresses."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from tal_fast.data.build import build_data
from tal_fast.data.check import check_folder, write_list
from tal_fast.data.check import main as check_main
from tal_fast.data.digest import data_digest
from tal_fast.data.headers import UnreadableImage
from tal_fast.data.loader import IGNORED_LABEL
from tal_fast.data.pack import main as pack_main
from tal_fast.data.pack import pack
from tal_fast.data.sources import absolute_place
from tests.helpers.images import LOADERS, collect, config, cut_short, make_folder, picture

SMALL = 0.01
"""Size of a shard in MB with which the pictures of ``make_folder`` fill several."""


def encoded(kind: str = "JPEG", seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(30, 40, seed).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_set(root: Path, labels: list[Any] | None = None, ending: str = "cls") -> Path:
    """A training and a validation shard, with an image for each label."""
    for split in ("train", "val"):
        files: dict[str, bytes] = {}
        for i, label in enumerate([0, 1, 2] if labels is None else labels):
            files |= {f"{i}.jpg": encoded(seed=i), f"{i}.{ending}": str(label).encode()}
        write_tar(root / f"{split}-0.tar", files)
    return root


def packed(tmp_path: Path, **counts: int) -> tuple[Path, Path]:
    """A folder of pictures and its shards."""
    folder = make_folder(tmp_path / "folder", **counts)
    pack(folder, tmp_path / "shards", shard_mb=SMALL)
    return folder, tmp_path / "shards"


def shards(root: Path | str, **options: Any) -> Any:
    return build_data(config(dataset="webdataset", **options, **{"root": str(root)}))


def by_name(data: Any, split: str) -> dict[str, tuple[int, torch.Tensor]]:
    """Label and pixels of each image by the last part of its name without the ending."""
    images, labels, indices = collect(data.loader(split, batch_size=4))
    paths = [Path(data.split(split).paths[i]) for i in indices.tolist()]
    return {path.stem: (int(label), image) for path, label, image in zip(paths, labels, images, strict=True)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loader", LOADERS)
def test_shards_give_the_images_of_their_folder(tmp_path: Path, loader: Any, workers: int) -> None:
    folder, root = packed(tmp_path)
    assert len(list(root.glob("train-*.tar"))) > 2
    of_folder, of_shards = build_data(config(folder, loader=loader)), shards(root, loader=loader, workers=workers)
    assert of_shards.class_names == of_folder.class_names == ("cat", "dog", "emu")
    for split in ("train-eval", "val"):
        want, got = by_name(of_folder, split), by_name(of_shards, split)
        assert got.keys() == want.keys()
        for name, (label, image) in want.items():
            assert got[name][0] == label
            assert torch.equal(got[name][1], image), name


@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_is_shared_by_ranks_and_resumed_at_any_step(tmp_path: Path, loader: Any) -> None:
    _, root = packed(tmp_path, train=29)
    data = shards(root, loader=loader)
    seen = []
    for rank in (0, 1):
        whole = data.loader("train", batch_size=3, rank=rank, world_size=2, seed=5)
        whole.set_epoch(2)
        steps = list(whole)
        start = int(np.random.default_rng().integers(1, len(steps)))
        rest = data.loader("train", batch_size=3, rank=rank, world_size=2, seed=5)
        rest.set_epoch(2, start)
        for got, want in zip(rest, steps[start:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        seen += torch.cat([step[2] for step in steps]).tolist()
    assert len(seen) == len(set(seen)) == 24


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    folder, root = packed(tmp_path)
    shutil.copytree(folder, tmp_path / "copy")
    pack(tmp_path / "copy", tmp_path / "again", shard_mb=SMALL)
    files = sorted(path.name for path in root.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((root / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    info = json.loads((root / "_info.json").read_text())["splits"]
    assert {name: split["num_samples"] for name, split in info.items()} == {"train": 13, "val": 7}
    assert sum(info["train"]["shard_lengths"]) == 13


def test_an_interrupted_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, root = packed(tmp_path)
    out, written = tmp_path / "parts", []

    def write(path: Path, shard: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard.name)
        original(path, shard)

    from tal_fast.data import pack as module

    original = module._write
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", write)
        with pytest.raises(KeyboardInterrupt):
            pack(folder, out, shard_mb=SMALL)
    with pytest.raises(ValueError, match="parts is not packed to its end; give the command that packs it again"):
        shards(out)
    with pytest.raises(ValueError, match="holds other shards"):
        pack(folder, out, shard_mb=2 * SMALL)
    before = {name: (out / name).stat().st_ino for name in written}
    pack(folder, out, shard_mb=SMALL)
    assert before == {name: (out / name).stat().st_ino for name in written}
    assert {p.name: p.read_bytes() for p in root.iterdir()} == {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ValueError, match="holds other shards; remove them, or name another folder"):
        pack(folder, out, shard_mb=SMALL)


def test_names_that_readers_would_take_for_one_stay_apart(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.b.jpg", "a_b.png", ".hidden.jpg"):
        (tmp_path / "in" / "x.y" / "deep").mkdir(parents=True, exist_ok=True)
        picture(20, 20, len(name)).save(tmp_path / "in" / "x.y" / "deep" / name)
    assert pack_main([str(tmp_path / "in"), str(tmp_path / "out"), "--split", "val"]) == 0
    with tarfile.open(tmp_path / "out" / "val-000000.tar") as archive:
        names = sorted(archive.getnames())
    assert len(names) == len(set(names)) == 8
    assert {name.partition(".")[0] for name in names if name.endswith(".cls")} == {"x"}
    keys = [name.removesuffix(".cls") for name in names if name.endswith(".cls")]
    assert all("." not in Path(key).name for key in keys)


def test_a_flat_folder_is_an_ood_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, root = packed(tmp_path)
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(5):
        picture(30, 30, i).save(flat / f"{i}.png")
    assert pack_main([str(flat), str(tmp_path / "other"), "--split", "other"]) == 0
    assert "other 5 images" in capsys.readouterr().out
    whole = shards(root, ood={"other": f"webdataset:{tmp_path / 'other'}"})
    one = shards(root, ood={"other": f"webdataset:{tmp_path / 'other' / 'other-000000.tar'}"})
    folder = shards(root, ood={"other": str(flat)})
    want = by_name(folder, "other")
    for data in (whole, one):
        got = by_name(data, "other")
        assert {label for label, _ in got.values()} == {-1}
        assert all(torch.equal(got[name][1], image) for name, (_, image) in want.items())


@pytest.mark.parametrize("loader", LOADERS)
def test_images_that_do_not_decode_count_as_elsewhere_and_can_be_listed(tmp_path: Path, loader: Any) -> None:
    folder = make_folder(tmp_path / "folder")
    cut_short(folder / "val" / "dog" / "bad.jpg")
    pack(folder, root := tmp_path / "shards", shard_mb=SMALL)
    reader = shards(root, loader=loader).loader("val", batch_size=4, skip_unreadable=True)
    _, labels, indices = collect(reader)
    (name,) = reader.unreadable
    assert name.endswith("dog/bad.jpg")
    assert str(root / "val-0") in name
    bad = shards(root, loader=loader).split("val").paths.index(name)
    assert (labels == IGNORED_LABEL).tolist() == (indices == bad).tolist()
    with pytest.raises(UnreadableImage, match=f"check_data webdataset:{root} --out list.txt"):
        list(shards(root, loader=loader).loader("val", batch_size=4))

    report = check_folder(f"webdataset:{root}", workers=1)
    assert [(f.kind, f.path) for f in report.problems] == [("truncated", str(Path(name).relative_to(root)))]
    write_list(tmp_path / "list.txt", report.usable)
    rest = shards(root, loader=loader, file_list=str(tmp_path / "list.txt"))
    assert len(rest.split("val")) == 7
    assert len(rest.split("train")) == 13
    assert IGNORED_LABEL not in collect(rest.loader("val", batch_size=4))[1]
    (tmp_path / "list.txt").write_text("train-000000.tar/cat/nothing.jpg\n")
    with pytest.raises(ValueError, match=r"names 1 images that are not in .*nothing\.jpg.*check_data webdataset:"):
        shards(root, file_list=str(tmp_path / "list.txt"))


def test_check_data_points_to_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, root = packed(tmp_path)
    assert check_main([str(root)]) == 2
    assert f".tar shards are webdataset:{root}" in capsys.readouterr().err
    out = tmp_path / "list.txt"
    assert check_main([f"webdataset:{root}", "--workers", "1", "--out", str(out)]) == 0
    assert f"--data.dataset webdataset --data.root {root} --data.file_list {out}" in capsys.readouterr().out


def test_a_shard_that_is_gone_or_replaced_is_reported(tmp_path: Path) -> None:
    data = shards(write_set(tmp_path / "set"))
    (tmp_path / "set" / "val-0.tar").unlink()
    with pytest.raises(UnreadableImage, match=r"val-0.tar/0.jpg cannot be decoded \(there is no such file\)"):
        list(data.loader("val", batch_size=3))


@pytest.mark.parametrize("labels", [["emu", "cat", "dog"], [2, 0, 1]])
def test_labels_are_numbers_or_names(tmp_path: Path, labels: list[Any]) -> None:
    data = shards(write_set(tmp_path, labels))
    assert data.class_names == (("cat", "dog", "emu") if labels[0] == "emu" else ("0", "1", "2"))
    assert data.split("val").labels.tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="has classes by name and by number; write classes.txt"):
        shards(write_set(tmp_path / "mixed", ["emu", 1, 0]))
    (tmp_path / "classes.txt").write_text("cat\ndog\nemu\nfox\n")
    named = shards(tmp_path)
    assert named.class_names == ("cat", "dog", "emu", "fox")
    assert named.split("train").labels.tolist() == [2, 0, 1]


def test_labels_in_json_and_other_files(tmp_path: Path) -> None:
    entries = [json.dumps({"label": 2 - i, "kind": f"k{i}", "box": [1, 2]}) for i in range(3)]
    root = write_set(tmp_path, entries, "json")
    assert shards(root).split("train").labels.tolist() == [2, 1, 0]
    assert shards(root, label_key="kind").class_names == ("k0", "k1", "k2")
    with pytest.raises(ValueError, match=r"'box' of 0.json is \[1, 2\], but a label is a number or a name"):
        shards(root, label_key="box")
    with pytest.raises(ValueError, match=r"0.jpg has no label"):
        shards(root, label_key="absent")
    assert shards(write_set(tmp_path / "b", [1, 0, 1], "id.txt"), label_key="id.txt").num_classes == 2


def damage(path: Path, kind: str) -> None:
    content, jpeg = path.read_bytes(), encoded()
    if kind == "truncated":
        path.write_bytes(content[: tarfile.BLOCKSIZE + 100])
    elif kind == "cut between members":
        path.write_bytes(content[: tarfile.BLOCKSIZE * (1 + -(-len(jpeg) // tarfile.BLOCKSIZE))])
    elif kind == "damaged header":
        place = content.index(b"1.jpg")
        path.write_bytes(content[:place] + b"\xff" * 300 + content[place + 300 :])
    elif kind == "two archives":
        path.write_bytes(content + content)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no archive":
        path.write_bytes(jpeg)
    else:
        extra = {
            "no label": {"a.jpg": jpeg},
            "duplicate key": {"a.jpg": jpeg, "a.cls": b"0", "b/c.jpg": jpeg, "./a.jpg": jpeg},
            "two images": {"a.jpg": jpeg, "a.png": jpeg, "a.cls": b"0"},
            "absolute path": {"/etc/a.jpg": jpeg},
            "path above": {"a/../../b.jpg": jpeg},
            "unknown class": {"a.jpg": jpeg, "a.cls": b"7"},
            "negative class": {"a.jpg": jpeg, "a.cls": b"-1"},
            "unknown name": {"a.jpg": jpeg, "a.cls": b"zebra"},
            "no image": {"a.jpg": b"text", "a.cls": b"0"},
            "bad json": {"a.jpg": jpeg, "a.json": b"[1"},
        }[kind]
        write_tar(path, extra)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("truncated", "val-0.tar cannot be read as a tar archive (unexpected end of data); copy it again"),
        ("cut between members", "val-0.tar ends without a tar's end mark; copy it again"),
        ("damaged header", "val-0.tar is damaged, or goes on, at byte"),
        ("two archives", "val-0.tar is damaged, or goes on, at byte"),
        ("empty", "val-0.tar cannot be read as a tar archive (empty file); copy it again"),
        ("no archive", "val-0.tar cannot be read as a tar archive"),
        ("no label", "val-0.tar/a.jpg has no label; add it, or use these images as an out-of-distribution set"),
        ("duplicate key", "val-0.tar has ./a.jpg twice; give every sample a key of its own"),
        ("two images", "val-0.tar has 2 images of the key a (jpg, png); keep one"),
        ("absolute path", "val-0.tar has a member '/etc/a.jpg', which leads out of it; pack it again"),
        ("path above", "val-0.tar has a member 'a/../../b.jpg', which leads out of it; pack it again"),
        ("unknown class", "val-0.tar/a.jpg has the label 7, but there are 3 classes (0, 1, 2), numbered from 0"),
        ("negative class", "val-0.tar/a.jpg has the label -1, but there are 3 classes"),
        ("unknown name", "val-0.tar/a.jpg has the label 'zebra', but there are 3 classes"),
        ("no image", "val-0.tar/a.jpg cannot be read as an image (no image format fits it)"),
        ("bad json", "val-0.tar: a.json is no JSON object; pack it again"),
    ],
)
def test_damaged_archives_are_named(tmp_path: Path, kind: str, sentence: str) -> None:
    root = write_set(tmp_path)
    damage(root / "val-0.tar", kind)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        shards(root)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_without_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; name a folder of .tar shards"):
        shards(tmp_path / "absent")
    with pytest.raises(ValueError, match="has no split train or training"):
        shards(tmp_path)
    write_set(tmp_path / "set")
    (tmp_path / "set" / "val-0.tar").rename(tmp_path / "set" / "other.tar")
    with pytest.raises(
        ValueError, match=r"no split val or .*; add one, or validate on training images with data.holdout"
    ):
        shards(tmp_path / "set")
    assert len(shards(tmp_path / "set", holdout=1).split("val")) == 1
    (tmp_path / "set" / "val-0.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="val-0.tar.gz is compressed"):
        shards(tmp_path / "set")
    with pytest.raises(ValueError, match="data.label_key is for data.dataset webdataset, huggingface, not folder"):
        build_data(config(tmp_path, label_key="cls"))


def test_weights_are_evaluated_on_validation_shards_alone(tmp_path: Path) -> None:
    root = write_set(tmp_path, ["cat", "emu", "cat"])
    (root / "train-0.tar").unlink()
    data = build_data(config(dataset="webdataset", root=str(root)), training=False)
    assert data.class_names == ("cat", "emu")
    assert len(data.split("train-eval")) == 0
    assert collect(data.loader("val", batch_size=2))[1].tolist() == [0, 1, 0]


def test_the_index_is_read_once_and_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tal_fast.data import shards as module

    scanned: list[str] = []
    original = module._scan
    monkeypatch.setattr(module, "_scan", lambda path, key: scanned.append(path) or original(path, key))
    root = write_set(tmp_path)
    first = shards(root)
    again = shards(root)
    assert len(scanned) == 2
    assert np.array_equal(first.split("train").extents, again.split("train").extents)
    write_tar(root / "val-0.tar", {"z.png": encoded("PNG"), "z.cls": b"1"})
    assert [Path(p).name for p in shards(root).split("val").paths] == ["z.png"]
    assert len(scanned) == 3


def test_a_copy_has_the_same_digest_and_other_images_another(tmp_path: Path) -> None:
    _, root = packed(tmp_path)
    digest = data_digest(shards(root))
    shutil.copytree(root, tmp_path / "elsewhere" / "copy")
    assert data_digest(shards(tmp_path / "elsewhere" / "copy")) == digest
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/digest", recursive=True)
    assert data_digest(shards("memory://digest")) == digest
    memory.rm("/digest", recursive=True)
    assert data_digest(shards(write_set(tmp_path / "set"))) != data_digest(shards(write_set(tmp_path / "t", [2, 0, 1])))


def test_shards_at_an_address_are_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAL_FAST_CACHE", str(tmp_path / "cache"))
    folder, root = packed(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/bucket/set", recursive=True)
    fetched: list[str] = []
    original = type(memory).get_file
    monkeypatch.setattr(
        type(memory),
        "get_file",
        lambda self, path, *rest, **o: fetched.append(path) or original(self, path, *rest, **o),
    )
    want = by_name(build_data(config(folder)), "val")
    for _ in range(2):
        data = shards("memory://bucket/set/")
        got = by_name(data, "val")
        assert all(torch.equal(got[name][1], image) for name, (_, image) in want.items())
    assert len(fetched) == len(list(root.glob("*.tar")))
    assert data.split("val").paths[0].startswith("memory://bucket/set/val-0")
    memory.pipe("/bucket/set/val-000000.tar", (root / "val-000000.tar").read_bytes() + bytes(512))
    shards("memory://bucket/set")
    assert fetched[-1].endswith("val-000000.tar")
    assert len(fetched) == len(list(root.glob("*.tar"))) + 1
    memory.rm("/bucket/set/train-000001.tar")
    (root / "train-000001.tar").unlink()
    for place in ("memory://bucket/set", root):
        with pytest.raises(ValueError, match=r"set/train-000001.tar is missing|shards/train-000001.tar is missing"):
            shards(place)
    memory.rm("/bucket", recursive=True)
    with pytest.raises(ValueError, match="has no split train"):
        shards("memory://bucket/set")


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_an_address_that_needs_another_package_says_so() -> None:
    with pytest.raises(
        ValueError, match=r"s3://bucket/set needs another package .*s3fs.*pip install 'tal-fast\[shards\]'"
    ):
        shards("s3://bucket/set")
    with pytest.raises(ValueError, match="nothing://set cannot be read .*check the address"):
        shards("nothing://set")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_hugging_face_needs_its_package(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"need the package datasets; pip install 'tal-fast\[huggingface\]'"):
        build_data(config(tmp_path, dataset="huggingface"))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda root: None, "absent is not a folder"),
        (lambda root: (root / "a").mkdir(parents=True), "a holds no images"),
        (lambda root: root.mkdir(), "holds no images"),
        (
            lambda root: (make_folder(root), (root / "val" / "cat").rename(root / "val" / "yak")),
            "has no counterpart in",
        ),
    ],
)
def test_folders_that_cannot_be_packed_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, sentence: str
) -> None:
    make(tmp_path / "absent")
    assert pack_main([str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_places_are_absolute_but_addresses_and_names_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    assert absolute_place("set") == absolute_place("set", "webdataset") == f"{here}/set"
    assert absolute_place("webdataset:set") == f"webdataset:{here}/set"
    for spec in ("s3://bucket/set", "webdataset:https://host/set", "huggingface:owner/name"):
        assert absolute_place(spec) == spec
    assert absolute_place("owner/name", "huggingface") == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert absolute_place("owner/name", "huggingface") == f"{here}/owner/name"
