"""Typicalness-Aware Learning (TAL) in plain PyTorch: the definition every fast path is tested against.

Liu et al., "Typicalness-Aware Learning for Failure Detection", NeurIPS 2024. The text below follows one training
step of the paper from top to bottom; ``tal_loss`` is the loss, the other functions are its parts. Everything runs
on any device, without reading a value back to the host, in float32 for half-precision and float32 inputs and in
float64 for float64 inputs.

Two variants exist because the paper and its released code differ:

``paper``
    mean over the batch of ``w L_dir + (1 - w) L_ce``, each sample with its own weight.
``released``
    ``w_mean mean(L_dir) + (1 - w_mean) mean(L_ce)``, and the typicalness counts only while some sample of the batch
    is not accepted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NORM_EPS = 1e-7
"""Added to the logits' norm, as in the released code."""

RANGE_EPS = 1e-8
"""Added to the batch's range of distances, as in the released code."""

_CHUNK = 1 << 16
"""Queue entries compared at a time: keeps the (B, chunk) temporaries of ``nearest_distance`` near 16 MB at B = 64."""


class TALStats(NamedTuple):
    """What TAL computed for each sample of a batch; every field has shape (B,) and carries no gradient.

    Attributes:
        distance: distance to the nearest queue entry; inf when the queue is empty, not finite when the features'
            statistics are not.
        typicalness: τ in [0, 1]; 1 while typicalness is not active and for ignored rows.
        weight: share of the direction loss, 1 for wrong samples, τ for right ones, 0 for ignored rows.
        temperature: what the normalised logits are multiplied by.
        right: bool, the prediction equals the label.
        accepted: bool, right, confident enough, and with finite logits: the rows whose statistics are pushed.
    """

    distance: Tensor
    typicalness: Tensor
    weight: Tensor
    temperature: Tensor
    right: Tensor
    accepted: Tensor


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 tensors, float32 for everything else."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def feature_statistics(features: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each sample's features (paper, section 3.1).

    Args:
        features: (B, D) floating point, D >= 2.
        dtype: of the result; by default float64 for float64 features and float32 for all others.

    Returns:
        ``(mean, std)``, each (B,), computed in float64 (float32 where the device has no float64) and rounded once.
    """
    wide = features.detach().to(torch.float32 if features.device.type == "mps" else torch.float64)
    dtype = dtype or compute_dtype(features)
    mean = wide.mean(dim=1, keepdim=True)
    variance = (wide - mean).square().sum(dim=1) / (wide.shape[1] - 1)
    return mean.squeeze(1).to(dtype), variance.sqrt().to(dtype)


def nearest_distance(
    mean: Tensor, std: Tensor, queue_mean: Tensor, queue_std: Tensor, length: Tensor | None = None
) -> Tensor:
    """Distance of each sample to the nearest queue entry: the 2-Wasserstein distance of two 1-D Gaussians.

    Args:
        mean, std: (B,) statistics of the samples.
        queue_mean, queue_std: (N,) statistics in the queue, in any order.
        length: int64 scalar tensor; only the first ``length`` entries belong to the queue. All of them by default.

    Returns:
        (B,) ``min_j sqrt((m - m_j)² + (s - s_j)²)``; inf for an empty queue.
    """
    best = torch.full_like(mean, torch.inf)
    for start in range(0, queue_mean.numel(), _CHUNK):
        m_j, s_j = queue_mean[start : start + _CHUNK], queue_std[start : start + _CHUNK]
        squared = (mean[:, None] - m_j).square() + (std[:, None] - s_j).square()
        if length is not None:
            beyond = torch.arange(start, start + m_j.numel(), device=mean.device) >= length
            squared = squared.masked_fill(beyond, torch.inf)
        best = torch.minimum(best, squared.amin(dim=1))
    return best.sqrt()


def batch_summary(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    *,
    confidence_threshold: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """The six numbers of a batch that its samples' losses depend on.

    They add up over the ranks of a distributed run (minimum, maximum, then sums), which is why the mean weight of
    variant ``released`` is carried as sums: τ is affine in the distance, so Σ τ follows from Σ d.

    Returns:
        (6,) float64: smallest and largest finite distance (inf and -inf when there is none), number of valid rows,
        of accepted rows, of rows whose weight is 1 whatever the distances (wrong, or without a finite distance), and
        the sum of the other valid rows' distances.
    """
    z, valid = _valid_rows(logits, labels, ignore_index)
    right, accepted = _right_and_accepted(z, labels, valid, confidence_threshold)
    return summary_of(distance, valid, right, accepted)


def summary_of(distance: Tensor, valid: Tensor, right: Tensor, accepted: Tensor) -> Tensor:
    """``batch_summary`` from what it needs to know of each row, all (B,): distance, and whether the row is valid,
    right and accepted."""
    d = distance.double()
    measured = valid & d.isfinite()
    weighted = measured & right
    return torch.stack([
        _min(d, measured),
        _max(d, measured),
        valid.sum().double(),
        accepted.sum().double(),
        (valid & ~weighted).sum().double(),
        torch.where(weighted, d, 0).sum(),
    ])  # fmt: skip


def tal_loss(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    *,
    variant: str = "paper",
    t_min: float = 10.0,
    t_max: float = 100.0,
    t_wrong: float | None = 20.0,
    confidence_threshold: float = 0.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    warmup: bool = False,
    batch: Tensor | None = None,
) -> tuple[Tensor, TALStats]:
    """The TAL loss of a batch, given each sample's distance to the queue (paper, equations 2 to 6).

    Args:
        logits: (B, C) floating point; the only input through which a gradient flows.
        labels: (B,) int64 in [0, C), or ``ignore_index``.
        distance: (B,) from ``nearest_distance``; inf where the queue is empty.
        variant: ``"paper"`` or ``"released"``.
        t_min, t_max: temperature of the most and of the least typical sample.
        t_wrong: temperature of misclassified samples; None leaves them the temperature of their typicalness.
        confidence_threshold: a right sample is accepted when its cosine confidence exceeds this.
        ignore_index: rows with this label have no loss, no gradient and no part in any mean or minimum.
        label_smoothing: ε in [0, 1], applied to both cross-entropies.
        warmup: typicalness is 1 for every sample.
        batch: ``batch_summary`` of a larger batch that this one is a part of, each sum divided by the number of
            parts. By default this batch stands alone.

    Returns:
        The loss, a scalar in float32 (float64 for float64 logits), and the per-sample ``TALStats``.
    """
    z, valid = _valid_rows(logits, labels, ignore_index)
    right, accepted = _right_and_accepted(z, labels, valid, confidence_threshold)

    typicalness, weight, temperature = sample_terms(
        distance.detach().to(z.dtype), valid, right, accepted,
        variant=variant, t_min=t_min, t_max=t_max, t_wrong=t_wrong, warmup=warmup, batch=batch,
    )  # fmt: skip

    # Direction loss on the unit-length logits, magnitude loss on the logits as they are (equations 2 and 6).
    u = z / (torch.linalg.vector_norm(z, dim=1, keepdim=True) + NORM_EPS)
    target = labels.masked_fill(~valid, 0)
    l_dir = F.cross_entropy(temperature[:, None] * u, target, reduction="none", label_smoothing=label_smoothing)
    l_ce = F.cross_entropy(z, target, reduction="none", label_smoothing=label_smoothing)
    if variant == "released":
        w_bar = mean_weight(weight, valid, batch, warmup)
        per_sample = w_bar * l_dir + (1 - w_bar) * l_ce
    else:
        per_sample = weight * l_dir + (1 - weight) * l_ce
    count = valid.sum().to(z.dtype) if batch is None else batch[2].to(z.dtype)
    loss = torch.where(valid, per_sample, 0.0).sum() / torch.where(count > 0, count, 1.0)
    return loss, TALStats(distance.detach(), typicalness, weight, temperature, right, accepted)


def sample_terms(
    distance: Tensor,
    valid: Tensor,
    right: Tensor,
    accepted: Tensor,
    *,
    variant: str,
    t_min: float,
    t_max: float,
    t_wrong: float | None,
    warmup: bool,
    batch: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Typicalness, weight and temperature of each row from its distance and its three flags; all (B,), the results in
    the distance's dtype. ``batch`` as in ``tal_loss``."""
    # Typicalness (equation 3): distances rescaled to [0, 1] within the batch, 1 for the nearest.
    d = distance
    measured = valid & d.isfinite()
    d_min, d_max = (_min(d, measured), _max(d, measured)) if batch is None else batch[:2].to(d.dtype)
    typicalness = torch.where(measured, 1 - (d - d_min) / (d_max - d_min + RANGE_EPS), 1.0)
    if warmup:
        typicalness = torch.ones_like(d)
    elif variant == "released":
        all_accepted = (accepted | ~valid).all() if batch is None else batch[3] == batch[2]
        typicalness = torch.where(all_accepted, 1.0, typicalness)

    # Temperature and weight (equations 4 and 5).
    temperature = t_min + (1 - typicalness) * (t_max - t_min)
    if t_wrong is not None:
        temperature = torch.where(right | ~valid, temperature, t_wrong)
    weight = torch.where(right, typicalness, 1.0).masked_fill(~valid, 0.0)
    return typicalness, weight, temperature


