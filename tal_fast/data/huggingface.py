"""Hugging Face image data sets: parquet or Arrow files on disk, or a name on the hub.

``datasets`` keeps every data set as Arrow files, which hold the encoded images one after the other, uncompressed. They
are read there, without ``datasets`` in the loader's processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tal_fast.config.typed import one_line
from tal_fast.data.packed import SPLITS, Packed


class HuggingFace:
    """Splits of a data set, by the name of a folder or on the hub."""

    def __init__(self, root: str, label_key: str | None = None) -> None:
        try:
            import datasets
        except ImportError:
            raise ValueError(
                "data sets of Hugging Face need the package datasets; pip install 'tal-fast[huggingface]'"
            ) from None
        self.root, self._label_key = root.rstrip("/"), label_key
        saved = any((Path(root) / name).is_file() for name in ("dataset_dict.json", "state.json"))
        try:
            found: Any = datasets.load_from_disk(root) if saved else datasets.load_dataset(root)
        except Exception as error:  # of many types, for missing and damaged files and without a network
            raise ValueError(
                f"{root} cannot be read as a Hugging Face data set ({one_line(error) or type(error).__name__}); name a "
                "folder of parquet or Arrow files, one that save_to_disk wrote, or a name on the hub"
            ) from None
        self._splits: dict[str, Any] = dict(found) if isinstance(found, dict) else {"train": found}

    def class_names(self) -> list[str] | None:
        """Names of the classes in the data set's description; None if it has none."""
        split = next(iter(self._splits))
        return getattr(self._splits[split].features[self._label_column(split)], "names", None)

    def split(self, split: str) -> Packed | None:
        """Images of ``train`` or ``val``; None if there is no such split."""
        name = next((name for name in SPLITS[split] if name in self._splits), None)
        return None if name is None else self._read(name, self._label_column(name))

    def all(self) -> Packed:
        """Images of ``test`` or validation, or else of the first split; labels count for nothing."""
        names = [name for name in ("test", *SPLITS["val"]) if name in self._splits]
        return self._read((names or list(self._splits))[0], None)

    def _label_column(self, split: str) -> str:
        features, label_key = self._splits[split].features, self._label_key
        if label_key is not None:
            if label_key not in features:
                raise ValueError(f"data.label_key is {label_key!r}, but {self.root} has {', '.join(features)}")
            return label_key
        columns = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
        columns = columns or [name for name in ("label", "labels") if name in features]
        if len(columns) != 1:
            raise ValueError(
                f"{self.root} has {len(columns)} columns of labels among {', '.join(features)}; choose one with "
                "data.label_key"
            )
        return columns[0]

    def _read(self, split: str, label: str | None) -> Packed:
        data = self._splits[split]
        columns = [name for name, feature in data.features.items() if type(feature).__name__ == "Image"]
        where = f"{self.root} ({split})"
        if len(columns) != 1:
            raise ValueError(f"{where} has {len(columns)} columns of images among {', '.join(data.features)}; keep one")
        files = [file["filename"] for file in data.cache_files]
        places = [_places(file, columns[0], where) for file in files]
        extents = np.concatenate([np.insert(found, 0, number, axis=1) for number, found in enumerate(places)])
        if data._indices is not None:  # after select, shuffle or filter
            extents = extents[data._indices.column(0).to_numpy()]
        if len(extents) != len(data):
            raise ValueError(f"{where} has {len(data)} rows and its files {len(extents)}; save it with save_to_disk")
        labels = [None] * len(data) if label is None else data.with_format(None)[label][:]
        names = [f"{self.root}/{split}/{row}" for row in range(len(data))]
        return Packed(where, names, list(labels), files, extents)


def _places(file: str, column: str, where: str) -> np.ndarray:
    """(N, 2) offset and size in bytes of the images in an Arrow file."""
    import pyarrow as pa

    with pa.memory_map(file) as source:
        content = source.read_buffer()
        found = []
        for chunk in pa.ipc.open_stream(content).read_all()[column].chunks:
            images = chunk.field("bytes")
            if chunk.null_count or images.null_count:
                raise ValueError(f"{where} has rows without an image in themselves; save it with the images embedded")
            kind = np.int64 if pa.types.is_large_binary(images.type) else np.int32
            _, offsets, values = images.buffers()
            place = np.frombuffer(offsets, kind)[images.offset : images.offset + len(images) + 1].astype(np.int64)
            place += values.address - content.address
            if not 0 <= place[0] <= place[-1] <= content.size:
                raise ValueError(f"{file} is compressed, so that images cannot be read at their place; save it anew")
            found.append(np.stack([place[:-1], np.diff(place)], axis=1))
    return np.concatenate(found)
