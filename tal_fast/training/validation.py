"""Validation: loss, accuracy and failure detection on the validation images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tal_fast.data import Loader
from tal_fast.methods import Method
from tal_fast.metrics.failure import failure_metrics
from tal_fast.training.runtime import Runtime
from tal_fast.utils.distributed import Ranks

FAILURE_METRICS = ("aurc", "auroc", "fpr95")
"""Metrics of the method's confidence score (setting Old FD) measured after each epoch."""


class Validator:
    """Validation pass over the images of all ranks.

    Args:
        loader: this rank's validation images.
        batch_size: images of a full batch.
        num_classes: number of classes of the data; further logits of the network are left out.
        method: the training method, whose confidence score is measured.
    """

    def __init__(
        self, loader: Loader, batch_size: int, num_classes: int, method: Method, runtime: Runtime, ranks: Ranks
    ) -> None:
        self._loader = loader
        self._batch_size = batch_size
        self._num_classes = num_classes
        self._method = method
        self._runtime = runtime
        self._ranks = ranks
        self._predict = torch.compile(_predict) if runtime.compile else _predict

    @property
    def unreadable(self) -> dict[str, str]:
        """Path -> reason, of the files that did not decode so far on this rank."""
        return self._loader.unreadable

    @torch.no_grad()
    def validate(self, network: nn.Module) -> dict[str, float]:
        """Validation columns of metrics.csv, the same on every rank; leaves the network in eval mode.

        ``val_loss`` is the cross-entropy for every method.
        """
        self._ranks.broadcast_buffers(network)
        network.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self._ranks.device)
        confidences, corrects = [], []
        self._loader.set_epoch(0)
        for images, labels, _ in self._loader:
            logits = self._logits(network, images)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            valid = labels >= 0
            correct = logits.argmax(1) == labels
            sums += torch.stack([loss.double(), correct.sum(), valid.sum()])
            confidences.append(torch.where(valid, self._method.confidence(logits), torch.nan))
            corrects.append(correct)
        loss_sum, correct_sum, count = self._ranks.sum(sums).tolist()
        samples = [torch.cat(parts).cpu() if parts else torch.zeros(0) for parts in (confidences, corrects)]
        gathered = self._ranks.gather(samples)
        metrics = self._ranks.on_main(lambda: _failure_metrics(gathered))
        return {"val_loss": loss_sum / count, "val_accuracy": correct_sum / count, **metrics}

    def _logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """(B, C) float32 logits; a short last batch is padded for a compiled network, which would compile anew."""
        rows = len(images)
        if self._runtime.compile and rows < self._batch_size:
            short, images = images, images.new_zeros(self._batch_size, *images.shape[1:])
            images[:rows] = short
        with self._runtime.autocast():
            return self._predict(network, self._runtime.arrange(images))[:rows, : self._num_classes].float()


def _predict(network: nn.Module, images: Tensor) -> Tensor:
    return network(images)[0]


def _failure_metrics(samples: list[list[Tensor]]) -> dict[str, float]:
    """Failure-detection metrics from the (confidences, correct) of each rank."""
    confidence, correct = (torch.cat([rank[i] for rank in samples]).double() for i in (0, 1))
    finite = confidence.isfinite()  # no image, or weights that are no longer finite, which the loss reports
    values = failure_metrics(confidence[finite].numpy(), correct[finite].numpy().astype(bool))
    return {name: values[name] for name in FAILURE_METRICS}
