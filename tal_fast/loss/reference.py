"""Definition of Typicalness-Aware Learning (TAL) in plain PyTorch, which every faster backend is tested against.

Liu et al., "Typicalness-Aware Learning for Failure Detection", NeurIPS 2024. A training step, for the logits z, the
features f and the labels y of a batch, and the queue's entries (m_j, s_j):

=====================  ============================================================  ========================
Feature statistics     m = mean(f), s = std(f)                                       ``feature_statistics``
Distance to the queue  d = min_j √((m - m_j)² + (s - s_j)²)                          ``nearest_distance``
Unit-length logits     u = z / (‖z‖ + 1e-7)                                          ``unit_length``
Cosine confidence      cos = max(u)                                                  ``_classified``
Correct                argmax(z) = y                                                 ``_classified``
Accepted               correct and cos > confidence_threshold                        ``_classified``
Typicalness            τ = 1 - (d - d_min) / (d_max - d_min + 1e-8)                  ``sample_terms``
Temperature            T = t_min + (1 - τ)(t_max - t_min); t_wrong if misclassified  ``sample_terms``
Weight                 w = τ if correct, 1 if misclassified                          ``sample_terms``
Direction loss         L_dir = CE(T u, y)                                            ``tal_loss``
Magnitude loss         L_ce = CE(z, y)                                               ``tal_loss``
Loss                   mean of w L_dir + (1 - w) L_ce over the batch                 ``tal_loss``
Queue update           append (m, s) of the accepted samples, drop the oldest        ``push``
=====================  ============================================================  ========================

d_min and d_max are those of the batch. Two variants exist because the paper and its released code differ:

``paper``
    The loss above: each sample has its own weight.
``released``
    The loss is mean(w) mean(L_dir) + (1 - mean(w)) mean(L_ce), and τ = 1 if all samples of the batch are accepted.

Class weights c multiply L_dir and L_ce as ``F.cross_entropy`` defines it, label smoothing included; the mean is then
divided by the sum of c_y over the batch. The typicalness, mean(w) and the queue do not depend on them.

Everything runs on any device without reading a value back to the host, in float64 for float64 logits and in float32
for all others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tal_fast.loss.options import LossOptions
from tal_fast.scores.logits import NORM_EPS

RANGE_EPS = 1e-8
"""Added to the range of the batch's distances, as in the released code."""

_CHUNK = 1 << 16
"""Number of queue entries compared at a time: a (B, chunk) float32 temporary has 16 MB at B = 64."""


class TALStats(NamedTuple):
    """Per-sample statistics of a TAL step; each field has shape (B,) and carries no gradient.

    Attributes:
        distance: Distance to the nearest queue entry; inf if the queue is empty, not finite if the features are not.
        typicalness: τ in [0, 1]; 1 during warm-up, with an empty queue, and for ignored rows.
        weight: Weight of the direction loss: τ for correct samples, 1 for misclassified ones, 0 for ignored rows.
        temperature: Factor of the unit-length logits.
        correct: bool, whether the prediction equals the label.
        accepted: bool, whether the sample enters the queue: correct, confident enough, and with finite logits.
    """

    distance: Tensor
    typicalness: Tensor
    weight: Tensor
    temperature: Tensor
    correct: Tensor
    accepted: Tensor


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def weights_for(logits: Tensor, class_weight: Tensor | None) -> Tensor | None:
    """Class weights as the loss of these logits computes with them: contiguous, in its dtype."""
    return None if class_weight is None else class_weight.to(compute_dtype(logits)).contiguous()


