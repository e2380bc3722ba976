"""NumPy type aliases, and array-likes as arrays."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tal_fast.utils.io import refuse_pipe

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Numbers in a block of rows (32 MB of float64), so that a float64 copy of large outputs never exists as a whole.
BLOCK = 1 << 22


def to_numpy(values: Any) -> NDArray[Any]:
    """Array, tensor or list as an array; not copied where possible.

    Tensors of floats narrower than 32 bits become float64, which holds them exactly: NumPy has no bfloat16. Raises
    ValueError for a sparse, quantized, nested or meta tensor, masked values, or a ragged list.
    """
    if not hasattr(values, "detach"):
        if np.ma.is_masked(values):
            raise ValueError("an array has masked values; leave those samples out")
        return np.asarray(values)
    try:
        narrow = values.is_floating_point() and values.element_size() < 4
        plain = values.detach().cpu()
        return (plain.double() if narrow else plain).resolve_conj().resolve_neg().numpy()
    except (TypeError, RuntimeError):
        raise ValueError(
            f"a tensor of {values.dtype} and layout {values.layout} on device {values.device} cannot be read as an "
            "array; convert it to a dense one first"
        ) from None


def total_memory() -> float:
    """Bytes of memory of the machine; infinity where that is unknown."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


class NpzArrays:
    """Arrays of an open ``.npz`` by name, each read when it is asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.names: list[str] = list(file.files)

    def __getitem__(self, name: str) -> NDArray[Any]:
        values = self._file[name]
        if not isinstance(values, np.ndarray):
            raise ValueError(f"{name} is no array")
        return values


@contextlib.contextmanager
def open_npz(path: str | Path) -> Iterator[NpzArrays]:
    """Open an ``.npz`` file.

    Raises OSError if it cannot be opened, and ValueError if it is damaged, holds objects, is no ``.npz``, or is
    larger than the machine's memory; also where an array is read or is missing.
    """
    refuse_pipe(path)
    with Path(path).open("rb") as file:
        try:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            with loaded:
                archive: Any = loaded.zip
                size = sum(member.file_size for member in archive.infolist())
                if size > total_memory():
                    raise ValueError(f"its arrays have {size:,} bytes, more than this machine's memory")
                yield NpzArrays(loaded)
        except Exception as error:  # unzipping and parsing of headers raise errors of many types
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            if "pickle" in reason:  # NumPy's words for objects, and for whatever it does not know
                reason = "it holds objects" if "Object arrays" in reason else "it is no .npz, or damaged"
            raise ValueError(f"{path} cannot be read as .npz ({reason})") from None


def check_dense(tensor: Any, name: str) -> None:
    """Raise a ValueError unless a tensor is dense and of real numbers."""
    if tensor.is_nested or tensor.is_quantized or str(tensor.layout) != "torch.strided":
        raise ValueError(f"{name} must be dense, not nested, quantized or sparse ({tensor.layout}, {tensor.dtype})")
    if tensor.is_complex() or str(tensor.dtype).startswith(("torch.bool", "torch.float4", "torch.bits")):
        raise ValueError(f"{name} must be real numbers, not {tensor.dtype}")


def as_classes(values: Any, classes: int, name: str = "labels", samples: int | None = None) -> Ints:
    """Class labels as an array; raises ValueError unless they are integers in [0, classes), one a sample if given."""
    labels = to_numpy(values)
    if samples is not None and labels.shape != (samples,):
        raise ValueError(f"{name} must be a label for each of {samples} samples, not of shape {labels.shape}")
    if labels.size and (labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= classes):
        found = f" from {labels.min()} to {labels.max()}" if labels.dtype.kind in "biuf" else ""
        raise ValueError(f"{name} must be integers in 0..{classes - 1}, the classes, not {labels.dtype}{found}")
    return labels.astype(np.int64)


def check_matrix_shape(shape: tuple[int, ...], name: str) -> None:
    """Raise a ValueError unless the shape is (n, C) with C >= 1."""
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"{name} must be (n, C) with C >= 1, not of shape {tuple(shape)}")


def as_matrix(values: Any, name: str) -> NDArray[Any]:
    """Matrix (n, C) as an array, not copied where possible; raises ValueError for anything else."""
    matrix = to_numpy(values)
    check_matrix_shape(matrix.shape, name)
    if matrix.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be real numbers, not {matrix.dtype}")
    return matrix


def by_blocks(function: Callable[[Floats], Floats], matrix: NDArray[Any], columns: int = 0) -> Floats:
    """Apply a function to the rows of a matrix, a block of them in float64 at a time.

    Args:
        function: (rows, C) -> (rows,), each row by itself.
        columns: width of the function's intermediate results, where they are wider than the matrix.
    """
    rows = max(1, BLOCK // max(matrix.shape[1], columns))
    parts = [function(matrix[i : i + rows].astype(np.float64, order="C")) for i in range(0, len(matrix), rows)]
    return np.concatenate(parts) if parts else np.zeros(0)
