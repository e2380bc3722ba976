"""TAL over logits whose classes are spread over ranks: tensor parallelism, and class counts beyond one device.

Rank r of ``class_group`` holds the columns ``z[:, start_r : start_r + C_r]`` of the (B, C) logits, in rank order, and
every rank has the same rows: the same labels (over all C classes) and the same features. Two collectives of a few
numbers a row make each rank's step equal to the one on whole logits:

1. each rank's largest logit, its place, the norm and the sum of its columns give the arg-max, the norm and the maximum
   of the whole row, and so typicalness, weight and temperature;
2. each rank's sums of exponentials give both log-sum-exps.

The gradient then is local: rank r computes its own columns. A rank's logits are read three times and its gradient
written once; nothing of size B x C is sent. What every rank gets is combined in rank order, so that the loss, the
statistics and the queue are the same bits on all of them.

The three passes over the logits stand here in plain PyTorch, which CPUs use too, and as one Triton kernel each in
``kernels/sharded.py``; what lies between them is on (B,) vectors in float64 and is not fused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from tal_fast.loss import collectives as distributed
from tal_fast.loss import reference
from tal_fast.loss.backends import LossOptions
from tal_fast.loss.reference import NORM_EPS, TALStats, compute_dtype

# Columns of what the first pass finds, of the second's sums, and of the third's terms.
LARGEST, ARGMAX, NORM, SUM, FINITE = range(5)
P_SUM, P_WEIGHTED, Q_SUM, AT_LABEL = range(4)
Z_MAX, SCALE, G_P, G_Q, G_LABEL, ALONG, AWAY = range(7)


def loss_and_gradient(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    options: LossOptions,
    warmup: bool,
    class_group: dist.ProcessGroup,
    *,
    rows_group: dist.ProcessGroup | None,
    backend: str,
    check_labels: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, TALStats]:
    """The mean loss of a batch without a graph, the same on every rank, its gradient by this rank's columns (empty
    unless ``need_grad``), and the per-sample statistics; see ``TALLoss``.

    Args:
        logits: (B, C_r) floating point, this rank's columns, C_r >= 0.
        labels: (B,) int64 in [0, ΣC_r) or ``ignore_index``.
        distance: (B,) to the queue.
        class_group: the ranks that hold the other columns of these rows.
        rows_group: the ranks that hold the same columns of other rows, where those are one batch; else None.
        backend: name of the backend that computes the passes over the logits.
        check_labels: refuse labels out of range and labels that differ between ranks, which waits for the device.

    Raises:
        ValueError: on every rank alike, for the labels refused.
    """
    scan, exp_sums, gradient = _passes(backend)
    z = logits.detach()
    wide = compute_dtype(logits)

    # 1. What each rank sees of each row. Its width and the labels travel along: (world, B, 7).
    seen = scan(z)
    width = torch.full_like(labels, logits.shape[1])
    every = distributed.gather(torch.cat([seen, torch.stack([width, labels], dim=1).double()], dim=1), class_group)
    widths, every_label = every[:, :, 5], every[:, :, 6]
    before = widths.cumsum(0) - widths  # of each rank, the classes of the ranks before it
    classes = widths.sum(0)
    if check_labels:
        _check_labels(labels, every_label, classes, options.ignore_index)
    largest, winner = every[:, :, LARGEST].max(dim=0)  # the first rank on ties, and within it the first class
    argmax = (every[:, :, ARGMAX] + before).gather(0, winner[None]).squeeze(0)
    norm = every[:, :, NORM].square().sum(0).sqrt()
    finite = (every[:, :, FINITE] == 1).all(0)
    valid = labels != options.ignore_index
    right = valid & (argmax == labels)
    accepted = right & finite & (largest / (norm + NORM_EPS) > options.confidence_threshold)

    # 2. Typicalness, weight and temperature, as for whole logits.
    batch = reference.summary_of(distance, valid, right, accepted)
    if rows_group is not None:
        batch = distributed.combine_summaries(batch, rows_group)
    typicalness, weight, temperature = reference.sample_terms(
        distance.detach().double(), valid, right, accepted,
        variant=options.variant, t_min=options.t_min, t_max=options.t_max, t_wrong=options.t_wrong, warmup=warmup,
        batch=batch,
    )  # fmt: skip
    share = weight
    if options.variant == "released":
        share = reference.mean_weight(weight, valid, batch, warmup).expand_as(weight)
    scale = temperature / (norm + NORM_EPS)

    # 3. Sums of the exponentials of x = z - max z, the label's apart; its x is known to one rank.
    own_label = labels - before[dist.get_rank(class_group)].long()
    own_label = torch.where(valid & (own_label >= 0) & (own_label < logits.shape[1]), own_label, -1)
    parts = distributed.gather(exp_sums(z, own_label, largest, scale), class_group).sum(0)  # (B, 4)
    x_label = parts[:, AT_LABEL]
    target_x = (1 - options.label_smoothing) * x_label
    if options.label_smoothing:
        target_x = target_x + options.label_smoothing * (every[:, :, SUM].sum(0) / classes - largest)
    per_row = 1 / torch.where(batch[2] > 0, batch[2], 1.0)

    def cross_entropy(rate: Tensor, others: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of softmax(rate x): the loss, and ``factor`` times its gradient by rate x: per exponential, at the label."""
        at_label = (rate * x_label).exp()
        total = others + at_label
        # The label's own exponential stays out of the sums: a confident row's gradient is others / total, not 1 - p.
        log_sum = torch.where(at_label == 1, others.log1p(), total.log())
        return log_sum - rate * target_x, factor / total, factor * (options.label_smoothing - others / total)

    f_dir, f_ce = share * scale * per_row, (1 - share) * per_row
    p_others, q_others = parts[:, P_SUM], parts[:, Q_SUM]
    l_dir, g_p, g_p_label = cross_entropy(scale, p_others, f_dir)
    l_ce, g_q, g_q_label = cross_entropy(torch.ones_like(scale), q_others, f_ce)
    row_loss = torch.where(finite, share * l_dir + (1 - share) * l_ce, torch.nan)
    loss = (torch.where(valid, row_loss, 0.0).sum() * per_row).to(wide)

    # 4. The gradient of this rank's columns.
    grad = z.new_empty(0)
    if need_grad:
        at_label = (scale * x_label).exp()
        k = (parts[:, P_WEIGHTED] + x_label * at_label) / (p_others + at_label) - target_x  # <z, p - e>
        along = torch.where(norm > 0, f_dir * k / (norm * (norm + NORM_EPS)), 0.0)
        away = (f_dir + f_ce) * options.label_smoothing / classes
        away = torch.where(finite, away, torch.nan)  # a row that is not finite has no finite gradient
        terms = torch.stack([largest, scale, g_p, g_q, g_p_label + g_q_label, along, away], dim=1)
        grad = gradient(z, own_label, valid, terms)
    stats = TALStats(
        distance.detach(), typicalness.to(wide), weight.to(wide), temperature.to(wide), right, accepted
    )  # fmt: skip
    return loss, grad, stats


