"""TAL over logits whose classes are spread over ranks: tensor parallelism, and class counts beyond one device.

Rank r of ``class_group`` holds the columns ``z[:, start_r : start_r + C_r]`` of the (B, C) logits, in rank order, and
every rank has the same rows: the same labels (over all C classes) and the same features. Two collectives of a few
numbers per row make each rank's step equal to the one on whole logits:

1. each rank's largest logit, its index, the norm and the sum of its columns give the arg-max, the norm and the maximum
   of the whole row, and so typicalness, weight and temperature;
2. each rank's sums of exponentials give both log-sum-exps.

The gradient is local then: each rank computes its own columns. A rank reads its logits three times and writes their
gradient once; no tensor of B x C numbers is sent. Results of the ranks are combined in rank order, so that the loss,
the statistics and the queue have the same bits on all of them.

The three passes over the logits are here in plain PyTorch, which CPUs use too, and as one Triton kernel each in
``tal_fast.kernels.sharded``; the work between them is on (B,) vectors in float64 and is not fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tal_fast.loss import reference
from tal_fast.loss.collectives import check_rows_once, gather
from tal_fast.loss.options import LossOptions, check_label_range, check_number_of_weights, labels_are_checked
from tal_fast.loss.reference import NORM_EPS, TALStats, compute_dtype

# Columns of the results of the first pass and of the second, and of the terms of the third.
LARGEST, ARGMAX, NORM, SUM, FINITE = range(5)
P_SUM, P_WEIGHTED, Q_SUM, AT_LABEL, SHARED = range(5)
Z_MAX, SCALE, G_P, G_Q, G_LABEL, ALONG, AWAY = range(7)


class _Rows(NamedTuple):
    """Statistics of whole rows, put together from all ranks' columns; each field is (B,)."""

    largest: Tensor
    argmax: Tensor
    norm: Tensor
    sum: Tensor
    finite: Tensor
    classes: Tensor  # number of classes, the same in all rows
    start: Tensor  # int64, this rank's first class, the same in all rows


