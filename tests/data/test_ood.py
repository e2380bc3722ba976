"""Out-of-distribution and shifted sets, from small files in the formats of the real ones."""

from __future__ import annotations

import gzip
import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image

from tal_fast import evaluate
from tal_fast.data import ood
from tal_fast.data.corruptions import Corruption
from tal_fast.data.datasets import MemoryImages
from tal_fast.data.image_folder import ImageFiles
from tal_fast.data.ood import ood_set, parse_named, shift_set

RNG = np.random.default_rng(0)


def write_image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20), (value, value, value)).save(path)


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


def pixels_of(found: Any) -> np.ndarray:
    assert isinstance(found, MemoryImages)
    assert (found.labels == -1).all()
    assert found.pixels.dtype == np.uint8
    return found.pixels


def test_a_folder_at_any_depth(tmp_path: Path) -> None:
    for name in ("a.png", "deep/b.jpg", "deep/er/c.png"):
        write_image(tmp_path / "ood" / name, 7)
    found = ood_set(str(tmp_path / "ood"), 32, 3)
    assert isinstance(found, ImageFiles)
    assert [Path(p).name for p in found.paths] == ["a.png", "b.jpg", "c.png"]
    assert found.labels.tolist() == [-1, -1, -1]


def test_textures(tmp_path: Path) -> None:
    names = ["banded/banded_0002.jpg", "banded/banded_0004.jpg", "zigzagged/zigzagged_0001.jpg"]
    for name in names:
        write_image(tmp_path / "dtd" / "images" / name, 9)
    lists = tmp_path / "dtd" / "labels"
    lists.mkdir()
    (lists / "test1.txt").write_text(f"{names[2]}\n{names[0]}\n")
    (lists / "test2.txt").write_text("banded/banded_0009.jpg\n")
    write_image(lists / "not-a-texture.png", 1)
    assert len(ood_set(f"textures:{tmp_path / 'dtd'}", 32, 3)) == 3
    found = ood_set(f"textures:{tmp_path / 'dtd'}:test1", 32, 3)
    assert isinstance(found, ImageFiles)
    assert [p.split("images/")[1] for p in found.paths] == [names[2], names[0]]
    for spec, message in (
        (
            f"textures:{tmp_path / 'dtd'}:test2",
            r"1 images that .*test2\.txt lists are missing \(.*banded_0009\.jpg",
        ),
        (f"textures:{tmp_path / 'dtd'}:test3", r"test3\.txt cannot be read"),
        (f"textures:{lists}", "has no folder images/"),
    ):
        with pytest.raises(ValueError, match=message):
            ood_set(spec, 32, 3)


def test_svhn(tmp_path: Path) -> None:
    images = RNG.integers(256, size=(5, 32, 32, 3), dtype=np.uint8)
    path = tmp_path / "test_32x32.mat"
    scipy.io.savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": np.ones((5, 1), np.uint8)})
    np.testing.assert_array_equal(pixels_of(ood_set(f"svhn:{path}", 32, 3)), images)
    gray = pixels_of(ood_set(f"svhn:{path}", 28, 1))
    want = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])
    np.testing.assert_array_equal(gray[..., 0], want)
    scipy.io.savemat(tmp_path / "y.mat", {"y": np.ones((5, 1))})
    scipy.io.savemat(tmp_path / "flat.mat", {"X": np.ones((5, 3))})
    (tmp_path / "text.mat").write_text("X")
    for name, message in (
        ("y.mat", "there is no array X in it"),
        ("flat.mat", r"must be \(32, 32, 3, n\) uint8"),
        ("text.mat", r"cannot be read as SVHN's \.mat"),
        ("gone.mat", r"cannot be read as SVHN's \.mat"),
    ):
        with pytest.raises(ValueError, match=message):
            ood_set(f"svhn:{tmp_path / name}", 32, 3)


