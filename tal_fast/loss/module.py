"""TAL loss as a module that keeps its queue."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tal_fast.loss import collectives, dispatch
from tal_fast.loss.backends import cpp
from tal_fast.loss.functional import StepResult, step_in_parts
from tal_fast.loss.options import LossOptions, check_class_weight, check_inputs, whole_number
from tal_fast.loss.queue import FeatureQueue
from tal_fast.loss.reference import TALStats
from tal_fast.loss.watch import QueueWatch


class TALLoss(nn.Module):
    """Typicalness-aware learning loss (Liu et al., NeurIPS 2024).

    Cross-entropy on unit-length logits, scaled by a temperature that falls with how typical the sample's features are
    of past correctly classified samples, mixed with plain cross-entropy by the same typicalness. The confidence of the
    trained model is the cosine score, ``tal_fast.scores.cosine``. ``tal_fast.loss.reference`` has the formulas.

    The queue of past samples is part of the ``state_dict`` and is filled in training mode only. No step waits for a
    GPU. The module works under autocast, ``torch.compile(fullgraph=True)``, DDP, deepcopy and pickle.

    Args:
        variant: ``"paper"`` weights each sample's two losses by its own typicalness; ``"released"``, as the authors'
            code, averages both over the batch first and weights them by the mean typicalness.
        queue_size: Number of past samples kept. The authors' code has 880,880 for ImageNet and 30,000 for CIFAR-100.
        t_min, t_max: Temperatures of the most and of the least typical sample of a batch; 0 < t_min <= t_max. The
            defaults, and that of t_wrong, are the paper's, for 100 and 1,000 classes, so that its results can be
            repeated. For about ten classes 5, 20 and t_wrong=10 do better (docs/results.md); the gradient, which grows
            with the temperature, is then half as large at first.
        t_wrong: Temperature of misclassified samples; None gives them that of their typicalness.
        confidence_threshold: Cosine confidence in [-1, 1] above which a correct sample enters the queue. None is the
            variant's own: -1 for ``"paper"``, every correct sample, and 0 for ``"released"``.
        ignore_index: Label of the rows that have no loss and no part in any statistic.
        label_smoothing: ε in [0, 1], in both cross-entropies.
        queue_scope: ``"local"``: each rank of a distributed run has its own queue and batch statistics, as in the
            authors' code. ``"global"``: all ranks share one queue and act as one rank with the whole batch; each must
            then have the same number of rows (fill up with ``ignore_index``).
        process_group: Ranks of ``"global"``; the default group if None.
        class_group: Ranks that share each row's classes (tensor parallelism, or more classes than one device holds).
            ``logits`` are then this rank's columns (B, C_r), C_r >= 0, in rank order, and labels and features are the
            same on all ranks. Loss, statistics and queue are equal on all ranks; the gradient is that of this rank's
            columns. With ``"global"``, ``process_group`` must be the ranks that hold the same columns of other rows.
        inplace: Whether the gradient may take the logits' memory, which saves a (B, C) tensor. The logits are lost, so
            use nothing but the loss and its statistics afterwards (accuracy is the mean of ``stats.correct``); a
            backward pass through anything autograd has saved of them raises. The logits must be contiguous bfloat16,
            float32 or float64, and no leaf with a gradient. No effect in plain PyTorch, under ``torch.compile`` and
            with ``class_group``.
        backend: ``"auto"``, ``"reference"``, ``"native"`` or ``"triton"``; see ``tal_fast.loss.dispatch``.
        reduction: ``"mean"`` over the rows that are not ignored; ``"sum"``; or ``"none"``, a loss for each row, 0 where
            ignored. ``"mean"`` alone is rescaled between the ranks of ``"global"``.
        class_weight: (C,) floating point, finite, >= 0, or None: factors of the row losses by label, in both
            cross-entropies as in ``F.cross_entropy``: ``"mean"`` divides by their sum over the batch (and is NaN where
            that is 0), and label smoothing weights each class by its own. Typicalness, temperature and queue do not
            depend on them. They are an option, not state: moved with the module, but neither cast by ``half()`` and the
            like nor in the ``state_dict``. With ``class_group`` they are those of all classes, on every rank.

    Attributes:
        queue: ``FeatureQueue`` of past samples.
        watch: warns once, by a RuntimeWarning, when logits and features look swapped, when most correct samples stay
            out of the queue or when it has stood still for 500 training steps; None to be silent. Inactive under
            ``torch.compile``.

    Raises:
        ValueError: If an option is out of its range.
        TypeError: If ``class_weight`` is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> from tal_fast import TALLoss
        >>> head, loss_fn = torch.nn.Linear(64, 10), TALLoss(queue_size=1000)
        >>> features, labels = torch.rand(32, 64), torch.randint(10, (32,))
        >>> loss, stats = loss_fn(head(features), features, labels, return_stats=True)
        >>> loss.backward()
        >>> head.weight.grad.shape
        torch.Size([10, 64])
        >>> len(loss_fn.queue) == stats.accepted.sum()
        tensor(True)
    """

    def __init__(
        self,
        variant: Literal["paper", "released"] = "paper",
        queue_size: int = 20000,
        t_min: float = 10.0,
        t_max: float = 100.0,
        t_wrong: float | None = 20.0,
        confidence_threshold: float | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        queue_scope: Literal["local", "global"] = "local",
        process_group: dist.ProcessGroup | None = None,
        class_group: dist.ProcessGroup | None = None,
        inplace: bool = False,
        backend: Literal["auto", "reference", "native", "triton"] = "auto",
        reduction: Literal["mean", "sum", "none"] = "mean",
        class_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.options = LossOptions(
            variant, float(t_min), float(t_max), None if t_wrong is None else float(t_wrong), confidence_threshold,
            ignore_index, float(label_smoothing), bool(inplace), reduction,
        )  # fmt: skip
        if queue_scope not in ("local", "global"):
            raise ValueError(f"queue_scope is {queue_scope!r}; use 'local' or 'global'")
        if class_group is not None and queue_scope == "global" and process_group is None:
            raise ValueError(
                "queue_scope='global' beside class_group needs process_group, "
                "the ranks that hold the same classes of other rows"
            )
        self.queue_scope = queue_scope
        self.class_group = class_group
        self.process_group = process_group
        self.backend = dispatch.check_name(backend)
        self.queue = FeatureQueue(whole_number("queue_size", queue_size), backend=backend)
        self.watch: QueueWatch | None = QueueWatch()
        self.class_weight: Tensor | None
        weight = None if class_weight is None else check_class_weight(class_weight)
        self.register_buffer("class_weight", weight, persistent=False)

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> TALLoss:
        weight = self.class_weight
        super()._apply(fn, *args, **kwargs)
        if weight is not None:  # moved, but neither rounded by half() nor emptied by to_empty()
            assert self.class_weight is not None
            self.class_weight = weight.to(self.class_weight.device)
        return self

    def reset_parameters(self) -> None:
        """Empty the queue, whatever its memory holds."""
        self.queue.reset_parameters()

    def extra_repr(self) -> str:
        weights = "" if self.class_weight is None else f", class_weight of {len(self.class_weight)} classes"
        return f"{self.options}, queue_scope={self.queue_scope!r}, backend={self.backend!r}{weights}"

    # The type of the result depends on ``return_stats``.
    @overload
    def forward(
        self, logits: Tensor, features: Tensor, labels: Tensor, *, warmup: bool = ..., push: bool = ...,
        return_stats: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, logits: Tensor, features: Tensor, labels: Tensor, *, warmup: bool = ..., push: bool = ...,
        return_stats: Literal[True],
    ) -> tuple[Tensor, TALStats]: ...  # fmt: skip

    def forward(
        self,
        logits: Tensor,
        features: Tensor,
        labels: Tensor,
        *,
        warmup: bool = False,
        push: bool = True,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, TALStats]:
        """Loss of a batch.

        Args:
            logits: (B, C) float64, float32, bfloat16 or float16, C >= 1, any strides.
            features: (B, D) floating point, D >= 2: the input of the last Linear layer. No gradient flows to it.
            labels: (B,) int64 in [0, C), or ``ignore_index``.
            warmup: Whether the typicalness of every sample is 1, while the queue fills (the first 5% of the epochs).
            push: Whether the accepted samples enter the queue afterwards; they never do in ``eval()`` mode.
            return_stats: Whether to return the per-sample statistics too.

        Returns:
            loss: Scalar, or (B,) for reduction ``"none"``, in float32 (float64 for float64 logits).
            stats: ``TALStats`` with (B,) fields, if ``return_stats``.

        Raises:
            ValueError: If shapes do not fit, D < 2, devices differ, or a label is out of range; labels are checked on
                CPUs, and on GPUs if the environment has TAL_FAST_DEBUG=1.
            TypeError: If labels are not int64, or logits or features are not floating point.
        """
        if self._runs_in_one_call(logits):
            loss, stats = self._in_one_call(logits, features, labels, warmup, push, direct=False)
        else:
            result = self._in_parts(logits, features, labels, warmup, push, direct=False)
            loss, stats = result.loss, result.stats
        self._look(stats, push, None if self.class_group is not None else (logits, features, labels))
        return (loss, stats) if return_stats else loss

    def loss_and_gradient(
        self, logits: Tensor, features: Tensor, labels: Tensor, *, warmup: bool = False, push: bool = True
    ) -> tuple[Tensor, Tensor, TALStats]:
        """Loss of a batch and its gradient with respect to the logits, without autograd.

        ``logits.backward(gradient)`` continues through the network; the gradients are those of ``forward`` and
        ``loss.backward()``. Forward hooks of this module are not called. Use ``forward``, which pushes once, in parts
        that activation checkpointing computes twice. Under ``torch.compile`` this is part of the graph, except in
        plain PyTorch, which breaks it.

        Args:
            logits, features, labels, warmup, push: As in ``forward``; no gradient is recorded.

        Returns:
            loss: As in ``forward``, without a graph.
            gradient: (B, C) in the logits' dtype, and in their memory with ``inplace``; float32 for float16 logits, to
                be multiplied by a gradient scaler's factor before ``backward`` casts it (``scaler.scale(gradient)``).
                For reduction ``"none"`` row i is the gradient of loss i.
            stats: ``TALStats`` with (B,) fields.

        Raises:
            ValueError, TypeError: As in ``forward``.
            RuntimeError: In plain PyTorch in inference mode, which switches autograd off.
        """
        if self._runs_in_one_call(logits):
            loss, gradient, stats = self._in_one_call(logits, features, labels, warmup, push, direct=True)
            self._look(stats, push)
            return loss, gradient, stats
        result = self._in_parts(logits, features, labels, warmup, push, direct=True)
        assert result.gradient is not None
        self._look(result.stats, push)
        return result.loss, result.gradient, result.stats

    def _look(self, stats: TALStats, push: bool, inputs: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
        if not torch.compiler.is_compiling() and self.watch is not None and push and self.training:
            queue: FeatureQueue = self._modules["queue"]  # type: ignore[assignment]
            self.watch.step(stats, queue, self.options, inputs)

    def _acts_as_one(self) -> bool:
        """Whether several ranks act as one with the whole batch."""
        distributed = self.queue_scope == "global" and dist.is_available() and dist.is_initialized()
        return distributed and dist.get_world_size(self.process_group) > 1

    def _runs_in_one_call(self, logits: Tensor) -> bool:
        return (
            not self._acts_as_one()
            and self.class_group is None
            and dispatch.runs_in_one_call(self.backend, logits, self.options)
        )

    def _in_one_call(
        self, logits: Tensor, features: Tensor, labels: Tensor, warmup: bool, push: bool, *, direct: bool
    ) -> tuple[Any, ...]:
        """Step in one call of the C++ extension, whose work in small batches is as short as a few Python calls."""
        queue: FeatureQueue = self._modules["queue"]  # type: ignore[assignment]  # self.queue runs Python code
        queue.flush()
        try:
            return cpp.step(
                logits, features, labels, queue.ring, self.options, warmup, self._buffers["class_weight"],
                push and self.training, direct,
            )  # fmt: skip
        except Exception:
            try:
                self._check(logits, features, labels)
            except (TypeError, ValueError) as clearer:
                raise clearer from None
            raise

    def _in_parts(
        self, logits: Tensor, features: Tensor, labels: Tensor, warmup: bool, push: bool, *, direct: bool
    ) -> StepResult:
        """Step from the backend's parts; ``direct`` as in ``step_in_parts``."""
        self._check(logits, features, labels)
        step = partial(step_in_parts, logits, features, labels, class_group=self.class_group, direct=direct)
        return self._around_queue(step, logits.device, len(labels), warmup, push)

    def _around_queue(
        self, step: Callable[..., StepResult], device: torch.device, rows: int, warmup: bool, push: bool
    ) -> StepResult:
        """A step of ``rows`` rows between what precedes it and the push after it."""
        self.queue.flush()
        ring, group = self.queue.ring, self.process_group
        backend = dispatch.for_device(self.backend, device)
        combine = None
        if self._acts_as_one():
            combine = partial(collectives.combine_summaries, rows=rows, group=group)
        result = step(
            ring, self.options, backend=backend, warmup=warmup, class_weight=self.class_weight, combine=combine
        )
        if push and self.training:
            entries = result.mean, result.std, result.stats.accepted  # without a graph
            if combine is None:
                backend.push(ring, *entries)
            else:  # the entries travel during the backward pass, since only the next step needs them
                wait = collectives.gather_entries(*entries, group)
                self.queue.push_later(lambda: backend.push(ring, *wait()))
        return result

    def _check(self, logits: Tensor, features: Tensor, labels: Tensor) -> None:
        sharded = self.class_group is not None
        check_inputs(logits, features, labels, self.options.ignore_index, sharded, self.class_weight)
        if self.queue.device != logits.device:
            move = f".{'to_empty(device=' if self.queue.device.type == 'meta' else 'to('}{str(logits.device)!r})"
            raise ValueError(
                f"the queue is on {self.queue.device} but the logits are on {logits.device}; move the loss with {move}"
            )
