"""The TAL loss as a module that keeps its queue."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tal_fast.loss import backends
from tal_fast.loss import collectives as distributed
from tal_fast.loss import tensor_parallel as sharded
from tal_fast.loss.backends import LossOptions
from tal_fast.loss.queue import FeatureQueue
from tal_fast.loss.reference import TALStats

Result = TypeVar("Result")

CHECK_LABELS_ON_GPU = os.environ.get("TAL_FAST_DEBUG") == "1"
"""Also check labels on GPUs, which makes every step wait for the device; on CPUs they always are checked."""


class TALLoss(nn.Module):
    """Typicalness-Aware Learning (Liu et al., NeurIPS 2024).

    Cross-entropy on unit-length logits, scaled by a temperature that falls with how typical the sample's features are
    of past well-classified samples, mixed with plain cross-entropy by the same typicalness. The confidence to use at
    inference is the cosine score, ``tal_fast.scores.cosine``.

    The queue of past samples is part of the state (``state_dict``) and is filled in training mode only. Nothing in a
    step waits for a GPU. Works under autocast, ``torch.compile(fullgraph=True)``, DDP, deepcopy and pickle.

    Args:
        variant: ``"paper"`` weights each sample's two losses by its own typicalness; ``"released"`` averages both over
            the batch first and weights them by the mean typicalness, as the authors' code does.
        queue_size: past samples kept; 880,880 for ImageNet and 30,000 for CIFAR-100 in the authors' code.
        t_min, t_max: temperature of the most and of the least typical sample of a batch; 0 < t_min <= t_max.
        t_wrong: temperature of misclassified samples; None leaves them the temperature of their typicalness.
        confidence_threshold: a rightly classified sample enters the queue when its cosine confidence exceeds this.
        ignore_index: rows with this label have no loss and no part in any statistic.
        label_smoothing: ε in [0, 1], in both cross-entropies.
        queue_scope: ``"local"``: every rank of a distributed run has its own queue and batch statistics, as released;
            ``"global"``: all ranks share one queue and act as one rank with the whole batch. Every rank then needs
            the same number of rows (fill up with ``ignore_index``).
        process_group: the ranks of ``"global"``; the default group when None.
        class_group: the ranks that share a row's classes (tensor parallelism, or more classes than one device holds):
            ``logits`` are then this rank's columns (B, C_r), C_r >= 0, in rank order, and labels and features the same
            on all of them. Loss, statistics and queue are equal on all ranks; the gradient is by this rank's columns.
            The ranks of ``"global"`` must then be named: those that hold the same columns of other rows.
        inplace: the gradient may take the logits' memory, which saves a (B, C) tensor: the logits are destroyed, so use
            nothing but the loss and its statistics afterwards (accuracy is ``stats.right``). What autograd had saved
            of them raises in ``backward``. For contiguous logits in bfloat16, float32 or float64 that are not a leaf
            with a gradient; no effect in plain PyTorch, under ``torch.compile`` and with ``class_group``.
        backend: ``"auto"``, ``"reference"``, ``"native"`` or ``"triton"``; see ``tal_fast.loss.backends``.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(
        self,
        variant: Literal["paper", "released"] = "paper",
        queue_size: int = 20000,
        t_min: float = 10.0,
        t_max: float = 100.0,
        t_wrong: float | None = 20.0,
        confidence_threshold: float = 0.0,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        queue_scope: Literal["local", "global"] = "local",
        process_group: dist.ProcessGroup | None = None,
        class_group: dist.ProcessGroup | None = None,
        inplace: bool = False,
        backend: Literal["auto", "reference", "native", "triton"] = "auto",
    ) -> None:
        super().__init__()
        self.options = LossOptions(
            variant,
            float(t_min),
            float(t_max),
            None if t_wrong is None else float(t_wrong),
            float(confidence_threshold),
            int(ignore_index),
            float(label_smoothing),
            bool(inplace),
        )
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
        self.backend = backends.check_name(backend)
        self.queue = FeatureQueue(queue_size, backend=backend)

    def extra_repr(self) -> str:
        return f"{self.options}, queue_scope={self.queue_scope!r}, backend={self.backend!r}"

    @overload
    def forward(
        self,
        logits: Tensor,
        features: Tensor,
        labels: Tensor,
        *,
        warmup: bool = ...,
        push: bool = ...,
        return_stats: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        logits: Tensor,
        features: Tensor,
        labels: Tensor,
        *,
        warmup: bool = ...,
        push: bool = ...,
        return_stats: Literal[True],
    ) -> tuple[Tensor, TALStats]: ...

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
        """The mean loss of a batch.

        Args:
            logits: (B, C) float64, float32, bfloat16 or float16, C >= 1, any strides.
            features: (B, D) floating point, D >= 2: the input of the last Linear layer. No gradient flows to it.
            labels: (B,) int64 in [0, C), or ``ignore_index``.
            warmup: typicalness is 1 for every sample while the queue fills (the first 5% of the epochs).
            push: add the accepted samples to the queue afterwards; never done in ``eval()`` mode.
            return_stats: also return the per-sample ``TALStats``.

        Returns:
            The loss, a scalar in float32 (float64 for float64 logits), or ``(loss, TALStats)``.

        Raises:
            ValueError: shapes that do not fit, D < 2, tensors on different devices, or (on the CPU, and on GPUs with
                TAL_FAST_DEBUG=1) labels out of range.
            TypeError: labels are not int64, or logits or features are not floating point.
        """
        if self._takes_one_call(logits):
            loss, stats = self._in_one_call(backends.NATIVE.step, logits, features, labels, warmup, push)
            return (loss, stats) if return_stats else loss
        loss, _, stats = self._in_parts(logits, features, labels, warmup, push, direct=False)
        return (loss, stats) if return_stats else loss

    def loss_and_gradient(
        self, logits: Tensor, features: Tensor, labels: Tensor, *, warmup: bool = False, push: bool = True
    ) -> tuple[Tensor, Tensor, TALStats]:
        """The mean loss of a batch and its gradient by the logits, for loops that do not differentiate the loss itself.

        The kernels compute both at once, and nothing of this goes through autograd; ``logits.backward(gradient)`` goes
        on through the network, with the gradients of ``forward`` and ``loss.backward()``. Forward hooks of this module
        are not called. In a part that activation checkpointing computes twice use ``forward``, which pushes once. Under
        ``torch.compile`` it is part of the graph, except in plain PyTorch, which leaves it.

        Args:
            logits, features, labels, warmup, push: as in ``forward``; no gradient is recorded.

        Returns:
            The loss, a scalar without a graph; its gradient (B, C), in the logits' dtype and with ``inplace`` in their
            memory; the per-sample ``TALStats``. Of float16 logits the gradient is float32: multiply it by a gradient
            scaler's factor before ``backward`` casts it (``scaler.scale(gradient)``).

        Raises:
            ValueError, TypeError: as ``forward``.
            RuntimeError: in plain PyTorch in inference mode, where autograd cannot compute it.
        """
        if self._takes_one_call(logits):
            return self._in_one_call(backends.NATIVE.step_with_gradient, logits, features, labels, warmup, push)
        loss, gradient, stats = self._in_parts(logits, features, labels, warmup, push, direct=True)
        assert gradient is not None
        return loss, gradient, stats

    def _is_spread(self) -> bool:
        return self.queue_scope == "global" and distributed.is_distributed(self.process_group)

    def _takes_one_call(self, logits: Tensor) -> bool:
        return (
            not self._is_spread() and self.class_group is None and backends.has_step(self.backend, logits, self.options)
        )

    def _in_one_call(
        self, step: Callable[..., Result], logits: Tensor, features: Tensor, labels: Tensor, warmup: bool, push: bool
    ) -> Result:
        queue: FeatureQueue = self._modules["queue"]  # type: ignore[assignment]  # self.queue asks Python code
        queue.settle()
        try:
            return step(logits, features, labels, queue, self.options, warmup, push and self.training)
        except Exception:
            try:
                self._check(logits, features, labels)
            except (TypeError, ValueError) as clearer:
                raise clearer from None
            raise

    def _in_parts(
        self, logits: Tensor, features: Tensor, labels: Tensor, warmup: bool, push: bool, *, direct: bool
    ) -> tuple[Tensor, Tensor | None, TALStats]:
        """The same from the backend's parts: -> loss, the gradient if ``direct``, statistics."""
        self._check(logits, features, labels)
        self.queue.settle()
        options, spread = self.options, self._is_spread()
        backend = backends.for_loss(self.backend, logits.device)
        with torch.no_grad():
            mean, std, distance, batch = backend.statistics_distance(features, labels, self.queue, options.ignore_index)
        gradient: Tensor | None = None
        if self.class_group is not None:
            need_grad = direct or backends.wants_gradient(logits)
            loss, gradient, stats = sharded.loss_and_gradient(
                logits, labels, distance, options, warmup, self.class_group,
                rows_group=self.process_group if spread else None, backend=backend.name,
                check_labels=labels_are_checked(labels), need_grad=need_grad,
            )  # fmt: skip
            if not direct:
                loss = backends.attach_gradient(logits, loss, gradient, need_grad)
        else:
            with torch.no_grad():
                if spread or (options.variant == "released" and batch is not None):
                    batch = backend.summary(logits, labels, distance, batch, self.queue, options)
                if spread:
                    assert batch is not None
                    batch = distributed.combine_summaries(batch, self.process_group)
            arguments = (logits, labels, distance, batch, self.queue, options, warmup)
            if direct:
                loss, gradient, stats = backend.loss_and_gradient(*arguments)
            else:
                loss, stats = backend.loss(*arguments)

        if push and self.training:
            with torch.no_grad():
                accepted = stats.accepted
                if not spread:
                    backend.push(self.queue, mean, std, accepted)
                else:  # nothing needs the entries before the next step: they travel during backward
                    entries = distributed.EntriesOfAll(mean, std, accepted, self.process_group)
                    self.queue.push_later(lambda: backend.push(self.queue, *entries.wait()))
        return loss, gradient, stats

    def _check(self, logits: Tensor, features: Tensor, labels: Tensor) -> None:
        check_inputs(logits, features, labels, self.options.ignore_index, in_columns=self.class_group is not None)
        if self.queue.device != logits.device:
            raise ValueError(
                f"the queue is on {self.queue.device} but the logits are on {logits.device}; "
                f"move the loss with .to({str(logits.device)!r})"
            )