@pytest.mark.parametrize("kind", ["mnist", "fashion-mnist"])
def test_idx_files(tmp_path: Path, kind: str) -> None:
    images = {name: RNG.integers(256, size=(n, 28, 28), dtype=np.uint8) for name, n in (("train", 4), ("t10k", 3))}
    for name, values in images.items():
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", values)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", np.arange(len(values)))
    found = pixels_of(ood_set(f"{kind}:{tmp_path}", 32, 3))
    np.testing.assert_array_equal(found, np.repeat(images["t10k"][..., None], 3, axis=3))


def test_npy(tmp_path: Path) -> None:
    images = RNG.integers(256, size=(4, 9, 7, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", images)
    np.save(tmp_path / "gray.npy", images[..., 0])
    np.save(tmp_path / "float.npy", images / 255)
    np.testing.assert_array_equal(pixels_of(ood_set(f"npy:{tmp_path / 'a.npy'}", 32, 3)), images)
    assert pixels_of(ood_set(f"npy:{tmp_path / 'gray.npy'}", 32, 1)).shape == (4, 9, 7, 1)
    with pytest.raises(ValueError, match="must hold images .* of uint8, not float64"):
        ood_set(f"npy:{tmp_path / 'float.npy'}", 32, 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["patches", "gaussian", "uniform"])
def test_generated_sets_are_the_same_each_time(kind: str, channels: int) -> None:
    one, two = (pixels_of(ood_set(f"{kind}:50", 16, channels)) for _ in range(2))
    assert one.shape == (50, 16, 16, channels)
    np.testing.assert_array_equal(one, two)
    assert len(np.unique(one.reshape(50, -1), axis=0)) == 50
    assert len(ood_set(kind, 8, channels)) == 1000
    mean, std = one.mean() / 255, one.std() / 255
    if kind == "gaussian":  # clipped at two standard deviations
        assert (mean, std) == (pytest.approx(0.5, abs=0.02), pytest.approx(0.235, abs=0.02))
    elif kind == "uniform":
        assert (mean, std) == (pytest.approx(0.5, abs=0.02), pytest.approx(12**-0.5, abs=0.02))
    else:  # neighbours in a photo are alike
        assert np.corrcoef(one[:, 1:, :, 0].ravel(), one[:, :-1, :, 0].ravel())[0, 1] > 0.8


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("/gone/folder", "the set '/gone/folder' is neither a folder nor one of "),
        ("patches:0", "must end with a whole number of at least 1, not '0'"),
        ("uniform:x", "must end with a whole number"),
        ("svhn", "'svhn' is neither a folder nor one of"),
    ],
)
def test_unknown_specifications_are_rejected(spec: str, message: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        ood_set(spec, 32, 3)
    assert message in str(refusal.value)


def test_names_of_sets() -> None:
    assert parse_named(["a=svhn:x=y.mat", "b=c"], "--ood") == {"a": "svhn:x=y.mat", "b": "c"}
    for bad in ("a", "=b", "a="):
        with pytest.raises(ValueError, match="--ood takes NAME=WHERE"):
            parse_named([bad], "--ood")


VAL = MemoryImages(RNG.integers(256, size=(6, 12, 12, 3), dtype=np.uint8), np.arange(6) % 3)


CLASSES = ("cat", "dog", "emu")


def test_a_folder_of_the_classes(tmp_path: Path) -> None:
    write_image(tmp_path / "sketch" / "emu" / "1.png", 5)
    write_image(tmp_path / "sketch" / "cat" / "1.png", 5)
    found, corruption = shift_set(str(tmp_path / "sketch"), CLASSES, VAL, 3)
    assert corruption is None
    assert found.labels.tolist() == [0, 2]
    write_image(tmp_path / "sketch" / "fox" / "1.png", 5)
    with pytest.raises(ValueError, match="fox has no counterpart among the training classes"):
        shift_set(str(tmp_path / "sketch"), CLASSES, VAL, 3)
    with pytest.raises(ValueError, match=r"'fog' is neither a folder nor cifar-c:FILE\.npy"):
        shift_set("fog", CLASSES, VAL, 3)


def test_cifar_c(tmp_path: Path) -> None:
    images = RNG.integers(256, size=(50, 32, 32, 3), dtype=np.uint8)
    labels = np.tile(np.arange(10) % 3, 5)
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", labels.astype(np.uint8))
    found, _ = shift_set(f"cifar-c:{tmp_path / 'fog.npy'}", CLASSES, VAL, 3)
    assert isinstance(found, MemoryImages)
    np.testing.assert_array_equal(found.pixels, images)
    for severity in range(1, 6):
        found, _ = shift_set(f"cifar-c:{tmp_path / 'fog.npy'}:{severity}", CLASSES, VAL, 3)
        assert isinstance(found, MemoryImages)
        np.testing.assert_array_equal(found.pixels, images[10 * severity - 10 : 10 * severity])
        np.testing.assert_array_equal(found.labels, labels[:10])
        assert found.labels.dtype == np.int64
    for spec, classes, message in (
        ("fog.npy:6", CLASSES, "is 1 to 5, not 6"),
        ("fog.npy", CLASSES[:2], r"labels\.npy must be integers in 0\.\.1, .* from 0 to 2"),
        ("gone.npy", CLASSES, r"cannot be read as \.npy"),
    ):
        with pytest.raises(ValueError, match=message):
            shift_set(f"cifar-c:{tmp_path / spec}", classes, VAL, 3)
    np.save(tmp_path / "labels.npy", labels[:7])
    with pytest.raises(ValueError, match="labels.npy must be a label for each of 50 samples, not of shape"):
        shift_set(f"cifar-c:{tmp_path / 'fog.npy'}", CLASSES, VAL, 3)


def test_built_in_corruptions_by_specification() -> None:
    assert shift_set("jpeg:5", CLASSES, VAL, 3) == (VAL, Corruption("jpeg", 5))
    assert shift_set("blur", CLASSES, VAL, 3, seed=2) == (VAL, Corruption("blur", 3, 2))
    with pytest.raises(ValueError, match="the severity of a corruption is 1 to 5, not 6"):
        shift_set("blur:6", CLASSES, VAL, 3)
    with pytest.raises(ValueError, match="unknown corruption 'rain'; choose from gaussian-noise, blur"):
        Corruption("rain")


@pytest.mark.slow
def test_several_sets_in_one_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.helpers.evaluation import make_run

    run = make_run(tmp_path / "run")  # 10 classes, 16 x 16 grey
    np.save(tmp_path / "fog.npy", RNG.integers(256, size=(25, 32, 32, 3), dtype=np.uint8))
    np.save(tmp_path / "labels.npy", np.tile(np.arange(5), 5))
    write_image(tmp_path / "far" / "x.png", 3)
    args = [
        "--run", str(run), "--mix", "all", "--ood", f"far={tmp_path / 'far'}", "--ood", "patches=patches:30",
        "--shift", f"fog=cifar-c:{tmp_path / 'fog.npy'}:2", "--shift", "bright=brightness:5",
    ]  # fmt: skip
    assert evaluate.main(args) == 0
    from tal_fast.evaluation.report import read_report

    found = read_report(run)
    assert found["ood_names"] == ["noise", "far", "patches"]
    assert found["counts"]["ood"] == {"noise": 1000, "far": 1, "patches": 30}
    assert list(found["settings"])[-5:] == ["shift/fog", "shift/bright", "ood", "new_fd", "shift"]
    assert (found["samples"]["shift/fog"]["n"], found["samples"]["shift/bright"]["n"]) == (5, 200)
    for score in ("cosine", "msp"):
        each = [found["settings"][f"shift/{name}"][score]["aurc"] for name in ("fog", "bright")]
        assert found["settings"]["shift"][score]["aurc"] == pytest.approx(sum(each) / 2)
    printed = capsys.readouterr().out
    assert "Old FD under shift (bright)\n200 ID, " in printed
    assert "Old FD under shift: mean over 2 shifted sets" in printed
    assert evaluate.main(["--run", str(run), "--ood", "noise=uniform"]) == 2
    assert "the data set has an OOD set 'noise' already" in capsys.readouterr().err


def openood(*args: str) -> subprocess.CompletedProcess[str]:
    """Finished run of the script of OpenOOD's benchmarks."""
    script = Path(__file__).parents[2] / "examples" / "openood.sh"
    return subprocess.run([script, *args], capture_output=True, text=True)


@pytest.mark.parametrize(("name", "sizes"), [("cifar10", (2, 4, 1)), ("cifar100", (2, 4, 0)), ("imagenet", (2, 3, 3))])
def test_benchmarks_of_openood(name: str, sizes: tuple[int, int, int], tmp_path: Path) -> None:
    (tmp_path / "benchmark_imglist" / name).mkdir(parents=True)
    lines = openood(name, str(tmp_path), "full").stdout.splitlines()
    assert tuple(
        sum(line.startswith(begin) for line in lines) for begin in ("--ood near/", "--ood far/", "--shift ")
    ) == (sizes)
    assert openood(name, str(tmp_path)).stdout.splitlines() == lines[: sizes[0] + sizes[1]]
    for line in lines:
        one, _, spec = line.split()[1].partition("=")
        images = "largescale" if name == "imagenet" and one != "far/textures" else "classic"
        file = f"{tmp_path}/benchmark_imglist/{name}/test_{one.rpartition('/')[2]}.txt"
        assert spec == f"list:{tmp_path}/images_{images}:{file}"
    assert "name the folder that OpenOOD downloads" in openood(name, str(tmp_path / "no")).stderr
    assert openood("cifar", str(tmp_path)).returncode == 2


@pytest.mark.slow
def test_a_benchmark_of_openood_in_one_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.helpers.evaluation import make_run, read_json

    run = make_run(tmp_path / "run")
    lists = tmp_path / "openood" / "benchmark_imglist" / "cifar10"
    lists.mkdir(parents=True)
    sets = ("cifar100", "tin", "mnist", "svhn", "texture", "places365", "cifar10c")
    for i, one in enumerate(sets):
        folder = tmp_path / "openood" / "images_classic" / one
        folder.mkdir(parents=True)
        for j in range(5):
            pixels = RNG.integers(0, 40 * (i + 1), (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{j}.png")
        (lists / f"test_{one}.txt").write_text("".join(f"{one}/{j}.png {j}\n" for j in range(5)))
    args = ["--run", str(run), "--mix", "all,full-spectrum", "--bootstrap", "20"]
    args += [*openood("cifar10", str(tmp_path / "openood"), "full").stdout.split(), "--scores", "msp", "cosine"]
    args += ["--metrics", "naurc", "risk@coverage=0.8", "ds=msp+cosine"]
    assert evaluate.main(args) == 0
    assert "New FD: mean over 4 far OOD sets" in capsys.readouterr().out
    report = read_json(run)
    assert report["samples"]["new_fd/near/tin"]["id"] == report["counts"]["id"] + 5
    each = [report["settings"][f"ood/{name}"]["msp"]["auroc"] for name in ("near/cifar100", "near/tin")]
    assert report["settings"]["ood/near"]["msp"]["auroc"] == pytest.approx(np.mean(each))
    assert len(report["further"]["new_fd/far/mnist"]["cosine"]["risk@coverage=0.8"]) == 3
    assert "ds_aurc_binned" in report["further"]["new_fd/far/mnist"]["msp+cosine"]
    assert "mean over 2 near OOD sets" in (run / "report.html").read_text()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("spec", ["npy:{}", "svhn:{}"])
def test_a_pipe_is_no_set(spec: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "images")
    with pytest.raises(ValueError, match="images is a pipe or a device, which may have no end"):
        ood_set(spec.format(tmp_path / "images"), 8, 3)


def test_listed_images(tmp_path: Path) -> None:
    for name in ("a b.png", "deep/c.png"):
        write_image(tmp_path / name, 7)
    (tmp_path / "list.txt").write_text("a b.png 1\ndeep/c.png 0\n\n")
    spec = f"list:{tmp_path}:{tmp_path / 'list.txt'}"
    found, corruption = shift_set(spec, ["x", "y"], VAL, 3)
    assert isinstance(found, ImageFiles)
    assert [Path(path).name for path in found.paths] == ["a b.png", "c.png"]
    assert (found.labels.tolist(), found.sizes.tolist(), corruption) == ([1, 0], [[20, 30]] * 2, None)
    assert ood_set(spec, 32, 3).labels.tolist() == [-1, -1]
    with pytest.raises(ValueError, match=r"labels in 0\.\.0; it has others"):
        shift_set(spec, ["x"], VAL, 3)
    (tmp_path / "list.txt").write_text("gone.png 0\na b.png 0\n")
    with pytest.raises(ValueError, match=r"1 images that .*list\.txt lists are missing .*gone\.png"):
        ood_set(spec, 32, 3)
    with pytest.raises(ValueError, match=r"give list:FOLDER:FILE\.txt"):
        ood_set(f"list:{tmp_path}:{tmp_path / 'no.txt'}", 32, 3)


@pytest.mark.parametrize(
    ("kind", "unpacked", "folders"),
    [
        ("imagenet-v2", "imagenetv2-matched-frequency-format-val", ["0", "2"]),
        ("imagenet-a", "imagenet-a", ["n01443537", "n01498041"]),
        ("imagenet-c", "blur", ["n01443537", "n01498041"]),
        ("imagenet-o", "imagenet-o", ["n01443537", "n03544143"]),
    ],
)
def test_named_sets(
    kind: str, unpacked: str, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, number in zip(folders, (1, 2), strict=True):
        for i in range(number):
            write_image(tmp_path / "data" / unpacked / folder / f"{i}.jpg", 7)
    classes = ["n01443537", "n01484850", "n01498041"]

    def read(folder: Path) -> Any:
        return (
            ood_set(f"{kind}:{folder}", 32, 3)
            if kind == "imagenet-o"
            else shift_set(f"{kind}:{folder}", classes, VAL, 3)[0]
        )

    with pytest.raises(ValueError, match=rf"holds 3 images but {kind} has {ood.NAMED[kind][1]:,}; unpack it again"):
        read(tmp_path / "data" / unpacked)
    monkeypatch.setitem(ood.NAMED, kind, (ood.NAMED[kind][0], 3))
    places = [tmp_path / "data" / unpacked] + [tmp_path / "data"] * (kind != "imagenet-c")
    for place in places:  # the folder itself or the one above
        assert read(place).labels.tolist() == ([-1] * 3 if kind == "imagenet-o" else [0, 2, 2])
    with pytest.raises(ValueError, match=r"has no class folders; name the folder of .*/CLASS/\*, 3 images"):
        read(tmp_path)


def test_cifar_10_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, number in (("v4", 5), ("v6", 4)):
        np.save(tmp_path / f"cifar10.1_{version}_data.npy", RNG.integers(0, 256, (number, 32, 32, 3), dtype=np.uint8))
        np.save(tmp_path / f"cifar10.1_{version}_labels.npy", np.arange(number, dtype=np.int32))
    with pytest.raises(ValueError, match="holds 4 images but v6 has 2000"):
        shift_set(f"cifar10.1:{tmp_path}", list("abcdefghij"), VAL, 3)
    monkeypatch.setattr(ood, "CIFAR_10_1", {"v4": 5, "v6": 4})
    for end, number in (("", 4), (":v6", 4), (":v4", 5)):
        found, _ = shift_set(f"cifar10.1:{tmp_path}{end}", list("abcdefghij"), VAL, 3)
        assert found.labels.tolist() == list(range(number))
    with pytest.raises(ValueError, match="the classes, not int32 from 0 to 3"):
        shift_set(f"cifar10.1:{tmp_path}", ["a", "b"], VAL, 3)