def loss_and_gradient(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    options: LossOptions,
    warmup: bool,
    class_group: dist.ProcessGroup,
    *,
    class_weight: Tensor | None = None,
    backend: str,
    combine: Callable[[Tensor], Tensor] | None,
    need_grad: bool,
) -> tuple[Tensor, Tensor, TALStats]:
    """Loss of a batch without a graph, its gradient, and per-sample statistics.

    Args:
        logits: (B, C_r) floating point, this rank's columns, C_r >= 0.
        labels: (B,) int64 in [0, ΣC_r), or ``options.ignore_index``.
        distance: (B,) distance to the queue.
        class_weight: (C,) weights of all ranks' classes, the same on every rank. A rank's own columns would not do: the
            sum over the labels' weights is needed before the collective that brings the labels' logits.
        backend: Name of the backend that computes the passes over the logits.
        combine: Function from the batch's summary to that of all ranks' rows, where those are one batch; else None.

    Returns:
        Loss and statistics, the same on every rank; between them the gradient (B, C_r) with respect to this rank's
        columns, empty unless ``need_grad``.

    Raises:
        ValueError: On every rank alike, if labels are out of range or differ between the ranks, the class weights are
            not as many as the classes, or, in the first step, the ranks have unequal numbers of rows.
    """
    scan, exp_sums, gradient = _passes(backend)
    z, wide = logits.detach(), compute_dtype(logits)
    check_rows_once(len(labels), labels, class_group)

    # 1. Whole rows, and which of them are correct and accepted.
    found = scan(z)
    rows = _whole_rows(found, labels, z.shape[1], class_group, options.ignore_index, class_weight)
    valid = labels != options.ignore_index
    correct = valid & (rows.argmax == labels)
    accepted = correct & rows.finite & (rows.largest / (rows.norm + NORM_EPS) > options.confidence_threshold)

    # 2. Typicalness, weight and temperature, as for whole logits.
    row_weight = reference.row_weights(labels, valid, class_weight)
    summary = reference.summarize(distance, valid, correct, accepted, row_weight)
    if combine is not None:
        summary = combine(summary)
    typicalness, weight, temperature = reference.sample_terms(
        distance.detach().double(), valid, correct, accepted, options, warmup, summary
    )
    share = weight
    if options.variant == "released":
        share = reference.mean_weight(weight, valid, summary, warmup).expand_as(weight)
    scale = temperature / (rows.norm + NORM_EPS)

    # 3. Sums of exponentials of x = z - max(z) without the label's, whose x one rank alone knows.
    label_column = labels - rows.start
    label_column = torch.where(valid & (label_column >= 0) & (label_column < z.shape[1]), label_column, -1)
    found = exp_sums(z, label_column, rows.largest, scale)
    smoothing: float | Tensor = options.label_smoothing
    row_scale = torch.ones_like(scale) if row_weight is None else row_weight.double()
    shares = None  # of the smoothing, by class, in this rank's columns; None if it is even
    if class_weight is not None and smoothing and len(labels):
        # The targets (1 - ε) c_y [c = y] + ε c_c / C sum to row_scale: a row's loss is that many times a cross-entropy
        # with another smoothing, spread over the classes by their weights.
        whole = class_weight.double().sum()
        columns = class_weight[rows.start[0] + torch.arange(z.shape[1], device=z.device)].double()
        shares = (columns / torch.where(whole > 0, whole, 1.0)).to(wide)
        spread = options.label_smoothing * whole / rows.classes
        row_scale = (1 - options.label_smoothing) * row_scale + spread
        smoothing = torch.where(row_scale > 0, spread / row_scale, 0.0)
        found = torch.cat([found, (z.to(wide) * shares).sum(1, dtype=torch.float64)[:, None]], dim=1)
    sums = gather(found, class_group).sum(0)  # (B, 4), or (B, 5) with shares
    x_label, p_others, q_others = sums[:, AT_LABEL], sums[:, P_SUM], sums[:, Q_SUM]
    target_x = (1 - smoothing) * x_label
    if options.label_smoothing:
        mean_z = rows.sum / rows.classes if shares is None else sums[:, SHARED]
        target_x = target_x + smoothing * (mean_z - rows.largest)
    per_row = row_scale
    if options.reduction == "mean":
        per_row = row_scale / reference.mean_divisor(summary[2], summary[6])

    def cross_entropy(rate: Tensor, others: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of softmax(rate x), and ``factor`` times its gradient: per exponential, and at the label."""
        at_label = (rate * x_label).exp()
        total = others + at_label
        # The label's own exponential stays out of the sums: a confident row's gradient is others / total, not 1 - p.
        log_sum = torch.where(at_label == 1, others.log1p(), total.log())
        return log_sum - rate * target_x, factor / total, factor * (smoothing - others / total)

    f_dir, f_ce = share * scale * per_row, (1 - share) * per_row
    l_dir, g_p, g_p_label = cross_entropy(scale, p_others, f_dir)
    l_ce, g_q, g_q_label = cross_entropy(torch.ones_like(scale), q_others, f_ce)
    row_loss = torch.where(rows.finite, share * l_dir + (1 - share) * l_ce, torch.nan)
    loss = torch.where(valid, row_loss * per_row, 0.0)
    loss = (loss if options.reduction == "none" else loss.sum()).to(wide)

    # 4. Gradient of this rank's columns.
    grad = z.new_empty(0)
    if need_grad:
        at_label = (scale * x_label).exp()
        k = (sums[:, P_WEIGHTED] + x_label * at_label) / (p_others + at_label) - target_x  # <z, p - e>
        along = torch.where(rows.norm > 0, f_dir * k / (rows.norm * (rows.norm + NORM_EPS)), 0.0)
        away = (f_dir + f_ce) * smoothing
        evenly = away / rows.classes if shares is None else torch.zeros_like(away)
        evenly = torch.where(rows.finite, evenly, torch.nan)  # a row that is not finite has no finite gradient
        terms = torch.stack([rows.largest, scale, g_p, g_q, g_p_label + g_q_label, along, evenly], dim=1)
        grad = gradient(z, label_column, valid, terms)
        if shares is not None:
            away = torch.where(valid & rows.finite, away, 0.0).to(wide)
            grad.addcmul_(away[:, None], shares, value=-1)
    stats = TALStats(distance.detach(), typicalness.to(wide), weight.to(wide), temperature.to(wide), correct, accepted)
    return loss, grad, stats


def _whole_rows(
    found: Tensor, labels: Tensor, columns: int, class_group: dist.ProcessGroup, ignore_index: int,
    class_weight: Tensor | None,
) -> _Rows:  # fmt: skip
    """Whole rows from the first pass of all ranks; checks the labels, which travel along, and the class weights."""
    width = torch.full_like(labels, columns)
    parts = gather(torch.cat([found, torch.stack([width, labels], dim=1).double()], dim=1), class_group)
    widths, labels_of_all = parts[:, :, 5], parts[:, :, 6]
    start = widths.cumsum(0) - widths  # each rank's first class
    classes = widths.sum(0)
    if labels_are_checked(labels):
        if not (labels_of_all == labels).all():
            raise ValueError("labels differ between the ranks of class_group; give all of them the same rows")
        if len(labels):
            check_label_range(labels, int(classes[0]), ignore_index)
            if class_weight is not None:
                check_number_of_weights(class_weight, int(classes[0]))
    largest, winner = parts[:, :, LARGEST].max(dim=0)  # the first rank on ties, and within it the first class
    return _Rows(
        largest=largest,
        argmax=(parts[:, :, ARGMAX] + start).gather(0, winner[None]).squeeze(0),
        norm=parts[:, :, NORM].square().sum(0).sqrt(),
        sum=parts[:, :, SUM].sum(0),
        finite=(parts[:, :, FINITE] == 1).all(0),
        classes=classes,
        start=start[dist.get_rank(class_group)].long(),
    )


def _passes(backend: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    if backend == "triton":
        from tal_fast.kernels import sharded

        return sharded.scan, sharded.exp_sums, sharded.gradient
    return _scan, _exp_sums, _gradient


def _scan(logits: Tensor) -> Tensor:
    """First pass: (B, 5) float64 with the columns' largest, its index, norm, sum, and 1 where all are finite."""
    z = logits.to(compute_dtype(logits))
    if z.shape[1] == 0:
        return z.new_tensor([-torch.inf, 0, 0, 0, 1], dtype=torch.float64).expand(len(z), 5)
    largest, index = z.max(dim=1)
    norm = torch.linalg.vector_norm(z, dim=1, dtype=torch.float64)  # float32 squares could overflow
    return torch.stack([t.double() for t in (largest, index, norm, z.sum(1), z.isfinite().all(1))], dim=1)


def _exp_sums(logits: Tensor, label_column: Tensor, z_max: Tensor, scale: Tensor) -> Tensor:
    """Second pass: (B, 4) float64 sums over the columns but the label's, of x = z - z_max.

    They are the sums of exp(scale x), of x exp(scale x) and of exp(x); the fourth number is x at the label. It is 0,
    and ``label_column`` -1, where the label is another rank's.
    """
    x = logits.to(compute_dtype(logits)) - z_max[:, None].to(compute_dtype(logits))
    at_label = torch.arange(x.shape[1], device=x.device) == label_column[:, None]
    p = (scale[:, None].to(x.dtype) * x).exp().masked_fill(at_label, 0)
    q = x.exp().masked_fill(at_label, 0)
    return torch.stack(
        [p.sum(1).double(), (x * p).sum(1).double(), q.sum(1).double(), torch.where(at_label, x, 0).sum(1).double()],
        dim=1,
    )


def _gradient(logits: Tensor, label_column: Tensor, valid: Tensor, terms: Tensor) -> Tensor:
    """Third pass: the gradient with respect to the columns, in the logits' dtype, or in float32 for float16.

    float16 would lose small gradients before a gradient scaler multiplies them. ``terms`` is (B, 7) float64 in the
    order of ``Z_MAX`` to ``AWAY``.
    """
    z = logits.to(compute_dtype(logits))
    # Huge logits times a tiny factor, which float32 would round to few digits or to 0.
    power = torch.where(terms[:, ALONG].abs() < 2.0**-100, 2.0**-78, 1.0)[:, None]
    wide_along = terms[:, ALONG, None] / power
    z_max, scale, g_p, g_q, g_label, _, away = terms.to(z.dtype)[:, :, None].unbind(1)
    along, power = wide_along.to(z.dtype), power.to(z.dtype)
    x = z - z_max
    at_label = torch.arange(z.shape[1], device=z.device) == label_column[:, None]
    grad = torch.where(at_label, g_label, (scale * x).exp() * g_p + x.exp() * g_q) - z * power * along - away
    grad = torch.where(valid[:, None], grad, 0)
    return grad if logits.dtype == torch.float16 else grad.to(logits.dtype)
