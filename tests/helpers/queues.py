"""Brute-force search in a queue, and comparison with it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def brute_force(m: Tensor, s: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Distance of each (m, s) to the nearest (mean, std)."""
    squared = ((m[:, None] - mean) ** 2 + (s[:, None] - std) ** 2).amin(1)
    return torch.from_numpy(np.sqrt(squared.numpy()))  # correctly rounded, which torch.sqrt on the CPU is not always


def assert_nearest(distance: Tensor, expected: Tensor, backend: str) -> None:
    """Distances of a backend equal those of ``brute_force``: to the bit in C++, elsewhere within rounding."""
    exact = backend == "native" and distance.device.type == "cpu"
    torch.testing.assert_close(distance.cpu(), expected, rtol=0 if exact else 1e-6, atol=0)
