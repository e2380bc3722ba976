"""The backends that run on this machine, as pytest parameters."""

from __future__ import annotations

import pytest
import torch

from tal_fast.loss import _extension
from tal_fast.loss.backends import triton_problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEEDS_EXTENSION = pytest.mark.skipif(not _extension.load()[0], reason=f"C++ extension: {_extension.load()[1]}")
NEEDS_TRITON = pytest.mark.skipif(triton_problem(DEVICE) is not None, reason=f"Triton: {triton_problem(DEVICE)}")
BACKENDS = [
    "reference",
    pytest.param("native", marks=NEEDS_EXTENSION),
    pytest.param("triton", marks=NEEDS_TRITON),
]
VARIANTS = ["paper", "released"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def device_of(backend: str) -> torch.device:
    return DEVICE if backend == "triton" else torch.device("cpu")
