"""Loads the compiled operators (``csrc/``) and says why when it cannot."""

from __future__ import annotations

import os
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


@cache
def load() -> tuple[bool, str]:
    """Load the compiled operators once.

    Returns:
        Whether ``torch.ops.tal_fast`` is usable, and one line saying with what or why not.
    """
    if os.environ.get("TAL_FAST_NO_EXTENSION") == "1":
        return False, "switched off by TAL_FAST_NO_EXTENSION=1"
    files = sorted(Path(__file__).parents[1].glob("_C.*"))
    if not files:
        return False, "not built: reinstall with `pip install --no-build-isolation .` where a C++ compiler is"
    try:
        torch.ops.load_library(str(files[0]))
        isa = torch.ops.tal_fast.cpu_isa()
        _ = torch.ops.tal_fast.step_with_gradient  # the newest: missing from the build of an older version
        cuda = torch.ops.tal_fast.built_with_cuda()
    except (OSError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        return False, f"{files[0].name} does not load ({reason}): reinstall with `pip install --no-build-isolation .`"
    _register_fakes()
    return True, f"{isa} kernels, {'with' if cuda else 'without'} CUDA"


def available_for(device: torch.device) -> bool:
    """Whether the compiled queue operators run on this device."""
    if not load()[0]:
        return False
    return device.type == "cpu" or (device.type == "cuda" and torch.ops.tal_fast.built_with_cuda())


@cache
def warn_if_missing() -> None:
    """One warning per process when everything runs on plain PyTorch because the extension is missing."""
    usable, why = load()
    if not usable:
        warnings.warn(f"tal_fast's C++ extension is {why}. Running on plain PyTorch: exact, but slower.", stacklevel=3)


def _register_fakes() -> None:
    """Shapes and dtypes of the results of the operators that torch.compile sees."""

    @torch.library.register_fake("tal_fast::push_")
    def _(
        queue_mean: Tensor,
        queue_std: Tensor,
        cursor: Tensor,
        mean: Tensor,
        std: Tensor,
        accepted: Tensor | None = None,
        index: Tensor | None = None,
    ) -> None:
        return None

    @torch.library.register_fake("tal_fast::nearest")
    def _(
        queue_mean: Tensor,
        queue_std: Tensor,
        cursor: Tensor,
        mean: Tensor,
        std: Tensor,
        index: Tensor | None = None,
    ) -> Tensor:
        return torch.empty_like(mean, memory_format=torch.contiguous_format)

    @torch.library.register_fake("tal_fast::statistics_distance")
    def _(
        features: Tensor,
        labels: Tensor,
        queue_mean: Tensor,
        queue_std: Tensor,
        cursor: Tensor,
        ignore_index: int,
        index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, std, distance = (queue_mean.new_empty(features.shape[:1]) for _ in range(3))
        return mean, std, distance, queue_mean.new_empty((6,), dtype=torch.float64)

    @torch.library.register_fake("tal_fast::batch_sums")
    def _(
        logits: Tensor,
        labels: Tensor,
        distance: Tensor,
        batch: Tensor,
        confidence_threshold: float,
        ignore_index: int,
    ) -> Tensor:
        return torch.empty_like(batch)

    @torch.library.register_fake("tal_fast::loss_forward")
    def _(
        logits: Tensor,
        labels: Tensor,
        distance: Tensor,
        batch: Tensor,
        released: bool,
        t_min: float,
        t_max: float,
        t_wrong: float | None,
        confidence_threshold: float,
        label_smoothing: float,
        ignore_index: int,
        warmup: bool,
        need_grad: bool,
    ) -> tuple[Tensor, ...]:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        rows = logits.shape[:1]
        # float16 would lose small gradients before a gradient scaler multiplies them: kept in float32.
        stored = wide if logits.dtype == torch.float16 else logits.dtype
        grad = logits.new_empty(logits.shape if need_grad else (0,), dtype=stored)
        per_row = [logits.new_empty(rows, dtype=wide) for _ in range(3)]
        flags = [logits.new_empty(rows, dtype=torch.bool) for _ in range(2)]
        return (logits.new_empty((), dtype=wide), grad, *per_row, *flags)
