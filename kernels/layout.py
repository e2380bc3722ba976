"""How rows of logits are laid out over the threads and programs of a launch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tal_fast.kernels.launch import Target, device_constants, tuned_options

# Indices into the tensor of ``loss_constants``.
T_MIN, T_RANGE, T_WRONG, THRESHOLD, SMOOTHING = (tl.constexpr(i) for i in range(5))


@dataclass(frozen=True)
class LossConfig:
    """Layout of rows of logits over a program."""

    rows: int  # at a time
    chunks: int  # of a row that is held
    width: int  # logits of a row in a chunk
    held: bool  # whether the chunks cover a row
    num_warps: int
    programs: int  # most programs on a multiprocessor
    unroll: int = 1  # chunks in flight, of a row that is not held
    max_registers: int | None = None  # per thread


WIDEST_HELD = 8192  # classes of rows that are held on chip


def loss_config(classes: int, dtype: torch.dtype, v: int, edges: bool, architecture: str = "") -> LossConfig:
    """Layout of rows of ``classes`` logits in vectors of ``v``, with the architecture's tuned options if it has some.

    Rows are held up to 8,192 logits, 32 in a thread, because the fixed work of a row, some 400 instructions in every
    warp, then costs least: on an H200 16,384 rows of 1,000 bfloat16 logits take 29 us with one warp a row, 38 with two.

    Wider rows are read three times, by few warps for the same reason, and so few at once that the second and third
    time they are in the L2 cache (of 50 MB): 528 rows of up to 45 KB, 264 of up to 90 KB. float64 serves checks only.
    """
    block = triton.next_power_of_2(classes)
    if dtype == torch.float64:
        return LossConfig(1, 1, min(block, 256), False, 4, 4)
    tuned = tuned_options(f"loss_{8 * dtype.itemsize}bit", classes, architecture) if v > 1 else {}
    if classes > WIDEST_HELD:
        kilobytes = classes * dtype.itemsize / 1000
        num_warps, programs = (4, 4) if kilobytes <= 45 or v == 1 else (8, 2) if kilobytes <= 90 else (16, 2)
        options = {"num_warps": num_warps, "programs": programs, "unroll": 4 if num_warps < 16 else 1, **tuned}
        return LossConfig(1, 1, 32 * options["num_warps"] * v, False, **options)
    # Of a warp; several float32 rows of few logits would spill.
    tile = 32 * tuned.get("logits", 16 if dtype.itemsize == 4 and block < 512 else 32)
    rows = max(1, min(64, tile // block))
    num_warps = max(1, block // tile)
    width = max(v, min(block, 32 * num_warps * v // rows))
    programs, registers = max(1, 8 // num_warps), None
    if "max_registers" in tuned and not edges:  # which would spill
        registers = tuned["max_registers"]
        programs = max(1, 65_536 // (32 * registers * num_warps))
    return LossConfig(rows, block // width, width, True, num_warps, programs, max_registers=registers)


def vector_of(
    classes: int, itemsize: int, stride: tuple[int, ...], aligned: bool, grad_stride: int | None = None
) -> tuple[int, bool]:
    """Logits in a vector of up to 16 bytes, and whether rows may begin or end within one.

    Args:
        stride: of the logits.
        aligned: whether they begin at a multiple of 16 bytes.
        grad_stride: elements from row to row of the gradient; None without one.
    """
    if stride[1] != 1 or not aligned:
        return 1, False
    widest, strides = 16 // itemsize, {stride[0], stride[0] if grad_stride is None else grad_stride}
    common = math.gcd(widest, classes, *strides)
    if common < widest and classes >= 256 and len(strides) == 1:
        return widest, True
    return common, False


def num_programs_for(turns: int, per_multiprocessor: int, target: Target) -> int:
    """Number of programs; an empty batch needs one, to write its loss."""
    return max(1, min(turns, per_multiprocessor * target.multiprocessors))


def constants_of(classes: int, v: int, edges: bool, config: LossConfig) -> dict[str, Any]:
    """Compile-time constants of the kernels that read rows of logits."""
    return {
        "CLASSES": classes, "ROWS": config.rows, "CHUNKS": config.chunks, "WIDTH": config.width, "V": v,
        "EDGES": edges, "HELD": config.held, "UNROLL": config.unroll,
    }  # fmt: skip


def loss_constants(
    device: torch.device, t_min: float, t_max: float, t_wrong: float | None, threshold: float, smoothing: float
) -> Tensor:
    """User-chosen numbers as a (5,) float64 tensor."""
    return device_constants(device, t_min, t_max - t_min, 0.0 if t_wrong is None else t_wrong, threshold, smoothing)
