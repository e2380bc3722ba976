"""Triton kernels of the TAL step.

=====================  =======================================================================================
``distance.py``        features -> mean, standard deviation; distance to the queue, the batch's distance range
``sums.py``            logits -> the batch's sums, which variant ``released`` needs before the loss
``loss.py``            logits -> loss and gradient
``sharded.py``         loss and gradient in three passes, for ranks that hold some of the classes
``rows.py``            rows of logits in these three: reading, scanning, storing
``layout.py``          rows of logits over threads and programs
``queue_push.py``      append the accepted rows to the queue
``launch.py``          plans of launches, kept; tuned options and the properties of a device that they depend on
``tuned/``             launch options that ``bench.tune`` measured on a GPU, a file per architecture
``ops.py``             the launchers as torch operators, for torch.compile
=====================  =======================================================================================

The functions of this module call the launcher in eager mode and the operator under torch.compile. They import Triton
when they are first called. CPU tensors need Triton's interpreter (TRITON_INTERPRET=1, set before Triton is imported),
which is for tests.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import torch
from torch import Tensor

__all__ = ["batch_sums", "is_available", "loss_forward", "nearest", "push", "scale", "statistics_distance"]


def is_available(device: torch.device) -> tuple[bool, str]:
    """Whether the kernels run on a device, and the reason if they do not."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return False, f"triton cannot be imported ({error})"
    if device.type == "cuda":  # includes AMD's GPUs
        return True, ""
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return True, ""
        return False, "CPU tensors need Triton's interpreter (TRITON_INTERPRET=1), which is for tests"
    return False, f"Triton has no backend for {device.type}"


def _module(name: str) -> Any:
    """Module of a launcher; under torch.compile that of the operators."""
    if torch.compiler.is_compiling():
        from tal_fast.kernels import ops

        return ops
    # An import statement takes 0.8 µs each time.
    return sys.modules.get(f"tal_fast.kernels.{name}") or importlib.import_module(f"tal_fast.kernels.{name}")


def statistics_distance(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Feature statistics and distance to the queue; arguments of ``distance.statistics_distance``."""
    return _module("distance").statistics_distance(*args, **kwargs)


def nearest(*args: Any) -> Tensor:
    """Distance to the nearest queue entry; arguments of ``distance.nearest``."""
    return _module("distance").nearest(*args)


def batch_sums(*args: Any, **kwargs: Any) -> None:
    """Complete the summary of a batch; arguments of ``sums.batch_sums``."""
    _module("sums").batch_sums(*args, **kwargs)


def loss_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradient and per-sample statistics; arguments of ``loss.loss_forward``."""
    if torch.compiler.is_compiling():
        kwargs.pop("inplace", None)  # always False there: torch.compile plans memory itself
    return _module("loss").loss_forward(*args, **kwargs)


def scale(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Values times a scalar tensor, in eager mode only; see ``loss.scale``."""
    return _module("loss").scale(values, factor, dtype)


def push(*args: Any) -> None:
    """Append rows to the queue; arguments of ``queue_push.push``."""
    _module("queue_push").push(*args)
