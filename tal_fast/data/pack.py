"""Packing of a folder of images into WebDataset shards: ``python -m tal_fast.pack FOLDER OUT``.

The same images give the same bytes. An interrupted command goes on after its last whole shard when it is given again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tal_fast.data.headers import EXTENSIONS
from tal_fast.data.image_folder import Found, files_below, files_by_class
from tal_fast.data.shards import CLASSES, INFO, PLAN
from tal_fast.utils.arguments import ArgumentParser, at_least
from tal_fast.utils.io import replacing, write_text
from tal_fast.utils.locks import alone_in
from tal_fast.utils.process import program_name, report_mistake

SHARD_MB = 256
"""Default size of a shard: some thousand photos, few enough files for a million images, quick to download."""


@dataclass(frozen=True)
class Shard:
    """Shard to be written: its name, and path, key and class of each image."""

    name: str
    images: list[tuple[str, str, int | None]]
    size: int  # in bytes, of the images


def pack(folder: Path, output: Path, split: str = "train", shard_mb: float = SHARD_MB) -> list[Shard]:
    """Write shards of a folder's images in a shuffled order, the names of the classes and timm's ``_info.json``.

    Args:
        folder: ``train/CLASS/**`` and ``val/CLASS/**``, or one of the two; or ``CLASS/**``; or images without classes.
        output: folder of the shards, which holds no others.
        split: name of the split of a folder without ``train/`` and ``val/``.
        shard_mb: size of a shard in MB, reached by its last image.

    Raises:
        ValueError: there are no images, or ``output`` holds other shards.
    """
    from tqdm import tqdm

    splits, class_names = _find(folder, split)
    shards: list[Shard] = []
    for name, (root, found) in splits.items():
        shards += _plan(name, root, class_names, found, int(shard_mb * 10**6))
    stamps = [image for _, found in splits.values() for images in found.values() for image in images]
    plan = json.dumps({"sha256": hashlib.sha256(repr((split, shard_mb, stamps)).encode()).hexdigest()})
    output.mkdir(parents=True, exist_ok=True)
    with alone_in(output, f"another command packs into {output}; waiting for it"):
        begun = (output / PLAN).exists() and (output / PLAN).read_text() == plan
        if not begun and ((output / INFO).exists() or any(output.glob("*.tar"))):
            raise ValueError(f"{output} holds other shards; remove them, or name another folder")
        write_text(output / PLAN, plan)
        total = sum(shard.size for shard in shards)
        with tqdm(total=total, desc="packing", unit="B", unit_scale=True, disable=None) as bar:
            for shard in shards:
                if not (output / shard.name).exists():
                    with replacing(output / shard.name) as temporary:
                        _write(temporary, shard)
                bar.update(shard.size)
        if class_names:
            write_text(output / CLASSES, "".join(f"{name}\n" for name in class_names))
        write_text(output / INFO, json.dumps({"splits": _info(shards)}, indent=1) + "\n")
        (output / PLAN).unlink()
    return shards


def _find(folder: Path, split: str) -> tuple[dict[str, tuple[Path, dict[str, Found]]], list[str]]:
    """Folder and images by class, or under ``""``, of each split, and the names of the classes."""
    folder = folder.absolute()
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name one with images")
    names = [name for name in ("train", "val") if (folder / name).is_dir()]
    if names:
        splits = {name: (folder / name, files_by_class(folder, name)) for name in names}
    elif any(path.is_dir() and not path.name.startswith(".") for path in folder.iterdir()):
        splits = {split: (folder, files_by_class(folder.parent, folder.name))}
    else:
        splits = {split: (folder, {"": files_below(folder)})}
    class_names = list(next(iter(splits.values()))[1])
    for root, found in splits.values():
        for name, images in found.items():
            if not images:
                raise ValueError(f"{root / name} holds no images ({', '.join(EXTENSIONS)}); fill or remove it")
            if name not in class_names:
                raise ValueError(f"{root / name} has no counterpart in {folder / 'train'}; rename or remove it")
            if "\n" in name:
                raise ValueError(f"the folder {name!r} has a line break in its name; rename it")
    return splits, [name for name in class_names if name]


def _plan(split: str, root: Path, class_names: list[str], found: dict[str, Found], limit: int) -> Iterator[Shard]:
    """Shards of a split in a fixed random order, which readers need that go through a shard from its start."""
    images: list[tuple[str, str, int | None, int]] = []
    used: set[str] = set()
    for name, files in found.items():
        label = class_names.index(name) if name else None
        for path, size, _ in files:
            folder, base = os.path.split(os.path.relpath(path, root))
            if name and not f"{folder}/".startswith(f"{name}/"):  # ImageNet's validation images
                folder = name
            stem, ending = os.path.splitext(base)
            key = os.path.join(folder, stem.replace(".", "_"))  # readers split a name at its first dot
            while key in used:
                key += f"_{ending[1:].lower()}"
            used.add(key)
            images.append((path, key, label, size))
    order = np.random.default_rng(0).permutation(len(images))
    shard: list[tuple[str, str, int | None]] = []
    number = total = 0
    for position, i in enumerate(order):
        path, key, label_of, size = images[i]
        shard.append((path, key, label_of))
        total += size
        if total >= limit or position == len(order) - 1:
            yield Shard(f"{split}-{number:06d}.tar", shard, total)
            shard, number, total = [], number + 1, 0


def _write(path: Path, shard: Shard) -> None:
    with tarfile.open(path, "w") as archive:
        for source, key, label in shard.images:
            content = Path(source).read_bytes()
            members = [(f"{key}{os.path.splitext(source)[1].lower()}", content)]
            if label is not None:
                members.append((f"{key}.cls", str(label).encode()))
            for name, data in members:
                member = tarfile.TarInfo(name)  # of time 0 and without an owner
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def _info(shards: Sequence[Shard]) -> dict[str, dict[str, Any]]:
    """Splits as timm's reader of WebDataset shards describes them."""
    info = {}
    for name in dict.fromkeys(shard.name.rpartition("-")[0] for shard in shards):
        own = [shard for shard in shards if shard.name.rpartition("-")[0] == name]
        lengths = [len(shard.images) for shard in own]
        info[name] = {
            "name": name, "num_samples": sum(lengths), "filenames": [shard.name for shard in own],
            "shard_lengths": lengths,
        }  # fmt: skip
    return info


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=program_name("pack"),
        description="Pack a folder of images into WebDataset shards, for --data.dataset webdataset.",
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER",
        help="Folder with train/CLASS/* and val/CLASS/*, or with CLASS/*, or of images without classes.",
    )  # fmt: skip
    parser.add_argument("output", type=Path, metavar="OUT", help="Folder of the shards.")
    parser.add_argument(
        "--split", default="train", metavar="NAME",
        help="Name of the shards of a folder without train/ and val/. Default: %(default)s.",
    )  # fmt: skip
    parser.add_argument(
        "--shard-mb", type=at_least(1), default=SHARD_MB, metavar="MB",
        help="Size of a shard in MB. Default: %(default)s.",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 for bad input."""
    options = _parser().parse_args(argv)
    try:
        shards = pack(options.folder, options.output, options.split, options.shard_mb)
    except (ValueError, OSError) as error:
        return report_mistake(error)
    counts = ", ".join(f"{name} {split['num_samples']:,} images" for name, split in _info(shards).items())
    size = sum((options.output / shard.name).stat().st_size for shard in shards) / 10**6
    print(f"wrote {len(shards)} shards of {size:,.1f} MB in all to {options.output}: {counts}")
    print(f"train with --data.dataset webdataset --data-dir {options.output}")
    return 0
