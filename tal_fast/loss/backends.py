"""The three ways to compute TAL, behind one interface.

=============  ==========================================================================  ==================
``reference``  plain PyTorch: the definition                                               any device
``native``     the C++ extension: everything on CPUs, the queue on GPUs                    CPU, CUDA
``triton``     fused Triton kernels                                                        GPUs
=============  ==========================================================================  ==================

``auto`` takes ``triton`` on GPUs and ``native`` on CPUs, and ``reference`` where those are not to be had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tal_fast.loss import _extension, reference
from tal_fast.loss.reference import TALStats

if TYPE_CHECKING:
    from tal_fast.loss.queue import FeatureQueue

NAMES = ("auto", "reference", "native", "triton")


@dataclass(frozen=True)
class LossOptions:
    """What defines a TAL loss, apart from its queue; see ``TALLoss`` for each field."""

    variant: str = "paper"
    t_min: float = 10.0
    t_max: float = 100.0
    t_wrong: float | None = 20.0
    confidence_threshold: float = 0.0
    ignore_index: int = -100
    label_smoothing: float = 0.0
    inplace: bool = False

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "released"):
            raise ValueError(f"variant is {self.variant!r}; use 'paper' or 'released'")
        if not 0 < self.t_min <= self.t_max < float("inf"):
            raise ValueError(
                f"temperatures are t_min={self.t_min}, t_max={self.t_max}; they must satisfy 0 < t_min <= t_max"
            )
        if self.t_wrong is not None and not 0 < self.t_wrong < float("inf"):
            raise ValueError(f"t_wrong is {self.t_wrong}; it must be positive, or None to keep typicalness's own")
        if not -1 <= self.confidence_threshold <= 1:
            raise ValueError(f"confidence_threshold is {self.confidence_threshold}; a cosine lies in [-1, 1]")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must lie in [0, 1]")


class Backend(Protocol):
    """One way to compute a step. Tensors are on one device; ``batch`` is ``reference.batch_summary``."""

    name: str

    def statistics_distance(
        self, features: Tensor, labels: Tensor, queue: FeatureQueue, ignore_index: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """-> mean, std, distance (B,) and the summary, or as much of it as does not need the logits."""

    def summary(
        self, logits: Tensor, labels: Tensor, distance: Tensor, batch: Tensor | None, queue: FeatureQueue,
        options: LossOptions,
    ) -> Tensor:  # fmt: skip
        """-> the whole summary."""

    def loss(
        self, logits: Tensor, labels: Tensor, distance: Tensor, batch: Tensor | None, queue: FeatureQueue,
        options: LossOptions, warmup: bool,
    ) -> tuple[Tensor, TALStats]:  # fmt: skip
        """-> the mean loss, through which a gradient flows to the logits, and the per-sample statistics."""

    def loss_and_gradient(
        self, logits: Tensor, labels: Tensor, distance: Tensor, batch: Tensor | None, queue: FeatureQueue,
        options: LossOptions, warmup: bool,
    ) -> tuple[Tensor, Tensor, TALStats]:  # fmt: skip
        """-> the mean loss without a graph, its gradient by the logits (float32 for float16), and the statistics."""

    def push(self, queue: FeatureQueue, mean: Tensor, std: Tensor, accepted: Tensor | None) -> None: ...

    def nearest(self, queue: FeatureQueue, mean: Tensor, std: Tensor) -> Tensor: ...


class Reference:
    """Plain PyTorch on any device, without waiting for it."""

    name = "reference"

    def statistics_distance(
        self, features: Tensor, labels: Tensor, queue: FeatureQueue, ignore_index: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        mean, std = reference.feature_statistics(features, queue.dtype)
        return mean, std, self.nearest(queue, mean, std), None

    def summary(
        self, logits: Tensor, labels: Tensor, distance: Tensor, batch: Tensor | None, queue: FeatureQueue,
        options: LossOptions,
    ) -> Tensor:  # fmt: skip
        return reference.batch_summary(
            logits,
            labels,
            distance,
            confidence_threshold=options.confidence_threshold,
            ignore_index=options.ignore_index,
        )

    def loss(
        self, logits: Tensor, labels: Tensor, distance: Tensor, batch: Tensor | None, queue: FeatureQueue,
        options: LossOptions, warmup: bool,
    ) -> tuple[Tensor, TALStats]:  # fmt: skip
        return reference.tal_loss(
            logits,
            labels,
            distance,
            variant=options.variant,
            t_min=options.t_min,
            t_max=options.t_max,
            t_wrong=options.t_wrong,
            confidence_threshold=options.confidence_threshold,
            ignore_index=options.ignore_index,
            label_smoothing=options.label_smoothing,
            warmup=warmup,
            batch=batch,
        )

    def loss_and_gradient(
        self, logits: Tensor, labels: Tensor, distance: Tensor, batch: Tensor | None, queue: FeatureQueue,
        options: LossOptions, warmup: bool,
    ) -> tuple[Tensor, Tensor, TALStats]:  # fmt: skip
        return differentiated(lambda z: self.loss(z, labels, distance, batch, queue, options, warmup), logits)

    def push(self, queue: FeatureQueue, mean: Tensor, std: Tensor, accepted: Tensor | None) -> None:
        """Shapes must not depend on the data: kept rows are sorted to the front, and a fixed number of slots is
        rewritten, those beyond the kept rows with what they held."""
        rows, capacity = mean.numel(), queue.capacity
        if rows == 0:
            return
        keep = mean.isfinite() & std.isfinite()
        if accepted is not None:
            keep = keep & accepted
        order = torch.argsort(~keep, stable=True)
        kept = keep.sum()
        head, length = queue.cursor[0], queue.cursor[1]
        skip = (kept - capacity).clamp(min=0)  # of more rows than slots, the oldest never get in
        offset = torch.arange(min(rows, capacity), device=mean.device) + skip
        source = order[offset.clamp(max=rows - 1)]
        slots = (head + offset) % capacity
        for ring, values in ((queue.mean_ring, mean), (queue.std_ring, std)):
            ring[slots] = torch.where(offset < kept, values[source], ring[slots])
        queue.cursor.copy_(torch.stack([(head + kept) % capacity, (length + kept).clamp(max=capacity)]))

    def nearest(self, queue: FeatureQueue, mean: Tensor, std: Tensor) -> Tensor:
        return reference.nearest_distance(mean, std, queue.mean_ring, queue.std_ring, queue.cursor[1])


def _loss_arguments(options: LossOptions, warmup: bool) -> tuple[Any, ...]:
    """What the extension's operators are told of the loss, in their order."""
    return (
        options.variant == "released",
        options.t_min,
        options.t_max,
        options.t_wrong,
        options.confidence_threshold,
        options.label_smoothing,
        options.ignore_index,
        warmup,
    )


