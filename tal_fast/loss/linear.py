"""TAL fused with the last Linear layer, whose logits exist for a chunk of rows at a time.

For each chunk: one matrix product gives its logits Z = X Wᵀ + b; their loss is computed and their gradient g written
over them; two more products give g W, the chunk's part of the features' gradient, and gᵀ X, which adds to the weight's
in float32. The temperature of variant ``paper`` needs of other rows only their features; ``released`` needs every row's
arg-max, and so the logits twice: in a first round for the batch's sums, in a second for the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from math import ceil
from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from tal_fast.loss import dispatch
from tal_fast.loss.autograd import attach_gradient, refuse_transforms, scaled, wants_gradient
from tal_fast.loss.backends import Backend, KernelBackend, LossInputs
from tal_fast.loss.functional import StepResult, step_in_parts
from tal_fast.loss.module import TALLoss
from tal_fast.loss.options import LossOptions, check_class_weight, check_inputs
from tal_fast.loss.reference import TALStats, compute_dtype, weights_for
from tal_fast.loss.ring import RingBuffer

CHUNK_ROWS = 1024
"""Most rows of a chunk, each of which reads the weight and its gradient once more. At C = 131,072 and D = 512, on one
core with AVX-512, the three products take 1.06 times as long in chunks of 256 rows as whole, 1.52 in those of 64."""

CHUNK_BYTES = 256 << 20
"""Memory of a chunk; where that is less than a ninth of the rows, a ninth: with the rest, 1/8 of all logits."""

CAST_CLASSES = 4096
"""Classes whose gradient is cast at a time where no product of half-precision factors adds to float32."""


class TALLinearLoss(TALLoss):
    """Typicalness-aware learning loss and the last Linear layer in one, for class counts whose logits fill the memory.

    The loss, its gradients and the queue are those of ``TALLoss`` of ``F.linear(features, weight, bias)``, to rounding,
    without a (B, C) tensor: at most 256 MB of logits, or a ninth of the batch's, exist at a time. The gradients are
    computed in the forward pass. In half precision the weight's is summed in float32 and rounded once. The matrix
    products of variant ``released`` are four instead of three. In plain PyTorch (``backend="reference"``) it is
    ``F.linear`` and ``TALLoss``, logits and all.

    Args:
        Those of ``TALLoss``, whose ``state_dict`` is the same. ``class_group`` must be None and ``reduction`` not
        ``"none"``; ``inplace`` does nothing.

    Raises:
        ValueError: If an option is out of its range.

    Examples:
        >>> import torch
        >>> from tal_fast import TALLinearLoss
        >>> head, loss_fn = torch.nn.Linear(64, 1000), TALLinearLoss(queue_size=1000)
        >>> features, labels = torch.rand(32, 64, requires_grad=True), torch.randint(1000, (32,))
        >>> loss = loss_fn(features, head.weight, head.bias, labels)
        >>> loss.backward()
        >>> features.grad.shape, head.weight.grad.shape, head.bias.grad.shape
        (torch.Size([32, 64]), torch.Size([1000, 64]), torch.Size([1000]))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_reduction(self.options)
        if self.class_group is not None:
            raise ValueError("class_group is for logits that a TALLoss is given; leave it None, or use TALLoss")

    # The type of the result depends on ``return_stats``.
    @overload  # type: ignore[override]
    def forward(
        self, features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, warmup: bool = ...,
        push: bool = ..., return_stats: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, warmup: bool = ...,
        push: bool = ..., return_stats: Literal[True],
    ) -> tuple[Tensor, TALStats]: ...  # fmt: skip

    def forward(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        *,
        warmup: bool = False,
        push: bool = True,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, TALStats]:
        """Loss of a batch.

        Args:
            features: (B, D) floating point, D >= 2: the input of the last Linear layer. Their gradient is that through
                the logits; the typicalness passes none.
            weight, bias: (C, D) and (C,) or None: the layer's parameters, in the features' dtype unless autocast is on.
            labels: (B,) int64 in [0, C), or ``ignore_index``.
            warmup, push, return_stats: As in ``TALLoss``.

        Returns:
            loss: Scalar in float32 (float64 for float64 logits).
            stats: ``TALStats`` with (B,) fields, if ``return_stats``.

        Raises:
            ValueError, TypeError: As in ``TALLoss``.
        """
        self._check(_check_layer(features, weight, bias), features, labels)
        step = partial(linear_step, features, weight, bias, labels)
        result = self._around_queue(step, features.device, len(labels), warmup, push)
        self._look(result.stats, push)
        return (result.loss, result.stats) if return_stats else result.loss

    def loss_and_gradient(self, *_: Any, **__: Any) -> NoReturn:
        """Unsupported method of ``TALLoss``; raises NotImplementedError, as ``forward`` computes the gradients."""
        raise NotImplementedError("TALLinearLoss has no gradient of logits to give; call it and use loss.backward()")


