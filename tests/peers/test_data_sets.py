"""Hugging Face data sets as training data; shards of ``tal-fast pack`` in the readers of webdataset and timm."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from timm.data.readers.reader_factory import create_reader

from tal_fast.data.build import build_data
from tal_fast.data.check import check_folder, write_list
from tal_fast.data.digest import data_digest
from tal_fast.data.pack import pack
from tests.helpers.images import LOADERS, collect, config, make_folder, picture

NAMES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAL_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()


def table(count: int, **columns: Any) -> datasets.Dataset:
    features: dict[str, Any] = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    features |= {name: datasets.Value("string") for name in columns}
    images = [picture(20 + i % 5, 31, i) for i in range(count)]
    rows = {"image": images, "label": [(i * 2) % 3 for i in range(count)], **columns}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def save(found: datasets.DatasetDict, root: Path, kind: str) -> None:
    if kind == "arrow":
        found.save_to_disk(root, num_shards={"train": 3, "validation": 1})
        return
    root.mkdir()
    for split in found:
        found[split].to_parquet(root / f"{split}-00000-of-00001.parquet")


def hugging_face(root: Path, **options: Any) -> Any:
    return build_data(config(dataset="huggingface", **options, root=root))


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
@pytest.mark.parametrize("loader", LOADERS)
def test_images_and_labels_are_those_of_datasets(tmp_path: Path, loader: Any, kind: str) -> None:
    found = datasets.DatasetDict({"train": table(17), "validation": table(6)})
    save(found, tmp_path / "set", kind)
    data = hugging_face(tmp_path / "set", loader=loader)
    assert data.class_names == tuple(NAMES)
    for split, name in (("train", "train"), ("val", "validation")):
        files = data.split(split)
        assert files.labels.tolist() == found[name]["label"][:]
        for i in range(len(files)):
            assert np.array_equal(np.asarray(Image.open(files.open(i))), np.asarray(found[name][i]["image"]))
    whole = data.loader("train", batch_size=4, seed=1)
    whole.set_epoch(3)
    rest = data.loader("train", batch_size=4, seed=1)
    rest.set_epoch(3, 2)
    for got, want in zip(rest, list(whole)[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_selected_rows_and_split_names(tmp_path: Path) -> None:
    train = table(17).shuffle(seed=4).select([3, 3, 0, 11])
    datasets.DatasetDict({"train": train, "test": table(5)}).save_to_disk(tmp_path / "set")
    data = hugging_face(tmp_path / "set")
    assert data.split("train").labels.tolist() == train["label"][:]
    for i in range(4):
        content = np.asarray(Image.open(data.split("train").open(i)))
        assert np.array_equal(content, np.asarray(train[i]["image"]))
    assert len(data.split("val")) == 5
    digest = data_digest(data)
    (tmp_path / "set").rename(tmp_path / "moved")
    assert data_digest(hugging_face(tmp_path / "moved")) == digest
    table(8).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match="one has no split val .*validate on training images with data.holdout"):
        hugging_face(tmp_path / "one")
    assert len(hugging_face(tmp_path / "one", holdout=3).split("val")) == 3


def test_columns_are_chosen(tmp_path: Path) -> None:
    found = datasets.DatasetDict({"train": table(6, kind=list("xyzxyz")), "validation": table(3, kind=list("zyx"))})
    fine = found.map(lambda row: {"fine": row["label"]})
    fine = fine.cast_column("fine", datasets.ClassLabel(names=["u", "v", "w"]))
    fine.save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="has 2 columns of labels among .*; choose one with data.label_key"):
        hugging_face(tmp_path / "set")
    assert hugging_face(tmp_path / "set", label_key="fine").class_names == ("u", "v", "w")
    strings = hugging_face(tmp_path / "set", label_key="kind")
    assert strings.class_names == ("x", "y", "z")
    assert strings.split("val").labels.tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="data.label_key is 'absent', but .* has image, label, kind, fine"):
        hugging_face(tmp_path / "set", label_key="absent")
    bare = datasets.DatasetDict({"train": found["train"].remove_columns("image")})
    bare.save_to_disk(tmp_path / "bare")
    with pytest.raises(ValueError, match="has 0 columns of images among label, kind; keep one"):
        hugging_face(tmp_path / "bare")


def test_missing_and_damaged_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read as a Hugging Face data set .*; name a folder of parquet"):
        hugging_face(tmp_path / "absent")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.parquet").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read as a Hugging Face data set"):
        hugging_face(tmp_path / "set")


def test_a_set_is_checked_listed_and_out_of_distribution(tmp_path: Path) -> None:
    save(datasets.DatasetDict({"train": table(7), "validation": table(4)}), root := tmp_path / "set", "parquet")
    report = check_folder(f"huggingface:{root}", workers=1)
    assert len(report.usable) == 11
    write_list(tmp_path / "list.txt", [name for name in report.usable if name != "train/3"])
    data = hugging_face(root, file_list=str(tmp_path / "list.txt"), ood={"same": f"huggingface:{root}"})
    assert [Path(path).name for path in data.split("train").paths] == ["0", "1", "2", "4", "5", "6"]
    assert data.split("same").labels.tolist() == [-1] * 4


def test_webdataset_reads_packed_shards(tmp_path: Path) -> None:
    pack(make_folder(tmp_path / "folder"), root := tmp_path / "shards", shard_mb=0.01)
    data = build_data(config(dataset="webdataset", root=root, loader="torch"))
    files = data.split("train")
    want = {
        Path(path).stem: (int(label), files.read(i))
        for i, (path, label) in enumerate(zip(files.paths, files.labels, strict=True))
    }
    urls = sorted(str(path) for path in root.glob("train-*.tar"))
    got = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        (image,) = (sample[key] for key in sample if key not in ("cls", "__key__", "__url__", "__local_path__"))
        got[Path(sample["__key__"]).name] = int(sample["cls"]), image
    assert got == want


def test_timm_reads_packed_shards(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / "folder" / "train" / NAMES[i % 2]).mkdir(parents=True, exist_ok=True)
        picture(20, 30, i).save(tmp_path / "folder" / "train" / NAMES[i % 2] / f"{i}.jpg")
    pack(tmp_path / "folder", tmp_path / "shards", shard_mb=0.005)
    reader = create_reader("wds/", root=str(tmp_path / "shards"), split="train", is_training=False, batch_size=1)
    assert sorted(target for _, target in reader) == [0] * 5 + [1] * 4


def test_shards_of_webdataset_are_read(tmp_path: Path) -> None:
    images = {split: [picture(20 + i, 30, i) for i in range(5)] for split in ("train", "val")}
    for split, found in images.items():
        with webdataset.ShardWriter(str(tmp_path / f"{split}-%04d.tar"), maxcount=2, verbose=0) as writer:
            for i, image in enumerate(found):
                writer.write({"__key__": f"sample{i}", "png": image, "cls": i % 3})
    data = build_data(config(dataset="webdataset", root=tmp_path))
    assert collect(data.loader("val", batch_size=2))[1].tolist() == [0, 1, 2, 0, 1]
    for i, image in enumerate(images["val"]):
        assert np.array_equal(np.asarray(Image.open(data.split("val").open(i))), np.asarray(image))


def test_shards_are_read_over_http(tmp_path: Path) -> None:
    pack(make_folder(tmp_path / "folder"), tmp_path / "served" / "set", shard_mb=0.01)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/set"
        by_address = build_data(config(dataset="webdataset", root=address))
        (tmp_path / "served" / "set" / "_info.json").unlink()  # the shards are found in the listing, too
        listed = build_data(config(dataset="webdataset", root=address))
        with pytest.raises(ValueError, match="absent.* has no split train"):
            build_data(config(dataset="webdataset", root=f"{address}-absent"))
        server.shutdown()
    local = build_data(config(dataset="webdataset", root=tmp_path / "served" / "set"))
    for data in (by_address, listed):
        assert data.class_names == local.class_names
        for split in ("train", "val"):
            got, want = data.split(split), local.split(split)
            assert [got.read(i) for i in range(len(got))] == [want.read(i) for i in range(len(want))]
    with pytest.raises(ValueError, match="cannot be read .*; check the address, the network and the credentials"):
        build_data(config(dataset="webdataset", root=address))
