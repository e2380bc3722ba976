"""Loss and gradients of a Linear layer's logits, a chunk of rows at a time, in eager mode and as operators.

For each chunk: one matrix product gives its logits Z = X Wᵀ + b; their loss is computed and their gradient g written
over them; two more products give g W, the chunk's part of the features' gradient, and gᵀ X, which adds to the weight's
in float32. The temperature of variant ``paper`` needs of other rows only their features; ``released`` needs every row's
arg-max, and so the logits twice: in a first round for the batch's sums, in a second for the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import ceil
from typing import Any

import torch
from torch import Tensor

from tal_fast.loss import dispatch
from tal_fast.loss.autograd import scaled
from tal_fast.loss.backends import Backend, KernelBackend, LossInputs
from tal_fast.loss.options import LossOptions
from tal_fast.loss.reference import TALStats, compute_dtype

CHUNK_ROWS = 1024
"""Most rows of a chunk, each of which reads the weight and its gradient once more. At C = 131,072 and D = 512, on one
core with AVX-512, the three products take 1.06 times as long in chunks of 256 rows as whole, 1.52 in those of 64."""

CHUNK_BYTES = 256 << 20
"""Memory of a chunk; where that is less than a ninth of the rows, a ninth: with the rest, 1/8 of all logits."""

CAST_CLASSES = 4096
"""Classes whose gradient is cast at a time where no product of half-precision factors adds to float32."""


def rows_per_chunk(rows: int, classes: int, bytes_each: int) -> int:
    """Rows of a chunk, at least 1, whose logits take ``bytes_each`` with their gradient."""
    most = min(CHUNK_ROWS, max(CHUNK_BYTES // (classes * bytes_each), ceil(rows / 9)))
    return max(1, ceil(rows / ceil(rows / most))) if rows else 1


class _Logits:
    """Logits of a batch, a chunk of rows at a time in one piece of memory."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        self.x, self.weight, self.bias = x, weight, bias
        # float16 logits have a float32 gradient beside them, and its float16 copy.
        rows = rows_per_chunk(len(x), len(weight), 8 if x.dtype == torch.float16 else x.element_size())
        self.chunks = [slice(start, min(start + rows, len(x))) for start in range(0, max(1, len(x)), rows)]
        self.memory = x.new_empty(min(rows, len(x)), len(weight))
        self.held: slice | None = None  # the rows whose logits the memory holds

    def of(self, chunk: slice) -> Tensor:
        """Logits (rows, C) of a chunk; whoever overwrites them sets ``held`` to None."""
        logits = self.memory[: chunk.stop - chunk.start]
        if self.held != chunk:
            if self.bias is None:
                torch.mm(self.x[chunk], self.weight.T, out=logits)
            else:
                torch.addmm(self.bias, self.x[chunk], self.weight.T, out=logits)
            self.held = chunk
        return logits