def linear_tal_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    queue_mean: Tensor,
    queue_std: Tensor,
    *,
    variant: str = "paper",
    t_min: float = 10.0,
    t_max: float = 100.0,
    t_wrong: float | None = 20.0,
    confidence_threshold: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    class_weight: Tensor | None = None,
    warmup: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, TALStats]:
    """TAL loss of a batch and its last Linear layer, given the queue as tensors; see ``TALLinearLoss``.

    Args:
        features, weight, bias, labels: As in ``TALLinearLoss.forward``.

    The other arguments, results and errors are those of ``tal_loss``.

    Examples:
        >>> import torch
        >>> from tal_fast.functional import linear_tal_loss
        >>> head, features = torch.nn.Linear(64, 1000), torch.rand(32, 64)
        >>> queue_mean, queue_std = torch.rand(500), torch.rand(500)
        >>> labels = torch.randint(1000, (32,))
        >>> loss, stats = linear_tal_loss(features, head.weight, head.bias, labels, queue_mean, queue_std)
        >>> loss.shape, stats.typicalness.shape
        (torch.Size([]), torch.Size([32]))
    """
    options = LossOptions(
        variant, t_min, t_max, t_wrong, confidence_threshold, ignore_index, label_smoothing, reduction=reduction
    )
    _check_reduction(options)
    if class_weight is not None:
        class_weight = check_class_weight(class_weight)
    check_inputs(_check_layer(features, weight, bias), features, labels, ignore_index, class_weight=class_weight)
    result = linear_step(
        features, weight, bias, labels, RingBuffer.of_entries(queue_mean, queue_std, features.device), options,
        backend=dispatch.for_device(dispatch.check_name(backend), features.device),
        warmup=warmup, class_weight=class_weight, combine=None,
    )  # fmt: skip
    return result.loss, result.stats


def linear_step(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ring: RingBuffer,
    options: LossOptions,
    *,
    backend: Backend,
    warmup: bool,
    class_weight: Tensor | None,
    combine: Callable[..., Tensor] | None,
) -> StepResult:
    """TAL step from features and the last layer, without the checks before it and the push after it.

    The arguments are those of ``functional.step_in_parts``.
    """
    if not isinstance(backend, KernelBackend):
        return step_in_parts(
            F.linear(features, weight, bias), features, labels, ring, options,
            backend=backend, warmup=warmup, class_weight=class_weight, class_group=None, combine=combine, direct=False,
        )  # fmt: skip
    layer = [features, weight] if bias is None else [features, weight, bias]
    for tensor in layer:
        refuse_transforms(tensor)
    wanted = [wants_gradient(tensor) for tensor in layer] + [False] * (bias is None)
    with torch.no_grad():
        factors = [tensor.detach().to(_dtype_in_products(tensor)) for tensor in layer]
        class_weight = weights_for(factors[0], class_weight)
        batch = backend.statistics_distance(features, labels, ring, options.ignore_index, class_weight)
        inputs = LossInputs(
            factors[0], labels, batch.distance, batch.summary, batch.tickets, options, warmup, class_weight
        )
        fused = _operators if torch.compiler.is_compiling() else _fused
        loss, gradients, stats = fused(factors, inputs, backend, wanted, combine)
    for tensor, gradient in zip(layer, gradients, strict=False):
        if wants_gradient(tensor):
            kept = torch.float32 if tensor.dtype == torch.float16 else tensor.dtype  # for a gradient scaler's factor
            none = torch.zeros_like(loss)
            loss = loss + attach_gradient(tensor, none, gradient.to(kept), labels, options.ignore_index)
    return StepResult(loss, None, stats, batch.mean, batch.std)


def _check_reduction(options: LossOptions) -> None:
    """Raise ValueError for the losses of single rows, whose gradients do not add up before the backward pass."""
    if options.reduction == "none":
        raise ValueError("reduction is 'none', which a loss fused with its layer has not; use 'mean', 'sum' or TALLoss")


def _check_layer(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Raise ValueError or TypeError unless a Linear layer fits the features; returns (B, C) in place of its logits."""
    layer = {"features": features, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in layer.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(
                f"{name} must be a floating-point tensor, not {found}; pass the layer's input, its weight and its bias"
            )
    if weight.dim() != 2 or features.dim() != 2 or features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"features are {tuple(features.shape)} and the weight {tuple(weight.shape)} but must be (B, D) and (C, D)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)} but must be ({len(weight)},) as the weight's rows, or None")
    for name, tensor in layer.items():
        if tensor.device != features.device:
            raise ValueError(f"features are on {features.device}, {name} on {tensor.device}; move them to one device")
        if _dtype_in_products(tensor) != _dtype_in_products(features):
            raise TypeError(
                f"features are {features.dtype}, {name} {tensor.dtype}; convert one of them, or use autocast"
            )
    return weight.detach().new_empty(()).expand(len(features), len(weight))


def _dtype_in_products(tensor: Tensor) -> torch.dtype:
    """The tensor's dtype in a matrix product: autocast's where it is on, which leaves float64 alone."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


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


def _fused(
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


def _operators(
    factors: list[Tensor], inputs: LossInputs, backend: KernelBackend, wanted: list[bool],
    combine: Callable[..., Tensor] | None,
) -> tuple[Tensor, list[Tensor], TALStats]:  # fmt: skip
    """``_fused`` as operators, which ``torch.compile`` keeps in its graph."""
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
    loss, gradients, stats = _fused(factors, *_inputs_of(factors, *arguments), wanted, None, summed)
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
