"""Availability of the compiled operators (``csrc/``) and of the Triton kernels, and why they are missing."""

from __future__ import annotations

import hashlib
import os
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

BUILD = "run `pip install --no-build-isolation .` in the source tree, with a C++ compiler such as g++ installed"


@cache
def load() -> tuple[bool, str]:
    """Load the compiled operators once; returns whether they are usable, and one line saying with what or why not."""
    if os.environ.get("TAL_FAST_NO_EXTENSION") == "1":
        return False, "switched off by TAL_FAST_NO_EXTENSION=1"
    files = sorted(Path(__file__).parents[1].glob("_C.*"))
    if not files:
        return False, f"not built; {BUILD}"
    try:
        torch.ops.load_library(str(files[0]))
        isa = torch.ops.tal_fast.cpu_isa()
        step = torch.ops.tal_fast.step_with_gradient.default._schema
        if not any(argument.name == "class_weight" for argument in step.arguments):  # the newest
            raise RuntimeError("it is the build of an older version")
    except (OSError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        return False, f"built, but {files[0].name} does not load ({reason}); {BUILD}"
    _register_fakes()
    return True, f"{isa} kernels"


@cache
def build_digest() -> str | None:
    """First digits of the SHA-256 of the extension's file, which differ between builds; None if it is not usable."""
    files = sorted(Path(__file__).parents[1].glob("_C.*")) if load()[0] else []
    return hashlib.sha256(files[0].read_bytes()).hexdigest()[:8] if files else None


@cache
def warn_if_missing() -> None:
    """Warn once per process if the extension is missing, so that plain PyTorch serves."""
    usable, why = load()
    if not usable:
        warn_of_pytorch(f"tal_fast's C++ extension is {why}")


@cache
def warn_of_pytorch(reason: str) -> None:
    """Warn once per process that plain PyTorch serves."""
    warnings.warn(f"{reason}. Plain PyTorch computes the same loss meanwhile, only slower.", stacklevel=4)


def triton_problem(device: torch.device) -> str | None:
    """Reason why the Triton kernels do not run on this device, or None if they do."""
    try:
        from tal_fast import kernels
    except ImportError as error:
        return f"tal_fast.kernels cannot be imported ({error})"
    usable, why = kernels.is_available(device)
    return None if usable else why


def _register_fakes() -> None:
    """Register what ``torch.compile`` traces with: shapes and dtypes of the operators' results.

    The operators in ``tal_fast.kernels.ops`` have other arguments and results, and register their own.
    """

    @torch.library.register_fake("tal_fast::push_")
    def _(*_: object) -> None:
        return None

    @torch.library.register_fake("tal_fast::nearest")
    def _(queue_mean: Tensor, queue_std: Tensor, cursor: Tensor, mean: Tensor, *_: object) -> Tensor:
        return torch.empty_like(mean, memory_format=torch.contiguous_format)

    @torch.library.register_fake("tal_fast::statistics_distance")
    def _(features: Tensor, labels: Tensor, queue_mean: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, std, distance = (queue_mean.new_empty(features.shape[:1]) for _ in range(3))
        return mean, std, distance, queue_mean.new_empty((7,), dtype=torch.float64)

    @torch.library.register_fake("tal_fast::batch_sums")
    def _(logits: Tensor, labels: Tensor, distance: Tensor, summary: Tensor, *_: object) -> Tensor:
        return torch.empty_like(summary)

    @torch.library.register_fake("tal_fast::loss_forward")
    def _(logits: Tensor, *arguments: object) -> tuple[Tensor, ...]:
        *_, reduction, _, need_grad = arguments
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        rows = logits.shape[:1]
        # float16 would lose small gradients before a gradient scaler multiplies them.
        stored = wide if logits.dtype == torch.float16 else logits.dtype
        grad = logits.new_empty(logits.shape if need_grad else (0,), dtype=stored)
        per_row = [logits.new_empty(rows, dtype=wide) for _ in range(3)]
        flags = [logits.new_empty(rows, dtype=torch.bool) for _ in range(2)]
        return (logits.new_empty(() if reduction else rows, dtype=wide), grad, *per_row, *flags)
