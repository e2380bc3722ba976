"""Random generators of Python, NumPy and PyTorch: seeding, saving and restoring."""

from __future__ import annotations

import ctypes
import random
from typing import Any

import numpy as np
import torch

# ruff: noqa: NPY002 - the global NumPy generator, which a user's own model may draw from


_numpy: tuple[bytes, list[Any]] = b"", []
"""Bytes of NumPy's generator at the last reading of its state, and that state."""


def seed_all(seed: int) -> None:
    """Seed all random generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """State of all random generators, on the CPU and the current GPU, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": _numpy_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _numpy_state() -> list[Any]:
    """State of NumPy's generator; reading it takes 70 µs, so one that nothing drew from since is not read again."""
    global _numpy
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]  # numpy 1.24 and later
    words = b""
    if isinstance(generator, np.random.MT19937):
        words = ctypes.string_at(generator.ctypes.state_address, 4 * 625)  # 624 words and the position
    before, state = _numpy
    if not words or words != before or state[3]:  # a second Gaussian that is kept is drawn without a trace
        name, keys, position, has_gauss, cached = np.random.get_state()
        # int64 tensor: torch.load(weights_only=True) admits no NumPy array.
        state = [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached]
        _numpy = words, state
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the state that ``rng_state`` returned."""
    global _numpy
    _numpy = b"", []
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