class _Gradients:
    """Gradients by features, weight and bias, summed over chunks; empty where not wanted.

    That by the features is in the dtype of the logits' gradient, the others in float32 (float64 for float64). float16
    factors of products are multiplied by a power of 2, without which small gradients would be lost and large ones
    overflow: the largest of all chunks is then 16 to 32.
    """

    def __init__(self, x: Tensor, weight: Tensor, wanted: list[bool]) -> None:
        self.x, self.weight, self.wanted = x, weight, wanted
        self.half = x.dtype == torch.float16
        wide = compute_dtype(x)
        self.by_x = x.new_empty(x.shape if wanted[0] else (0,), dtype=wide if self.half else x.dtype)
        self.by_weight = x.new_empty(weight.shape if wanted[1] else (0,), dtype=wide)
        self.by_bias = x.new_zeros(weight.shape[:1] if wanted[2] else (0,), dtype=wide)
        self.beta = 0.0  # of the first chunk, before which the weight's gradient is not written
        self.scale = x.new_full((), 2.0**100, dtype=wide)  # of float16 factors and of the weight's gradient

    def add(self, chunk: slice, gradient: Tensor) -> None:
        """Add a chunk's part, from its gradient (rows, C) by the logits, which is lost."""
        by_x, by_weight, by_bias = self.wanted
        if by_bias and gradient.dtype == self.by_bias.dtype:
            self.by_bias.addmv_(gradient.T, gradient.new_ones(len(gradient)))  # in half the time of sum(0) on CPUs
        elif by_bias:
            self.by_bias += gradient.sum(0, dtype=self.by_bias.dtype)
        if self.half and (by_x or by_weight):
            gradient = self._to_half(gradient)
        if by_x and self.half:
            self.by_x[chunk].copy_(torch.mm(gradient, self.weight)).div_(self.scale)
        elif by_x:
            torch.mm(gradient, self.weight, out=self.by_x[chunk])
        if by_weight:
            _add_product(self.by_weight, gradient.T, self.x[chunk], self.beta)
        self.beta = 1.0

    def _to_half(self, gradient: Tensor) -> Tensor:
        """Scaled float16 gradient; what the weight's has so far follows a scale that falls."""
        if not gradient.numel():
            return gradient.half()  # without a largest number
        largest = torch.linalg.vector_norm(gradient, torch.inf)
        own = torch.where(largest.isfinite(), torch.exp2(5 - largest.log2().ceil()), 1.0)
        scale = torch.minimum(own, self.scale)
        if self.wanted[1] and self.beta:
            scaled(self.by_weight, scale / self.scale, self.by_weight.dtype, may_overwrite=True)
        self.scale = scale
        return gradient.mul_(scale).half()

    def finish(self) -> list[Tensor]:
        """The gradients."""
        if self.half:
            self.by_weight.div_(self.scale)
        return [self.by_x, self.by_weight, self.by_bias]


