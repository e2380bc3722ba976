"""TAL fused with the last Linear layer, whose logits exist for a chunk of rows at a time (linear_chunks.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from tal_fast.loss import dispatch
from tal_fast.loss.autograd import attach_gradient, refuse_transforms, wants_gradient
from tal_fast.loss.backends import Backend, KernelBackend, LossInputs
from tal_fast.loss.functional import StepResult, step_in_parts
from tal_fast.loss.linear_chunks import fused, operators
from tal_fast.loss.module import TALLoss
from tal_fast.loss.options import LossOptions, check_class_weight, check_inputs
from tal_fast.loss.reference import TALStats, weights_for
from tal_fast.loss.ring import RingBuffer


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
        self, features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, warmup: bool = False,
        push: bool = True, return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, TALStats]:  # fmt: skip
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
    features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, queue_mean: Tensor, queue_std: Tensor, *,
    variant: str = "paper", t_min: float = 10.0, t_max: float = 100.0, t_wrong: float | None = 20.0,
    confidence_threshold: float | None = None, ignore_index: int = -100, label_smoothing: float = 0.0,
    reduction: str = "mean", class_weight: Tensor | None = None, warmup: bool = False, backend: str = "auto",
) -> tuple[Tensor, TALStats]:  # fmt: skip
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
    features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ring: RingBuffer, options: LossOptions, *,
    backend: Backend, warmup: bool, class_weight: Tensor | None, combine: Callable[..., Tensor] | None,
) -> StepResult:  # fmt: skip
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
        compute = operators if torch.compiler.is_compiling() else fused
        loss, gradients, stats = compute(factors, inputs, backend, wanted, combine)
    for tensor, gradient in zip(layer, gradients, strict=False):
        if wants_gradient(tensor):
            kept = torch.float32 if tensor.dtype == torch.float16 else tensor.dtype  # for a gradient scaler's factor
            none = torch.zeros_like(loss)
            loss = loss + attach_gradient(tensor, none, gradient.to(kept), labels, options.ignore_index)
    return StepResult(loss, None, stats, batch.mean, batch.std)


def _check_reduction(options: LossOptions) -> None:
    """Raise ValueError for the losses of single rows, whose gradients do not add up before the backward pass."""
    if options.reduction == "none":
        raise ValueError("reduction is 'none', which TALLinearLoss does not have; use 'mean', 'sum' or TALLoss")


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
