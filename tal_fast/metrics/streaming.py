"""Failure-detection metrics over batches, for anyone's loop: ``update``, ``compute``, ``reset``.

    metric = AURC()
    for images, labels in loader:
        logits = model(images)
        metric.update(tal_fast.scores.cosine(logits), logits.argmax(1) == labels)
    print(float(metric.compute()))

Under ``torch.distributed`` every rank updates with its own samples, as many as it has, and ``compute``, which all ranks
must call, gives all of them the metric of the samples of all. The areas depend on the ranking of all samples, so
nothing smaller than the samples themselves can be kept: their confidences and outcomes, as they come.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tal_fast.metrics.failure import Floats, Ints, as_correct, as_scores, check_convention, failure_metrics


class FailureMetrics:
    """All metrics of ``tal_fast.metrics.METRICS``.

    Args:
        convention: see ``tal_fast.metrics``.
        group: of the ranks whose samples belong together; None: all ranks, if ``torch.distributed`` has been started.

    Raises:
        ValueError: an unknown convention.
    """

    def __init__(self, convention: str = "tal_fast", group: dist.ProcessGroup | None = None) -> None:
        self.convention = check_convention(convention)
        self.group = group
        self._confidence: list[Tensor] = []
        self._correct: list[Tensor] = []

    def update(self, confidence: Any, correct: Any) -> None:
        """Add a batch, empty perhaps. Tensors stay on their device until ``compute``: a GPU is not waited for.

        Args:
            confidence: (n,) higher = surer, of any floating or integer type.
            correct: (n,) 0/1 or bool.

        Raises:
            ValueError: not two vectors of the same length. What is in them is checked by ``compute``.
        """
        batch = [torch.as_tensor(values).detach().clone() for values in (confidence, correct)]
        if batch[0].ndim != 1 or batch[0].shape != batch[1].shape:
            shapes = " and ".join(str(tuple(values.shape)) for values in batch)
            raise ValueError(f"confidence and correct must be vectors (n,) of the same length, not of shapes {shapes}")
        self._confidence.append(batch[0])
        self._correct.append(batch[1])

    def reset(self) -> None:
        """Forget all samples."""
        self._confidence.clear()
        self._correct.clear()

    def samples(self) -> tuple[Floats, Ints]:
        """(n,) float64 confidences and (n,) int64 outcomes of all ranks, in the order of ranks and updates.

        Raises:
            ValueError: NaN confidences, or outcomes other than 0 and 1, on any rank; all ranks raise it.
        """
        own = tuple(
            torch.cat([values.cpu().double() for values in batches]) if batches else torch.zeros(0).double()
            for batches in (self._confidence, self._correct)
        )
        parts: list[Any] = [own]
        if dist.is_available() and dist.is_initialized():
            parts = [None] * dist.get_world_size(self.group)
            # Objects, for ranks may hold different numbers and types; once an evaluation that costs nothing.
            dist.all_gather_object(parts, own, self.group)
        # Checked after the exchange, so that no rank is left waiting for one that has refused.
        confidence, correct = (torch.cat(column) for column in zip(*parts, strict=True))
        return as_scores(confidence), as_correct(correct)

    def values(self) -> dict[str, float]:
        """Each metric of the samples of all ranks; NaN where undefined."""
        return failure_metrics(*self.samples(), self.convention)

    def compute(self) -> Any:
        """Metric -> float64 scalar tensor, over the samples of all ranks; NaN where undefined.

        Raises:
            ValueError: see ``samples``.
        """
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self.values().items()}


class _Single(FailureMetrics):
    name: str

    def compute(self) -> Tensor:
        """The metric of the samples of all ranks, a float64 scalar; NaN where undefined.

        Raises:
            ValueError: see ``samples``.
        """
        return torch.tensor(self.values()[self.name], dtype=torch.float64)


class AURC(_Single):
    """Area under the risk-coverage curve (Geifman and El-Yaniv, 2017); arguments as for ``FailureMetrics``."""

    name = "aurc"


class EAURC(_Single):
    """AURC minus the floor for n → ∞ (Geifman et al., 2019); arguments as for ``FailureMetrics``."""

    name = "eaurc"


class AUGRC(_Single):
    """Area under the generalised risk (Traub et al., 2024); arguments as for ``FailureMetrics``."""

    name = "augrc"


class FPR95(_Single):
    """Errors accepted where 95% of the successes are; arguments as for ``FailureMetrics``."""

    name = "fpr95"


class AUROC(_Single):
    """P(a success is surer than an error), ties half; arguments as for ``FailureMetrics``."""

    name = "auroc"