def _add_product(total: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
    """Write beta · total + a b over ``total``, in its dtype even if a and b have half its precision."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif _adds_to_float32(total.device):
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:
        b = b.to(total.dtype)
        for rows, part in zip(total.split(CAST_CLASSES), a.split(CAST_CLASSES), strict=True):
            torch.addmm(rows, part.to(total.dtype), b, beta=beta, out=rows)


@cache
def _adds_to_float32(device: torch.device) -> bool:
    """Whether products of bfloat16 and float16 matrices can be added to float32 ones on this device."""
    total = torch.ones(16, 16, device=device)
    half = total.to(torch.bfloat16)
    try:
        torch.addmm(total, half, half, out_dtype=torch.float32, out=total)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def fused(
    factors: list[Tensor], inputs: LossInputs, backend: KernelBackend, wanted: list[bool],
    combine: Callable[..., Tensor] | None, summed: bool = False,
) -> tuple[Tensor, list[Tensor], TALStats]:  # fmt: skip
    """Loss without a graph, gradients (empty where not wanted), and statistics.

    Args:
        factors: features (B, D), weight (C, D) and perhaps bias (C,), of one dtype.
        inputs: those of the whole batch, without logits.
        wanted: whether the gradients by features, weight and bias are wanted.
        summed: whether the summary is complete.
    """
    logits = _Logits(*factors)
    if not summed:
        if inputs.needs_sums:
            inputs.summary = _whole_summary(logits, inputs, backend)
        if combine is not None:
            inputs.summary = combine(inputs.summary)
    inputs.options = replace(inputs.options, inplace=factors[0].dtype != torch.float16)
    gradients = _Gradients(factors[0], factors[1], wanted)
    losses, rows = [], []
    for chunk in reversed(logits.chunks):  # the first round, if there was one, has left the last chunk's logits
        loss, gradient, stats = backend.forward(_rows(inputs, chunk, logits.of(chunk)), any(wanted))
        losses.append(loss)
        rows.append(stats)
        if any(wanted):
            logits.held = None
            gradients.add(chunk, gradient)
    fields = (torch.cat(parts[::-1]) for parts in zip(*rows, strict=True))
    return torch.stack(losses).sum(), gradients.finish(), TALStats(*fields)


def _whole_summary(logits: _Logits, inputs: LossInputs, backend: Backend) -> Tensor:
    """Summary of the batch with the sums that need logits; they add up over the chunks."""
    assert inputs.summary is not None
    total = inputs.summary.clone()
    total[3:6] = 0
    for chunk in logits.chunks:
        rows = _rows(inputs, chunk, logits.of(chunk))
        total[3:6] += backend.complete_summary(replace(rows, summary=inputs.summary.clone()))[3:6]
    return total


def _rows(inputs: LossInputs, chunk: slice, logits: Tensor) -> LossInputs:
    """A chunk's inputs, with the summary of the batch."""
    return replace(inputs, logits=logits, labels=inputs.labels[chunk], distance=inputs.distance[chunk])


# What torch.compile keeps in its graph.
_INPUTS = (
    "Tensor[] factors, Tensor labels, Tensor distance, Tensor summary, Tensor? tickets, Tensor? class_weight, "
    "str backend, bool warmup, str variant, float t_min, float t_max, float? t_wrong, float confidence_threshold, "
    "int ignore_index, float label_smoothing, bool inplace, str reduction"
)


def operators(
    factors: list[Tensor], inputs: LossInputs, backend: KernelBackend, wanted: list[bool],
    combine: Callable[..., Tensor] | None,
) -> tuple[Tensor, list[Tensor], TALStats]:  # fmt: skip
    """``fused`` as operators, which ``torch.compile`` keeps in its graph."""
    o = inputs.options
    rest = (
        inputs.tickets, inputs.class_weight, backend.name, inputs.warmup, o.variant, o.t_min, o.t_max, o.t_wrong,
        o.confidence_threshold, o.ignore_index, o.label_smoothing, o.inplace, o.reduction,
    )  # fmt: skip
    summary = inputs.summary
    if combine is not None:
        if inputs.needs_sums:
            summary = _linear_sums(factors, inputs.labels, inputs.distance, summary, *rest)
        summary = combine(summary)
    results = _linear_loss(wanted, combine is not None, factors, inputs.labels, inputs.distance, summary, *rest)
    return results[0], results[1:4], TALStats(inputs.distance, *results[4:])


def _inputs_of(
    factors: list[Tensor], labels: Tensor, distance: Tensor, summary: Tensor, tickets: Tensor | None,
    class_weight: Tensor | None, backend: str, warmup: bool, *options: Any,
) -> tuple[LossInputs, KernelBackend]:  # fmt: skip
    own = None if tickets is None else torch.zeros_like(tickets)  # an operator does not write into its arguments
    inputs = LossInputs(factors[0], labels, distance, summary, own, LossOptions(*options), warmup, class_weight)
    return inputs, dispatch.for_device(backend, labels.device)  # type: ignore[return-value]


@torch.library.custom_op("tal_fast::linear_sums", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _linear_sums(factors: list[Tensor], *arguments: Any) -> Tensor:
    return _whole_summary(_Logits(*factors), *_inputs_of(factors, *arguments))


_RESULTS = ", ".join(["Tensor"] * 9)


@torch.library.custom_op(
    "tal_fast::linear_loss", mutates_args=(), schema=f"(bool[] wanted, bool summed, {_INPUTS}) -> ({_RESULTS})"
)
def _linear_loss(wanted: list[bool], summed: bool, factors: list[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    loss, gradients, stats = fused(factors, *_inputs_of(factors, *arguments), wanted, None, summed)
    return (loss, *gradients, *stats[1:])


@_linear_sums.register_fake
def _(factors: list[Tensor], labels: Tensor, distance: Tensor, summary: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(summary)


@_linear_loss.register_fake
def _(wanted: list[bool], summed: bool, factors: list[Tensor], *_: Any) -> tuple[Tensor, ...]:
    x, weight = factors[:2]
    wide, rows = compute_dtype(x), x.shape[:1]
    by_x, by_weight, by_bias = wanted
    gradients = (
        x.new_empty(x.shape if by_x else (0,), dtype=wide if x.dtype == torch.float16 else x.dtype),
        x.new_empty(weight.shape if by_weight else (0,), dtype=wide),
        x.new_empty(weight.shape[:1] if by_bias else (0,), dtype=wide),
    )
    stats = [x.new_empty(rows, dtype=dtype) for dtype in (wide, wide, wide, torch.bool, torch.bool)]
    return (x.new_empty((), dtype=wide), *gradients, *stats)
