"""Brute-force search in a queue."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def brute_force(m: Tensor, s: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Distance of each (m, s) to the nearest (mean, std)."""
    squared = ((m[:, None] - mean) ** 2 + (s[:, None] - std) ** 2).amin(1)
    return torch.from_numpy(np.sqrt(squared.numpy()))  # correctly rounded, which torch.sqrt on the CPU is not always