def check_inputs(logits: Tensor, features: Tensor, labels: Tensor, ignore_index: int, in_columns: bool = False) -> None:
    """Refuse what no backend could compute, before anything is computed or pushed; see ``TALLoss.forward``.

    ``in_columns``: the logits are some columns of rows whose width only all ranks know together, so that the labels'
    range is not checked here.
    """
    if logits.dim() != 2 or (logits.shape[1] < 1 and not in_columns):
        raise ValueError(f"logits are {tuple(logits.shape)} but must be (B, C) with C >= 1")
    if features.dim() != 2 or features.shape[0] != logits.shape[0]:
        raise ValueError(
            f"features are {tuple(features.shape)} but must be (B, D) with B = {logits.shape[0]} as the logits"
        )
    if features.shape[1] < 2:
        raise ValueError(
            f"features have {features.shape[1]} dimension but need at least 2 for a standard deviation; "
            "pass the input of the last Linear layer"
        )
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels are {tuple(labels.shape)} but must be ({logits.shape[0]},) as the logits")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels are {labels.dtype} but must be torch.int64 class indices; use labels.long()")
    for name, tensor in (("logits", logits), ("features", features)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} are {tensor.dtype} but must be floating point")
    if not (logits.device == features.device == labels.device):
        raise ValueError(
            f"logits are on {logits.device}, features on {features.device} and labels on {labels.device}; "
            "move them to one device"
        )
    if not in_columns and labels.numel() and labels_are_checked(labels):
        outside = (labels != ignore_index) & ((labels < 0) | (labels >= logits.shape[1]))
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"label {int(labels[row])} in row {row} is outside [0, {logits.shape[1]}); "
                f"give it a class or ignore_index = {ignore_index}"
            )


def labels_are_checked(labels: Tensor) -> bool:
    """Whether to look at the labels' values: not where that waits for a GPU, nor while compiling."""
    return not torch.compiler.is_compiling() and (labels.device.type == "cpu" or CHECK_LABELS_ON_GPU)
