"""Triton kernels of the TAL step: statistics and nearest distance, loss and gradient, push.

=====================  ================================================================================
``typicalness.py``     features -> mean, std, distance, the batch's smallest and largest distance
``loss.py``            logits -> loss and gradient; for variant ``released`` the batch's sums first
``sharded.py``         the same where ranks hold some columns of each row: three passes
``ring.py``            the accepted rows into the ring
``launch.py``          grids, constants: what a launch is made of
``ops.py``             the same as torch operators, for torch.compile
``compile_check.py``   compiles every kernel for GPUs that are not here, and fails on spilled registers
=====================  ================================================================================

The functions here take the launcher in eager mode and the operator under torch.compile. On CPU tensors they run in
Triton's interpreter (TRITON_INTERPRET=1, set before Triton is imported), which is for tests.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

__all__ = ["batch_sums", "is_available", "loss_forward", "nearest", "push", "scale", "statistics_distance"]


def is_available(device: torch.device) -> tuple[bool, str]:
    """Whether the kernels run on this device, and why not."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return False, f"triton cannot be imported ({error})"
    if device.type == "cuda":  # AMD's GPUs too
        return True, ""
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return True, ""
        return False, "CPU tensors need Triton's interpreter (TRITON_INTERPRET=1), which is for tests"
    return False, f"Triton has no backend for {device.type}"


def statistics_distance(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``typicalness.statistics_distance``."""
    from tal_fast.kernels import ops, typicalness

    if torch.compiler.is_compiling():
        return ops.statistics_distance(*args, **kwargs)
    return typicalness.statistics_distance(*args, **kwargs)


def batch_sums(*args: Any, **kwargs: Any) -> None:
    """See ``loss.batch_sums``."""
    from tal_fast.kernels import loss, ops

    if torch.compiler.is_compiling():
        ops.batch_sums(*args, **kwargs)
    else:
        loss.batch_sums(*args, **kwargs)


def loss_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``loss.loss_forward``."""
    from tal_fast.kernels import loss, ops

    if torch.compiler.is_compiling():
        kwargs.pop("inplace", None)  # never asked for there: backends.may_overwrite
        return ops.loss_forward(*args, **kwargs)
    return loss.loss_forward(*args, **kwargs)


def scale(values: Tensor, factor: Tensor) -> None:
    """See ``loss.scale``; in eager mode only."""
    from tal_fast.kernels import loss

    loss.scale(values, factor)


def push(*args: Any) -> None:
    """See ``ring.push``."""
    from tal_fast.kernels import ops, ring

    if torch.compiler.is_compiling():
        ops.push_(*args)
    else:
        ring.push(*args)


def nearest(*args: Any) -> Tensor:
    """See ``typicalness.nearest``."""
    from tal_fast.kernels import ops, typicalness

    return ops.nearest(*args) if torch.compiler.is_compiling() else typicalness.nearest(*args)
