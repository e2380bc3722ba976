"""WebDataset shards: tar archives with the files KEY.jpg and KEY.cls of each sample, on disk or at an address.

An archive is read through once for the place of each image, and the result kept in the cache. Shards at an address
(s3://, https://, anything of fsspec) are downloaded to the cache when they are first used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import re
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np

from tal_fast.config.typed import one_line
from tal_fast.data.cache import cache_dir
from tal_fast.data.headers import EXTENSIONS
from tal_fast.data.packed import SPLITS, Packed
from tal_fast.data.walk import report_left_out
from tal_fast.utils.io import replacing, write_text
from tal_fast.utils.locks import alone_in

CLASSES, INFO, PLAN = "classes.txt", "_info.json", ".pack.json"
"""Files beside the shards: the names of the classes, one per line; the shards of each split, as timm writes them; and
what is being packed, until the last shard is written."""

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_DOWNLOADS = 8


class _Sample(NamedTuple):
    name: str  # of the image in the archive
    offset: int
    size: int
    label: int | str | None


class Shards:
    """Shards of a folder or address, by split."""

    def __init__(self, root: str, label_key: str | None = None) -> None:
        self._label_key = label_key
        self.root = root.rstrip("/") if "://" in root else os.path.abspath(os.path.expanduser(root))
        self._remote = "://" in root
        self._fs, self._base = self._asked(lambda: fsspec.core.url_to_fs(self.root))
        if not self._remote and not os.path.exists(self.root):
            raise ValueError(f"data.root {root} does not exist; name a folder of .tar shards, or an address of one")
        if self._text(PLAN) is not None:
            raise ValueError(f"{self.root} is not packed to its end; give the command that packs it again")
        try:
            self._splits: dict[str, Any] = dict(json.loads(self._text(INFO) or "{}").get("splits", {}))
        except (ValueError, AttributeError):
            raise ValueError(f"{self.root}/{INFO} is damaged; copy it again, or remove it") from None

    def class_names(self) -> list[str] | None:
        """Names of the classes in ``classes.txt``; None if there is no such file."""
        text = self._text(CLASSES)
        return None if text is None else text.splitlines()

    def split(self, split: str) -> Packed | None:
        """Images of ``train`` or ``val``; None if it has no shards."""
        for name in SPLITS[split]:
            if shards := self._of_split(name):
                return self._read(f"{self.root} ({name})", shards)
        return None

    def all(self) -> Packed:
        """Images of all shards; labels count for nothing."""
        shards = [self._base] if self._base.lower().endswith(".tar") else self._tars("")
        if not shards:
            raise ValueError(f"{self.root} holds no .tar shards; name their folder, or one of them")
        return self._read(self.root, shards)

    def _of_split(self, name: str) -> list[str]:
        if name in self._splits:
            return [f"{self._base}/{shard}" for shard in self._splits[name]["filenames"]]
        word = re.compile(rf"(?<![a-z]){name}(?![a-z])", re.IGNORECASE)
        return [path for path in self._tars("") if word.search(os.path.basename(path))] or self._tars(name)

    def _tars(self, folder: str) -> list[str]:
        try:
            paths = self._asked(lambda: self._fs.ls(f"{self._base}/{folder}".rstrip("/"), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        compressed = [path for path in paths if path.lower().endswith(_COMPRESSED)]
        if compressed:
            raise ValueError(f"{compressed[0]} is compressed, so that images cannot be read at their place; unpack it")
        return sorted(path for path in paths if re.fullmatch(r"[^.].*\.tar", os.path.basename(path), re.I))

    def _text(self, name: str) -> str | None:
        try:
            return self._asked(lambda: self._fs.cat_file(f"{self._base}/{name}")).decode()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _read(self, where: str, shards: list[str]) -> Packed:
        from tqdm import tqdm

        with ThreadPoolExecutor(_DOWNLOADS) as pool:
            found = pool.map(self._local_index, shards)
            local, samples = zip(*tqdm(found, f"reading {where}", len(shards), leave=False, disable=None), strict=True)
        names, labels, extents = [], [], []
        for number, (shard, found) in enumerate(zip(shards, samples, strict=True)):
            below = shard[len(self._base) :].lstrip("/")
            prefix = "/".join(filter(None, (self.root, below)))
            for sample in found:
                names.append(f"{prefix}/{sample.name}")
                labels.append(sample.label)
                extents.append((number, sample.offset, sample.size))
        if not names:
            raise ValueError(f"{where} holds no images ({', '.join(EXTENSIONS)})")
        return Packed(where, names, labels, list(local), np.array(extents, np.int64))

    def _local_index(self, shard: str) -> tuple[str, list[_Sample]]:
        path = self._local(shard)
        return path, _index(path, self._label_key)

    def _local(self, shard: str) -> str:
        """Path of a shard on this machine, where it is downloaded once."""
        try:
            info = self._asked(lambda: self._fs.info(shard))
        except FileNotFoundError:
            raise ValueError(f"{shard} is missing, though {INFO} lists it; copy it there, or pack again") from None
        if not self._remote:
            return shard
        version = [str(info.get(key)) for key in ("size", "ETag", "etag", "LastModified", "mtime", "created")]
        digest = hashlib.sha256("\0".join([self.root, shard, *version]).encode()).hexdigest()[:16]
        path = cache_dir() / "shards" / digest / os.path.basename(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(path.parent, f"another process downloads {shard}; waiting for it"):
            if not path.exists():
                with replacing(path) as temporary:
                    self._asked(lambda: self._fs.get_file(shard, str(temporary)))
                    if info.get("size") not in (None, temporary.stat().st_size):
                        raise ValueError(f"{shard} was not downloaded whole; run the command again")
        return str(path)

    def _asked(self, ask: Any) -> Any:
        """Answer of the file system; a sentence if it cannot be reached."""
        try:
            return ask()
        except ImportError as error:
            raise ValueError(f"{self.root} needs another package ({error}); pip install 'tal-fast[shards]'") from None
        except (FileNotFoundError, NotADirectoryError):
            raise
        except Exception as error:  # each file system has its own errors
            if isinstance(error, OSError) and not self._remote:
                raise
            raise ValueError(
                f"{self.root} cannot be read ({one_line(error) or type(error).__name__}); check the address, the "
                "network and the credentials"
            ) from None


def _index(path: str, label_key: str | None) -> list[_Sample]:
    """Samples of an archive that have an image, from the cache if possible."""
    status = os.stat(path)
    digest = hashlib.sha256(f"{os.path.abspath(path)}\0{status.st_size} {status.st_mtime_ns} {label_key}".encode())
    cached = cache_dir() / "shard-index-1" / f"{digest.hexdigest()[:32]}.json"
    try:
        return [_Sample(*sample) for sample in json.loads(cached.read_text())]
    except (OSError, ValueError, TypeError):  # missing or damaged
        pass
    samples = _scan(path, label_key)
    with contextlib.suppress(OSError):  # a read-only home, a full disk
        write_text(cached, json.dumps(samples))
    return samples


def _scan(path: str, label_key: str | None) -> list[_Sample]:
    """Samples of an archive; raises ValueError if it is damaged or a sample is no classification's."""
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    raise ValueError(f"{path} has a member {member.name!r}, which leads out of it; pack it again")
                folder, _, name = posixpath.normpath(member.name).rpartition("/")
                stem, _, ending = name.partition(".")
                if not member.isreg() or not stem:  # folders, links, hidden files
                    continue
                files = groups.setdefault(f"{folder}/{stem}" if folder else stem, {})
                if files.setdefault(ending.lower(), member) is not member:
                    raise ValueError(f"{path} has {member.name} twice; give every sample a key of its own")
            end = archive.offset
    except tarfile.TarError as error:
        raise ValueError(f"{path} cannot be read as a tar archive ({one_line(error)}); copy it again") from None
    left_out: Counter[str] = Counter()
    samples = []
    with open(path, "rb") as file:
        file.seek(end)
        rest = file.read(1 << 20)
        if len(rest) < tarfile.BLOCKSIZE or any(rest):
            reason = "ends without a tar's end mark" if not rest else f"is damaged, or goes on, at byte {end:,}"
            raise ValueError(f"{path} {reason}; copy it again")
        for key, files in groups.items():
            images = [ending for ending in files if f".{ending}" in EXTENSIONS]
            if len(images) > 1:
                raise ValueError(f"{path} has {len(images)} images of the key {key} ({', '.join(images)}); keep one")
            if not images:
                left_out.update(f".{ending}" for ending in files)
                continue
            image, label = files[images[0]], _label(path, file, files, label_key)
            samples.append(_Sample(posixpath.normpath(image.name), image.offset_data, image.size, label))
    report_left_out(Path(path), left_out)
    return samples


def _label(path: str, file: Any, files: dict[str, tarfile.TarInfo], label_key: str | None) -> int | str | None:
    """Label of a sample: its .cls or another ending, or an entry of its .json."""
    ending = label_key or "cls"
    member, entry = files.get(ending.lower()), None
    if member is None and "json" in files:
        member, entry = files["json"], label_key or "label"
    if member is None:
        return None
    file.seek(member.offset_data)
    text = file.read(member.size).decode("utf-8", errors="replace").strip()
    if entry is None:
        return int(text) if re.fullmatch("-?[0-9]+", text) else text
    try:
        label = json.loads(text).get(entry)
    except (ValueError, AttributeError):
        raise ValueError(f"{path}: {member.name} is no JSON object; pack it again") from None
    if label is not None and type(label) not in (int, str):
        raise ValueError(f"{path}: {entry!r} of {member.name} is {label!r}, but a label is a number or a name")
    return label
