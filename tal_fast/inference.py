"""One pass of a model over a split: logits, features and labels, kept on disk so that no score asks for a second.

A pass is kept as one ``.npz`` per split together with the hash of what it came from: the weights and the data. A file
whose hash is another, or that cannot be read, is computed anew and replaced.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from tal_fast.data.bundle import MemoryImages, Split
from tal_fast.files import replacing


@dataclass(frozen=True)
class Outputs:
    """What a model says about a split, in the order of the samples' indices.

    Attributes:
        logits: (n, C) float32 or float64.
        features: (n, D), the input of the last Linear layer, in the same type; None where unknown.
        labels: (n,) int64; −1 in OOD sets.
    """

    logits: NDArray[Any]
    features: NDArray[Any] | None
    labels: NDArray[np.int64]

    @property
    def right(self) -> NDArray[np.bool_]:
        """(n,) whether the largest logit (the first on ties) is the label's."""
        return np.asarray(self.logits.argmax(axis=1) == self.labels)


def check_finite(outputs: Outputs, name: str) -> None:
    """Refuse NaN and infinity: they have no confidence.

    Raises:
        ValueError: names how many samples and the first of them.
    """
    for what, values in (("logits", outputs.logits), ("features", outputs.features)):
        if values is None:
            continue
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if bad.size:
            raise ValueError(
                f"the {what} of {bad.size} of {len(values)} samples of {name!r} are not finite (the first is sample "
                f"{bad[0]}); training may have diverged: evaluate an earlier checkpoint, or leave these samples out"
            )


def run_model(model: nn.Module, loader: Iterable[Any], device: torch.device | str = "cpu", name: str = "") -> Outputs:
    """Run a model over all batches of a loader.

    Args:
        model: ``model(images)`` returns ``(logits, features)``; put into eval mode here and left in it.
        loader: yields ``(images, labels, indices)``; every index 0..n−1 once, in any order.
        device: where to run.
        name: of the split, for the progress bar (shown on a terminal only) and for errors.

    Returns:
        Outputs ordered by index. Types narrower than float32 are widened to it.

    Raises:
        ValueError: a sample missing or there twice, or outputs that are not finite.
    """
    model.eval().to(device)
    parts: list[tuple[Tensor, ...]] = []
    with torch.inference_mode():
        for images, labels, indices in tqdm(loader, desc=name or "inference", disable=None, leave=False):
            logits, features = (_wide(t) for t in model(images.to(device, non_blocking=True)))
            parts.append((logits, features, labels.cpu().long(), indices.cpu().long()))
    if not parts:
        raise ValueError(f"the split {name!r} has no samples")
    logits, features, labels, indices = (torch.cat(column) for column in zip(*parts, strict=True))
    order = indices.argsort(stable=True)
    if not torch.equal(indices[order], torch.arange(len(indices))):
        raise ValueError(
            f"the loader of {name!r} gave {len(indices)} samples with {len(indices.unique())} different indices "
            f"between {int(indices.min())} and {int(indices.max())}; each of 0..n-1 must come once"
        )
    outputs = Outputs(logits[order].numpy(), features[order].numpy(), labels[order].numpy())
    check_finite(outputs, name)
    return outputs


def _wide(values: Tensor) -> Tensor:
    return values.cpu() if values.dtype == torch.float64 else values.float().cpu()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a model's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def split_hash(split: Split) -> str:
    """SHA-256 of a split: paths, sizes and times of change of image files, or pixels in memory; and the labels.

    Raises:
        ValueError: an image file has gone.
    """
    digest = hashlib.sha256(np.ascontiguousarray(split.labels).tobytes())
    if isinstance(split, MemoryImages):
        digest.update(str(split.pixels.shape).encode())
        digest.update(np.ascontiguousarray(split.pixels).data)
        return digest.hexdigest()
    for path in split.paths:
        try:
            found = os.stat(path)
        except OSError as problem:
            raise ValueError(f"{path} cannot be read ({problem.strerror}); put it back or evaluate again") from None
        digest.update(f"{path}\0{found.st_size} {found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def cache_key(*parts: str) -> str:
    """A hash of what a pass depends on: a weights hash, a description of the data, versions."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def cache_path(folder: str | Path, split: str) -> Path:
    """Where a split's outputs are kept; any name of a split makes a legal file name, and no two the same."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", split)
    return Path(folder) / (f"{plain}.npz" if plain == split else f"{plain}-{cache_key(split)[:8]}.npz")


def save_outputs(path: str | Path, outputs: Outputs, key: str) -> None:
    """Keep outputs under a key; the file is whole or not there."""
    arrays: dict[str, Any] = {"key": np.array(key), "logits": outputs.logits, "labels": outputs.labels}
    if outputs.features is not None:
        arrays["features"] = outputs.features
    with replacing(path) as temporary:
        np.savez(temporary, **arrays)


def load_outputs(path: str | Path, key: str) -> Outputs | None:
    """Outputs kept under this key, or None: not there, of another key, or unreadable."""
    try:
        with np.load(path, allow_pickle=False) as data:
            if str(data["key"]) != key:
                return None
            features = data["features"] if "features" in data.files else None
            return Outputs(data["logits"], features, data["labels"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as problem:
        print(f"note: {path} cannot be read ({problem}); computing it again", file=sys.stderr)
        return None