def feature_statistics(features: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each sample's features (paper, section 3.1).

    They are computed in float64 (float32 on devices without float64) and rounded once.

    Args:
        features: (B, D) floating point, D >= 2.
        dtype: dtype of the results; by default float64 for float64 features and float32 for all others.

    Returns:
        mean: (B,).
        std: (B,).

    Examples:
        >>> import torch
        >>> from tal_fast.functional import feature_statistics
        >>> feature_statistics(torch.tensor([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]]))
        (tensor([1., 5.]), tensor([1., 0.]))
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
        length: int64 scalar tensor; only the first ``length`` entries count. All of them by default.

    Returns:
        (B,) ``min_j sqrt((m - m_j)² + (s - s_j)²)``; inf for an empty queue.

    Examples:
        >>> import torch
        >>> from tal_fast.functional import nearest_distance
        >>> queue_mean, queue_std = torch.tensor([0.0, 4.0]), torch.tensor([0.0, 0.0])
        >>> nearest_distance(torch.tensor([1.0, 4.0]), torch.tensor([0.0, 3.0]), queue_mean, queue_std)
        tensor([1., 3.])
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
    logits: Tensor, labels: Tensor, distance: Tensor, *, confidence_threshold: float = 0.0, ignore_index: int = -100,
    class_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Seven numbers of a batch that the loss of each of its samples depends on.

    Those of several ranks combine to those of the whole batch by a minimum, a maximum and sums. The mean weight of
    variant ``released`` is therefore carried as sums: τ is affine in the distance, so Σ τ follows from Σ d.

    Returns:
        (7,) float64: the smallest and the largest finite distance (inf and -inf if there is none); the number of
        valid rows, of accepted rows, and of rows with a weight of 1 whatever the distances (misclassified, or without
        a finite distance); the sum of the other valid rows' distances; and the sum of the valid rows' class weights,
        their number if there are none.
    """
    z, valid = _valid_rows(logits, labels, ignore_index)
    correct, accepted = _classified(z, labels, valid, confidence_threshold)
    return summarize(distance, valid, correct, accepted, row_weights(labels, valid, class_weight))


def summarize(distance: Tensor, valid: Tensor, correct: Tensor, accepted: Tensor, row_weight: Tensor | None) -> Tensor:
    """``batch_summary`` from each row's distance, flags and class weight, all (B,)."""
    d = distance.double()
    measured = valid & d.isfinite()
    weighted = measured & correct
    return torch.stack([
        _min(d, measured),
        _max(d, measured),
        valid.sum().double(),
        accepted.sum().double(),
        (valid & ~weighted).sum().double(),
        torch.where(weighted, d, 0).sum(),
        (valid if row_weight is None else row_weight).sum().double(),
    ])  # fmt: skip


def row_weights(labels: Tensor, valid: Tensor, class_weight: Tensor | None) -> Tensor | None:
    """Class weight of each row's label (B,), 0 for ignored rows; None without class weights."""
    if class_weight is None:
        return None
    return torch.where(valid, class_weight[torch.where(valid, labels, 0)], 0.0)


def tal_loss(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    options: LossOptions | None = None,
    *,
    warmup: bool = False,
    summary: Tensor | None = None,
    class_weight: Tensor | None = None,
) -> tuple[Tensor, TALStats]:
    """TAL loss of a batch, given each sample's distance to the queue (paper, equations 2 to 6).

    Args:
        logits, labels, warmup, class_weight: As in ``tal_fast.functional.tal_loss``.
        distance: (B,) from ``nearest_distance``; inf if the queue is empty.
        options: The defaults if None. ``inplace`` has no effect here.
        summary: ``batch_summary`` of a larger batch that this one is a part of, each sum divided by the number of
            parts; that of this batch by default.

    Returns:
        loss: Scalar, or (B,) for reduction "none", in float32 (float64 for float64 logits).
        stats: Per-sample ``TALStats``.
    """
    options = LossOptions() if options is None else options
    z, valid = _valid_rows(logits, labels, options.ignore_index)
    correct, accepted = _classified(z, labels, valid, options.confidence_threshold)

    typicalness, weight, temperature = sample_terms(
        distance.detach().to(z.dtype), valid, correct, accepted, options, warmup, summary
    )

    # Direction loss on the unit-length logits, magnitude loss on the logits as they are (equations 2 and 6).
    u = unit_length(z)
    target = labels.masked_fill(~valid, 0)
    class_weight = None if class_weight is None else class_weight.to(z.dtype)
    given: dict[str, Any] = {"weight": class_weight, "reduction": "none", "label_smoothing": options.label_smoothing}
    l_dir = F.cross_entropy(temperature[:, None] * u, target, **given)
    l_ce = F.cross_entropy(z, target, **given)
    if options.variant == "released":
        w_bar = mean_weight(weight, valid, summary, warmup)
        per_sample = w_bar * l_dir + (1 - w_bar) * l_ce
    else:
        per_sample = weight * l_dir + (1 - weight) * l_ce
    loss = torch.where(valid, per_sample, 0.0)
    if options.reduction != "none":
        loss = loss.sum()
    if options.reduction == "mean":
        if summary is None:
            row_weight = row_weights(labels, valid, class_weight)
            count, weight_sum = valid.sum(), (valid if row_weight is None else row_weight).sum()
        else:
            count, weight_sum = summary[2], summary[6]
        loss = loss / mean_divisor(count, weight_sum.to(z.dtype))
    return loss, TALStats(distance.detach(), typicalness, weight, temperature, correct, accepted)


def mean_divisor(count: Tensor, weight_sum: Tensor) -> Tensor:
    """Divisor of a mean: the valid rows' class weights; 1 without a valid row, NaN where all their weights are 0.

    ``F.cross_entropy`` is NaN in both cases, with label smoothing too.
    """
    return torch.where(count > 0, torch.where(weight_sum > 0, weight_sum, torch.nan), 1.0)


