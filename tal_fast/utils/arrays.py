"""NumPy type aliases, and array-likes as arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Numbers in a block of rows (32 MB of float64), so that a float64 copy of large outputs never exists as a whole.
BLOCK = 1 << 22


def to_numpy(values: Any) -> NDArray[Any]:
    """Array, tensor or list as an array; not copied where possible.

    Tensors of floats narrower than 32 bits become float64, which holds them exactly: NumPy has no bfloat16.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        narrow = values.is_floating_point() and values.element_size() < 4
        return (values.double() if narrow else values).numpy()
    return np.asarray(values)


@contextlib.contextmanager
def open_npz(path: str | Path) -> Iterator[np.lib.npyio.NpzFile]:
    """Open an ``.npz`` file, whose arrays are read when they are asked for.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        ValueError: it is damaged, holds pickled objects or is no ``.npz``; also where an array is read or is missing.
    """
    with Path(path).open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                yield arrays
        except Exception as error:  # unzipping and parsing of headers raise errors of many types
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(f"{path} cannot be read as .npz without pickle ({reason})") from None


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