def _step_arguments(
    logits: Tensor, features: Tensor, labels: Tensor, queue: FeatureQueue, options: LossOptions, warmup: bool
) -> tuple[Any, ...]:
    rings = queue.mean_ring, queue.std_ring, queue.cursor, queue.index
    return (logits, features, labels, *rings, *_loss_arguments(options, warmup))


class Native:
    """The C++ extension. On GPUs only the queue is in it; the loss is the reference's."""

    name = "native"

    def statistics_distance(
        self, features: Tensor, labels: Tensor, queue: FeatureQueue, ignore_index: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if features.device.type == "cpu":
            return torch.ops.tal_fast.statistics_distance(
                features.detach(), labels, queue.mean_ring, queue.std_ring, queue.cursor, ignore_index, queue.index
            )
        mean, std = reference.feature_statistics(features, queue.dtype)
        return mean, std, self.nearest(queue, mean, std), None

    def summary(
        self, logits: Tensor, labels: Tensor, distance: Tensor, batch: Tensor | None, queue: FeatureQueue,
        options: LossOptions,
    ) -> Tensor:  # fmt: skip
        if batch is None:
            return REFERENCE.summary(logits, labels, distance, batch, queue, options)
        return torch.ops.tal_fast.batch_sums(
            logits.detach(), labels, distance, batch, options.confidence_threshold, options.ignore_index
        )

    def loss(
        self, logits: Tensor, labels: Tensor, distance: Tensor, batch: Tensor | None, queue: FeatureQueue,
        options: LossOptions, warmup: bool,
    ) -> tuple[Tensor, TALStats]:  # fmt: skip
        if logits.device.type != "cpu":
            return REFERENCE.loss(logits, labels, distance, batch, queue, options, warmup)
        need_grad = wants_gradient(logits)
        loss, grad, stats = self._forward(logits, labels, distance, batch, options, warmup, need_grad)
        return attach_gradient(logits, loss, grad, need_grad), stats

    def loss_and_gradient(
        self, logits: Tensor, labels: Tensor, distance: Tensor, batch: Tensor | None, queue: FeatureQueue,
        options: LossOptions, warmup: bool,
    ) -> tuple[Tensor, Tensor, TALStats]:  # fmt: skip
        if logits.device.type != "cpu":
            return REFERENCE.loss_and_gradient(logits, labels, distance, batch, queue, options, warmup)
        return self._forward(logits, labels, distance, batch, options, warmup, need_grad=True)

    def _forward(
        self, logits: Tensor, labels: Tensor, distance: Tensor, batch: Tensor | None, options: LossOptions,
        warmup: bool, need_grad: bool,
    ) -> tuple[Tensor, Tensor, TALStats]:  # fmt: skip
        assert batch is not None
        arguments = (logits.detach(), labels, distance, batch, *_loss_arguments(options, warmup))
        if need_grad and may_overwrite(logits, options):
            loss, *stats = torch.ops.tal_fast.loss_inplace_(*arguments)
            grad = overwritten(arguments[0])
        else:
            loss, grad, *stats = torch.ops.tal_fast.loss_forward(*arguments, need_grad)
        return loss, grad, TALStats(distance, *stats)

    def step(
        self, logits: Tensor, features: Tensor, labels: Tensor, queue: FeatureQueue, options: LossOptions,
        warmup: bool, push: bool,
    ) -> tuple[Tensor, TALStats]:  # fmt: skip
        """Everything in one call, on the CPU: statistics, search, loss, gradient and push. Checks its arguments."""
        loss, *stats = torch.ops.tal_fast.step.default(
            *_step_arguments(logits, features, labels, queue, options, warmup), push
        )
        return loss, TALStats(*stats)

    def step_with_gradient(
        self, logits: Tensor, features: Tensor, labels: Tensor, queue: FeatureQueue, options: LossOptions,
        warmup: bool, push: bool,
    ) -> tuple[Tensor, Tensor, TALStats]:  # fmt: skip
        """The same without a graph: -> the loss, its gradient by the logits, and the per-sample statistics."""
        loss, gradient, *stats = torch.ops.tal_fast.step_with_gradient.default(
            *_step_arguments(logits, features, labels, queue, options, warmup), push
        )
        return loss, gradient, TALStats(*stats)

    def push(self, queue: FeatureQueue, mean: Tensor, std: Tensor, accepted: Tensor | None) -> None:
        torch.ops.tal_fast.push_(queue.mean_ring, queue.std_ring, queue.cursor, mean, std, accepted, queue.index)

    def nearest(self, queue: FeatureQueue, mean: Tensor, std: Tensor) -> Tensor:
        return torch.ops.tal_fast.nearest(queue.mean_ring, queue.std_ring, queue.cursor, mean, std, queue.index)


class Triton:
    """Fused kernels on GPUs; on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1), to test them."""

    name = "triton"

    def statistics_distance(
        self, features: Tensor, labels: Tensor, queue: FeatureQueue, ignore_index: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        from tal_fast import kernels

        return kernels.statistics_distance(
            features.detach(),
            labels,
            queue.mean_ring,
            queue.std_ring,
            queue.cursor,
            queue.ticket,
            ignore_index=ignore_index,
        )

    def summary(
        self, logits: Tensor, labels: Tensor, distance: Tensor, batch: Tensor | None, queue: FeatureQueue,
        options: LossOptions,
    ) -> Tensor:  # fmt: skip
        from tal_fast import kernels

        assert batch is not None
        kernels.batch_sums(
            logits.detach(),
            labels,
            distance,
            batch,
            queue.ticket,
            confidence_threshold=options.confidence_threshold,
            ignore_index=options.ignore_index,
        )
        return batch

    def loss(
        self, logits: Tensor, labels: Tensor, distance: Tensor, batch: Tensor | None, queue: FeatureQueue,
        options: LossOptions, warmup: bool,
    ) -> tuple[Tensor, TALStats]:  # fmt: skip
        need_grad = wants_gradient(logits)
        loss, grad, stats = self._forward(logits, labels, distance, batch, queue, options, warmup, need_grad)
        return attach_gradient(logits, loss, grad, need_grad), stats

    def loss_and_gradient(
        self, logits: Tensor, labels: Tensor, distance: Tensor, batch: Tensor | None, queue: FeatureQueue,
        options: LossOptions, warmup: bool,
    ) -> tuple[Tensor, Tensor, TALStats]:  # fmt: skip
        return self._forward(logits, labels, distance, batch, queue, options, warmup, need_grad=True)

    def _forward(
        self, logits: Tensor, labels: Tensor, distance: Tensor, batch: Tensor | None, queue: FeatureQueue,
        options: LossOptions, warmup: bool, need_grad: bool,
    ) -> tuple[Tensor, Tensor, TALStats]:  # fmt: skip
        from tal_fast import kernels

        assert batch is not None
        inplace = need_grad and may_overwrite(logits, options)
        loss, grad, stats, flags = kernels.loss_forward(
            logits.detach(),
            labels,
            distance,
            batch,
            queue.ticket,
            variant=options.variant,
            t_min=options.t_min,
            t_max=options.t_max,
            t_wrong=options.t_wrong,
            confidence_threshold=options.confidence_threshold,
            label_smoothing=options.label_smoothing,
            ignore_index=options.ignore_index,
            warmup=warmup,
            need_grad=need_grad,
            inplace=inplace,
        )
        grad = overwritten(grad) if inplace else grad
        return loss, grad, TALStats(distance, *stats.unbind(), *flags.unbind())

    def push(self, queue: FeatureQueue, mean: Tensor, std: Tensor, accepted: Tensor | None) -> None:
        from tal_fast import kernels

        kernels.push(queue.mean_ring, queue.std_ring, queue.cursor, mean, std, accepted)

    def nearest(self, queue: FeatureQueue, mean: Tensor, std: Tensor) -> Tensor:
        from tal_fast import kernels

        return kernels.nearest(queue.mean_ring, queue.std_ring, queue.cursor, mean, std)


class _AttachGradient(torch.autograd.Function):
    """Gives a loss whose gradient the forward kernel has already computed its place in the autograd graph."""

    @staticmethod
    def forward(ctx, logits: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        ctx.logits_dtype = logits.dtype
        return loss.detach()  # as no view, which ``loss += ...`` could not change

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the gradient of the TAL loss is a constant to autograd, and a second derivative (create_graph=True) "
                "would miss terms; use backend='reference' for it"
            )
        (grad,) = ctx.saved_tensors
        # Multiplied before the cast: under a gradient scaler a float16 product keeps what float16 factors lose.
        if torch.compiler.is_compiling() or grad.dtype != ctx.logits_dtype or _graph_is_kept():
            return (grad * upstream.to(grad.dtype)).to(ctx.logits_dtype), None, None
        return scaled_(grad, upstream), None, None


def _graph_is_kept() -> bool:
    """Whether the backward pass that is running leaves its saved tensors to a later one (``retain_graph``)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def scaled_(grad: Tensor, upstream: Tensor) -> Tensor:
    """``grad`` times a scalar tensor, in its own memory. A factor of 1, which is what ``loss.backward()`` gives, costs
    no pass over memory: on CPUs it is looked at here, on GPUs by the kernel."""
    if grad.device.type == "cpu":
        return grad if upstream.item() == 1 else grad.mul_(upstream.to(grad.dtype))
    if triton_problem(grad.device) is None and grad.is_contiguous():
        from tal_fast import kernels

        kernels.scale(grad, upstream)
        return grad
    return grad.mul_(upstream.to(grad.dtype))


def wants_gradient(logits: Tensor) -> bool:
    """Whether a loss of these logits is to be differentiable."""
    return logits.requires_grad and torch.is_grad_enabled()


@torch.compiler.disable
def differentiated(
    loss_of: Callable[[Tensor], tuple[Tensor, TALStats]], logits: Tensor
) -> tuple[Tensor, Tensor, TALStats]:
    """A loss, its gradient by the logits and its statistics by autograd. float16 logits are taken as float32, so that
    their gradient is.

    Raises:
        RuntimeError: in inference mode, or of tensors made in it.
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
        (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad, stats


def attach_gradient(logits: Tensor, loss: Tensor, grad: Tensor, need_grad: bool) -> Tensor:
    """The scalar ``loss`` with ``grad`` (B, C) as its gradient with respect to ``logits``, times the upstream one."""
    return _AttachGradient.apply(logits, loss, grad) if need_grad else loss


def may_overwrite(logits: Tensor, options: LossOptions) -> bool:
    """Whether the gradient goes where the logits are. torch.compile plans memory itself and must not see it.

    Raises:
        ValueError: ``inplace`` for logits whose memory cannot hold their gradient.
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


def overwritten(logits: Tensor) -> Tensor:
    """Says so to autograd: what it has saved of these logits raises when it is used."""
    torch.autograd.graph.increment_version(logits)
    return logits


REFERENCE, NATIVE = Reference(), Native()
_BY_NAME: dict[str, Backend] = {b.name: b for b in (REFERENCE, NATIVE, Triton())}


def check_name(name: str) -> str:
    """The name, if it is one of ``NAMES``; ValueError otherwise."""
    if name not in NAMES:
        raise ValueError(f"backend is {name!r}; use one of {', '.join(map(repr, NAMES))}")
    return name


def triton_problem(device: torch.device) -> str | None:
    """Why the Triton kernels do not run on this device; None when they do."""
    try:
        from tal_fast import kernels
    except ImportError as error:
        return f"tal_fast.kernels cannot be imported ({error})"
    usable, why = kernels.is_available(device)
    return None if usable else why


def for_loss(name: str, device: torch.device) -> Backend:
    """The backend that computes the loss on this device.

    Raises:
        ValueError: the backend asked for does not run there.
    """
    return _BY_NAME[_name_for_loss(name, device)]


def has_step(name: str, logits: Tensor, options: LossOptions) -> bool:
    """Whether ``NATIVE.step`` computes this loss in one call. torch.compile takes the parts, which it can trace."""
    if options.inplace or not logits.is_cpu or torch.compiler.is_compiling():
        return False
    return _choose(name, logits.device) == "native"


def for_queue(name: str, device: torch.device) -> Backend:
    """The backend that pushes to and searches a queue used alone: as for the loss, but on GPUs the CUDA kernels
    come before Triton's."""
    return _BY_NAME[_name_for_queue(name, device)]


# torch.compile takes the choice as a constant: a name, since a constant object cannot be guarded.
@torch.compiler.assume_constant_result
def _name_for_loss(name: str, device: torch.device) -> str:
    return _choose(name, device)


@torch.compiler.assume_constant_result
def _name_for_queue(name: str, device: torch.device) -> str:
    return "native" if name == "auto" and _extension.available_for(device) else _choose(name, device)


@cache
def _choose(name: str, device: torch.device) -> str:
    if name == "reference":
        return "reference"
    if name == "native":
        usable, why = _extension.load()
        if not usable:
            raise ValueError(f"backend 'native' needs the C++ extension, which is {why}")
        if not _extension.available_for(device):
            raise ValueError(f"backend 'native' does not run on {device}; use backend='auto'")
        return "native"
    problem = triton_problem(device) if name == "triton" or device.type == "cuda" else "not a GPU"
    if problem is None:
        return "triton"
    if name == "triton":
        raise ValueError(f"backend 'triton' does not run on {device}: {problem}; use backend='auto'")
    if device.type == "cpu" and _extension.load()[0]:
        return "native"
    _extension.warn_if_missing()
    return "reference"


def describe() -> list[str]:
    """Which backends run on this machine, why, and which one ``auto`` takes, one line each."""
    usable, why = _extension.load()
    lines = [f"C++ extension: {'yes' if usable else 'no'}, {why}"]
    for device in [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else []):
        problem = triton_problem(device)
        lines.append(f"Triton kernels on {device.type}: {'yes' if problem is None else f'no, {problem}'}")
        lines.append(f"backend 'auto' on {device.type}: {for_loss('auto', device).name}")
    return lines
