"""Validation: loss, accuracy and failure detection on the validation images."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tal_fast.data.loader import Images, Loader
from tal_fast.methods import Method
from tal_fast.metrics.failure import failure_metrics
from tal_fast.training.runtime import Runtime
from tal_fast.utils.distributed import Ranks

FAILURE_METRICS = ("aurc", "auroc", "fpr95")
"""Metrics of the method's confidence score (setting Old FD) measured after each epoch."""

NOT_VALIDATED = dict.fromkeys(("val_loss", "val_accuracy", *FAILURE_METRICS), math.nan)
"""Validation columns of an epoch that is not validated."""

Batches = Generator[Images, None, None]


@dataclass
class Validator:
    """Validation pass over the images of all ranks."""

    loader: Loader  # this rank's validation images
    batch_size: int  # images of a full batch
    num_classes: int  # of the data; further logits of the network are left out
    method: Method  # whose confidence score is measured
    runtime: Runtime
    ranks: Ranks

    def __post_init__(self) -> None:
        self._predict = torch.compile(_predict) if self.runtime.compile else _predict

    @torch.no_grad()
    def validate(self, network: nn.Module, guard: Callable[[Batches, int], Batches] | None = None) -> dict[str, float]:
        """Validation columns of metrics.csv, the same on every rank; leaves the network in eval mode.

        ``guard`` takes this rank's batches and the largest number of any rank and returns the batches; it may raise.
        """
        self.ranks.broadcast_buffers(network)
        network.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.ranks.device)
        confidences, corrects = [], []
        self.loader.set_epoch(0)
        batches = iter(self.loader)
        if guard is not None:  # rank 0 has the most images
            batches = guard(batches, -(-self.loader.num_samples // (self.ranks.world_size * self.batch_size)))
        with closing(batches):
            for images, labels, _ in batches:
                logits = self._logits(network, images)
                loss = F.cross_entropy(logits, labels, reduction="sum")
                valid = labels >= 0
                correct = logits.argmax(1) == labels
                sums += torch.stack([loss.double(), correct.sum(), valid.sum()])
                confidences.append(torch.where(valid, self.method.confidence(logits), torch.nan))
                corrects.append(correct)
        loss_sum, correct_sum, count = self.ranks.sum(sums).tolist()
        samples = [torch.cat(parts).cpu() if parts else torch.zeros(0) for parts in (confidences, corrects)]
        gathered = self.ranks.gather(samples)
        metrics = self.ranks.on_main(lambda: _failure_metrics(gathered))
        return {"val_loss": loss_sum / count, "val_accuracy": correct_sum / count, **metrics}

    def _logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """(B, C) float32 logits; a short last batch is padded for a compiled network, which would compile anew."""
        rows = len(images)
        if self.runtime.compile and rows < self.batch_size:
            short, images = images, images.new_zeros(self.batch_size, *images.shape[1:])
            images[:rows] = short
        with self.runtime.autocast():
            return self._predict(network, self.runtime.arrange(images))[:rows, : self.num_classes].float()


def _predict(network: nn.Module, images: Tensor) -> Tensor:
    return network(images)[0]


def _failure_metrics(samples: list[list[Tensor]]) -> dict[str, float]:
    """Failure-detection metrics from the (confidences, correct) of each rank."""
    confidence, correct = (torch.cat([rank[i] for rank in samples]).double() for i in (0, 1))
    finite = confidence.isfinite()  # no image, or weights that are no longer finite, which the loss reports
    values = failure_metrics(confidence[finite].numpy(), correct[finite].numpy().astype(bool))
    return {name: values[name] for name in FAILURE_METRICS}
