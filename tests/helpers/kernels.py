"""Device, markers and tensors shared by the tests of the Triton kernels.

Without a GPU the kernels run in Triton's interpreter; on a GPU they run compiled.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from tal_fast import kernels
from tal_fast.loss.options import LossOptions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
AVAILABLE, REASON = kernels.is_available(DEVICE)

# The interpreter computes with NumPy, which warns where a test has NaN or infinity on purpose, and of columns beyond a
# row and rows beyond a batch, whose exponentials and quotients are computed and not used.
NAN_WARNINGS = [
    pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
    for what in ("invalid value encountered", "overflow encountered in exp2")
]

LOSS_OPTIONS: dict[str, Any] = {
    **{name: value for name, value in asdict(LossOptions()).items() if name != "inplace"},
    "class_weight": None,
    "warmup": False,
    "need_grad": True,
}
"""Arguments of ``loss_forward`` unless a test changes them."""


def gpu_too(test: Any) -> Any:
    """Add a test to ``pytest -m gpu`` where there is a GPU: it tells much for the seconds that compiling takes."""
    return pytest.mark.gpu(test) if DEVICE.type == "cuda" else test


def new_tickets() -> Tensor:
    return torch.zeros(3, dtype=torch.int32, device=DEVICE)


def on_device(*tensors: Tensor) -> list[Tensor]:
    """The tensors on the device with their strides, which ``Tensor.to`` keeps for dense tensors only."""
    if DEVICE.type == "cpu":
        return list(tensors)
    moved = []
    for t in tensors:
        span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        memory = t.as_strided((span,), (1,)).to(DEVICE) if span else t.to(DEVICE).flatten()
        moved.append(memory.as_strided(t.shape, t.stride()))
    return moved