def mean_weight(weight: Tensor, valid: Tensor, batch: Tensor | None, warmup: bool) -> Tensor:
    """Mean weight of the batch: the plain mean, or the same number from the sums of a larger batch."""
    if batch is None:
        return weight.sum() / valid.sum().clamp(min=1)
    d_min, d_max, n_valid, n_accepted, n_one, sum_distance = batch.double()
    n_weighted = n_valid - n_one
    # No weighted row at all leaves d_min infinite; 0 * inf would make the sum NaN.
    nearest = torch.where(n_weighted > 0, d_min, 0.0)
    spread = torch.where(n_weighted > 0, d_max - d_min, 0.0) + RANGE_EPS
    w_bar = (n_one + n_weighted - (sum_distance - n_weighted * nearest) / spread) / n_valid
    inactive = (n_accepted == n_valid) | warmup
    return torch.where(inactive, 1.0, w_bar).to(weight.dtype)


def push(
    queue_mean: Tensor, queue_std: Tensor, mean: Tensor, std: Tensor, accepted: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    """The queue after a step: accepted samples with finite statistics appended in batch order, oldest dropped.

    Args:
        queue_mean, queue_std: (n,) contents so far, oldest first.
        mean, std: (B,) statistics of the batch.
        accepted: (B,) bool.
        capacity: most entries kept.

    Returns:
        New ``(queue_mean, queue_std)``, oldest first, at most ``capacity`` long.
    """
    keep = accepted & mean.isfinite() & std.isfinite()
    return torch.cat([queue_mean, mean[keep]])[-capacity:], torch.cat([queue_std, std[keep]])[-capacity:]


def _valid_rows(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Logits in the compute dtype with ignored rows zeroed (a NaN there must not spread), and the (B,) mask."""
    valid = labels != ignore_index
    return torch.where(valid[:, None], logits.to(compute_dtype(logits)), 0.0), valid


def _right_and_accepted(z: Tensor, labels: Tensor, valid: Tensor, confidence_threshold: float) -> tuple[Tensor, Tensor]:
    z = z.detach()
    largest, prediction = z.max(dim=1)  # the first one on ties
    cosine = largest / (torch.linalg.vector_norm(z, dim=1) + NORM_EPS)
    right = valid & (prediction == labels)
    return right, right & (cosine > confidence_threshold) & z.isfinite().all(dim=1)


def _min(x: Tensor, mask: Tensor) -> Tensor:
    """Smallest x where the mask holds; inf when it holds nowhere, an empty x included."""
    return torch.cat([x.masked_fill(~mask, torch.inf), x.new_full((1,), torch.inf)]).amin()


def _max(x: Tensor, mask: Tensor) -> Tensor:
    return -_min(-x, mask)
