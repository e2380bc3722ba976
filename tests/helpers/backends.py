"""Backends that run on this machine, as pytest parameters."""

from __future__ import annotations

import pytest
import torch

from tal_fast.loss import _extension

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"
"""Whether the Triton kernels run in Triton's interpreter, whose time grows with the number of rows."""

_USABLE, _WHY = _extension.load()
_PROBLEM = _extension.triton_problem(DEVICE)
NEEDS_EXTENSION = pytest.mark.skipif(not _USABLE, reason=f"C++ extension: {_WHY}")
NEEDS_TRITON = pytest.mark.skipif(_PROBLEM is not None, reason=f"Triton: {_PROBLEM}")
NATIVE = pytest.param("native", marks=NEEDS_EXTENSION)
# Triton's interpreter computes with NumPy, which warns of values that are not finite.
TRITON = pytest.param(
    "triton", marks=[NEEDS_TRITON, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]
)
every_backend = pytest.mark.parametrize("backend", ["reference", NATIVE, TRITON])
kernel_backends = pytest.mark.parametrize("backend", [NATIVE, TRITON])
every_variant = pytest.mark.parametrize("variant", ["paper", "released"])


def device_of(backend: str) -> torch.device:
    return DEVICE if backend == "triton" else torch.device("cpu")