def unit_length(z: Tensor) -> Tensor:
    """Rows z / (‖z‖ + 1e-7), as in the released code; no finite float32 or float64 logits overflow."""
    scaled, norm = scaled_with_norm(z)
    return scaled / norm


def scaled_with_norm(z: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of (n, C) and their norms (n, 1) plus ``NORM_EPS``, both times a power of 2 at which no square overflows.

    The power is 1, which changes no bit, but for rows with logits beyond 2^50 (2^400 in float64), which are brought
    below it.
    """
    huge, power = (2.0**400, 2.0**-624) if z.element_size() == 8 else (2.0**50, 2.0**-78)
    powers = z.new_ones(()).where(z.detach().abs().amax(1, keepdim=True) <= huge, power)
    scaled = z * powers
    return scaled, torch.linalg.vector_norm(scaled, dim=1, keepdim=True) + NORM_EPS * powers


def sample_terms(
    distance: Tensor, valid: Tensor, correct: Tensor, accepted: Tensor, options: LossOptions, warmup: bool,
    summary: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Typicalness, weight and temperature of each row, all (B,) in the distance's dtype (paper, equations 3 to 5)."""
    # Typicalness: distances rescaled to [0, 1] within the batch, 1 for the nearest.
    d = distance
    measured = valid & d.isfinite()
    d_min, d_max = (_min(d, measured), _max(d, measured)) if summary is None else summary[:2].to(d.dtype)
    typicalness = torch.where(measured, 1 - (d - d_min) / (d_max - d_min + RANGE_EPS), 1.0)
    if warmup:
        typicalness = torch.ones_like(d)
    elif options.variant == "released":
        all_accepted = (accepted | ~valid).all() if summary is None else summary[3] == summary[2]
        typicalness = torch.where(all_accepted, 1.0, typicalness)

    temperature = options.t_min + (1 - typicalness) * (options.t_max - options.t_min)
    if options.t_wrong is not None:
        temperature = torch.where(correct | ~valid, temperature, options.t_wrong)
    weight = torch.where(correct, typicalness, 1.0).masked_fill(~valid, 0.0)
    return typicalness, weight, temperature


def mean_weight(weight: Tensor, valid: Tensor, summary: Tensor | None, warmup: bool) -> Tensor:
    """Mean weight of the batch, or of the larger batch that ``summary`` describes."""
    if summary is None:
        return weight.sum() / valid.sum().clamp(min=1)
    d_min, d_max, n_valid, n_accepted, n_one, sum_distance = summary[:6].double()
    n_weighted = n_valid - n_one
    # Without any weighted row d_min is infinite, and 0 * inf would make the sum NaN.
    nearest = torch.where(n_weighted > 0, d_min, 0.0)
    spread = torch.where(n_weighted > 0, d_max - d_min, 0.0) + RANGE_EPS
    w_bar = (n_one + n_weighted - (sum_distance - n_weighted * nearest) / spread) / n_valid
    inactive = (n_accepted == n_valid) | warmup
    return torch.where(inactive, 1.0, w_bar).to(weight.dtype)


def push(
    queue_mean: Tensor, queue_std: Tensor, mean: Tensor, std: Tensor, accepted: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    """Queue after a step: accepted samples with finite statistics are appended in batch order, the oldest dropped.

    The entries, oldest first, are new tensors of at most ``capacity`` numbers.
    """
    keep = accepted & mean.isfinite() & std.isfinite()
    return torch.cat([queue_mean, mean[keep]])[-capacity:], torch.cat([queue_std, std[keep]])[-capacity:]


def _valid_rows(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Logits in the compute dtype with ignored rows zeroed (a NaN there must not spread), and the (B,) mask."""
    valid = labels != ignore_index
    return torch.where(valid[:, None], logits.to(compute_dtype(logits)), 0.0), valid


def _classified(z: Tensor, labels: Tensor, valid: Tensor, confidence_threshold: float) -> tuple[Tensor, Tensor]:
    """Correct and accepted rows, both (B,) bool."""
    z = z.detach()
    correct = valid & (z.argmax(dim=1) == labels)  # the first class on ties
    cosine = unit_length(z).amax(dim=1)
    return correct, correct & (cosine > confidence_threshold) & z.isfinite().all(dim=1)


def _min(x: Tensor, mask: Tensor) -> Tensor:
    """Smallest x where the mask holds; inf if it holds nowhere, even for an empty x."""
    return torch.cat([x.masked_fill(~mask, torch.inf), x.new_full((1,), torch.inf)]).amin()


def _max(x: Tensor, mask: Tensor) -> Tensor:
    return -_min(-x, mask)