def _scan(logits: Tensor) -> Tensor:
    """(B, 5) float64 of the columns given: largest, its index, norm, sum, and 1 where all are finite."""
    z = logits.to(compute_dtype(logits))
    if z.shape[1] == 0:
        return z.new_tensor([-torch.inf, 0, 0, 0, 1], dtype=torch.float64).expand(len(z), 5)
    largest, index = z.max(dim=1)
    norm = torch.linalg.vector_norm(z, dim=1)
    return torch.stack([t.double() for t in (largest, index, norm, z.sum(1), z.isfinite().all(1))], dim=1)


def _exp_sums(logits: Tensor, own_label: Tensor, z_max: Tensor, scale: Tensor) -> Tensor:
    """(B, 4) float64 sums over the columns given, with x = z - z_max and without the label's column ``own_label``
    (-1: it is another rank's): of exp(scale x), of x exp(scale x), of exp(x); and x at the label, or 0."""
    x = logits.to(compute_dtype(logits)) - z_max[:, None].to(compute_dtype(logits))
    at_label = torch.arange(x.shape[1], device=x.device) == own_label[:, None]
    p = (scale[:, None].to(x.dtype) * x).exp().masked_fill(at_label, 0)
    q = x.exp().masked_fill(at_label, 0)
    return torch.stack(
        [p.sum(1).double(), (x * p).sum(1).double(), q.sum(1).double(), torch.where(at_label, x, 0).sum(1).double()],
        dim=1,
    )


def _gradient(logits: Tensor, own_label: Tensor, valid: Tensor, terms: Tensor) -> Tensor:
    """The gradient by the columns given, in the logits' dtype (float32 for float16, whose small values would be lost
    before a gradient scaler multiplies them); ``terms`` (B, 7) float64 in the order of ``Z_MAX`` to ``AWAY``."""
    z = logits.to(compute_dtype(logits))
    z_max, scale, g_p, g_q, g_label, along, away = terms.to(z.dtype)[:, :, None].unbind(1)
    x = z - z_max
    at_label = torch.arange(z.shape[1], device=z.device) == own_label[:, None]
    grad = torch.where(at_label, g_label, (scale * x).exp() * g_p + x.exp() * g_q) - z * along - away
    grad = torch.where(valid[:, None], grad, 0)
    return grad if logits.dtype == torch.float16 else grad.to(logits.dtype)


def _passes(backend: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    if backend == "triton":
        from tal_fast.kernels import sharded

        return sharded.scan, sharded.exp_sums, sharded.gradient
    return _scan, _exp_sums, _gradient


def _check_labels(labels: Tensor, every_label: Tensor, classes: Tensor, ignore_index: int) -> None:
    if not (every_label == labels).all():
        raise ValueError("labels differ between the ranks of class_group; give all of them the same rows")
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"label {int(labels[row])} in row {row} is outside [0, {int(classes[row])}); "
            f"give it a class or ignore_index = {ignore_index}"
        )
