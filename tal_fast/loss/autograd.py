"""Gradients that the forward pass has computed, and their place in PyTorch's autograd graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tal_fast.loss._extension import triton_problem
from tal_fast.loss.options import LossOptions
from tal_fast.loss.reference import TALStats

# csrc/step_cpu.cpp has a copy of it: its node of the graph runs without Python.
NO_SECOND_DERIVATIVE = (
    "the gradient of the TAL loss is a constant to autograd, and a second derivative (create_graph=True) "
    "would miss terms; use backend='reference' for it"
)

# As above.
NO_TRANSFORMS = (
    "forward-mode derivatives and torch.func transforms do not reach into the kernels of the TAL loss, nor through "
    "loss_and_gradient; use backend='reference' and the loss itself for them"
)


def refuse_transforms(logits: Tensor) -> None:
    """Raise RuntimeError where forward-mode derivatives or ``torch.func`` transforms of these logits are wanted."""
    if torch.compiler.is_compiling():
        return
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if transformed or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(logits).tangent is not None):
        raise RuntimeError(NO_TRANSFORMS)


def wants_gradient(logits: Tensor) -> bool:
    """Whether a loss of these logits is to be differentiable."""
    return logits.requires_grad and torch.is_grad_enabled()


def attach_gradient(logits: Tensor, loss: Tensor, grad: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """``loss`` with the known gradient ``grad`` (B, C) with respect to ``logits``.

    ``loss`` is a scalar, or (B,) where row i of ``grad`` is the gradient of loss i.
    """
    loss = _AttachGradient.apply(logits, loss, grad)
    # Whatever is computed from an ignored row's loss of 0, its logits have a gradient of 0.
    return loss.masked_fill(labels == ignore_index, 0) if loss.dim() else loss


class _AttachGradient(torch.autograd.Function):
    """Node of the autograd graph for a loss whose gradient the forward kernel has computed."""

    @staticmethod
    def forward(ctx, logits: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        ctx.logits_dtype = logits.dtype
        return loss.detach()  # not a view, which ``loss += ...`` could not change

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        (grad,) = ctx.saved_tensors
        may_overwrite = not torch.compiler.is_compiling() and not _graph_is_kept()
        return scaled(grad, upstream, ctx.logits_dtype, may_overwrite), None, None


def _graph_is_kept() -> bool:
    """Whether the running backward pass leaves its saved tensors to a later one (``retain_graph``)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def scaled(grad: Tensor, upstream: Tensor, dtype: torch.dtype, may_overwrite: bool) -> Tensor:
    """``grad`` times the upstream gradient, a scalar or one number for each row, in the logits' dtype.

    Multiplied before the cast: under a gradient scaler a float16 product keeps what float16 factors lose. A scalar of
    1, which ``loss.backward()`` gives, costs no pass over memory where ``grad`` may be overwritten: it is read here on
    CPUs, and by the kernel on GPUs.
    """
    factor = upstream.to(grad.dtype)
    if not may_overwrite or factor.dim():
        return (grad * (factor[:, None] if factor.dim() else factor)).to(dtype)
    if grad.device.type != "cpu" and triton_problem(grad.device) is None and grad.is_contiguous():
        from tal_fast import kernels

        return kernels.scale(grad, upstream, dtype)
    if grad.device.type != "cpu" or factor.item() != 1:
        grad.mul_(factor)
    return grad.to(dtype)


@torch.compiler.disable
def differentiate(
    loss_of: Callable[[Tensor], tuple[Tensor, TALStats]], logits: Tensor
) -> tuple[Tensor, Tensor, TALStats]:
    """Loss, its gradient with respect to the logits (row i is that of loss i), and its statistics, by autograd.

    float16 logits are converted to float32, so that their gradient is float32. Inference mode is an error.
    """
    if torch.is_inference_mode_enabled() or logits.is_inference():
        raise RuntimeError(
            "loss_and_gradient in plain PyTorch goes through autograd, which inference mode switches off; "
            "use torch.no_grad(), or a backend with kernels"
        )
    leaf = logits.detach()
    leaf = (leaf.float() if leaf.dtype == torch.float16 else leaf).requires_grad_()
    with torch.enable_grad():
        loss, stats = loss_of(leaf)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)  # rows are independent: τ and w are constants
    return loss.detach(), grad, stats


def may_overwrite(logits: Tensor, options: LossOptions) -> bool:
    """Whether to write the gradient over the logits; never under ``torch.compile``, which plans memory itself.

    Raises:
        ValueError: If ``inplace`` is set and the logits' memory cannot hold their gradient.
    """
    if not options.inplace or torch.compiler.is_compiling():
        return False
    if logits.is_leaf and logits.requires_grad:
        raise ValueError("inplace=True would overwrite a leaf's values; pass the logits a layer gave, or inplace=False")
    if logits.dtype == torch.float16:
        raise ValueError(
            "inplace=True would round the gradient to float16 before a gradient scaler multiplies it; "
            "use bfloat16 or inplace=False"
        )
    if not logits.is_contiguous():
        raise ValueError(
            f"inplace=True needs contiguous logits, not strides {logits.stride()}; use .contiguous() or inplace=False"
        )
    return True


def mark_overwritten(logits: Tensor) -> Tensor:
    """Tell autograd that the logits have changed, so that a backward pass through their old values raises."""
    torch.autograd.graph.increment_version(logits)
    return logits
